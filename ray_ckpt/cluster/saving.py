"""save(group, state_of, target, step): the phases of `protocol/`, carried by actor calls, without any collective.

driver                                    every worker
    plan    ── state_of ───────────────>  look through the state          <── LocalPlan ──
    merge, refuse what does not fit
    stage   ── Assignment ─────────────>  only with blocking=False: copy; from here on in a thread of the driver,
                                          and beside the other calls of the workers
    write   ── Assignment ─────────────>  write files (again, if asked)   <── RankRecord ──
    check, see the files; publish
    a death in any of these               begin again with the others, if they hold all that the dead one held

The driver loads no torch: its part is merging and checking names, shapes and checksums.
"""

from __future__ import annotations

import importlib.metadata
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, overload
from weakref import WeakKeyDictionary

from ray_ckpt.cluster import worker_side
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.errors import (
    DIED,
    CheckpointError,
    CheckpointExistsError,
    CommitError,
    GroupError,
    RankFailure,
    StorageError,
    WorkerError,
)
from ray_ckpt.events import Events, Telling
from ray_ckpt.format.saved import Saved
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.progress import Progress
from ray_ckpt.protocol.coordinator import Coordinator, PlanCache
from ray_ckpt.protocol.messages import Assignment, RankRecord
from ray_ckpt.protocol.save_handle import SaveHandle, check_on_error
from ray_ckpt.protocol.save_options import Cast, SaveOptions
from ray_ckpt.report import SaveReport
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.resolve import Target, destination

T = TypeVar("T")

NOTHING = RankRecord((), b"")
"""What a lost rank has written."""


@overload
def save(
    group: WorkerGroup,
    state_of: worker_side.StateOf | str,
    target: Target,
    step: int | None = ...,
    *,
    only: Sequence[str] | None = ...,
    cast: Cast | None = ...,
    key_map: Mapping[str, str | Saved] | None = ...,
    overwrite: bool = ...,
    fingerprints: bool = ...,
    layout: str | None = ...,
    retries: int = ...,
    blocking: Literal[True] = ...,
    on_error: Literal["raise"] = ...,
    timeout_s: float | None = ...,
    progress: Progress | None = ...,
    events: Events | None = ...,
) -> SaveReport: ...
@overload
def save(
    group: WorkerGroup,
    state_of: worker_side.StateOf | str,
    target: Target,
    step: int | None = ...,
    *,
    only: Sequence[str] | None = ...,
    cast: Cast | None = ...,
    key_map: Mapping[str, str | Saved] | None = ...,
    overwrite: bool = ...,
    fingerprints: bool = ...,
    layout: str | None = ...,
    retries: int = ...,
    blocking: Literal[False],
    on_error: Literal["raise", "warn"] = ...,
    timeout_s: float | None = ...,
    progress: Progress | None = ...,
    events: Events | None = ...,
) -> SaveHandle: ...
def save(
    group: WorkerGroup,
    state_of: worker_side.StateOf | str,
    target: Target,
    step: int | None = None,
    *,
    only: Sequence[str] | None = None,
    cast: Cast | None = None,
    key_map: Mapping[str, str | Saved] | None = None,
    overwrite: bool = False,
    fingerprints: bool = False,
    layout: str | None = None,
    retries: int = 0,
    blocking: bool = True,
    on_error: Literal["raise", "warn"] = "raise",
    timeout_s: float | None = None,
    progress: Progress | None = None,
    events: Events | None = None,
) -> SaveReport | SaveHandle:
    """Save what the workers hold as one checkpoint at `target`. The group stays open, whatever happens.

    A worker that dies does not end a save with `blocking=True`, nor the copying of one with `blocking=False`, if the
    others hold all that it held, as replicas do (ddp, hsdp): the save begins again without it, and
    `SaveReport.lost_ranks` and `left_out` tell. What it held is known when it had told, or no other worker's state is
    another than in the save before, or else by the layout that a `TrainState` names.

    A group has one save in flight at a time; the next one waits for it. With `blocking=False` the call returns once
    every worker has copied its part into host memory, which the next save uses again: what later calls on the workers
    change is not in the checkpoint. A thread of the driver, and the workers beside their other calls, write and commit.
    Closing the group waits for it.

    Example:
        >>> import torch
        >>> from ray_ckpt import WorkerGroup, cluster
        >>> def state_of(ctx):
        ...     return ctx.objects.setdefault("stage", {f"stage{ctx.rank}": torch.ones(3)})
        >>> with WorkerGroup(2, process_group=False) as group:
        ...     report = cluster.save(group, state_of, "run/step-1")
        >>> report.num_files
        2

    Args:
        state_of: a top-level function that returns a worker's state, given its `WorkerContext`: a `TrainState`,
            anything else with a `state_dict`, or a state dict. By name (`"package.module:function"`) the driver need
            not load its module.
        target: the checkpoint's directory as every worker's node knows it: a path, a URI, or a `Storage`. With `step`
            the store to save into: the same, or a `CheckpointStore`.
        step: number of the step in the store, from 0.
        only, cast, key_map: as for `ray_ckpt.save`.
        overwrite: replace a committed checkpoint; it stays valid until the new one is committed.
        fingerprints: also record the fingerprint of every tensor, as for `ray_ckpt.save`.
        layout: how the state lies across the workers, for the manifest; by default what rank 0's `TrainState` says.
        retries: how often a worker whose write failed writes again, without the others.
        blocking: whether to wait for the commit. Otherwise the handle, or else the next `save`, reports a failure.
        on_error: as for `ray_ckpt.save`.
        timeout_s: time limit of the whole save; by default the group's `call_timeout_s`.
        progress: called about twice a second with the bytes of tensors that the workers have written and all that they
            will, on the thread that waits for them. When it raises, the save goes on, without it and with a warning.
        events: as for `ray_ckpt.save`, with the phases of all workers.

    Raises:
        CheckpointExistsError: `target` holds a committed checkpoint already and `overwrite` was not given.
        CommitError: the workers' parts do not fit together, or differ under one name; or the driver, which commits,
            does not see at `target` what the workers have written.
        WorkerError, GroupTimeoutError: workers failed, died and were not replicas, or were too slow; names each.
            Nothing was committed.
        CheckpointError: the previous save, with `blocking=False`, failed, and no call has raised that yet; this one was
            not begun.
        SavePendingError: the save before this one has not ended within `timeout_s`; this one was not begun.
    """
    check_on_error(on_error, blocking)
    options = SaveOptions.of(only, cast, key_map, fingerprints=fingerprints)
    deadline = time.monotonic() + (group.call_timeout_s if timeout_s is None else timeout_s)
    storage, step, _ = destination(target, step)
    memory = _memories.setdefault(group, _GroupMemory())
    telling = Telling(events, "save", storage.address, step)
    outcome: SaveReport | SaveHandle
    try:
        with telling.failing():
            memory.settle(deadline - time.monotonic(), is_patient=on_error == "warn")
            coordinator = Coordinator(
                storage,
                overwrite=overwrite,
                layout=layout,
                saved_by={"torch": importlib.metadata.version("torch")},
                cache=memory.plans,
                step=step,
                called="the driver",
            )
            coordinator.num_failed_before = memory.num_failed
            attempt = _Attempt(group, storage, coordinator, memory, retries, deadline, progress, telling)
            if blocking:
                outcome = attempt.save(state_of, options)
            else:
                outcome = memory.pending = attempt.save_beside_training(state_of, options)
    except (CheckpointError, StorageError, GroupError) as error:
        if on_error == "raise":
            raise
        memory.num_failed += 1
        outcome = SaveHandle.of_failure(storage.address, error)
        warnings.warn(outcome.described, RuntimeWarning, stacklevel=2)
    telling.blocked()
    return outcome


