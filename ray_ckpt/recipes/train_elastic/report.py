"""What an elastic run went through, as one value: for the program that reads JSON and for the person at the screen."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.console import Console


@dataclass(frozen=True)
class Restart:
    """A failure that was recovered from, and its cost."""

    cause: str
    """The error, with every rank that failed."""
    rank: int | None
    """The first rank to blame; None when no single rank is."""
    step: int
    """The step that was being trained, or the next to be."""
    seconds_lost: float
    """Seconds from the failure until training was back at `step`."""


@dataclass(frozen=True)
class ElasticReport:
    """The fields of the JSON object."""

    final_step: int
    """Steps trained and committed."""
    steps: int
    """Steps asked for."""
    stopped: bool
    """Whether SIGTERM ended the run before all steps were trained."""
    restarts: list[Restart]
    layouts_used: list[str]
    """The layout of each worker group, in order."""
    losses: list[float]
    """The loss of each step."""
    damaged: dict[int, str]
    """Damaged steps that were passed over at a start: path and reason."""
    storage: str
    phases: dict[str, float]
    """Phase name -> seconds, of the last time that it ran."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def show(self, console: Console) -> None:
        for line in self.lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    @property
    def lines(self) -> list[str]:
        """Every restart, then the whole."""
        curve = f", loss {self.losses[0]:.4f} -> {self.losses[-1]:.4f}" if self.losses else ""
        return [
            *(
                f"restart at step {restart.step} ({restart.seconds_lost:.1f} s lost): {restart.cause}"
                for restart in self.restarts
            ),
            f"{'stopped at' if self.stopped else 'done:'} step {self.final_step} of {self.steps}{curve}; "
            f"{len(self.restarts)} restarts; layouts {', '.join(self.layouts_used)}",
        ]
