"""Which elements of a tensor a rank's shard holds, from the sizes of the mesh and the placements alone.

Numbers instead of a DTensor and a process group, so that it answers for shards that other ranks wrote, elsewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from ray_ckpt.errors import FormatError
from ray_ckpt.format.boxes import Box
from ray_ckpt.rounding import ceil_div

__all__ = ["Split", "placed_boxes"]

MAX_BOXES = 100_000
"""Largest number of boxes that one shard may consist of."""

_Runs = list[tuple[int, int]]
"""Indices of one dim that a shard holds, in its order: (first, length) of each run of consecutive ones."""


class Split(NamedTuple):
    """One axis of a mesh that splits one dim of a tensor, as `Shard` and `_StridedShard` do."""

    dim: int
    num_parts: int
    """Size of the axis."""
    part: int
    """The rank's place on the axis."""
    pieces: int = 1
    """The dim is cut into so many pieces first, of which every rank gets a part: `split_factor` of `_StridedShard`."""


def placed_boxes(shape: Sequence[int], splits: Sequence[Split]) -> list[tuple[Box, tuple[int, ...]]]:
    """The boxes that a shard consists of, each with its place in the shard; none if the shard alone is empty.

    Args:
        splits: in the order in which they are applied.

    Raises:
        FormatError: there are more boxes than any layout has.
    """
    runs: list[_Runs] = [[(0, size)] for size in shape]
    for split in splits:
        runs[split.dim] = _split(runs[split.dim], split)
    sizes = shard_shape(runs)
    if 0 in sizes:
        return [(Box.whole(shape), (0,) * len(shape))] if 0 in shape else []
    num_boxes = 1
    for of_dim in runs:
        num_boxes *= len(of_dim)
    if num_boxes > MAX_BOXES:
        raise _too_many()
    starts = [itertools.accumulate((size for _, size in of_dim), initial=0) for of_dim in runs]
    placed = [list(zip(of_dim, start)) for of_dim, start in zip(runs, starts, strict=True)]  # noqa: B905 (one start more)
    return [
        (
            Box(tuple(first for (first, _), _ in parts), tuple(size for (_, size), _ in parts)),
            tuple(start for _, start in parts),
        )
        for parts in itertools.product(*placed)
    ]


def shard_shape(runs: Sequence[_Runs]) -> tuple[int, ...]:
    return tuple(sum(size for _, size in of_dim) for of_dim in runs)


def _split(runs: _Runs, split: Split) -> _Runs:
    total = sum(size for _, size in runs)
    piece = ceil_div(total, split.pieces)
    if piece and ceil_div(total, piece) > MAX_BOXES:
        raise _too_many()
    parts: _Runs = []
    for start in range(0, total, piece) if piece else ():
        length = min(piece, total - start)
        share = ceil_div(length, split.num_parts)
        first = min(length, share * split.part)
        parts += _cut(runs, start + first, start + min(length, first + share))
    return _joined(parts)


def _cut(runs: _Runs, start: int, stop: int) -> _Runs:
    """What stands at [start, stop) of the runs, one behind the other."""
    cut: _Runs = []
    at = 0
    for first, size in runs:
        low, high = max(start, at), min(stop, at + size)
        if low < high:
            cut.append((first + low - at, high - low))
        at += size
    return cut


def _joined(runs: _Runs) -> _Runs:
    joined: _Runs = []
    for first, size in runs:
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + size)
        else:
            joined.append((first, size))
    return joined


def _too_many() -> FormatError:
    return FormatError(f"a shard consists of more than {MAX_BOXES} boxes, which no layout has")
