"""What has become of an elastic run so far, which outlives its worker groups, and is told as events."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ray_ckpt.errors import GroupError, RayCkptError, WorkerError
from ray_ckpt.events import DURABLE, Event, Events, Listeners, failure_of
from ray_ckpt.recipes.train_elastic.notices import Notice
from ray_ckpt.recipes.train_elastic.report import Drain, FailedSave, Restart, Resume
from ray_ckpt.report import LoadReport, SaveReport

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
    saved_without: dict[int, Sequence[int]] = field(default_factory=dict)
    """Steps that were saved without ranks that died meanwhile, and these."""
    not_durable: dict[str, None] = field(default_factory=dict)
    """What was told of copies that failed, each text once, in order."""
    _newest_durable: int | None = None
    _last: _Failure | None = None
    _open: _Failure | None = None
    """The last failure, until training is back where it had been."""

    @property
    def step(self) -> int:
        """The next to be trained."""
        return len(self.losses)

    def saved(self, report: SaveReport) -> None:
        """Note a save that has ended well."""
        self.saves.append(report)
        self.not_durable |= dict.fromkeys(report.not_durable)
        if report.lost_ranks and report.step is not None:
            self.saved_without[report.step] = report.lost_ranks

    def durable(self, step: int, uri: str) -> None:
        """Note that a step is in the durable tier, where it is the newest."""
        if step != self._newest_durable:
            self._newest_durable = step
            self.tell(Event("save", DURABLE, time.time(), 0.0, step, uri=uri))

    def not_saved(self, step: int, error: RayCkptError) -> str:
        """Note a save that has failed. Returns what is told of it."""
        self.failed_saves.append(FailedSave(step, str(error)))
        return str(error)

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
