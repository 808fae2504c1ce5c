"""What has become of an elastic run so far, which outlives its worker groups, and is told as events."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ray_ckpt.errors import GroupError, WorkerError
from ray_ckpt.events import END, Event, Events, Listeners, failure_of, save_events
from ray_ckpt.recipes.train_elastic.notices import Notice
from ray_ckpt.recipes.train_elastic.report import Drain, FailedSave, Restart, Resume
from ray_ckpt.report import LoadReport, SaveReport

if TYPE_CHECKING:
    from ray_ckpt.recipes.train_elastic.ranks import SaveOutcome

KEPT_REPORTS = 100
"""Reports of saves, and of loads, that are kept for the page."""


@dataclass(frozen=True)
class _Failure:
    """A failure of the run, as it was noticed."""

    cause: str
    rank: int | None
    """The first rank to blame; None when no single rank is."""
    step: int
    """The next to be trained."""
    kind: str
    """The cause without its numbers."""
    noticed_at: float
    """`time.monotonic()`."""

    @classmethod
    def of(cls, error: GroupError, step: int) -> _Failure:
        rank = error.ranks[0] if isinstance(error, WorkerError) else None
        # Numbers differ from one time to the next, as those of processes and of addresses do.
        return cls(str(error), rank, step, re.sub(r"\d+", "#", str(error)), time.monotonic())

    def repeats(self, other: _Failure | None) -> bool:
        """Whether it is the same failure of the same rank at the same step: it would come again and again."""
        return other is not None and (self.step, self.rank, self.kind) == (other.step, other.rank, other.kind)

    @property
    def restart(self) -> Restart:
        """The restart as it would be reported now."""
        return Restart(self.cause, self.rank, self.step, time.monotonic() - self.noticed_at)


@dataclass
class Progress:
    """The run so far. It outlives the worker groups."""

    tell: Events = field(default_factory=Listeners)
    losses: list[float] = field(default_factory=list)
    layouts_used: list[str] = field(default_factory=list)
    restarts: list[Restart] = field(default_factory=list)
    damaged: dict[int, str] = field(default_factory=dict)
    """Damaged steps that were passed over at a start: path and reason."""
    saves: deque[SaveReport] = field(default_factory=lambda: deque(maxlen=KEPT_REPORTS))
    """The last ones, for the page."""
    loads: deque[Sequence[LoadReport]] = field(default_factory=lambda: deque(maxlen=KEPT_REPORTS))
    """The last ones: the reports of all ranks each."""
    resumes: list[Resume] = field(default_factory=list)
    failed_saves: list[FailedSave] = field(default_factory=list)
    drains: list[Drain] = field(default_factory=list)
    not_durable: dict[str, None] = field(default_factory=dict)
    """What was told of copies that failed, each text once, in order."""
    _last: _Failure | None = None
    _open: _Failure | None = None
    """The last failure, until training is back where it had been."""

    @property
    def step(self) -> int:
        """The next to be trained."""
        return len(self.losses)

    def saved(self, outcomes: Sequence[SaveOutcome | None], step: int) -> str:
        """Note what the ranks, which all know the same, tell of a save.

        Returns:
            Why it has failed; empty when it has not.
        """
        outcome = next((found for found in outcomes if found is not None and found.failure is not None), outcomes[0])
        if outcome is None:
            return ""
        if outcome.failure is not None:
            kind, message = outcome.failure
            self.failed_saves.append(FailedSave(step, message))
            self.tell(Event("save", END, time.time(), 0.0, step, failure=kind, message=message))
            return message
        report = outcome.report
        assert report is not None, "what has not failed has a report"
        self.saves.append(report)
        self.not_durable |= dict.fromkeys(report.not_durable)
        for event in save_events(report):
            self.tell(event)
        return ""

    def trained(self, loss: float, seconds: float = 0.0) -> None:
        """Note a step.

        Args:
            seconds: what it took.
        """
        self.losses.append(loss)
        self.tell(Event("train", "step", time.time() - seconds, seconds, self.step))
        self.caught_up()

    def drained(self, notice: Notice) -> None:
        """Note that training goes on without a node that is to go."""
        self.drains.append(Drain(self.step, notice.node, list(notice.ranks), notice.left_s))
        self.tell(Event("train", "drain", time.time(), 0.0, self.step, notice.ranks[0], message=notice.text))

    def caught_up(self) -> None:
        """Note what a failure has cost, once training is back where it had been."""
        if self._open is not None and self.step >= self._open.step:
            self._restarted(self._open.restart)
            self._open = None

    def _restarted(self, restart: Restart) -> None:
        self.restarts.append(restart)
        lost_s = restart.seconds_lost
        self.tell(Event("train", "restart", time.time() - lost_s, lost_s, restart.step, restart.rank))

    def failed(self, error: GroupError, max_failures: int) -> None:
        """Note a failure.

        Raises:
            GroupError: the failure itself, when it is not worth another try.
        """
        if self._open is not None:
            # It struck again before training was back: both are told.
            self._restarted(self._open.restart)
        failure = _Failure.of(error, self.step)
        kind, message = failure_of(error)
        self.tell(Event("train", "end", time.time(), 0.0, self.step, failure.rank, failure=kind, message=message))
        if failure.repeats(self._last) or len(self.restarts) >= max_failures:
            raise error
        self._open = self._last = failure
