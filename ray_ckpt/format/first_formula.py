"""The formula of the first fingerprints, for the records that have them:

    contribution(i, word) = mix(mix(i + 1) + word * ODD)     modulo 2^64; mix: the finalizer of SplitMix64

A word is an element, or 8 bytes of it, as a signed number; i is its index in the whole tensor. By numpy, in two buffers
that stay in the cache and are used for all words. Rows of consecutive words share their indices' arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_CHUNK_WORDS = 1 << 15
"""Words that are mixed at once: 256 KiB per buffer."""

_ODD = np.uint64(0x9E3779B97F4A7C15)
_STEPS = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST_SHIFT = np.uint64(31)


def sum_words(words: npt.NDArray[Any], dims: Sequence[tuple[int, int, int]]) -> int:
    """Sum of the contributions, modulo 2^64.

    Args:
        words: flat integers of at most 8 bytes, row-major.
        dims: (size, offset, stride in the whole) per dim of `words`, innermost first.
    """
    (inner, offset, stride), *outer = dims or [(1, 0, 1)]
    columns = max(1, min(inner, _CHUNK_WORDS))
    rows = max(1, _CHUNK_WORDS // columns)
    room = min(rows * columns, words.size)
    mixed, other = np.empty(room, np.uint64), np.empty(room, np.uint64)
    table = words.reshape(-1, inner) if words.size else words.reshape(0, 1)
    within = (np.arange(min(inner, columns), dtype=np.uint64) + np.uint64(offset)) * np.uint64(stride) + np.uint64(1)
    total = 0
    for row in range(0, len(table), rows):
        bases = _row_bases(row, min(rows, len(table) - row), outer)
        for column in range(0, inner, columns):
            part = table[row : row + rows, column : column + columns]
            index, bits = (buffer[: part.size].reshape(part.shape) for buffer in (mixed, other))
            np.add((bases + np.uint64(column * stride))[:, None], within[: part.shape[1]], out=index)
            _mix(index, bits)
            bits.view(np.int64)[...] = part
            np.multiply(bits, _ODD, out=bits)
            np.add(index, bits, out=index)
            _mix(index, bits)
            total += int(index.sum(dtype=np.uint64))
    return total % (1 << 64)


def _row_bases(first: int, count: int, outer: Sequence[tuple[int, int, int]]) -> Words:
    """What the outer dims add to the index, by row."""
    number = np.arange(first, first + count, dtype=np.uint64)
    bases = np.zeros(count, np.uint64)
    for size, offset, stride in outer:
        bases += (number % np.uint64(size) + np.uint64(offset)) * np.uint64(stride)
        number //= np.uint64(size)
    return bases


def _mix(words: Words, spare: Words) -> None:
    """SplitMix64's finalizer, in place."""
    for shift, factor in _STEPS:
        np.right_shift(words, shift, out=spare)
        np.bitwise_xor(words, spare, out=words)
        np.multiply(words, factor, out=words)
    np.right_shift(words, _LAST_SHIFT, out=spare)
    np.bitwise_xor(words, spare, out=words)