class _GroupMemory:
    """What is kept from one save of a group to the next."""

    def __init__(self) -> None:
        self.plans = PlanCache()
        """Plans of the last save: a worker whose plan has not changed sends a token instead."""
        self.pending: SaveHandle | None = None
        self.num_failed = 0
        """Saves that have failed, and were passed over, since the last one that ended well."""
        self.lost: dict[int, RankFailure] = {}
        """Ranks whose processes are gone, and how they were found so."""

    def settle(self, timeout_s: float, *, is_patient: bool) -> None:
        """Wait for the save in flight.

        Args:
            is_patient: warn of its failure instead of raising it.

        Raises:
            SavePendingError: it has not ended within the time; it goes on.
            CheckpointError: it failed, and nobody has seen that yet.
        """
        if self.pending is None:
            return
        self.pending.wait(max(0.0, timeout_s))
        ended, self.pending = self.pending, None
        self.num_failed = self.num_failed + is_patient if ended.failed else 0
        if (failure := ended.take_failure(and_went_on=is_patient)) is not None:
            if not is_patient:
                raise failure
            warnings.warn(str(failure), RuntimeWarning, stacklevel=3)


_memories: WeakKeyDictionary[WorkerGroup, _GroupMemory] = WeakKeyDictionary()


class _Attempt:
    """The driver's side of one save. After a failure nothing is left of it on the workers that answer.

    While the states may not change, the death of workers does not end it if the others hold all that those held: then
    it begins again without them.
    """

    def __init__(
        self,
        group: WorkerGroup,
        storage: Storage,
        coordinator: Coordinator,
        memory: _GroupMemory,
        retries: int,
        deadline: float,
        progress: Progress | None,
        telling: Telling,
    ) -> None:
        self._group = group
        self._storage = storage
        self._coordinator = coordinator
        self._memory = memory
        self._retries = retries
        self._deadline = deadline
        self._progress = progress
        self._telling = telling

    def save(self, state_of: worker_side.StateOf | str, options: SaveOptions) -> SaveReport:
        """All of it."""
        return self._without_lost(lambda: self._finish(self._plan(state_of, options)))

    def save_beside_training(self, state_of: worker_side.StateOf | str, options: SaveOptions) -> SaveHandle:
        """Wait until the workers have copied their parts, and begin the rest in a thread."""

        def stage() -> Sequence[Assignment]:
            assignments = self._plan(state_of, options)
            with self._discarding():
                self._call(worker_side.stage, {assignment.rank: (assignment,) for assignment in assignments})
            return assignments

        assignments = self._without_lost(stage)
        handle = SaveHandle(self._storage.address)
        self._group.wait_for(handle.wait)

        def finish() -> SaveReport:
            with self._telling.failing():
                return self._finish(assignments)

        handle.start(finish)
        return handle

    def _without_lost(self, try_it: Callable[[], T]) -> T:
        """Call it, and again whenever workers have died that it had not known to be gone.

        Raises:
            WorkerError: of those that died, when the others cannot save without them.
        """
        while True:
            num_lost = len(self._memory.lost)
            try:
                return try_it()
            except WorkerError:
                if len(self._memory.lost) == num_lost or not self._left:
                    raise
                self._coordinator.begin_again()

    def _plan(self, state_of: worker_side.StateOf | str, options: SaveOptions) -> Sequence[Assignment]:
        """Let the workers look through their states; who writes what."""
        coordinator, lost = self._coordinator, self._memory.lost
        if not self._left:
            raise WorkerError(tuple(lost.values()))
        known = self._memory.plans.token_of
        args_of = {rank: (coordinator.attempt, state_of, self._storage, known(rank), options) for rank in self._left}
        with self._discarding(), collector_paused():  # plans of many parts arrive
            offers = self._call(worker_side.plan, args_of)
            layout = offers[self._left[0]].layout
            coordinator.layout = coordinator.layout or layout
            plans = [offers[rank].plan if rank in offers else None for rank in range(self._group.num_workers)]
            try:
                return coordinator.merge(plans, layout)
            except CommitError as error:
                if not lost:
                    raise
                failure = WorkerError(tuple(lost.values()))
                failure.append(f"the others cannot save alone: {error}")
                raise failure from error

    def _finish(self, assignments: Sequence[Assignment]) -> SaveReport:
        """Let the workers write, check what they have written, and commit it."""
        coordinator = self._coordinator
        with self._discarding():
            args_of = {assignment.rank: (assignment,) for assignment in assignments}
            records = self._call(
                worker_side.write, args_of, beside=True, retries=self._retries, progress=self._progress
            )
            coordinator.check([records.get(rank, NOTHING) for rank in range(self._group.num_workers)])
            stock_record = self._stock_record()
        # After a failed commit the checkpoint may be there or not: the files stay, only the state is released.
        ending = worker_side.finish
        try:
            report = coordinator.publish(stock_record)
        except CheckpointExistsError:
            ending = worker_side.discard  # it is another writer's that is there
            raise
        finally:
            self._tell_left(ending)
        self._telling.saved(report)
        return report

    def _stock_record(self) -> bytes:
        """Made by the first worker that lives to do it: all that they were to write is written."""
        *others, last = self._left
        for rank in others:
            try:
                return self._call_for_record(rank)
            except WorkerError as error:
                if any(failure.error_type != DIED for failure in error.failures):
                    raise
        return self._call_for_record(last)

    def _call_for_record(self, rank: int) -> bytes:
        made: bytes = self._call(worker_side.stock_record, {rank: (self._coordinator.manifest,)}, beside=True)[rank]
        return made

    @property
    def _left(self) -> list[int]:
        """The ranks that are not lost, as far as is known."""
        return [rank for rank in range(self._group.num_workers) if rank not in self._memory.lost]

    def _call(self, fn: Callable[..., Any], args_of: Mapping[int, tuple[Any, ...]], **options: Any) -> dict[int, Any]:
        try:
            return self._group.call(fn, args_of, timeout_s=max(0.0, self._deadline - time.monotonic()), **options)
        except WorkerError as error:
            self._memory.lost |= {failure.rank: failure for failure in error.failures if failure.error_type == DIED}
            raise

    def _tell_left(self, fn: Callable[..., Any]) -> None:
        worker_side.tell_all(self._group, fn, self._coordinator.attempt, self._memory.lost)

    @contextmanager
    def _discarding(self) -> Iterator[None]:
        """If the block fails, let the workers remove their files. What a dead one leaves is for the store's `clean`."""
        try:
            yield
        except BaseException:
            self._tell_left(worker_side.discard)
            raise
