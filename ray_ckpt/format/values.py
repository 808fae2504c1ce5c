"""Plain Python values <-> JSON, exactly: what is not exact is refused, never rounded.

`None`, `bool`, `int`, finite `float`, `str`, `list` and `dict` with text keys stand for themselves. Two things that
JSON lacks are tagged: `{"$tuple": [...]}` and `{"$float": "nan" | "inf" | "-inf"}`; a dict with a key that starts with
`$` is therefore refused. Subclasses (an `IntEnum`, a `numpy.float64`, an `OrderedDict`) are refused too: they would
come back as something else.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

from ray_ckpt.errors import FormatError, UsageError
from ray_ckpt.format import limits
from ray_ckpt.text import quoted

Json: TypeAlias = Any
"""What `json.loads` returns."""


class NotPlainError(ValueError):
    """The value cannot be written as JSON and come back the same."""


def encode(value: object, depth: int = 0) -> Json:
    """The value as JSON.

    Args:
        depth: levels of nesting around it.

    Raises:
        NotPlainError: it would not come back the same.
        UsageError: it is nested deeper than a record may be.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if isinstance(value, float) and kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if depth > limits.NESTING.default and depth > limits.NESTING.value:
        raise UsageError(
            f"a value nested more than {limits.NESTING.value} levels deep would not be read again; set "
            f"{limits.NESTING.variable} to a higher number, for the load as well"
        )
    if isinstance(value, list) and kind is list:
        return [encode(item, depth + 1) for item in value]
    if isinstance(value, tuple) and kind is tuple:
        return {"$tuple": [encode(item, depth + 1) for item in value]}
    if isinstance(value, dict) and kind is dict and all(type(key) is str and key[:1] != "$" for key in value):
        return {key: encode(item, depth + 1) for key, item in value.items()}
    raise NotPlainError(f"{kind.__module__}.{kind.__qualname__} is not a plain value")


def decode(data: Json, depth: int = 0) -> Any:
    """The value that `encode` was given.

    Args:
        depth: levels of nesting around it.

    Raises:
        FormatError: the JSON holds a tag, or a number, that `encode` does not write, or is nested too deep.
    """
    if not isinstance(data, (dict, list)):
        if type(data) is float and not math.isfinite(data):
            raise FormatError("a number is too large for a float")
        return data
    if depth > limits.NESTING.default and depth > limits.NESTING.value:
        raise limits.NESTING.error("values that are nested too deep", "the record")
    if isinstance(data, list):
        return [decode(item, depth + 1) for item in data]
    tags = [key for key in data if key[:1] == "$"]
    if not tags:
        return {key: decode(item, depth + 1) for key, item in data.items()}
    if tags == ["$tuple"] and len(data) == 1 and isinstance(data["$tuple"], list):
        return tuple(decode(item, depth + 1) for item in data["$tuple"])
    if tags == ["$float"] and len(data) == 1 and data["$float"] in ("nan", "inf", "-inf"):
        return float(data["$float"])
    raise FormatError(f"not an encoded value: {quoted(data)}")
