"""PhaseClock: what a rank spends its time on in a save or a load."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ray_ckpt.report import Phase

__all__ = ["PhaseClock"]


@dataclass
class Running:
    """A stretch of time that has begun. What it takes to tell of it is filled in until it ends."""

    start_s: float
    """Seconds since the epoch."""
    num_bytes: int = 0
    checksum_s: float | None = None
    """Seconds of it that were spent on checksums, which are a phase of their own; None when there were none."""


class PhaseClock:
    """Measures stretches of time, for the reports. Costs two looks at a clock each."""

    def __init__(self) -> None:
        self._phases: list[Phase] = []

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What was measured, in the order in which it ended. No rank is named."""
        return tuple(self._phases)

    @contextmanager
    def phase(self, name: str) -> Iterator[Running]:
        """Measure the block, unless it raises."""
        running, began = Running(time.time()), time.perf_counter()
        yield running
        seconds = time.perf_counter() - began
        self._phases.append(Phase(name, None, running.start_s, seconds, running.num_bytes))
        if running.checksum_s is not None:
            self._phases.append(Phase("checksum", None, running.start_s, running.checksum_s, running.num_bytes))
