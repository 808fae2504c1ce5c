"""Where the elements of a DTensor's local shard lie in the global tensor: a list of boxes.

`Shard` gives every rank one box. `_StridedShard` (FSDP2 over tensor parallelism; projections that are packed into one
weight) may give a rank rows 0, 1, 4 and 5: two boxes, which lie next to each other in the local shard.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from ray_ckpt.errors import UsageError
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.torch_internals import StridedShard, local_tensor, locate_shard
from ray_ckpt.rounding import ceil_div


class LocalBox(NamedTuple):
    """A part of the local shard whose elements are a box of the global tensor."""

    box: Box
    """Place in the global tensor."""
    start: tuple[int, ...]
    """Offsets of the same elements in the local shard."""

    def of(self, local: torch.Tensor) -> torch.Tensor:
        """The elements, as a view of the local shard."""
        if local.shape == self.box.sizes:
            return local
        for dim, (start, size) in enumerate(zip(self.start, self.box.sizes, strict=True)):
            local = local.narrow(dim, start, size)
        return local


def local_boxes(tensor: DTensor) -> tuple[LocalBox, ...]:
    """The boxes that this rank's shard consists of; none if it is empty and the tensor is not.

    Raises:
        UsageError: a placement is neither a replica nor a shard, or the local tensor has not the shape that they imply.
    """
    placements = tensor.placements
    if unknown := [placement for placement in placements if type(placement) not in (Replicate, Shard, StridedShard)]:
        raise UsageError(
            f"a DTensor placed by {unknown} cannot be saved or loaded: redistribute it to Shard or Replicate"
        )
    if tensor.device_mesh.get_coordinate() is None:
        return ()
    if any(type(placement) is StridedShard for placement in placements):
        runs = [_runs(_local_indices(tensor, dim)) for dim in range(tensor.dim())]
    else:
        sizes, offsets = locate_shard(tensor)
        runs = [[(offset, size)] for offset, size in zip(offsets, sizes, strict=True)]
    implied = tuple(sum(size for _, size in of_dim) for of_dim in runs)
    local = local_tensor(tensor)
    if implied != local.shape and (local.numel() or 0 not in implied):
        raise UsageError(
            f"a DTensor of shape {list(tensor.shape)} placed by {placements} has a local shard of shape "
            f"{list(local.shape)} where the placements imply {list(implied)}"
        )
    if 0 in implied and 0 not in tensor.shape:
        return ()
    starts = [itertools.accumulate((size for _, size in of_dim), initial=0) for of_dim in runs]
    placed = [list(zip(of_dim, start)) for of_dim, start in zip(runs, starts, strict=True)]  # noqa: B905 (one start more)
    return tuple(
        LocalBox(
            Box(tuple(offset for (offset, _), _ in parts), tuple(size for (_, size), _ in parts)),
            tuple(start for _, start in parts),
        )
        for parts in itertools.product(*placed)
    )


def _local_indices(tensor: DTensor, dim: int) -> torch.Tensor:
    """Global index in this dim of each local index: the placements split it one after the other."""
    coordinate: Sequence[int] = tensor.device_mesh.get_coordinate() or []
    indices = torch.arange(tensor.shape[dim])
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, (Shard, StridedShard)) and placement.dim == dim:
            num_parts, part = tensor.device_mesh.size(axis), coordinate[axis]
            pieces = int(placement.split_factor) if isinstance(placement, StridedShard) else 1
            indices = torch.cat([_part(piece, num_parts, part) for piece in _parts(indices, pieces)])
    return indices


def _parts(indices: torch.Tensor, num_parts: int) -> list[torch.Tensor]:
    """As `torch.chunk`, with empty ones at the end where there are too few."""
    return [_part(indices, num_parts, part) for part in range(num_parts)]


def _part(indices: torch.Tensor, num_parts: int, part: int) -> torch.Tensor:
    size = ceil_div(len(indices), num_parts)
    return indices[part * size : (part + 1) * size]


def _runs(indices: torch.Tensor) -> list[tuple[int, int]]:
    """Runs of consecutive indices, as (first, length); one empty run if there are no indices."""
    if not len(indices):
        return [(0, 0)]
    breaks = [0, *((indices.diff() != 1).nonzero().flatten() + 1).tolist(), len(indices)]
    return [(int(indices[start]), end - start) for start, end in itertools.pairwise(breaks)]
