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

from ray_ckpt.format.word_sums import GOLDEN, bases_of, mix

_CHUNK_WORDS = 1 << 15
"""Words that are mixed at once: 256 KiB per buffer."""


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
        bases = bases_of(row, min(rows, len(table) - row), outer).view(np.uint64)
        for column in range(0, inner, columns):
            part = table[row : row + rows, column : column + columns]
            index, bits = (buffer[: part.size].reshape(part.shape) for buffer in (mixed, other))
            np.add((bases + np.uint64(column * stride))[:, None], within[: part.shape[1]], out=index)
            mix(index, bits)
            bits.view(np.int64)[...] = part
            np.multiply(bits, GOLDEN, out=bits)
            np.add(index, bits, out=index)
            mix(index, bits)
            total += int(index.sum(dtype=np.uint64))
    return total % (1 << 64)
