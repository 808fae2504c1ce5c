"""Whether a checkpoint fits what it is loaded into, and what ranks tell each other about that. Needs no torch.

A rank can tell alone what it misses. What is left over in the checkpoint only all ranks together can tell: a pipeline
stage does not want what another stage does. Each sends a bit per name, which for a shard of everything are all zero.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

_MAX_NAMES = 8
"""As many names as an error message lists."""


@dataclass(frozen=True)
class LoadOffer:
    """What a rank found when it compared the checkpoint with what it holds."""

    missing: tuple[str, ...]
    """Wanted, and not saved."""
    cast: tuple[str, ...]
    """Wanted in another dtype than it was saved in."""
    unwanted: bytes
    """A bit per name of the checkpoint, in sorted order: not wanted by this rank."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Section -> what becomes of it, where that depends on the layout."""


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
    marks = bytearray(-(-len(names) // 8))
    for place, name in enumerate(names):
        if name in chosen:
            marks[place // 8] |= 1 << place % 8
    return bytes(marks)


def marked(names: Sequence[str], marks: bytes) -> list[str]:
    return [name for place, name in enumerate(names) if marks[place // 8] >> place % 8 & 1]


def listed(texts: Sequence[str]) -> str:
    more = len(texts) - _MAX_NAMES
    return "; ".join(texts[:_MAX_NAMES]) + (f"; and {more} more" if more > 0 else "")
