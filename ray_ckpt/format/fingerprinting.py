"""Compute the fingerprint of a tensor where it lives, on CPU or GPU, in bounded memory.

    contribution(n, word) = word * T[s(n div M) + n mod M] * C(n div M)      modulo 2^64, M = 8192

The words of a tensor are its elements as numbers without sign, in row-major order; of an element of 8 or 16 bytes, 4
bytes at a time. The upper half of a word of 4 bytes is XORed into its lower half. n counts the words of the whole
tensor.

T is a table of 2 M odd 64-bit numbers. Each block of M words has an odd factor C, and a place s in the table at which
its keys begin, so that the keys of one block are not those of another times a number. All of them are of SplitMix64's
sequence from 0 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): T its first 2 M
numbers; then one per block, which is C, and whose upper 13 bits are s. T and C are made odd.

This is multilinear hashing (Lemire, Kaser, "Strongly universal string hashing is fast", The Computer Journal, 2014). As
all keys are odd, a single word that differs always shows. Of several that differ, and have their v lowest bits alike,
the sums are equal by a chance of about 2^(v-63). v is 0 for most changes, 15 where only signs flip, and more, 31 at
most, only if in every word of 4 bytes that differs the same bits of its upper and of its lower half do.

On the CPU `word_sums.py` adds up; elsewhere torch does, by the same formula. Records of earlier versions have sums by
another one, `first_formula.py`, which is computed on the CPU alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from ray_ckpt.format import first_formula, word_sums
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.fingerprint import CURRENT, FIRST, WORD_MASK, Fingerprint
from ray_ckpt.format.memory import fault
from ray_ckpt.format.shards import local_boxes
from ray_ckpt.format.torch_container import dtype_name
from ray_ckpt.format.torch_internals import local_tensor

COPIED_ELEMENTS = 1 << 15
"""Elements of a strided tensor that are copied at once."""

_DEVICE_CHUNK_WORDS = 1 << 22
"""Words summed up at once on another device, where each operation takes as long to start as to handle many words."""


def fingerprint(tensor: torch.Tensor) -> Fingerprint:
    """Compute the fingerprint of what this process holds of `tensor`: a plain tensor, or the local shard of a DTensor.

    Runs where the tensor lives, on CPU or GPU, in bounded memory: half a MiB of temporaries, or 32 MiB each on a GPU.

    Example:
        >>> import torch
        >>> from ray_ckpt import fingerprint
        >>> one, other = torch.arange(6.0), torch.arange(6.0)
        >>> fingerprint(one).digest == fingerprint(other).digest
        True
        >>> other[[0, 1]] = other[[1, 0]]  # the same elements, two of them moved
        >>> fingerprint(one).digest == fingerprint(other).digest
        False

    Raises:
        ValueError: the tensor has no bits of its own: on the meta device, sparse, quantized, made of other tensors
            (fingerprint those), or a DTensor with partial sums.
    """
    return fingerprint_by(CURRENT, tensor)


def fingerprint_by(formula: int, tensor: torch.Tensor) -> Fingerprint:
    """The same by the formula that a record has.

    Raises:
        ValueError: as `fingerprint`.
    """
    parts: dict[Box, int] = {}
    if wrong := fault(local_tensor(tensor)):
        raise ValueError(f"there are no bits to fingerprint: what was given {wrong}")
    for box, local in _local_parts(tensor.detach()):
        parts[box] = sum_of_part(local, box, tensor.shape, formula=formula)
    return Fingerprint(dtype_name(tensor.dtype), tuple(tensor.shape), parts, formula)


def sum_of_part(
    part: torch.Tensor,
    box: Box,
    shape: Sequence[int],
    convert: Callable[[torch.Tensor], torch.Tensor] | None = None,
    formula: int = CURRENT,
) -> int:
    """Sum of the contributions of a part of a tensor, modulo 2^64.

    Args:
        part: a plain tensor, of any strides.
        box: where it lies in the whole tensor.
        shape: the whole tensor's.
        convert: gives the elements of a window in the dtype that counts, if that is not their own.
        formula: by which contributions are computed.
    """
    if formula == FIRST and part.device.type != "cpu":
        converted = convert
        convert = lambda window: (window if converted is None else converted(window)).cpu()  # noqa: E731
    parts = _contiguous_parts(part.detach(), box, convert)
    return sum(_sum_contiguous(each, at, shape, formula) for each, at in parts) & WORD_MASK


def _local_parts(tensor: torch.Tensor) -> list[tuple[Box, torch.Tensor]]:
    if not isinstance(tensor, DTensor):
        return [(Box.whole(tensor.shape), tensor)]
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"a DTensor with partial sums has no bits to fingerprint: {tensor.placements}")
    local = local_tensor(tensor).detach()
    return [(part.box, part.of(local)) for part in local_boxes(tensor)]


def _contiguous_parts(
    tensor: torch.Tensor, box: Box, convert: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Iterator[tuple[torch.Tensor, Box]]:
    """Split a strided tensor until each part is contiguous or small enough to copy; one to convert, always."""
    if tensor.numel() <= COPIED_ELEMENTS or (convert is None and tensor.is_contiguous()):
        yield (tensor if convert is None else convert(tensor)).contiguous(), box
        return
    dim = max(range(tensor.dim()), key=lambda d: tensor.shape[d])
    offset = 0
    for half in tensor.tensor_split(2, dim=dim):
        offsets = tuple(o + offset if d == dim else o for d, o in enumerate(box.offsets))
        yield from _contiguous_parts(half, Box(offsets, tuple(half.shape)), convert)
        offset += half.shape[dim]


def _sum_contiguous(part: torch.Tensor, box: Box, shape: Sequence[int], formula: int) -> int:
    words, dims = _words_and_dims(part, box, shape, formula)
    if words.device.type != "cpu":
        return _sum_on_device(words, dims)
    if formula == FIRST:
        return first_formula.sum_words(words.numpy(), dims)
    numbers = words.numpy()
    return word_sums.sum_words(numbers.view(f"u{numbers.itemsize}"), dims)


def _words_and_dims(
    part: torch.Tensor, box: Box, shape: Sequence[int], formula: int = CURRENT
) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    """The bits of a contiguous part, and how they lie in the whole: see `_index_dims`."""
    words = _as_words(part, 8 if formula == FIRST else 4)
    if (per_element := words.numel() // max(1, part.numel())) > 1:  # the words of an element are one more dim
        box, shape = Box((*box.offsets, 0), (*box.sizes, per_element)), (*shape, per_element)
    return words, _index_dims(box, tuple(shape))


def _sum_on_device(words: torch.Tensor, dims: Sequence[tuple[int, int, int]]) -> int:
    """The same as `word_sums.sum_words`, by torch's operations."""
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    if not words.numel():
        return 0
    first = sum(offset * stride for _, offset, stride in dims) // word_sums.BLOCK_WORDS
    last = sum((offset + size - 1) * stride for size, offset, stride in dims) // word_sums.BLOCK_WORDS
    blocks = np.arange(first, last + 1)
    starts, all_factors = word_sums.keys_of(blocks)
    table, to_table, factors = (
        torch.from_numpy(values).to(words.device)
        for values in (word_sums.TABLE, starts - blocks * word_sums.BLOCK_WORDS, all_factors)
    )
    for start in range(0, words.numel(), _DEVICE_CHUNK_WORDS):
        chunk = words[start : start + _DEVICE_CHUNK_WORDS].to(torch.int64).bitwise_and_((1 << 8 * words.itemsize) - 1)
        if words.itemsize == 4:
            chunk.bitwise_xor_(chunk >> 16)
        index = _global_index(torch.arange(start, start + chunk.numel(), device=words.device), dims)
        block = (index >> word_sums.BLOCK_BITS).sub_(first)
        keys = table[index.add_(to_table[block])].mul_(factors[block])
        total += keys.mul_(chunk).sum()
    return int(total.item()) & WORD_MASK


