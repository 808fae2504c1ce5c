"""What is to be written: one `FileJob` per file. Plain data, so that a task on another node can do it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_ckpt.format.manifest import ObjectEntry, Path, itemsize
from ray_ckpt.storage.rewrite import WantedTensor

__all__ = ["FileJob", "TensorJob", "Written", "batches"]


@dataclass(frozen=True)
class TensorJob:
    """A whole tensor on its way into a file."""

    name: str
    """Its name in the target."""
    source: WantedTensor
    dtype: str
    """Its dtype in the target."""
    fingerprint: str = ""
    """What the source's record says that its fingerprint is; empty when it says nothing."""
    path: Path | None = None
    """Where it stands in the target's nested state dict, in containers."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.box.sizes

    @property
    def num_bytes(self) -> int:
        """In the target."""
        return self.source.box.num_elements * itemsize(self.dtype)


@dataclass(frozen=True)
class FileJob:
    """A file to be written."""

    name: str
    form: str
    """`safetensors`, `torch`, or `dcp` for containers, which our own checkpoints have too."""
    tensors: tuple[TensorJob, ...]
    """What lies in it, in this order."""
    objects: Mapping[int, tuple[str, ObjectEntry]] = field(default_factory=dict)
    """Number -> name and entry, of what containers hold besides tensors."""
    pickled: bytes = b""
    """The pickle of a file by `torch.save`, in which the n-th tensor is the storage of key n."""

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)


@dataclass(frozen=True)
class Written:
    """A file that was written, and what was in it when it was."""

    name: str
    num_bytes: int
    digest: str
    """XXH3-128 of the file."""
    tensors: Mapping[str, str]
    """Name -> XXH3-128 of its dtype, shape and elements in row-major order: whatever file they lie in."""
    record: str = ""
    """The manifest of this one file, if it holds containers."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Written:
        """
        Raises:
            KeyError, TypeError: it is something else.
        """
        return cls(data["name"], data["num_bytes"], data["digest"], dict(data["tensors"]), data["record"])


def batches(sizes: Sequence[int], max_bytes: int) -> Iterator[range]:
    """Consecutive items, as many as fit; a larger one is alone. At least one batch, which may be empty."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > max_bytes:
            yield range(start, index)
            start, total = index, 0
        total += size
    yield range(start, len(sizes))
