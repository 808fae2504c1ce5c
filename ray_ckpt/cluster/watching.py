"""How far a call on the workers is: they are asked twice a second, beside what they do, and the sum is told.

a worker     save(..., progress=ctx.progress) ──> the last numbers stay in its context
the driver   while it waits: Worker.progress ── of every rank ──> the sums ──> progress(done_bytes, total_bytes)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from ray_ckpt.progress import Meter

ASK_EVERY_S = 0.5
"""Least time between two questions. No worker is asked again before all have answered."""

LAST_ANSWER_S = 2.0
"""How long the last answers may take, after the call has succeeded."""


class Watch:
    """Asks the workers of one call, and tells the sums.

    Args:
        ask: asks all ranks of the call; returns a reference per rank, to the bytes that are done and those in all.
    """

    def __init__(self, ask: Callable[[], Sequence[Any]], meter: Meter) -> None:
        self._ask = ask
        self._meter = meter
        self._asked: list[Any] = []
        self._due = time.monotonic() + ASK_EVERY_S

    def look(self) -> None:
        """Tell what has been answered, and ask again. Waits for nobody."""
        if self._asked:
            answered, silent = ray.wait(self._asked, num_returns=len(self._asked), timeout=0)
            if silent:
                return
            self._tell(answered)
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + ASK_EVERY_S
            self._asked = list(self._ask())

    def end(self) -> None:
        """The call has succeeded: tell its last numbers."""
        asked = list(self._ask())
        answered, silent = ray.wait(asked, num_returns=len(asked), timeout=LAST_ANSWER_S)
        if not silent:
            self._tell(answered)
        self._meter.end()

    def leave(self) -> Sequence[Any]:
        """References whose answers nobody waits for any more."""
        asked, self._asked = self._asked, []
        return asked

    def _tell(self, answered: Sequence[Any]) -> None:
        self._asked = []
        # A rank that has died is told by the call itself.
        with contextlib.suppress(RayError):
            numbers = ray.get(list(answered))
            self._meter.set(sum(done for done, _ in numbers), sum(total for _, total in numbers))
