"""The saves of one worker group of the elastic job. The driver coordinates them, without any collective.

    begin    the workers copy what they hold, and write it beside the training that goes on
    finish   of the last step, while nothing is trained: workers that die do not end it if the others are their replicas

A save that fails does not end the run: it is told, and the next step, or the end, tries again.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType

from ray_ckpt import cluster
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.errors import (
    DIED,
    CheckpointError,
    GroupError,
    GroupTimeoutError,
    RayCkptError,
    SavePendingError,
    StorageError,
    WorkerError,
)
from ray_ckpt.protocol.save_handle import SaveHandle
from ray_ckpt.recipes.screen import Line
from ray_ckpt.recipes.train_elastic.progress import Progress
from ray_ckpt.report import SaveReport
from ray_ckpt.storage.retention import keep_last
from ray_ckpt.storage.store import CheckpointStore
from ray_ckpt.storage.two_tiers import TwoTierStore


class Saves:
    """A context manager. On leaving, no save is going on any more; on leaving by an error the group is closed.

    Args:
        progress: what it holds is saved; it is told how saves end.
        line: where that is shown.
        state_of: function of a worker that gives its state, by name.
        num_kept: number of the newest steps that are kept.
    """

    def __init__(
        self,
        store: CheckpointStore,
        group: WorkerGroup,
        progress: Progress,
        line: Line,
        state_of: str,
        num_kept: int,
    ) -> None:
        self._store = store
        self._group = group
        self._progress = progress
        self._line = line
        self._state_of = state_of
        self._num_kept = num_kept
        self._handle: SaveHandle | None = None
        self._begun = progress.step
        """The step of the last save that was begun, or was there before."""
        self._waits = False
        """Whether the run waits for a save, so that its progress is shown."""
        self._told = set(progress.not_durable)

    def __enter__(self) -> Saves:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        self._group.close(patience_s=0.0)  # which a save beside training does not outlive
        with contextlib.suppress(Exception):  # the error that is on its way says more
            self._settle(0.0)

    @property
    def has_failed(self) -> bool:
        """Whether the save that was going on beside training has failed meanwhile."""
        return self._handle is not None and self._handle.done() and self._handle.failed

    def begin(self, timeout_s: float) -> None:
        """Let the workers copy what they hold, and write it beside the training that goes on.

        Args:
            timeout_s: of the save, and of the wait for the one before.
        """
        progress = self._progress
        self._settle(timeout_s)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # it is told here
            self._handle = cluster.save(
                self._group,
                self._state_of,
                self._store,
                progress.step,
                overwrite=progress.step in progress.damaged,
                blocking=False,
                on_error="warn",
                timeout_s=timeout_s,
                progress=self._show,
                events=progress.tell,
            )
        self._begun = progress.step
        self._store.prune(keep_last(self._num_kept))

    def finish(self, left_s: Callable[[], float]) -> None:
        """Save the last step, if that has not begun or has failed, and wait for its commit. One that fails is tried
        once more.

        Args:
            left_s: the time that this may take, from now on.

        Raises:
            CheckpointError: it failed again.
            GroupError: a worker has died, and the others do not hold what it held, or one does not answer.
        """
        settled = self._settle(left_s())
        if (not settled or self._begun < self._progress.step) and not self._save(left_s()) and not self._save(left_s()):
            cause = self._progress.failed_saves[-1].cause
            raise CheckpointError(f"step {self._progress.step} is not saved: {cause}")
        self._store.prune(keep_last(self._num_kept))

    def _save(self, timeout_s: float) -> bool:
        """Save the last step while nothing is trained. Returns whether that was successful."""
        progress, step = self._progress, self._progress.step
        self._begun = step
        try:
            with self._waiting():
                report = cluster.save(
                    self._group,
                    self._state_of,
                    self._store,
                    step,
                    overwrite=step in progress.damaged,
                    timeout_s=timeout_s,
                    progress=self._show,
                    events=progress.tell,
                )
        except (CheckpointError, StorageError, GroupError) as error:
            if _is_of_lost(error):
                raise
            self._note_failure(error)
            return False
        self._note(report)
        return True

    def _settle(self, timeout_s: float) -> bool:
        """Wait for the save beside training, if there is one. Returns whether it has not failed."""
        handle, self._handle = self._handle, None
        if handle is None:
            return True
        try:
            with self._waiting():
                report = handle.result(timeout_s)
        except SavePendingError:
            self._handle = handle
            raise
        except (CheckpointError, StorageError, GroupError) as error:
            self._note_failure(error)
            return False
        self._note(report)
        return True

    def _note(self, report: SaveReport) -> None:
        progress = self._progress
        progress.saved(report)
        if report.lost_ranks:
            ranks = ", ".join(map(str, report.lost_ranks))
            self._line.note(f"step {report.step} is saved without what died: rank {ranks}")
        for problem in [text for text in progress.not_durable if text not in self._told]:
            self._told.add(problem)
            self._line.note(problem)
        self._look_for_durable()

    def _look_for_durable(self) -> None:
        """Others copy a step to the durable tier, so that no report tells when it is there."""
        if not isinstance(self._store, TwoTierStore):
            return
        with contextlib.suppress(StorageError):  # what is wrong there is told by those who copy
            if (newest := self._store.durable.latest()) is not None:
                self._progress.durable(newest, self._store.durable.address)

    def _note_failure(self, error: RayCkptError) -> None:
        """Tell that the save has failed, and that the next one tries again. That workers are lost, the group tells."""
        if _is_of_lost(error):
            return
        cause = self._progress.not_saved(self._begun, error)
        self._line.note(f"the save of step {self._begun} failed, training goes on and tries again: {cause}")

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def _show(self, done: int, total: int) -> None:
        if self._waits:
            self._line.progress(done, total)


def _is_of_lost(error: RayCkptError) -> bool:
    """Whether workers have died, or do not answer, so that this group trains no more."""
    died = isinstance(error, WorkerError) and any(failure.error_type == DIED for failure in error.failures)
    return died or isinstance(error, GroupTimeoutError)
