"""Whether a checkpoint fits what it is loaded into, and what ranks tell each other about that. Needs no torch.

A rank can tell alone what it misses. What is left over in the checkpoint only all ranks together can tell: a pipeline
stage does not want what another stage does. Each sends a bit per name, which for a shard of everything are all zero.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ray_ckpt.protocol.messages import LoadOffer
from ray_ckpt.rounding import ceil_div


def agree(offers: Sequence[LoadOffer]) -> LoadOffer:
    """What all ranks together miss, cast, and do not want."""
    unwanted = int.from_bytes(offers[0].unwanted, "little")
    for offer in offers[1:]:
        unwanted &= int.from_bytes(offer.unwanted, "little")
    return LoadOffer(
        missing=tuple(sorted({name for offer in offers for name in offer.missing})),
        cast=tuple(sorted({name for offer in offers for name in offer.cast})),
        unwanted=unwanted.to_bytes(len(offers[0].unwanted), "little"),
        notes={section: note for offer in offers for section, note in offer.notes.items()},
    )


def mark(names: Sequence[str], chosen: Collection[str]) -> bytes:
    """A bit per name, set for those that are chosen."""
    marks = bytearray(ceil_div(len(names), 8))
    for place, name in enumerate(names):
        if name in chosen:
            marks[place // 8] |= 1 << place % 8
    return bytes(marks)


def marked(names: Sequence[str], marks: bytes) -> list[str]:
    return [name for place, name in enumerate(names) if marks[place // 8] >> place % 8 & 1]
