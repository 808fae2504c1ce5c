"""SIGTERM, which preemption and `ray job stop` send: end what is being done, save, leave, all within a time."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopper:
    """Whether to stop, and how much time that may take.

    Args:
        grace_s: time from the signal to the end of the process.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._deadline: float | None = None
        self.out_of_time = False
        """Whether the grace is over. It ends by a `KeyboardInterrupt`, which no code on the way takes for a failure."""
        self._deferred = False

    @property
    def asked(self) -> bool:
        """Whether the signal has come."""
        return self._deadline is not None

    @property
    def left_s(self) -> float:
        """Seconds of grace that are left, once it has come."""
        return self._grace_s if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM within the block. After `ray.init`, which installs a handler of its own."""
        before = signal.signal(signal.SIGTERM, self._asked)
        alarm = signal.signal(signal.SIGALRM, self._out_of_time)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block come to its own end when the signal comes, as long as the grace lasts.

        Outside of such a block there is nothing to be saved, and the signal raises `SystemExit` at once.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self._deadline is not None:
            return
        self._deadline = time.monotonic() + self._grace_s
        if not self._deferred:
            raise SystemExit(number)
        # A tenth of the grace is left for killing the workers and giving back what they had.
        signal.setitimer(signal.ITIMER_REAL, 0.9 * self._grace_s)

    def _out_of_time(self, number: int, frame: FrameType | None) -> None:
        self.out_of_time = True
        # Of what a signal may raise, a wait of Ray's lets only this and SystemExit through, and as new ones.
        raise KeyboardInterrupt
