"""PhaseClock: what a rank spends its time on in a save or a load."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ray_ckpt.report import Phase

__all__ = ["PhaseClock"]


class PhaseClock:
    """Measures stretches of time, for the reports. Costs two looks at a clock each."""

    def __init__(self) -> None:
        self._phases: list[Phase] = []

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What was measured, in the order in which it ended. No rank is named."""
        return tuple(self._phases)

    @contextmanager
    def phase(self, name: str, num_bytes: int = 0) -> Iterator[None]:
        """Measure the block, unless it raises."""
        start_s, began = time.time(), time.perf_counter()
        yield
        self.add(name, start_s, time.perf_counter() - began, num_bytes)

    def add(self, name: str, start_s: float, seconds: float, num_bytes: int = 0) -> None:
        """Note what was measured elsewhere.

        Args:
            start_s: seconds since the epoch.
        """
        self._phases.append(Phase(name, None, start_s, seconds, num_bytes))
