"""The order in which the dims of optimizer state lie in memory, so that the next step computes what it would have.

Products and sums of a transposed matrix may differ from those of its contiguous copy in the last bit, so state comes
back in the order that it was saved in: eigenvectors, as LAPACK returns them, lie column by column. State of its
parameter's shape lies as the parameter does, unless it was saved otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ray_ckpt.format.torch_internals import local_tensor
from ray_ckpt.format.wrappers import is_made_of_others

Order = tuple[int, ...]
"""Dims with more than one element, from the largest stride to the smallest."""


def order_of(tensor: torch.Tensor) -> Order:
    strides = tensor.stride()
    return tuple(sorted((dim for dim, size in enumerate(tensor.shape) if size > 1), key=lambda dim: -strides[dim]))


def default_order(shape: tuple[int, ...], parameter: torch.Tensor) -> Order:
    """How state of this shape lies that is nothing special."""
    if shape == tuple(parameter.shape) and not is_made_of_others(parameter):
        return order_of(parameter)
    return tuple(dim for dim, size in enumerate(shape) if size > 1)


def special_order(leaf: Any, parameter: torch.Tensor) -> Order | None:
    """How a leaf of a parameter's state lies, where that is not the default; None for shards, whose ranks may differ in
    it, and for what has no memory of its own."""
    if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided or leaf.is_nested or leaf.dim() < 2:
        return None
    if isinstance(leaf, DTensor):
        if not all(placement.is_replicate() for placement in leaf.placements):
            return None
    elif leaf.is_contiguous() and (leaf.shape != parameter.shape or parameter.is_contiguous()):
        return None
    if is_made_of_others(leaf):
        return None
    order = order_of(local_tensor(leaf))
    return None if order == default_order(tuple(leaf.shape), parameter) else order


def empty(shape: tuple[int, ...], order: Order, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialized memory whose dims lie in this order. An order that is none of this shape is not followed."""
    if sorted(order) != [dim for dim, size in enumerate(shape) if size > 1]:
        return torch.empty(shape, dtype=dtype, device=device)
    dims = [*order, *(dim for dim, size in enumerate(shape) if size <= 1)]
    memory = torch.empty([shape[dim] for dim in dims], dtype=dtype, device=device)
    return memory.permute([dims.index(dim) for dim in range(len(shape))])
