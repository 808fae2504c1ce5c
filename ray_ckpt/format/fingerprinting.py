"""Compute the fingerprint of a tensor where it lives, on CPU or GPU, in bounded memory.

    contribution(i, bits) = mix(mix(i + 1) + bits * ODD)      mix: the finalizer of SplitMix64

`mix` is a bijection of 64-bit words, so for a fixed index two different elements never contribute the same. Source of
the constants: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014).

On the CPU `word_sums.py` adds up; elsewhere torch does, by the same formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.distributed.tensor import DTensor

from ray_ckpt.format.boxes import Box
from ray_ckpt.format.fingerprint import WORD_MASK, Fingerprint
from ray_ckpt.format.memory import fault
from ray_ckpt.format.shards import local_boxes
from ray_ckpt.format.torch_container import dtype_name
from ray_ckpt.format.torch_internals import local_tensor
from ray_ckpt.format.word_sums import FIRST_FACTOR, GOLDEN, SECOND_FACTOR, sum_words

CHUNK_WORDS = 1 << 15
"""Words mixed at once on the CPU: 256 KiB per temporary, so that the temporaries stay in the cache."""

_DEVICE_CHUNK_WORDS = 1 << 22
"""The same on another device, where each operation takes as long to start as to mix many words."""


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
    parts: dict[Box, int] = {}
    if wrong := fault(local_tensor(tensor)):
        raise ValueError(f"there are no bits to fingerprint: what was given {wrong}")
    for box, local in _local_parts(tensor.detach()):
        parts[box] = sum_of_part(local, box, tensor.shape)
    return Fingerprint(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), parts=parts)


def sum_of_part(
    part: torch.Tensor,
    box: Box,
    shape: Sequence[int],
    convert: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> int:
    """Sum of the contributions of a part of a tensor, modulo 2^64.

    Args:
        part: a plain tensor, of any strides.
        box: where it lies in the whole tensor.
        shape: the whole tensor's.
        convert: gives the elements of a window in the dtype that counts, if that is not their own.
    """
    parts = _contiguous_parts(part.detach(), box, convert)
    return sum(_sum_contiguous(each, at, shape) for each, at in parts) & WORD_MASK


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
    if tensor.numel() <= CHUNK_WORDS or (convert is None and tensor.is_contiguous()):
        yield (tensor if convert is None else convert(tensor)).contiguous(), box
        return
    dim = max(range(tensor.dim()), key=lambda d: tensor.shape[d])
    offset = 0
    for half in tensor.tensor_split(2, dim=dim):
        offsets = tuple(o + offset if d == dim else o for d, o in enumerate(box.offsets))
        yield from _contiguous_parts(half, Box(offsets, tuple(half.shape)), convert)
        offset += half.shape[dim]


def _sum_contiguous(part: torch.Tensor, box: Box, shape: Sequence[int]) -> int:
    words, dims = _words_and_dims(part, box, shape)
    if words.device.type == "cpu":
        return sum_words(words.numpy(), dims, CHUNK_WORDS)
    return _sum_on_device(words, dims)


def _words_and_dims(
    part: torch.Tensor, box: Box, shape: Sequence[int]
) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    """The bits of a contiguous part, and how they lie in the whole: see `_index_dims`."""
    words = _as_words(part)
    if (per_element := words.numel() // max(1, part.numel())) > 1:  # the words of an element are one more dim
        box, shape = Box((*box.offsets, 0), (*box.sizes, per_element)), (*shape, per_element)
    return words, _index_dims(box, tuple(shape))


def _sum_on_device(words: torch.Tensor, dims: Sequence[tuple[int, int, int]]) -> int:
    """The same as `sum_words`, by torch's operations."""
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), _DEVICE_CHUNK_WORDS):
        chunk = words[start : start + _DEVICE_CHUNK_WORDS].to(torch.int64)
        flat = torch.arange(start, start + chunk.numel(), device=words.device)
        mixed = _mix(_mix(_global_index(flat, dims).add_(1)).add_(chunk * _signed(GOLDEN)))
        total += mixed.sum()
    return int(total.item()) & WORD_MASK


def _as_words(part: torch.Tensor) -> torch.Tensor:
    """The bits of a contiguous tensor as a flat tensor of integers, at most 8 bytes each."""
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
    if part.is_complex():
        part = torch.view_as_real(part.resolve_conj())
    return part.resolve_neg().reshape(-1).view(views[part.element_size()])


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


def _mix(words: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer, in place. int64 arithmetic wraps, which is what modulo 2^64 asks for."""
    for shift, factor in ((30, FIRST_FACTOR), (27, SECOND_FACTOR)):
        words.bitwise_xor_(_shift_right(words, shift)).mul_(_signed(factor))
    return words.bitwise_xor_(_shift_right(words, 31))


def _shift_right(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch's own copies the sign bit, which is masked off."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
