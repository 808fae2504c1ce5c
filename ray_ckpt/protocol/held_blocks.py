"""Whether a part of a live tensor is what was saved, by the checksums that every record has.

A record has one XXH3-64 per block of a saved chunk. Where the part of a tensor that a rank holds consists of whole
blocks, as shards along dim 0 and whole tensors do, its memory is hashed and compared block by block, at the speed of
memory. Where it does not, only a fingerprint tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ray_ckpt.format.block_sums import sums_of
from ray_ckpt.format.boxes import Box, shared_box
from ray_ckpt.format.manifest import Chunk, TensorEntry, itemsize
from ray_ckpt.format.ranges import contiguous_strides, is_dense
from ray_ckpt.protocol.messages import TensorSpec
from ray_ckpt.storage.staging import bytes_of, plain


class _Run(NamedTuple):
    """Whole blocks of a chunk, and where their bytes are in the part."""

    chunk: Chunk
    first_block: int
    offset: int
    """Byte offset in the part."""
    num_bytes: int


def consists_of_blocks(spec: TensorSpec, part: object, entry: TensorEntry) -> bool:
    """Whether a part can be compared block by block: whole blocks, one after the other in CPU memory."""
    return (
        isinstance(part, torch.Tensor)
        and not part.is_cuda
        and part.is_contiguous()
        and (spec.dtype, spec.shape) == (entry.dtype, entry.shape)
        and None not in _runs(spec, entry)
    )


def is_as_saved(spec: TensorSpec, part: torch.Tensor, entry: TensorEntry) -> bool:
    """Whether all bytes of a part that consists of blocks have the checksums of the record."""
    memory = bytes_of(plain(part))
    for run in _runs(spec, entry):
        assert run is not None, "it consists of whole blocks"
        assert run.chunk.checksums is not None, "as above"
        found = sums_of(memory[run.offset : run.offset + run.num_bytes], run.chunk.checksums.block_bytes)
        start = 8 * run.first_block
        if found != run.chunk.checksums.sums[start : start + len(found)]:
            return False
    return True


def _runs(spec: TensorSpec, entry: TensorEntry) -> Iterator[_Run | None]:
    """The blocks of each chunk that a part has in common; None for parts of blocks."""
    width, box = itemsize(entry.dtype), shared_box(spec.offsets, spec.sizes)
    for chunk in entry.chunks:
        common = chunk.box.intersect(box)
        if common is None:
            continue
        if chunk.checksums is None or chunk.strides is not None:
            yield None
            return
        at, num_bytes = _first_byte(common.within(chunk.box), chunk.box, width), common.num_elements * width
        block, end = chunk.checksums.block_bytes, chunk.box.num_elements * width
        is_whole = at % block == 0 and ((at + num_bytes) % block == 0 or at + num_bytes == end)
        if not (is_whole and _is_run(common, chunk.box) and _is_run(common, box)):
            yield None
            return
        yield _Run(chunk, at // block, _first_byte(common.within(box), box, width), num_bytes)


def _is_run(box: Box, whole: Box) -> bool:
    return is_dense(box.sizes, contiguous_strides(whole.sizes))


def _first_byte(box: Box, whole: Box, width: int) -> int:
    strides = contiguous_strides(whole.sizes)
    return width * sum(offset * stride for offset, stride in zip(box.offsets, strides, strict=True))
