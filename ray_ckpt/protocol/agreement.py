"""Whether a checkpoint fits what it is loaded into, and what ranks tell each other about that. Needs no torch.

Each rank knows by itself what it misses. Only all ranks together know what no rank wants: a pipeline stage does not
want what another stage does. So each rank sends one bit per name; a rank that wants a shard of everything sends zeros.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ray_ckpt.errors import StateMismatchError
from ray_ckpt.protocol.frozen import compare
from ray_ckpt.protocol.messages import LoadOffer
from ray_ckpt.rounding import ceil_div


def agree(offers: Sequence[LoadOffer]) -> LoadOffer:
    """One offer for all ranks: names that any of them misses or casts, and names that none of them wants."""
    if len({len(offer.unwanted) for offer in offers}) > 1:
        raise StateMismatchError(
            "the ranks see different names in the checkpoint: a key map that joins or splits has to be the same on all"
        )
    unwanted = int.from_bytes(offers[0].unwanted, "little")
    for offer in offers[1:]:
        unwanted &= int.from_bytes(offer.unwanted, "little")
    other_base, base = compare([offer.frozen for offer in offers])
    return LoadOffer(
        missing=tuple(sorted({name for offer in offers for name in offer.missing})),
        cast=tuple(sorted({name for offer in offers for name in offer.cast})),
        unwanted=unwanted.to_bytes(len(offers[0].unwanted), "little"),
        notes={section: note for offer in offers for section, note in offer.notes.items()} | base,
        other_base=other_base,
        unused_keys=tuple(
            key for key in offers[0].unused_keys if all(key in offer.unused_keys for offer in offers[1:])
        ),
    )


def mark(names: Sequence[str], chosen: Collection[str]) -> bytes:
    """One bit per name, set for the chosen ones."""
    marks = bytearray(ceil_div(len(names), 8))
    for place, name in enumerate(names):
        if name in chosen:
            marks[place // 8] |= 1 << place % 8
    return bytes(marks)


def marked(names: Sequence[str], marks: bytes) -> list[str]:
    return [name for place, name in enumerate(names) if marks[place // 8] >> place % 8 & 1]
