"""What lies where in the files of a checkpoint, and what is known of it.

    Placed ── spans ──> Span     consecutive bytes of a file with their checksums

A checkpoint of a million parts has a `Placed` for each only while the part of a file is read in which it lies. Needs
neither torch nor numpy, as a task of a cluster begins with this alone; `places.py` makes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from ray_ckpt.format.block_sums import BlockSums

__all__ = ["CONTAINER", "ELEMENTS", "PADDING", "STRETCH_BYTES", "Elements", "Placed", "Span", "Stretch", "sums_of"]

STRETCH_BYTES = 32 << 20
"""Size of the piece of work that a thread takes at a time, apart from an entry at its end."""

ELEMENTS, CONTAINER, PADDING = "elements", "container around the elements", "padding between entries"

_MAX_PADDING_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Elements:
    """Bytes `[start, end)` of a file that are elements of a tensor, in any order, whose NaN and Inf are counted."""

    name: str
    dtype: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `[start, end)` of a file and what is known of them."""

    start: int
    end: int
    names: tuple[str, ...]
    """Name of the tensor, or names of the objects that share these bytes."""
    what: str
    sums: BlockSums | None
    """Checksums of the bytes; None when there is nothing to compare with."""
    elements: Elements | None = None
    """What of it is counted; None for nothing."""


class Placed(NamedTuple):
    """Bytes `[start, end)` of a file: the container of a chunk of a tensor, or of objects."""

    start: int
    end: int
    names: tuple[str, ...]
    """Name of the tensor, or names of the objects that share these bytes."""
    data_start: int
    """Byte of the file at which begins what has checksums; all of it where there are none."""
    data_end: int
    sums: BlockSums | None
    """Checksums of that; None when there are none."""
    head: BlockSums | None = None
    """What stands before it; None when that is not known."""
    tail: BlockSums | None = None
    elements: Elements | None = None

    @property
    def spans(self) -> Iterator[Span]:
        """All of its bytes, in pieces that are not too long for one stretch where there are checksums."""
        if self.start < self.data_start:
            yield Span(self.start, self.data_start, self.names if self.head else (), CONTAINER, self.head)
        if self.sums is None:
            yield Span(self.data_start, self.data_end, self.names, ELEMENTS, None, self.elements)
        else:
            yield from self._blocks(self.sums)
        if self.data_end < self.end:
            yield Span(self.data_end, self.end, self.names if self.tail else (), CONTAINER, self.tail)

    def _blocks(self, sums: BlockSums) -> Iterator[Span]:
        num_blocks = max(1, STRETCH_BYTES // sums.block_bytes)
        for first in range(0, len(sums), num_blocks):
            start = self.data_start + first * sums.block_bytes
            some = BlockSums(sums.block_bytes, sums.sums[8 * first : 8 * (first + num_blocks)])
            end = min(start + len(some) * sums.block_bytes, self.data_end)
            yield Span(start, end, self.names, ELEMENTS, some, self.elements)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes `[start, end)` of a file, whose ends lie between spans."""

    file: str
    start: int
    end: int
    entries: tuple[Placed, ...]
    """Those of which some bytes lie here, by position."""
    file_bytes: int
    """Size of the file as it is: what reaches beyond is not read."""
    is_ours: bool
    """Whether ray_ckpt wrote the file: then what lies between entries is zeros."""

    @property
    def num_bytes(self) -> int:
        return self.end - self.start

    @property
    def spans(self) -> Iterator[Span]:
        """All that can be read of it, by position."""
        at = self.start
        for entry in self.entries:
            if entry.start > at:
                yield from self._readable(_padding(at, entry.start, is_ours=self.is_ours))
            for span in entry.spans:
                if self.start <= span.start:
                    yield from self._readable(span)
            at = max(at, entry.end)
        if at < self.end:
            yield from self._readable(_padding(at, self.end, is_ours=self.is_ours))

    def _readable(self, span: Span) -> Iterator[Span]:
        if span.start < span.end <= min(self.end, self.file_bytes):
            yield span


def _padding(start: int, end: int, *, is_ours: bool) -> Span:
    """Zeros, where ray_ckpt wrote the file. It never leaves long gaps: who claims one may claim any length."""
    is_known = is_ours and end - start <= _MAX_PADDING_BYTES
    return Span(start, end, (), PADDING, sums_of(bytes(end - start)) if is_known else None)


def sums_of(data: bytes) -> BlockSums:
    """The checksum of bytes that are known."""
    return BlockSums(max(1, len(data)), xxhash.xxh3_64_intdigest(data).to_bytes(8, "little"))
