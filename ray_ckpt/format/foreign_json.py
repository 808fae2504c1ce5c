"""JSON that another program wrote, or somebody in its name."""

from __future__ import annotations

import json
from typing import Any

from ray_ckpt.errors import FormatError
from ray_ckpt.format.limits import JSON_VALUES

__all__ = ["parse_object"]


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """The object that a JSON text is.

    Raises:
        FormatError: it is none, holds a key twice, or more than `JSON_VALUES` values.
    """
    # Counted before any is made: each takes a few bytes of text, and up to a hundred times as many of memory.
    JSON_VALUES.check(text.count(b",") + text.count(b"[") + text.count(b"{"), where)
    try:
        data = json.loads(text, object_pairs_hook=_without_duplicates)
    except Exception as error:  # nested too deep, no text, integers of too many digits
        raise FormatError(f"{where} holds no JSON: {str(error)[:200]}") from error
    if not isinstance(data, dict):
        raise FormatError(f"{where} holds a JSON {type(data).__name__} where an object is expected")
    return data


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError("a key appears twice")
    return data
