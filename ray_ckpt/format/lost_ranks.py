"""How a checkpoint says that ranks were lost while it was saved: in its layout. Needs no torch.

    ddp4 without rank 2

What such a rank had of its own, its random generators and its data loader, is not there.
"""

from __future__ import annotations

import re
from collections.abc import Collection

__all__ = ["in_layout", "is_own", "with_lost"]

_LOST = re.compile(r"(?:^| )without ranks? ([0-9]{1,7}(?:, [0-9]{1,7})*)$")


def with_lost(layout: str | None, ranks: Collection[int]) -> str | None:
    """The layout of a save that goes on without these ranks."""
    if not ranks:
        return layout
    numbers = ", ".join(map(str, sorted(ranks)))
    return f"{layout or ''} without rank{'s' * (len(ranks) > 1)} {numbers}".lstrip()


def in_layout(layout: str | None) -> frozenset[int]:
    """The ranks that were lost, by what the layout says; none of most."""
    found = _LOST.search(layout or "")
    return frozenset(map(int, found[1].split(", "))) if found else frozenset()


def is_own(name: str, rank: int) -> bool:
    """Whether a name in a checkpoint is of what this rank has of its own, as every rank does."""
    return re.match(rf"(?:rng|dataloader)\.(?:rank{rank}\.|positions\.{rank}$)", name) is not None
