"""How far a long operation is, told to whoever asked.

the byte path of a rank ── Meter.add ── at most ten times a second ──> progress(done_bytes, total_bytes)
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Meter", "Progress"]

Progress = Callable[[int, int], None]
"""Takes the bytes that are done, and all that will be as far as it is known."""

INTERVAL_S = 0.1
"""Least time between two calls."""

_logger = logging.getLogger(__name__)


class Meter:
    """Counts the bytes of one operation, on threads that may count at the same time.

    `tell` is called on a thread that has just counted, never on two at a time, and nobody waits for it but that thread.
    It is there to show something: when it raises, the operation goes on without it, and `end` warns. What is no
    `Exception`, such as `KeyboardInterrupt`, is raised.

    Args:
        tell: None when nobody asked; then nothing is counted.
    """

    def __init__(self, tell: Progress | None = None) -> None:
        self._tell = tell
        self._counting = threading.Lock()
        self._telling = threading.Lock()
        """Held while `tell` runs; a thread that finds it taken goes on."""
        self._done = self._total = 0
        self._told: tuple[int, int] | None = None
        self._due = 0.0
        self._failure: Exception | None = None

    @property
    def is_heard(self) -> bool:
        """Whether anybody asked."""
        return self._tell is not None

    @property
    def done(self) -> int:
        """Bytes that are done, where anybody asked."""
        return self._done

    def expect(self, num_bytes: int) -> None:
        """So many bytes more are to be done."""
        if self._tell is None:
            return
        with self._counting:
            self._total += num_bytes

    def add(self, num_bytes: int) -> None:
        """So many bytes more are done."""
        if self._tell is None:
            return
        with self._counting:
            self._done += num_bytes
        self._say_if_due()

    def set(self, done: int, total: int) -> None:
        """So many bytes are done, and so many will be, in all."""
        if self._tell is None:
            return
        with self._counting:
            self._done, self._total = done, total
        self._say_if_due()

    @contextmanager
    def trial(self) -> Iterator[Callable[[int], None]]:
        """Count the bytes of the block by what this yields; if the block fails they are not done after all."""
        if self._tell is None:
            yield self.add
            return
        counted = 0

        def count(num_bytes: int) -> None:
            nonlocal counted
            counted += num_bytes
            self.add(num_bytes)

        try:
            yield count
        except BaseException:
            self.add(-counted)
            raise

    @contextmanager
    def part(self, num_bytes: int) -> Iterator[Callable[[int], None]]:
        """Count a part of so many bytes by what this yields; after the block all of it is done, also what was left."""
        with self.trial() as count:
            counted = 0

            def count_some(some: int) -> None:
                nonlocal counted
                counted += some
                count(some)

            yield count_some
            count(num_bytes - counted)

    def end(self) -> None:
        """The operation has succeeded: tell the last numbers, unless they were told, and warn if telling has failed."""
        if self._told != (self._done, self._total):
            self._say()
        if self._failure is not None:
            text = f"{type(self._failure).__name__}: {self._failure}"
            warnings.warn(f"progress= raised {text}; it was not called again", RuntimeWarning, stacklevel=3)

    def _say_if_due(self) -> None:
        if time.monotonic() >= self._due:
            self._say()

    def _say(self) -> None:
        if self._tell is None or not self._telling.acquire(blocking=False):
            return
        try:
            self._told = self._done, self._total
            self._tell(*self._told)
        except Exception as error:
            self._tell, self._failure = None, error
            _logger.warning("progress= raised %s: %s; it is not called again", type(error).__name__, error)
        finally:
            self._due = time.monotonic() + INTERVAL_S
            self._telling.release()


NOBODY = Meter()
"""The meter of operations whose progress nobody asked for."""
