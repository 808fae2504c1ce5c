"""What is read of a checkpoint before anybody vouches for it: every limit, in one place.

Each is checked before the work that it bounds. A checkpoint that is right and exceeds one is loaded by setting the
environment variable that the error names; processes that Ray starts inherit it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from ray_ckpt.errors import FormatError, UsageError
from ray_ckpt.text import quoted

__all__ = [
    "DECODED_BYTES",
    "DIRECTORY_BYTES",
    "ENTRIES",
    "HEADER_BYTES",
    "INTEGER_BYTES",
    "ITEMS",
    "NAME_CHARS",
    "NESTING",
    "ODD_KEYS",
    "PICKLE_OPERATIONS",
    "RECORD_BYTES",
    "Limit",
    "check_dims",
    "check_shape",
]

MAX_DIMS = 64
"""Dims of a tensor. torch itself has no more."""

MAX_ELEMENTS = (1 << 63) - 1
"""Elements of a tensor, a dim of size 0 counted as 1. torch counts them in 64 bits."""


@dataclass(frozen=True)
class Limit:
    """An upper bound that a user can raise."""

    name: str
    default: int
    unit: str
    """What is counted, in the plural."""

    @property
    def variable(self) -> str:
        """The environment variable that raises the limit."""
        return f"RAY_CKPT_MAX_{self.name.upper()}"

    @property
    def value(self) -> int:
        """The limit in force.

        Raises:
            UsageError: the variable holds no number.
        """
        text = os.environ.get(self.variable)
        if text is None:
            return self.default
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise UsageError(f"{self.variable}={text[:40]!r} is no number of {self.unit}")
        return int(text)

    def check(self, count: int, where: str, aside: str = "") -> None:
        """Whether the count is within the limit.

        Args:
            where: what has that many, for the message.
            aside: what else is to be said of it.

        Raises:
            FormatError: it is not.
        """
        if count > self.default and count > self.value:
            raise self.error(f"{count} {self.unit}", where, aside)

    def error(self, found: str, where: str, aside: str = "") -> FormatError:
        """The error of something that exceeds the limit."""
        return FormatError(
            f"{where} has {found}{aside}; the limit is {self.value}. If you trust it, set the environment variable "
            f"{self.variable} to a higher number"
        )


RECORD_BYTES = Limit("record_bytes", 512 << 20, "bytes")
"""Of `manifest.json`, `.metadata`, an index, or the pickle of a file that `torch.save` wrote."""

HEADER_BYTES = Limit("header_bytes", 100_000_000, "bytes of header")
"""Of a safetensors file. The reference reader admits as many."""

DIRECTORY_BYTES = Limit("directory_bytes", 16 << 20, "bytes of directory")
"""Of a zip archive: about 100 for each of its members."""

DECODED_BYTES = Limit("decoded_bytes", 128 << 20, "bytes once it is decoded")
"""Of an object that a stream extension compressed. The length of a tensor is known."""

PICKLE_OPERATIONS = Limit("pickle_operations", 200_000_000, "pickle operations")
"""A tensor in a `.metadata` takes about 110."""

INTEGER_BYTES = Limit("integer_bytes", 1785, "bytes of one integer")
"""As long as the 4300 digits that Python itself admits in a text."""

ODD_KEYS = Limit("odd_keys", 10_000, "dict keys that are tuples or long integers")
"""Their hashes can be made to collide, and a dict of colliding keys takes quadratic time."""

NESTING = Limit("nesting", 200, "levels of nested values")

ENTRIES = Limit("entries", 1_000_000, "entries, which no model has")
"""Of a state dict, once it is flattened. What is shared counts wherever it appears."""

ITEMS = Limit("items", 10_000_000, "values in its lists")
"""What is shared counts wherever it appears."""

NAME_CHARS = Limit("name_chars", 64 << 20, "characters of names")
"""Of all entries of a checkpoint together."""


def check_dims(shape: Sequence[int], name: str) -> None:
    """Whether a tensor can have so many dims, before their sizes are multiplied.

    Raises:
        FormatError: it cannot.
    """
    if len(shape) > MAX_DIMS:
        raise FormatError(f"tensor {quoted(name)} has {len(shape)} dims; a tensor has at most {MAX_DIMS}")


def check_shape(shape: Sequence[int], name: str) -> None:
    """Whether a tensor can have this shape, before anything is made of it.

    Args:
        shape: sizes that are not negative.
        name: of the tensor, for the message.

    Raises:
        FormatError: it has too many dims or elements.
    """
    check_dims(shape, name)
    if math.prod([max(1, size) for size in shape]) > MAX_ELEMENTS:
        raise FormatError(
            f"tensor {quoted(name)} has the shape {quoted(list(shape))}, which is more elements than a tensor can have"
        )
