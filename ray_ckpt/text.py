"""Text for messages."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["listed"]


def listed(items: Sequence[object], *, at_most: int = 5, separator: str = ", ") -> str:
    """The first items, and how many more there are: `a, b, and 3 more`."""
    more = len(items) - at_most
    return separator.join([*map(str, items[:at_most]), *([f"and {more} more"] if more > 0 else [])])
