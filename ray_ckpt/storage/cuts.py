"""What is wanted of whole checksum blocks, cut out where they lie: only that is sent.

A part of a block cannot be compared with its checksum, so who wants half of each row of a tensor would have all of it
sent. Where whoever keeps the file can compute, as a keeper of `ram://` on another node, it compares the blocks and
sends the wanted bytes.

    a read's ranges ── cuts_of ──> cuts ── InputFile.read_cuts ──> whoever keeps the file ── cut_out ──> wanted bytes
                                           a block differs, or anything fails ──> the blocks are read, as ever
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ray_ckpt.format.block_sums import BlockSums, sums_of
from ray_ckpt.format.ranges import contiguous_strides
from ray_ckpt.rounding import ceil_div

if TYPE_CHECKING:
    from ray_ckpt.storage.ranged_reads import Range, Scatter

__all__ = ["Cut", "cut_out", "cuts_of", "deliver_cuts", "size_of"]

_WORTH_IT = 0.95
"""Wanted part of the blocks from which on they are sent whole."""

_LEAST_RUN_BYTES = 256
"""Many runs of wanted bytes that are shorter take longer to copy one by one than their blocks take to send."""


class Cut(NamedTuple):
    """Wanted bytes, as a strided array of bytes lies in whole checksum blocks."""

    start: int
    """Where the blocks begin in the file."""
    num_bytes: int
    sums: BlockSums
    first: int
    """The first wanted byte, counted from `start`."""
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def num_wanted(self) -> int:
        return math.prod(self.sizes)


def size_of(cuts: Sequence[Cut]) -> int:
    """Bytes that are sent for them."""
    return sum(cut.num_wanted for cut in cuts)


def cuts_of(found: Sequence[Range], num_bytes: int) -> list[Cut]:
    """What is wanted of ranges; nothing where they are better read whole.

    Args:
        num_bytes: of the read that serves them.
    """
    cuts = []
    for item in found:
        cut = _cut_of(item)
        if cut is None:
            return []
        cuts.append(cut)
    return cuts if size_of(cuts) <= _WORTH_IT * num_bytes else []


def _cut_of(item: Range) -> Cut | None:
    source, target = item.source, item.target
    if source.checksums is None or target is None or item.is_direct:
        return None
    sizes, strides = _extent_of(target)
    if _run_bytes(sizes, strides) < min(_LEAST_RUN_BYTES, math.prod(sizes)):
        return None
    size, num_bytes = source.checksums.block_bytes, item.end - item.start
    block = 8 * ((item.start - source.data_start) // size)
    sums = source.checksums.sums[block : block + 8 * ceil_div(num_bytes, size)]
    return Cut(item.start, num_bytes, BlockSums(size, sums), item.lead, sizes, strides)


def _extent_of(target: memoryview | Scatter) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of what it takes, in bytes."""
    if isinstance(target, memoryview):
        return (len(target),), (1,)
    width = target.dtype.itemsize
    return (*target.target.shape, width), (*(stride * width for stride in target.strides), 1)


def _run_bytes(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """How many wanted bytes lie one after the other."""
    run = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != run:
            break
        run *= size
    return run


def cut_out(file: memoryview, cut: Cut, into: memoryview) -> bool:
    """Copy the wanted bytes out of a file, if its blocks are those that were saved. Returns whether they are.

    Raises:
        ValueError: bytes are wanted that are not in the blocks.
    """
    last = cut.first + sum((size - 1) * stride for size, stride in zip(cut.sizes, cut.strides, strict=True))
    if min(cut.start, cut.first, *cut.strides) < 0 or min(cut.sizes) < 1 or last >= cut.num_bytes:
        raise ValueError(f"bytes up to {last} are wanted of blocks of {cut.num_bytes} bytes")
    blocks = file[cut.start : cut.start + cut.num_bytes]
    if len(blocks) < cut.num_bytes or sums_of(blocks, cut.sums.block_bytes) != cut.sums.sums:
        return False
    wanted = np.lib.stride_tricks.as_strided(np.frombuffer(blocks, np.uint8)[cut.first :], cut.sizes, cut.strides)
    np.copyto(np.frombuffer(into, np.uint8).reshape(cut.sizes), wanted)
    return True


def deliver_cuts(found: Sequence[Range], data: memoryview) -> None:
    """Fill the targets of ranges by the bytes of their cuts."""
    at = 0
    for item in found:
        target = item.target
        assert target is not None, "it has a cut"
        if isinstance(target, memoryview):
            num_bytes = len(target)
            target[:] = data[at : at + num_bytes]
        else:
            shape = tuple(target.target.shape)
            num_bytes = math.prod(shape) * target.dtype.itemsize
            packed = target._replace(strides=contiguous_strides(shape), num_bytes=num_bytes)
            packed.deliver(data[at : at + num_bytes])
        at += num_bytes
