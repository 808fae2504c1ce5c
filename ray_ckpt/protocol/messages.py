"""What ranks and the coordinator tell each other. Plain data, and little of it for many tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ray_ckpt.format.manifest import ObjectEntry, Path, TensorColumns, itemsize


class TensorSpec(NamedTuple):
    """A part of a tensor. Equal ones of a plan are one object, which pickle then sends once."""

    dtype: str
    """As `str(torch.dtype)` without the `torch.` prefix."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def num_bytes(spec: TensorSpec) -> int:
    """Of a part's elements. Cached, as a state has thousands of parts and few specs."""
    return math.prod(spec.sizes) * itemsize(spec.dtype)


class Item(NamedTuple):
    """What a rank holds under one name."""

    name: str
    path: Path | None
    """Keys that lead to it in the nested state dict; None when that is the name alone."""
    spec: TensorSpec | None
    """None: not a tensor."""


@dataclass(frozen=True)
class LocalPlan:
    """What a rank holds. Positions in `items` are how both sides refer to an item from here on."""

    token: str
    """Names this plan: a rank that holds the same things again sends the same token."""
    items: tuple[Item, ...] | None
    """None: as sent before under this token."""


@dataclass(frozen=True)
class Assignment:
    """What the coordinator tells a rank: write everything you hold, except for what another rank writes."""

    attempt: str
    """Id of the attempt, which is part of every file's name."""
    rank: int
    skipped: tuple[int, ...]
    """Positions in the rank's plan, ascending."""


@dataclass(frozen=True)
class FileRecord:
    """One written file."""

    tensors: TensorColumns
    positions: Sequence[int]
    """Of its tensors, in the same order."""
    objects: Mapping[int, ObjectEntry]
    """By position."""

    @property
    def name(self) -> str:
        return self.tensors.file


@dataclass(frozen=True)
class RankRecord:
    """What a rank wrote, and what it would have written."""

    files: tuple[FileRecord, ...]
    replicas: bytes
    """16 bytes for every skipped position: XXH3-128 of a tensor's block sums, or XXH3-64 of an object's container."""


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
