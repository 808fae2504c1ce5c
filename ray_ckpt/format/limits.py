"""The limits of what is read from a checkpoint that nobody has checked yet, in one place.

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
    "EMPTY_CONTAINERS",
    "ENTRIES",
    "HEADER_BYTES",
    "INTEGER_BYTES",
    "ITEMS",
    "JSON_VALUES",
    "NAME_CHARS",
    "NESTING",
    "ODD_KEYS",
    "PICKLE_OPERATIONS",
    "RECORD_BYTES",
    "SIGNATURE_BYTES",
    "Limit",
    "check_dims",
    "check_shape",
]

MAX_DIMS = 64
"""Largest number of dims of a tensor, as in torch itself."""

MAX_ELEMENTS = (1 << 63) - 1
"""Largest number of elements of a tensor, where a dim of size 0 counts as 1. torch counts them in 64 bits."""


@dataclass(frozen=True)
class Limit:
    """An upper bound that a user can raise."""

    name: str
    default: int
    unit: str
    """Unit of the limit, in the plural, such as `bytes`."""

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
        """Refuse a count that exceeds the limit.

        Args:
            where: what has that count, for the message.
            aside: a remark on it, for the message.

        Raises:
            FormatError: the count exceeds the limit.
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
"""Size of `manifest.json`, `.metadata`, an index, or the pickle of a file that `torch.save` wrote."""

HEADER_BYTES = Limit("header_bytes", 100_000_000, "bytes of header")
"""Size of a safetensors file's header. The reference reader has the same limit."""

DIRECTORY_BYTES = Limit("directory_bytes", 16 << 20, "bytes of directory")
"""Size of a zip archive's directory, which takes about 100 bytes per member."""

DECODED_BYTES = Limit("decoded_bytes", 128 << 20, "bytes once it is decoded")
"""Size of an object that a stream extension compressed. That of a tensor is known."""

PICKLE_OPERATIONS = Limit("pickle_operations", 200_000_000, "pickle operations")
"""Operations of one pickle. A tensor in a `.metadata` takes about 110."""

EMPTY_CONTAINERS = Limit("empty_containers", 1_000_000, "containers with next to nothing in them")
"""Lists, dicts, sets and tuples of a pickle that has little else: each of its bytes can take 200 of memory."""

INTEGER_BYTES = Limit("integer_bytes", 1785, "bytes of one integer")
"""Size of one integer: the 4300 digits that Python itself admits in a text."""

ODD_KEYS = Limit("odd_keys", 10_000, "dict keys that are tuples or long integers")
"""Dict keys whose hashes can be made to collide: a dict of colliding keys takes quadratic time."""

SIGNATURE_BYTES = Limit("signature_bytes", 16 << 20, "bytes")
"""Size of `model.sig`, which takes about 200 bytes per file that it names."""

NESTING = Limit("nesting", 200, "levels of nested values")

ENTRIES = Limit("entries", 1_000_000, "entries, which no model has")
"""Entries of a flattened state dict. What is shared counts wherever it appears."""

ITEMS = Limit("items", 10_000_000, "values in its lists")
"""Values in lists. What is shared counts wherever it appears."""

JSON_VALUES = Limit("json_values", 3_000_000, "commas and brackets")
"""Values in a JSON text of another program. A tensor in a safetensors header takes about eight."""

NAME_CHARS = Limit("name_chars", 64 << 20, "characters of names")
"""Length of all names of a checkpoint together."""


def check_dims(shape: Sequence[int], name: str) -> None:
    """Refuse a shape of too many dims, before their sizes are multiplied.

    Raises:
        FormatError: a tensor cannot have so many dims.
    """
    if len(shape) > MAX_DIMS:
        raise FormatError(f"tensor {quoted(name)} has {len(shape)} dims; a tensor has at most {MAX_DIMS}")


def check_shape(shape: Sequence[int], name: str) -> None:
    """Refuse a shape that no tensor can have, before anything of it is allocated.

    Args:
        shape: sizes that are not negative.
        name: the tensor's name, for the message.

    Raises:
        FormatError: it has too many dims or elements.
    """
    check_dims(shape, name)
    if math.prod([max(1, size) for size in shape]) > MAX_ELEMENTS:
        raise FormatError(
            f"tensor {quoted(name)} has the shape {quoted(list(shape))}, which is more elements than a tensor can have"
        )
