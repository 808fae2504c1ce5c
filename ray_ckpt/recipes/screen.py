"""What a person sees of a job: one live line per phase on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.status import Status

from ray_ckpt.events import Event, Listeners, failure_of
from ray_ckpt.text_units import format_bytes

__all__ = ["Line", "Screen"]

LOG_INTERVAL_S = 15.0
"""Least time between two reports of the same wait in a log."""


LONG_S = 2.0
"""What takes longer shows its bytes, rate and time left."""


@dataclass
class Line:
    """The line of the phase in progress."""

    console: Console
    name: str
    status: Status | None
    """The spinner, on a terminal."""
    result: str = ""
    """The result to print when the phase ends well."""
    _last_logged: float = field(default=-LOG_INTERVAL_S)
    _first: tuple[float, int] = field(default=(0.0, 0))
    """When `progress` was first called for what is going on, and the bytes that were done then."""

    def update(self, text: str) -> None:
        """Say what the phase is waiting for."""
        if self.status is not None:
            self.status.update(f"{self.name}: {text}")
        elif time.monotonic() - self._last_logged >= LOG_INTERVAL_S:
            self._last_logged = time.monotonic()
            self.note(text)

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Say how many bytes are done, and how fast, and how long the rest will take, once it has taken a while.

        Args:
            text: what else is said of it, from the beginning.
        """
        now = time.monotonic()
        if not self._first[0] or done < self._first[1]:
            self._first = now, done
        passed_s, moved = now - self._first[0], done - self._first[1]
        said = [text] if text else []
        if passed_s >= LONG_S and moved:
            rate = moved / passed_s
            left_s = max(0, total - done) / rate
            said += f"{format_bytes(done)} of {format_bytes(total)}", f"{format_bytes(rate)}/s", f"{left_s:.0f} s left"
        if said:
            self.update(", ".join(said))

    def note(self, text: str) -> None:
        """Say something that stays on the screen."""
        _print_plain(self.console, f"{self.name}: {text}")


@dataclass
class Screen:
    """Shows the phases of a job and keeps their times."""

    console: Console
    events: Listeners = field(default_factory=Listeners)
    """Those who are told what the job goes through."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase name -> seconds, in order."""

    @contextmanager
    def phase(self, name: str, doing: str) -> Iterator[Line]:
        """Show a line while the block runs, and what it did with its time when it ends well."""
        text = f"{name}: {doing}"
        line = Line(self.console, name, self.console.status(text) if self.console.is_terminal else None)
        start, start_s = time.monotonic(), time.time()
        try:
            if line.status is None:
                _print_plain(self.console, text)
                yield line
            else:
                with line.status:
                    yield line
        except BaseException as error:
            failure, message = failure_of(error)
            seconds = time.monotonic() - start
            self.events(Event("job", name, start_s, seconds, failure=failure, message=message))
            raise
        self.seconds[name] = time.monotonic() - start
        self.events(Event("job", name, start_s, self.seconds[name]))
        line.note(f"{line.result or 'done'} ({self.seconds[name]:.1f} s)")


def _print_plain(console: Console, text: str) -> None:
    """One line however long, as it is: paths and numbers are neither wrapped, nor colored, nor taken for markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
