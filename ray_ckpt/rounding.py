"""Integer division that rounds up: for sizes and counts, which floats would round wrong past 2^53."""

from __future__ import annotations

__all__ = ["ceil_div", "round_up"]


def ceil_div(number: int, divisor: int) -> int:
    """The least integer that is not below `number / divisor`."""
    return -(-number // divisor)


def round_up(number: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `number`."""
    return ceil_div(number, multiple) * multiple
