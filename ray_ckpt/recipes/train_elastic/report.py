"""What an elastic run went through, as one value: for the program that reads JSON and for the person at the screen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ray_ckpt.report import LoadReport


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
class Drain:
    """A node that was left before it went."""

    step: int
    """The step that was saved, from which training went on without the node."""
    node: str
    ranks: list[int]
    """The ranks that ran there."""
    notice_s: float | None
    """Seconds that were left; None where that was not said."""


@dataclass(frozen=True)
class FailedSave:
    """A save that failed, after which training went on."""

    step: int
    cause: str


@dataclass(frozen=True)
class Resume:
    """A start from a committed step."""

    step: int
    layout: str
    tier: str | None
    """With a front: `front` or `durable`, whichever the step was read from."""
    num_bytes: int
    """Bytes of tensors that all workers have read."""
    durable_bytes: int
    """Bytes that came to them from the durable storage."""
    seconds: float
    """Seconds that the load took on the slowest worker."""
    damaged_copies: list[str]
    """What was read from another copy, because one is damaged."""

    @classmethod
    def of(cls, layout: str, reports: Sequence[LoadReport], durable_alone: bool) -> Resume:
        """What the reports of all workers say.

        Args:
            durable_alone: whether the store has no front.
        """
        num_bytes = sum(report.num_bytes for report in reports)
        return cls(
            step=reports[0].step or 0,
            layout=layout,
            tier=reports[0].tier,
            num_bytes=num_bytes,
            durable_bytes=num_bytes if durable_alone else sum(report.durable_bytes for report in reports),
            seconds=max(report.seconds for report in reports),
            damaged_copies=sorted({text for report in reports for text in report.damaged_copies}),
        )


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
    front: str | None
    """The storage in front of it; None without one."""
    resumes: list[Resume]
    """Every start from a committed step, in order."""
    drains: list[Drain]
    """Nodes that were left within their notice."""
    failed_saves: list[FailedSave]
    """Saves that failed; the next step, or the end, tried again."""
    saved_without: dict[int, Sequence[int]]
    """Steps that were saved although ranks died meanwhile, by their replicas: step -> these ranks."""
    not_durable: list[str]
    """What could not be copied to the durable storage at some time, with reasons."""
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
        failed = f", {len(self.failed_saves)} failed saves" if self.failed_saves else ""
        curve = f", loss {self.losses[0]:.4f} -> {self.losses[-1]:.4f}" if self.losses else ""
        return [
            *(
                f"restart at step {restart.step} ({restart.seconds_lost:.1f} s lost): {restart.cause}"
                for restart in self.restarts
            ),
            f"{'stopped at' if self.stopped else 'done:'} step {self.final_step} of {self.steps}{curve}; "
            f"{len(self.restarts)} restarts{failed}; layouts {', '.join(self.layouts_used)}",
        ]
