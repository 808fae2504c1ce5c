"""CheckpointStore(durable, front=...): a step is committed in the front, and copied to the durable store behind it.

    save     ──> the front; whoever keeps it copies (front.py), and commits in the durable store by the same rule
    load     <── of each step the front's, if that is good, else the durable one; the newest good step of either
    prune    ──> each tier by its own steps, but no step of the front that still is to be copied

The durable store may fail or be full: then the front goes on alone, and this is told.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from ray_ckpt.errors import CheckpointError, StorageError
from ray_ckpt.report import CopyReport, RemovalReport
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.front import Front, FrontStorage
from ray_ckpt.storage.retention import Policy, keep
from ray_ckpt.storage.step_names import directory_of
from ray_ckpt.storage.steps import Look, Steps
from ray_ckpt.storage.store import DAY_S, CheckpointStore

__all__ = ["TwoTierStore"]

POLL_S = 0.1
"""Time between two looks whether a step has been copied."""

SILENCE_S = 30.0
"""How long a durable tier that did not answer is not asked again: each time, retries would hold up a resume."""

_NONE: Sequence[int] = ()

T = TypeVar("T")

_logger = logging.getLogger("ray_ckpt")


class TwoTierStore(CheckpointStore):
    """What `CheckpointStore` makes where a front is given. Its address is the durable one's."""

    def __init__(
        self,
        target: str | os.PathLike[str] | Storage,
        front: str | os.PathLike[str] | Storage | None = None,
        durable_every: int = 1,
    ) -> None:
        super().__init__(target)
        assert front is not None, "else it has one tier"
        self._front = Front(Storage.of(front), self._storage, durable_every)
        self.front = CheckpointStore(self._front.storage)
        self.durable = CheckpointStore(self._storage)
        self._steps = _TwoTierSteps(self._front)

    def __reduce__(self) -> tuple[Any, ...]:
        return CheckpointStore, (self._storage, self._front.storage, self._front.every)

    @property
    def looks_cost_requests(self) -> bool:
        return self.durable.looks_cost_requests

    # ----------------------------------------------------------------------------------------------- durability

    def copying(self) -> CopyReport:
        return self._front.copying()

    def make_durable(self, step: int | None = None, *, timeout_s: float) -> int | None:
        deadline = time.monotonic() + timeout_s
        chosen = self.latest(fallback=True) if step is None else step
        if chosen is None:
            return None
        look = self._steps.look(chosen)
        needed = () if look is None else look.built_on  # a delta alone would be of no use
        for each in (*(step for step in needed if not self.durable.is_committed(step)), chosen):
            self._make_durable(each, deadline, timeout_s)
        return chosen

    def _make_durable(self, step: int, deadline: float, timeout_s: float) -> None:
        if self.front.is_committed(step):
            self._front.order(step, overwrite=False)
        elif not self.durable.is_committed(step):
            raise self.not_found(step)
        while step in (report := self.copying()).waiting:
            if time.monotonic() > deadline:
                why = report.waiting[step] or "it is being copied"
                raise CheckpointError(f"step {step} of {self.address} is not durable after {timeout_s:g} s: {why}")
            time.sleep(POLL_S)
        if step in report.given_up:
            raise CheckpointError(f"step {step} of {self.address} is not durable: {report.given_up[step]}")
        if not self.durable.is_committed(step):
            raise CheckpointError(
                f"step {step} of {self.address} is not durable, and nobody is copying it any more: its memory has "
                "ended, or has lost the order; look at latest(), and call make_durable again"
            )

    def is_copied_alone(self, step: int) -> bool:
        return self._front.every > 1 and step % self._front.every == 0

    # -------------------------------------------------------------------------------------------------- removal

    def delete(self, *steps: int, dry_run: bool = False) -> RemovalReport:
        pins = self.pins()
        for step in steps:
            if not self.is_committed(step):
                raise self.not_found(step)
            if step in pins:
                raise self._pinned(step)
        return self._joined(
            tier.delete(*filter(tier.is_committed, steps), dry_run=dry_run) for tier in (self.front, self.durable)
        )

    def prune(self, *policies: Policy, dry_run: bool = False) -> RemovalReport:
        waiting = self.copying().waiting
        kept = (*policies, keep(waiting)) if policies and waiting else policies
        reports = [self.front.prune(*kept, dry_run=dry_run)]
        try:
            reports.append(self.durable.prune(*policies, dry_run=dry_run))
        except StorageError as error:
            _logger.warning("the steps of %s are not pruned: %s", self.address, error)
        return self._joined(reports)

    def pin(self, step: int) -> None:
        if not self.is_committed(step):
            raise self.not_found(step)
        for tier in (self.front, self.durable):
            if tier.is_committed(step):
                tier.pin(step)
            else:
                tier._pins.pin(step)  # for when it comes

    def unpin(self, step: int) -> None:
        for tier in (self.front, self.durable):
            tier.unpin(step)

    def pins(self) -> tuple[int, ...]:
        return tuple(sorted({*self.front.pins(), *self.durable.pins()}))

    def clean(self, *, older_than_s: float = DAY_S, dry_run: bool = False) -> RemovalReport:
        return self._joined(
            tier.clean(older_than_s=older_than_s, dry_run=dry_run) for tier in (self.front, self.durable)
        )

    def _joined(self, reports: Iterable[RemovalReport]) -> RemovalReport:
        """What is no longer in any tier, and the files that are gone from either."""
        done = list(reports)
        kept = {step for report in done for step in report.kept}
        removed = {step for report in done for step in report.removed} - kept
        return RemovalReport(
            self.address,
            tuple(sorted(removed)),
            tuple(sorted(kept)),
            tuple(dict.fromkeys(file for report in done for file in report.files)),
            sum(report.total_bytes for report in done),
            dry_run=any(report.dry_run for report in done),
            damages={step: damage for report in done for step, damage in report.damages.items()},
            uploads=tuple(name for report in done for name in report.uploads),
        )


