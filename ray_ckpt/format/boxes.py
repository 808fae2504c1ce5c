"""Boxes: the rectangular parts that a tensor is saved, sharded and read in.

A box is half-open in every dim: it holds the elements whose index `i` satisfies
`offsets[d] <= i[d] < offsets[d] + sizes[d]` for all d. The box of a 0-dim tensor has no dims and holds one element.
"""

from __future__ import annotations

import math
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


def find_overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two of the boxes that share an element, or None.

    Sweeps along the dim in which the boxes differ most, so that the usual sharding (disjoint rows or columns)
    costs O(n log n).
    """
    boxes = [box for box in boxes if box.num_elements]
    if len(boxes) < 2 or not boxes[0].sizes:
        return (boxes[0], boxes[1]) if len(boxes) > 1 else None
    dim = max(range(len(boxes[0].sizes)), key=lambda d: len({box.offsets[d] for box in boxes}))
    open_boxes: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offsets[dim]):
        open_boxes = [other for other in open_boxes if other.offsets[dim] + other.sizes[dim] > box.offsets[dim]]
        for other in open_boxes:
            if box.intersect(other):
                return other, box
        open_boxes.append(box)
    return None


def check_cover(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """What is wrong when the boxes do not cover a tensor of this shape exactly once; None when they do.

    Boxes that lie inside the shape and share no element cover it exactly when their element counts add up to its own.
    """
    if len(boxes) == 1 and boxes[0].sizes == tuple(shape) and not any(boxes[0].offsets):
        return None
    for box in boxes:
        if not box.fits(shape):
            return f"part at {box.offsets} of size {box.sizes} lies outside the shape {tuple(shape)}"
    if overlap := find_overlap(boxes):
        first, second = overlap
        return f"parts at {first.offsets} of size {first.sizes} and at {second.offsets} of size {second.sizes} overlap"
    present, wanted = sum(box.num_elements for box in boxes), math.prod(shape)
    if present != wanted:
        return f"{wanted - present} of {wanted} elements are missing"
    return None
