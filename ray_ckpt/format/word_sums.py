"""Sum up the contributions of words on the CPU, as `fingerprinting.py` defines them; and the keys, for any device.

By numpy, a block at a time, so that what is read and written on the way stays in the cache: widen, multiply by the keys
and add up. The factor of a block is multiplied once, by the sum of its words. Short rows, as shards along an
inner dim have them, are summed up many at once, each by its own window of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

Words = npt.NDArray[np.int64]

BLOCK_BITS = 13
BLOCK_WORDS = 1 << BLOCK_BITS
"""Words that share a factor and a place in the table: 64 KiB of keys."""

_LONG_ROW_WORDS = BLOCK_WORDS // 4
"""From here on a row is summed up by itself: its windows of the table would have to be copied."""

_PLANNED_ROWS, _PLANNED_WORDS = 1 << 12, 1 << 18
"""Short rows whose keys are found at once: at most so many, of at most so many words."""

_KEYS_AT_ONCE, _FEW_WORDS = 1 << 10, 16

_HALF = np.uint32(16)

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""SplitMix64 adds this to go on from number to number."""
_STEPS = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST_SHIFT = np.uint64(31)


def _random(numbers: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """The numbers that SplitMix64 gives at these places of its sequence."""
    words: npt.NDArray[np.uint64] = numbers.astype(np.uint64) * GOLDEN
    mix(words, np.empty_like(words))
    return words


def mix(words: npt.NDArray[np.uint64], spare: npt.NDArray[np.uint64]) -> None:
    """SplitMix64's finalizer, in place; `spare` takes what comes between."""
    for shift, factor in _STEPS:
        np.right_shift(words, shift, out=spare)
        np.bitwise_xor(words, spare, out=words)
        np.multiply(words, factor, out=words)
    np.right_shift(words, _LAST_SHIFT, out=spare)
    np.bitwise_xor(words, spare, out=words)


TABLE: Words = (_random(np.arange(1, 2 * BLOCK_WORDS + 1)) | np.uint64(1)).view(np.int64)
"""Odd numbers, of which the keys of a block are `BLOCK_WORDS` that follow each other."""

_PADDED = np.concatenate([np.zeros(_LONG_ROW_WORDS, np.int64), TABLE, np.zeros(_LONG_ROW_WORDS, np.int64)])
"""Windows that begin before the table or end behind it are those of rows of which another part counts."""


def keys_of(blocks: npt.NDArray[Any]) -> tuple[Words, Words]:
    """For blocks of these numbers, where their keys begin in the table, and their factors, which are odd."""
    found = _random(blocks + len(TABLE) + 1)
    return (found >> np.uint64(64 - BLOCK_BITS)).view(np.int64), (found | np.uint64(1)).view(np.int64)


@lru_cache(maxsize=256)
def _keys_near(number: int) -> tuple[list[int], list[int]]:
    """What `keys_of` gives for `_KEYS_AT_ONCE` blocks that follow each other."""
    starts, factors = keys_of(np.arange(number * _KEYS_AT_ONCE, (number + 1) * _KEYS_AT_ONCE))
    return starts.tolist(), factors.tolist()


def sum_words(words: npt.NDArray[Any], dims: Sequence[tuple[int, int, int]]) -> int:
    """Sum of the contributions, modulo 2^64.

    Args:
        words: flat integers without sign, of at most 4 bytes, row-major.
        dims: (size, offset, stride in the whole) per dim of `words`, innermost first; its stride is 1.
    """
    if not words.size:
        return 0
    (inner, offset, _), *outer = dims or [(1, 0, 1)]
    table = words.reshape(-1, inner)
    num_rows = max(1, min(_PLANNED_ROWS, _PLANNED_WORDS // inner))
    windows = None if inner > _LONG_ROW_WORDS or len(table) == 1 else sliding_window_view(_PADDED, inner)
    total = 0
    for row in range(0, len(table), num_rows):
        part = table[row : row + num_rows]
        bases = bases_of(row, len(part), outer) + offset
        if windows is not None:
            total += _sum_rows(part, bases, windows)
        else:
            total += sum(_sum_row(each, base) for each, base in zip(part, bases.tolist(), strict=True))
    return total % (1 << 64)


def _widened(words: npt.NDArray[Any]) -> Words:
    """With the upper half of each word of 4 bytes in its lower half too, so that the keys' low bits see it."""
    return (words ^ (words >> _HALF) if words.itemsize == 4 else words).astype(np.int64)


def bases_of(first: int, count: int, outer: Sequence[tuple[int, int, int]]) -> Words:
    """What the outer dims add to the index, by row."""
    number = np.arange(first, first + count)
    bases = np.zeros(count, np.int64)
    for size, offset, stride in outer:
        bases += (number % size + offset) * stride
        number //= size
    return bases


def _sum_row(row: npt.NDArray[Any], base: int) -> int:
    """The sum of one row, whose first word has this index."""
    total = position = 0
    block, place = divmod(base, BLOCK_WORDS)
    while position < len(row):
        starts, factors = _keys_near(block // _KEYS_AT_ONCE)
        start, factor = starts[block % _KEYS_AT_ONCE] + place, factors[block % _KEYS_AT_ONCE]
        bits = _widened(row[position : position + BLOCK_WORDS - place])
        total += factor * int(np.dot(bits, TABLE[start : start + len(bits)]))
        position, place, block = position + len(bits), 0, block + 1
    return total


def _sum_rows(rows: npt.NDArray[Any], bases: Words, windows: Words) -> int:
    """The sum of short rows, whose first words have these indices. Some may begin in one block and end in the next."""
    blocks, places = bases >> BLOCK_BITS, bases & (BLOCK_WORDS - 1)
    starts, factors = keys_of(blocks)
    lefts = BLOCK_WORDS - places
    is_split = lefts < rows.shape[1]
    if not is_split.any():
        return _sum_weighed(rows, starts + places, factors, windows)
    split, left = rows[is_split], lefts[is_split]
    is_next = np.arange(rows.shape[1]) >= left[:, None]
    next_starts, next_factors = keys_of(blocks[is_split] + 1)
    return (
        _sum_weighed(rows[~is_split], (starts + places)[~is_split], factors[~is_split], windows)
        + _sum_weighed(
            np.where(is_next, rows.dtype.type(0), split), (starts + places)[is_split], factors[is_split], windows
        )
        + _sum_weighed(np.where(is_next, split, rows.dtype.type(0)), next_starts - left, next_factors, windows)
    )


def _sum_weighed(rows: npt.NDArray[Any], starts: Words, factors: Words, windows: Words) -> int:
    """The sum of rows by the keys that begin there in the table."""
    starts = starts + _LONG_ROW_WORDS
    if rows.shape[1] < _FEW_WORDS:  # by columns: numpy takes as long for a short row as for many words
        columns = ((_widened(rows[:, column]) * factors, starts + column) for column in range(rows.shape[1]))
        return sum(int(np.dot(words, _PADDED[at])) for words, at in columns)
    total, at_once = 0, max(1, BLOCK_WORDS // rows.shape[1])
    for row in range(0, len(rows), at_once):
        keys = windows[starts[row : row + at_once]]
        sums = np.einsum("ij,ij->i", _widened(rows[row : row + at_once]), keys)
        total += int(np.dot(sums, factors[row : row + at_once]))
    return total
