"""Boxes: the rectangular parts that a tensor is saved, sharded and read in.

A box is half-open in every dim: it holds the elements whose index `i` satisfies
`offsets[d] <= i[d] < offsets[d] + sizes[d]` for all d. The box of a 0-dim tensor has no dims and holds one element.
"""

from __future__ import annotations

import math
import os
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache


@dataclass(frozen=True, order=True)
class Box:
    """A rectangular part of a tensor, in elements."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.sizes) or min(self.offsets + self.sizes, default=0) < 0:
            raise ValueError(f"not a box: offsets {self.offsets}, sizes {self.sizes}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @cached_property
    def num_elements(self) -> int:
        return math.prod(self.sizes)

    def intersect(self, other: Box) -> Box | None:
        """The elements in both boxes, or None when there are none."""
        offsets = tuple(max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True))
        ends = (
            min(a + m, b + n) for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        sizes = tuple(end - offset for offset, end in zip(offsets, ends, strict=True))
        return Box(offsets, sizes) if all(size > 0 for size in sizes) else None

    def within(self, frame: Box) -> Box:
        """The same elements, in the coordinates of a box that holds them."""
        return Box(tuple(a - b for a, b in zip(self.offsets, frame.offsets, strict=True)), self.sizes)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether every element of the box is an element of a tensor of this shape."""
        return len(shape) == len(self.sizes) and all(
            offset + size <= length for offset, size, length in zip(self.offsets, self.sizes, shape, strict=True)
        )


@lru_cache(maxsize=4096)
def shared_box(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Box:
    """The box, made once: a checkpoint has thousands of parts, and few boxes that differ.

    Raises:
        ValueError: there is no such box.
    """
    return Box(offsets, sizes)


def check_cover(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """What is wrong when the boxes do not cover a tensor of this shape exactly once; None when they do.

    Costs O(n log n) for n boxes, whatever they are. What is wrong is then looked for within a fixed amount of work.
    """
    if len(boxes) == 1 and boxes[0].sizes == tuple(shape) and not any(boxes[0].offsets):
        return None
    for box in boxes:
        if not box.fits(shape):
            return f"part at {box.offsets} of size {box.sizes} lies outside the shape {tuple(shape)}"
    boxes = [box for box in boxes if box.num_elements]
    if _cover_once(shape, boxes):
        return None
    if overlap := _find_overlap(boxes):
        first, second = overlap
        return f"parts at {first.offsets} of size {first.sizes} and at {second.offsets} of size {second.sizes} overlap"
    present, wanted = sum(box.num_elements for box in boxes), math.prod(shape)
    if present < wanted:
        return f"{wanted - present} of {wanted} elements are missing"
    return f"parts overlap: {len(boxes)} of them have {present} elements together, the tensor has {wanted}"


def _cover_once(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether non-empty boxes within a tensor of this shape cover it exactly once.

    Where they differ in one dim alone, they must follow each other. Else every index of every dim is given a random
    weight, and every element the product of the weights of its indices: the boxes cover each element once if, and but
    for a chance of 2^-55 only if, the weights of their elements add up to those of the tensor (modulo a prime; the
    difference is a polynomial in the weights, which is zero everywhere or nearly nowhere: Schwartz and Zippel). The
    weight of a box is a product of differences of running sums, so that only the places of its corners are drawn.
    """
    if not math.prod(shape):
        return True
    dims = [dim for dim, size in enumerate(shape) if any(box.sizes[dim] != size for box in boxes)]
    if len(dims) < 2:
        return _follow_each_other(shape, boxes, dims)
    sums: list[dict[int, int]] = [defaultdict(_random_weight) for _ in dims]
    total = 0
    for box in boxes:
        weight = 1
        for sum_up_to, dim in zip(sums, dims, strict=True):
            offset = box.offsets[dim]
            weight = weight * (sum_up_to[offset + box.sizes[dim]] - sum_up_to[offset]) % _PRIME
        total += weight
    whole = math.prod([sum_up_to[shape[dim]] - sum_up_to[0] for sum_up_to, dim in zip(sums, dims, strict=True)])
    return (total - whole) % _PRIME == 0


_PRIME = (1 << 61) - 1
_random = random.Random(os.urandom(32))
"""Seeded so that nobody who makes up boxes can know the weights."""


def _random_weight() -> int:
    return _random.randrange(_PRIME)


def _follow_each_other(shape: Sequence[int], boxes: Sequence[Box], dims: Sequence[int]) -> bool:
    """Whether boxes that span the whole tensor but for at most one dim lie in it one behind the other."""
    if not dims:
        return len(boxes) == 1
    at = 0
    for offset, size in sorted((box.offsets[dims[0]], box.sizes[dims[0]]) for box in boxes):
        if offset != at:
            return False
        at += size
    return at == shape[dims[0]]


_MAX_COMPARED = 200_000
"""Pairs of boxes that are compared to name two that overlap."""


def _find_overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two non-empty boxes that share an element; None when there are none, or they are hard to find.

    Sweeps along the dim in which the boxes differ most.
    """
    if len(boxes) < 2 or not boxes[0].sizes:
        return (boxes[0], boxes[1]) if len(boxes) > 1 else None
    dim = max(range(len(boxes[0].sizes)), key=lambda d: len({box.offsets[d] for box in boxes}))
    open_boxes: list[Box] = []
    num_compared = 0
    for box in sorted(boxes, key=lambda box: box.offsets[dim]):
        open_boxes = [other for other in open_boxes if other.offsets[dim] + other.sizes[dim] > box.offsets[dim]]
        for other in open_boxes:
            if box.intersect(other):
                return other, box
        num_compared += len(open_boxes)
        if num_compared > _MAX_COMPARED:
            return None
        open_boxes.append(box)
    return None
