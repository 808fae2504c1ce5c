"""Random weights for the elements of a tensor, whatever part of it a rank holds.

The weight of an element is a product of numbers, one for each dim: the one that belongs to the element's place along
that dim. So a rank that holds a box needs only the numbers of the box's rows, columns and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from ray_ckpt.recipes.pipeline_to_fsdp.continuation import Projection

NUM_SUMS = 4
"""Sets of weights. What one set hides, as two errors that cancel each other, another shows."""


def project(part: torch.Tensor, offsets: Sequence[int], shape: Sequence[int]) -> Projection:
    """What a part adds to the numbers that stand for its tensor.

    Args:
        part: a plain tensor, of any dtype.
        offsets: where it lies in the tensor, per dim.
        shape: of the whole tensor.
    """
    if part.is_complex():
        part, offsets, shape = torch.view_as_real(part), [*offsets, 0], [*shape, 2]
    part = part.to(torch.float64)
    sums = []
    for number in range(NUM_SUMS):
        total = part
        for dim in reversed(range(part.dim())):
            weights = _weights(shape[dim], dim, number)[offsets[dim] : offsets[dim] + part.shape[dim]]
            total = total @ weights.to(part.device)
        sums.append(float(total))
    return Projection(tuple(sums), float(part.square().sum()))


def move(part: torch.Tensor, offsets: Sequence[int], shape: Sequence[int], by: float, number: int) -> None:
    """Change every element of a part by a fraction of itself, up or down by the sign of its weight, in place."""
    signs = torch.ones(part.shape, dtype=part.dtype, device=part.device)
    for dim, length in enumerate(part.shape):
        along = _weights(shape[dim], dim, 1000 + number)[offsets[dim] : offsets[dim] + length].sign().to(signs)
        signs *= along.reshape([-1 if d == dim else 1 for d in range(part.dim())])
    part.mul_(1 + by * signs)


@lru_cache(maxsize=256)
def _weights(length: int, dim: int, number: int) -> torch.Tensor:
    """Numbers from 1 to 2 with random signs: none is so small that it hides an element."""
    generator = torch.Generator().manual_seed(number * 100 + dim)
    numbers = torch.rand(length, generator=generator, dtype=torch.float64) + 1
    return numbers * (torch.randint(2, (length,), generator=generator) * 2 - 1)