class _TwoTierSteps(Steps):
    """The steps of two tiers, as those of one store."""

    def __init__(self, front: Front) -> None:
        super().__init__(front.durable)
        self._front = front
        self._in_front, self._durable = Steps(front.storage), Steps(front.durable)
        self._silent_until = 0.0

    def location(self, step: int) -> Storage:
        return FrontStorage(self._front, step, directory_of(step))

    def holding(self, step: int) -> Storage:
        front = self._in_front.look(step)
        if front is not None and not front.damage:
            return self.location(step)
        durable = self._of_durable(lambda: self._durable.look(step), None)
        if front is not None and (durable is None or durable.damage):
            return self.location(step)
        location = self._durable.location(step)
        location.tier = "durable"
        return location

    def committed(self) -> tuple[int, ...]:
        durable = self._of_durable(self._durable.committed, _NONE)
        return tuple(sorted({*self._in_front.committed(), *durable}))

    def is_committed(self, step: int) -> bool:
        return self._in_front.is_committed(step) or self._of_durable(lambda: self._durable.is_committed(step), False)

    def look(self, step: int) -> Look | None:
        front = self._in_front.look(step)
        if front is not None and not front.damage:
            return front
        durable = self._of_durable(lambda: self._durable.look(step), None)
        return durable if durable is not None and (front is None or not durable.damage) else front

    def _descending(self) -> Sequence[int]:
        durable = self._of_durable(self._durable._descending, _NONE)
        return sorted({*self._in_front._descending(), *durable}, reverse=True)

    def _of_durable(self, ask: Callable[[], T], unknown: T) -> T:
        """What the durable tier says. While it does not answer, the front's steps are all that there are."""
        if time.monotonic() < self._silent_until and self._in_front.committed():
            return unknown
        try:
            return ask()
        except StorageError as error:
            if not self._in_front.committed():
                raise  # else a run that is all there would begin anew
            self._silent_until = time.monotonic() + SILENCE_S
            _logger.warning("only the steps in %s are looked at: %s", self._front.storage.address, error)
            return unknown
