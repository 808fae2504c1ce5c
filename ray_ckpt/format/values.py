"""Plain Python values <-> JSON, exactly: what is not exact is refused, never rounded.

`None`, `bool`, `int`, finite `float`, `str`, `list` and `dict` with text keys stand for themselves. Two things that
JSON lacks are tagged: `{"$tuple": [...]}` and `{"$float": "nan" | "inf" | "-inf"}`; a dict with a key that starts with
`$` is therefore refused. Subclasses (an `IntEnum`, a `numpy.float64`, an `OrderedDict`) are refused too: they would
come back as something else.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

from ray_ckpt.errors import FormatError

Json: TypeAlias = Any
"""What `json.loads` returns."""


class NotPlainError(ValueError):
    """The value cannot be written as JSON and come back the same."""


def encode(value: object) -> Json:
    """The value as JSON.

    Raises:
        NotPlainError: it would not come back the same.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if isinstance(value, float) and kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, list) and kind is list:
        return [encode(item) for item in value]
    if isinstance(value, tuple) and kind is tuple:
        return {"$tuple": [encode(item) for item in value]}
    if isinstance(value, dict) and kind is dict and all(type(key) is str and key[:1] != "$" for key in value):
        return {key: encode(item) for key, item in value.items()}
    raise NotPlainError(f"{kind.__module__}.{kind.__qualname__} is not a plain value")


def decode(data: Json) -> Any:
    """The value that `encode` was given.

    Raises:
        FormatError: the JSON holds a tag, or a number, that `encode` does not write.
    """
    if isinstance(data, list):
        return [decode(item) for item in data]
    if not isinstance(data, dict):
        if type(data) is float and not math.isfinite(data):
            raise FormatError("a number is too large for a float")
        return data
    tags = [key for key in data if key[:1] == "$"]
    if not tags:
        return {key: decode(item) for key, item in data.items()}
    if tags == ["$tuple"] and len(data) == 1 and isinstance(data["$tuple"], list):
        return tuple(decode(item) for item in data["$tuple"])
    if tags == ["$float"] and len(data) == 1 and data["$float"] in ("nan", "inf", "-inf"):
        return float(data["$float"])
    raise FormatError(f"not an encoded value: {str(data)[:100]}")
