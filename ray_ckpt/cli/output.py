"""How commands print: aligned plain text, or one JSON object.

Colors appear on a terminal alone, and what a checkpoint's names contain cannot move the cursor.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Sequence, Sized
from typing import Any, TypeVar, cast

import click

from ray_ckpt.errors import RayCkptError
from ray_ckpt.plain_data import plain
from ray_ckpt.text import printable
from ray_ckpt.text_units import count

F = TypeVar("F", bound=Callable[..., Any])

__all__ = [
    "as_json",
    "clock",
    "count",
    "json_option",
    "more",
    "printable",
    "step_option",
    "table",
    "trusted_option",
    "uri_argument",
]


def json_option(command: F) -> F:
    """`--json`. An error is then told as JSON, too."""

    @functools.wraps(command)
    def told(*args: Any, in_json: bool, **options: Any) -> Any:
        try:
            return command(*args, in_json=in_json, **options)
        except (RayCkptError, click.ClickException) as error:
            if in_json:
                as_json({"error": error.format_message() if isinstance(error, click.ClickException) else str(error)})
            raise

    option = click.option("--json", "in_json", is_flag=True, help="Print one JSON object (docs/cli.md has its fields).")
    return option(cast(F, told))


step_option = click.option("--step", type=click.IntRange(min=0), help="Step of the store.  [default: the highest]")
trusted_option = click.option(
    "--trusted", is_flag=True, help="Let a stock DCP .metadata run whatever code it names: if you trust its author."
)


def uri_argument(name: str = "uri") -> Callable[[F], F]:
    """The place that a command is about."""
    return click.argument(name, metavar=name.upper())


def as_json(value: Any) -> None:
    """Print a value: dataclasses as objects, and what JSON has no word for, such as NaN, as text."""
    click.echo(json.dumps(plain(value), indent=2))


def table(rows: Sequence[Sequence[object]], *, head: Sequence[str] = (), right: Sequence[int] = ()) -> None:
    """Print rows in aligned columns.

    Args:
        right: columns that are aligned to the right, as numbers are.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    lines = [list(head), *cells] if head else cells
    if not lines:
        return
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for number, line in enumerate(lines):
        padded = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text = "  ".join(padded).rstrip()
        click.echo(click.style(text, bold=True) if head and number == 0 else text)


def more(items: Sized, shown: int, what: str) -> None:
    """Say how many there are beyond those that were shown, if there are."""
    if (left := len(items) - shown) > 0:
        click.echo(f"and {count(left)} more {what}: --json has them all")


def clock(seconds: float | None) -> str:
    """A time since the epoch, in UTC, so that it means the same everywhere."""
    if seconds is None:
        return "-"
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")
