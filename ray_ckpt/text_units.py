"""Numbers for people."""

from __future__ import annotations

__all__ = ["count", "format_bytes"]


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
