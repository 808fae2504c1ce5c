"""The entries of a manifest: tensors and the chunks that they are saved in, and everything else.

Plain values that need neither torch nor pyarrow. `manifest.py` has what they are part of, `record.py` their JSON.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from ray_ckpt.errors import CommitError, FormatError, UnsafeCheckpointError
from ray_ckpt.format.block_sums import BlockSums
from ray_ckpt.format.boxes import Box
from ray_ckpt.rounding import ceil_div
from ray_ckpt.text import quoted

__all__ = ["Chunk", "Inline", "ObjectEntry", "Path", "TensorColumns", "TensorEntry", "check_file_name", "itemsize"]

Path = tuple[str | int, ...]


class Chunk(NamedTuple):
    """A saved box of a tensor and where its bytes lie."""

    box: Box
    file: str
    start: int
    """Byte offset of the container in `file`."""
    length: int
    """Size of the container in bytes."""
    data_start: int | None
    """Byte offset of the first element in `file`; None when only the container tells, as in stock DCP's files."""
    checksums: BlockSums | None = None
    """Checksums of the elements; None in a checkpoint that another program wrote."""
    transforms: tuple[str, ...] = ()
    """Descriptors of the DCP stream extensions that encoded the container, outermost first."""
    strides: tuple[int, ...] | None = None
    """Strides of the elements at `data_start`, in elements; None for row-major order, which ours always have."""
    crc: int = 0
    """CRC-32 of the elements' bytes, where the directory of a zip archive tells it; else 0. Not in a record of ours."""


@dataclass(frozen=True)
class TensorColumns:
    """The tensors in one written file, one column per fact: thousands of tensors travel as six values."""

    file: str
    starts: Sequence[int]
    """Byte offset of each tensor's container in `file`."""
    lengths: Sequence[int]
    """Size of each container in bytes."""
    data_starts: Sequence[int]
    """Byte offset of each tensor's first element in `file`."""
    block_bytes: Sequence[int]
    """Size of each tensor's checksum blocks in bytes."""
    sums: bytes
    """All block sums, one tensor's after the other's."""

    def chunks(self, parts: Iterable[tuple[Box, int]]) -> Iterator[Chunk]:
        """As the manifest has them.

        Args:
            parts: box and bytes of each tensor, in the order of the columns.

        Raises:
            CommitError: there are more or fewer checksums than blocks.
        """
        end = 0
        columns = zip(parts, self.starts, self.lengths, self.data_starts, self.block_bytes, strict=True)
        for (box, num_bytes), start, length, data_start, block_bytes in columns:
            begin, end = end, end + 8 * ceil_div(num_bytes, block_bytes)
            yield Chunk(box, self.file, start, length, data_start, BlockSums(block_bytes, self.sums[begin:end]))
        if end != len(self.sums):
            raise CommitError(f"refusing to commit: {self.file} has checksums of {len(self.sums)} bytes, not of {end}")


class TensorEntry(NamedTuple):
    """A tensor: its element type, its global shape and the chunks that cover it."""

    dtype: str
    """`str(torch.dtype)` without the `torch.` prefix."""
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    path: Path | None = None
    """Keys that lead to it in the nested state dict; None when nothing was flattened."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class Inline:
    """A value that the manifest holds itself. A class of its own, because None is a value too."""

    value: Any


class ObjectEntry(NamedTuple):
    """A non-tensor: a number, a text, a list, or an object that only `torch.save` can write."""

    file: str
    start: int
    length: int
    inline: Inline | None = None
    blob: bytes | None = None
    """The container's bytes, when they are few and the value is not inline."""
    checksum: int | None = None
    """XXH3-64 of the container; None in a checkpoint that another program wrote."""
    transforms: tuple[str, ...] = ()
    path: Path | None = None
    refusal: str = ""
    """Why the value cannot be loaded; empty when it can, as always in a checkpoint of ours."""


@lru_cache
def itemsize(dtype: str) -> int:
    """Bytes of an element, from the dtype's name: the first number in it counts bits. `bool` has one byte."""
    digits = re.search(r"\d{1,6}", dtype)
    if dtype != "bool" and not digits:
        raise FormatError(f"{quoted(dtype)} is not the name of a dtype")
    return 1 if digits is None else max(8, int(digits.group())) // 8


def check_file_name(name: str) -> str:
    """The name itself, when it is a relative path of plain parts.

    Raises:
        UnsafeCheckpointError: it is absolute, climbs with `..`, or is a URI or a path of another system.
    """
    plain = all(part not in ("", ".", "..") for part in name.split("/"))
    if not plain or re.search(r"[\\\0]|^[A-Za-z][A-Za-z0-9+.-]*:", name):
        raise UnsafeCheckpointError(
            f"file name {quoted(name)} leaves the checkpoint's directory; nothing was read from it"
        )
    return str(PurePosixPath(name))
