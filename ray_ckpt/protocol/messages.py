"""What ranks and the coordinator tell each other. Plain data, and little of it for many tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import xxhash

from ray_ckpt.errors import RayCkptError
from ray_ckpt.format.fingerprint import Fingerprint
from ray_ckpt.format.manifest import ObjectEntry, Path, TensorColumns, itemsize
from ray_ckpt.protocol.frozen import Frozen
from ray_ckpt.report import Phase

T = TypeVar("T")


class RankError(Exception):
    """An error of a rank's that is none of ours, and may not pickle; its text is that error's class and message."""


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What came of a call on one rank: its value, or the failure that it raised. Travels if the value does."""

    value: T | None = None
    """None where there is a failure."""
    failure: Exception | None = None
    """One of our errors, or a `RankError`, or how the rank was lost; None where there is a value."""

    @staticmethod
    def of(function: Callable[[], T]) -> Outcome[T]:
        """Call it now."""
        try:
            return Outcome(function())
        except (RayCkptError, RankError) as error:
            return Outcome(failure=error)
        except Exception as error:
            told = RankError(f"{type(error).__name__}: {error}")
            told.__cause__ = error
            return Outcome(failure=told)

    def get(self) -> T:
        """Return the value, or raise the failure; as often as one asks."""
        if self.failure is not None:
            raise self.failure
        return self.value  # type: ignore[return-value]


class TensorSpec(NamedTuple):
    """A part of a tensor. Equal ones of a plan are one object, which pickle then sends once."""

    dtype: str
    """`str(torch.dtype)` without the `torch.` prefix."""
    shape: tuple[int, ...]
    """Shape of the global tensor."""
    offsets: tuple[int, ...]
    """First element of the part in the tensor, per dim."""
    sizes: tuple[int, ...]
    """Shape of the part, in elements."""


@functools.lru_cache(maxsize=4096)
def num_bytes(spec: TensorSpec) -> int:
    """Bytes of a part's elements. Cached, as a state has thousands of parts and few specs."""
    return math.prod(spec.sizes) * itemsize(spec.dtype)


def num_bytes_in_all(spec: TensorSpec) -> int:
    """Bytes of the elements of the whole tensor that it is a part of."""
    return math.prod(spec.shape) * itemsize(spec.dtype)


class Item(NamedTuple):
    """What a rank holds under one name."""

    name: str
    path: Path | None
    """Keys that lead to it in the nested state dict; None when that is the name alone."""
    spec: TensorSpec | None
    """The part of the tensor; None for an object."""


@dataclass(frozen=True)
class LocalPlan:
    """What a rank holds. Positions in `items` are how both sides refer to an item from here on."""

    token: str
    """Id of this plan: a rank that holds the same things again sends the same token."""
    items: tuple[Item, ...] | None
    """What the rank holds; None for the items that were sent before under this token."""
    buffers: frozenset[str] = frozenset()
    """Names in which ranks may differ, as in the statistics of a BatchNorm: the first rank's are saved."""
    absent: frozenset[str] = frozenset()
    """What the options of the save ask for by name and this rank holds nothing of."""
    frozen: Mapping[str, Fingerprint] = field(default_factory=dict)
    """Name -> fingerprint of what this rank holds of a tensor that is not saved; sent with every token."""


@dataclass(frozen=True)
class Assignment:
    """What the coordinator tells a rank: write everything you hold, except for what another rank writes."""

    attempt: str
    """Id of the attempt, which is part of every file's name."""
    rank: int
    skipped: tuple[int, ...]
    """Positions in the rank's plan that it does not write, ascending."""


@dataclass(frozen=True)
class FileRecord:
    """One written file."""

    tensors: TensorColumns
    positions: Sequence[int]
    """Position in the rank's plan of each row of `tensors`."""
    objects: Mapping[int, ObjectEntry]
    """Position in the rank's plan -> entry."""
    sums: Sequence[int] = ()
    """Fingerprint's sum of each row of `tensors`; empty where none were asked for."""
    checksum_s: float = 0.0
    """Seconds spent on checksums."""

    @property
    def name(self) -> str:
        return self.tensors.file


@dataclass(frozen=True)
class RankRecord:
    """What a rank wrote, and what it would have written."""

    files: tuple[FileRecord, ...]
    replicas: bytes
    """`digest_tensor` or `digest_object` of what stands at each skipped position, one after the other."""
    phases: tuple[Phase, ...] = ()
    """What took how long; the rank is not named."""
    num_retries: int = 0
    """How often the storage was asked again."""
    unsaved: tuple[str, ...] = ()
    """What the rank's optimizers keep and do not show."""


REPLICA_DIGEST_BYTES = 16


def digest_tensor(sums: bytes) -> bytes:
    """The digest by which replicas of a tensor's part are compared, besides their specs: XXH3-128.

    Args:
        sums: the part's block sums, as in `BlockSums.sums`.
    """
    return xxhash.xxh3_128_digest(sums)


def digest_object(checksum: int) -> bytes:
    """The digest by which replicas of an object are compared.

    Args:
        checksum: XXH3-64 of the object's container, as in `ObjectEntry.checksum`.
    """
    return checksum.to_bytes(REPLICA_DIGEST_BYTES, "little")


@dataclass(frozen=True)
class LoadOffer:
    """What a rank found when it compared the checkpoint with what it holds."""

    missing: tuple[str, ...]
    """Names that are wanted and were not saved."""
    cast: tuple[str, ...]
    """Names that are wanted in another dtype than they were saved in."""
    unwanted: bytes
    """A bit per name of the checkpoint, in sorted order, that is set where this rank does not want it."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Section -> what a load does with it, where that depends on the layout."""
    frozen: Frozen = field(default_factory=dict)
    """What this rank holds of tensors that are compared instead of loaded."""
    other_base: tuple[str, ...] = ()
    """Names of those that are others than when it was saved; known once all ranks have agreed."""
    unused_keys: tuple[str, ...] = ()
    """Keys of the key map that name nothing that this rank wants."""
