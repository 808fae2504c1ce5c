"""Byte ranges: which bytes of a saved chunk hold a wanted box, and how to read them in few requests.

**Every range is half-open, `[start, end)`, in bytes, and never empty.**

    wanted box ── split ──> parts: sub-boxes, each inside one byte range worth reading at once
    part       ── widen ──> its range on whole checksum blocks
    ranges     ── group ──> runs of near ranges that one request serves
    long range ── cut   ──> requests of bounded size
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ray_ckpt.format.boxes import Box
from ray_ckpt.rounding import round_up


@dataclass(frozen=True)
class Part:
    """A sub-box and the byte range that encloses it, counted from the first byte of the chunk's data."""

    box: Box
    start: int
    end: int


@lru_cache(maxsize=4096)
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a row-major tensor; dims of size 0 count as 1, as in torch."""
    strides: list[int] = []
    stride = 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= max(size, 1)
    return tuple(reversed(strides))


@lru_cache(maxsize=4096)
def is_dense(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a strided box is one run of bytes in row-major order."""
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def span(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first of a box to its last, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def split(box: Box, strides: Sequence[int], itemsize: int, *, max_bytes: int, max_gap: int) -> Iterator[Part]:
    """Cut a non-empty box of a chunk into parts that are worth one read each, in the order of the file.

    Args:
        box: the box, in the coordinates of a chunk with these strides (in elements).
        max_bytes: upper limit of a part's range in bytes; a single element may be larger.
        max_gap: number of unwanted bytes between two wanted ones up to which reading is cheaper than skipping.
    """
    first = sum(offset * stride for offset, stride in zip(box.offsets, strides, strict=True)) * itemsize
    length = span(box.sizes, strides) * itemsize
    if length <= max_bytes and _widest_gap(box.sizes, strides) * itemsize <= max_gap:
        yield Part(box, first, first + length)
        return
    splittable = [d for d, size in enumerate(box.sizes) if size > 1]
    if not splittable:
        yield Part(box, first, first + length)
        return
    # Along the outermost dim in memory, so that parts follow each other in the file.
    dim = max(splittable, key=lambda d: strides[d])
    step = 1
    if _gap(box.sizes, strides, dim) * itemsize <= max_gap:
        # As many indices of `dim` as fit in one read. The first takes `inner` bytes, each further one its stride; a
        # stride of 0 (an expanded tensor) takes none.
        inner = (span(box.sizes, strides) - (box.sizes[dim] - 1) * strides[dim]) * itemsize
        step += max(0, max_bytes - inner) // max(1, strides[dim] * itemsize)
    # Fewer than all: else the same box would come back, for it was a gap in an inner dim that forbade it whole.
    step = min(step, box.sizes[dim] - 1)
    for start in range(0, box.sizes[dim], step):
        part = _narrow(box, dim, start, min(step, box.sizes[dim] - start))
        yield from split(part, strides, itemsize, max_bytes=max_bytes, max_gap=max_gap)


def _narrow(box: Box, dim: int, start: int, length: int) -> Box:
    offsets = tuple(offset + start if d == dim else offset for d, offset in enumerate(box.offsets))
    return Box(offsets, tuple(length if d == dim else size for d, size in enumerate(box.sizes)))


def _gap(sizes: Sequence[int], strides: Sequence[int], dim: int) -> int:
    """Elements between the end of what one index of `dim` spans and the start of the next one."""
    inner = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if stride < strides[dim]]
    return strides[dim] - span([size for size, _ in inner], [stride for _, stride in inner])


def _widest_gap(sizes: Sequence[int], strides: Sequence[int]) -> int:
    return max((_gap(sizes, strides, d) for d, size in enumerate(sizes) if size > 1), default=0)


def widen(start: int, end: int, block_bytes: int, total: int) -> tuple[int, int]:
    """The range on whole blocks of a run of `total` bytes; the last block may be short."""
    return start // block_bytes * block_bytes, min(round_up(end, block_bytes), total)


def cut(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut a range into consecutive ranges of `size` bytes, the last of which may be shorter."""
    for at in range(start, end, size):
        yield at, min(at + size, end)


def group(ranges: Sequence[tuple[int, int]], *, max_gap: int, max_bytes: int) -> Iterator[list[int]]:
    """Group ranges, given in the order of their starts, so that one request of at most `max_bytes` serves each group.

    Yields:
        Positions in `ranges`. A single range longer than `max_bytes` makes a group of its own.
    """
    members: list[int] = []
    group_start = group_end = 0
    for position, (start, end) in enumerate(ranges):
        if members and (start - group_end > max_gap or max(end, group_end) - group_start > max_bytes):
            yield members
            members = []
        if not members:
            group_start, group_end = start, end
        members.append(position)
        group_end = max(group_end, end)
    if members:
        yield members
