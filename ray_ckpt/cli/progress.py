"""The progress of a long command: a bar with bytes, rate and time left on a terminal, nothing in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["shown"]

DELAY_S = 0.5
"""What takes no longer than this shows no bar."""


@contextmanager
def shown(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A callable that takes the bytes that are done, and all bytes.

    Args:
        quiet: show nothing, whatever standard error is.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn()
    bar = Progress(TextColumn(what), *columns, console=Console(stderr=True), transient=True)
    task, started = bar.add_task(what, total=None), time.monotonic()

    def show(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if not bar.live.is_started and time.monotonic() - started > DELAY_S:
            bar.start()

    try:
        yield show
    finally:
        bar.stop()
