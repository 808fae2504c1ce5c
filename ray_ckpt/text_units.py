"""Numbers for people."""

from __future__ import annotations

import re

__all__ = ["count", "format_bytes", "parse_bytes"]

_UNITS = {"": 1, **{f"{prefix}B": 1000**n for n, prefix in enumerate(["", "K", "M", "G", "T"])}}
_UNITS |= {f"{prefix}IB": 1024**n for n, prefix in enumerate(["K", "M", "G", "T"], start=1)}


def format_bytes(count: float) -> str:
    """Binary units, three significant digits: `12.1 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1000 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}"


def count(number: int) -> str:
    """`1 234 567`, as text."""
    return f"{number:,}".replace(",", " ")


def parse_bytes(text: str) -> int:
    """A number of bytes: `5GB` is 5 * 10^9, `5GiB` is 5 * 2^30.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is no size: give bytes, or a number with KB, MB, GB, TB, KiB, MiB, GiB or TiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
