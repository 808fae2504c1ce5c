"""The fingerprint of a tensor: a digest that does not depend on how the tensor is sharded.

Every element contributes its bits times a 64-bit key, which follows from its index in the global tensor; contributions
are added modulo 2^64. The sum over disjoint parts is the sum over the tensor, so ranks that hold shards, whatever their
layout, each return the sum of what they hold and whoever asked adds them up: nobody gathers the tensor.

A changed element of up to 4 bytes always changes the sum. Other changed, moved or missing elements do except with a
probability of about 2^-63, or 2^-48 if nothing but signs differ (`fingerprinting.py` says when it is more). This is a
checksum against accidents (wrong shard, wrong order, lost write, flipped bit), not a signature against somebody who
forges one.

Here are the values, which need no torch; `fingerprinting.py` computes them, and has the formulas: sums by different
ones say nothing about each other, so that a digest names its formula.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ray_ckpt.errors import FormatError
from ray_ckpt.format.boxes import Box, check_cover

WORD_MASK = (1 << 64) - 1
"""Sums of contributions are taken modulo 2^64."""

FIRST, CURRENT = 1, 2
"""Formulas of contributions: that of earlier versions, and the one by which new sums are taken."""

_MARKS = {FIRST: "", CURRENT: "2:"}
"""What stands before the sum in a digest."""


@dataclass(frozen=True)
class Fingerprint:
    """The fingerprint of one tensor, or of the parts of it that one process holds. Plain data without torch objects.

    Fingerprints of parts of the same tensor merge into one; only a complete one has a `digest`.

    Example:
        >>> import torch
        >>> from ray_ckpt import fingerprint
        >>> found = fingerprint(torch.arange(6).reshape(2, 3))
        >>> found.dtype, found.shape
        ('int64', (2, 3))
        >>> found.merge(found) == found  # replicas count once
        True
        >>> found.digest
        'int64[2, 3]:...'
    """

    dtype: str
    """`str(torch.dtype)` without the `torch.` prefix, such as `float32`."""
    shape: tuple[int, ...]
    """Shape of the global tensor."""
    parts: dict[Box, int]
    """Part of the tensor -> sum of its elements' contributions, modulo 2^64."""
    formula: int = CURRENT
    """Number of the formula that its contributions were computed by."""

    def merge(self, other: Fingerprint) -> Fingerprint:
        """One fingerprint of all parts of both. Replicas count once.

        Raises:
            FormatError: the two differ in dtype, shape or formula, or hold different bits for the same part.
        """
        if self.formula != other.formula:
            raise FormatError(f"sums by different formulas: {self.formula} and {other.formula}")
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            raise FormatError(
                f"parts of different tensors: {self.dtype}{list(self.shape)} and {other.dtype}{list(other.shape)}"
            )
        for box in self.parts.keys() & other.parts.keys():
            if self.parts[box] != other.parts[box]:
                raise FormatError(f"replicas differ in the part at {box.offsets} of size {box.sizes}")
        return Fingerprint(self.dtype, self.shape, {**self.parts, **other.parts}, self.formula)

    @property
    def digest(self) -> str:
        """Dtype, shape, formula and sum as text: equal texts mean equal bits.

        Raises:
            FormatError: the parts do not cover the tensor exactly once.
        """
        if problem := check_cover(self.shape, list(self.parts)):
            raise FormatError(f"incomplete fingerprint: {problem}")
        return digest_of(self.dtype, self.shape, self.parts.values(), self.formula)


def digest_of(dtype: str, shape: Sequence[int], sums: Iterable[int], formula: int = CURRENT) -> str:
    """`Fingerprint.digest` of a tensor from the sums of parts that are known to cover it exactly once."""
    return f"{dtype}{list(shape)}:{_MARKS[formula]}{sum(sums) & WORD_MASK:016x}"


def formula_of(digest: str) -> int:
    """The formula by which a digest was taken."""
    return CURRENT if digest.rpartition("]:")[2].startswith(_MARKS[CURRENT]) else FIRST


def merge(fingerprints: Iterable[Fingerprint]) -> Fingerprint:
    """The fingerprint of everything that the given ones hold together.

    Raises:
        FormatError: they are not of one tensor, or replicas among them differ.
    """
    first, *others = fingerprints
    for other in others:
        first = first.merge(other)
    return first


def by_name(held: Iterable[Mapping[str, Fingerprint]]) -> dict[str, list[Fingerprint]]:
    """Name -> what each rank holds of that tensor, from what the ranks hold."""
    found: dict[str, list[Fingerprint]] = {}
    for of_rank in held:
        for name, part in of_rank.items():
            found.setdefault(name, []).append(part)
    return found