def _as_words(part: torch.Tensor, max_bytes: int) -> torch.Tensor:
    """The bits of a contiguous tensor as a flat tensor of integers: an element each, or so many bytes of it."""
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if part.is_complex():
        part = torch.view_as_real(part.resolve_conj())
    return part.resolve_neg().reshape(-1).view(views[min(part.element_size(), max_bytes)])


def _index_dims(box: Box, shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(size, offset, stride in the global tensor) per dim, innermost first, whole dims merged into their outer one."""
    dims: list[tuple[int, int, int]] = []
    stride, inner_is_whole = 1, False
    for size, offset, length in zip(reversed(box.sizes), reversed(box.offsets), reversed(shape), strict=True):
        if inner_is_whole:
            inner_size, _, inner_stride = dims.pop()
            dims.append((size * inner_size, offset * inner_size, inner_stride))
        else:
            dims.append((size, offset, stride))
        inner_is_whole = size == length
        stride *= length
    return dims


def _global_index(flat: torch.Tensor, dims: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """Row-major index in the global tensor of the words at these flat positions of a part."""
    if len(dims) <= 1:
        return flat + sum(offset * stride for _, offset, stride in dims)
    index = torch.zeros_like(flat)
    for size, offset, stride in dims:
        index += (flat % size + offset) * stride
        flat = flat // size
    return index
