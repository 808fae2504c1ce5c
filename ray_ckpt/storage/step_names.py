"""Names of the steps in a store: `step-<number>`, a directory each. Needs no torch."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable

from ray_ckpt.errors import UsageError

__all__ = ["directory_of", "name_in", "parse_steps"]

_STEP = re.compile(r"step-(0|[1-9][0-9]*)", re.ASCII)


def directory_of(step: int) -> str:
    """The name of a step's directory.

    Raises:
        UsageError: `step` is not a number from 0.
    """
    try:
        number = -1 if isinstance(step, bool) else operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise UsageError(f"{step!r} is not a step: it is a number from 0")
    return f"step-{number}"


def name_in(step: int | None, file: str) -> str:
    """The name in the store of a step's file, or of the store's own directory when `step` is None."""
    return file if step is None else f"{directory_of(step)}/{file}"


def parse_steps(directories: Iterable[str]) -> list[int]:
    return [int(match[1]) for match in map(_STEP.fullmatch, directories) if match]
