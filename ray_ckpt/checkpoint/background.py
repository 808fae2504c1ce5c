"""Saves beside training: one at a time per process, in a thread, with a group of their own.

save(blocking=False) ── Saver.start ── thread: write, check, publish ──> SaveHandle.result
next save            ── Saver.settle: wait for it, and raise its failure unless `result` has done so
end of the process   ── Python waits for the thread; a failure that was not raised is printed, and the exit code is 1
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable

import torch.distributed as dist

from ray_ckpt.checkpoint.carriers import Alone, Carrier, LostContact, Star, timeout_of
from ray_ckpt.checkpoint.meetings import Deadline
from ray_ckpt.errors import CheckpointError, RayCkptError
from ray_ckpt.protocol.coordinator import PlanCache
from ray_ckpt.protocol.host_copy import HostCopy
from ray_ckpt.protocol.messages import Assignment
from ray_ckpt.protocol.rank_save import PlanMemory
from ray_ckpt.protocol.save_handle import SaveHandle
from ray_ckpt.report import SaveReport


class Saver:
    """What a process keeps from one save to the next: plans, the memory of copies, a group, the save in flight."""

    def __init__(self) -> None:
        self.host_copy = HostCopy()
        self._pending: SaveHandle | None = None
        self.num_failed = 0
        """Saves that have failed, and were passed over, since the last one that ended well."""
        self._meet(None)

    def meet(self) -> None:
        """Forget what was agreed with other ranks if the process group is another one than at the previous save."""
        group = dist.group.WORLD if dist.is_initialized() else None
        if group is not self._trainers_group():
            self._meet(group)

    def _meet(self, group: dist.ProcessGroup | None) -> None:
        # Weakly: the trainer may destroy its group, and then nothing may keep its connections open.
        self._trainers_group: Callable[[], dist.ProcessGroup | None] = weakref.ref(group) if group else lambda: None
        self._is_alone = group is None or group.size() == 1
        self._background: dist.ProcessGroup | None = None
        self.memory = PlanMemory()
        self.cache = PlanCache()
        self.known: frozenset[str] = frozenset()
        """Tokens of this rank's plans that the coordinator's cache holds."""
        self.agreed: Assignment | None = None
        """This rank's assignment for the plan of that token."""

    @property
    def busy(self) -> bool:
        return self._pending is not None and not self._pending.done()

    def remember(self, assignment: Assignment) -> None:
        """Keep what this save does, for the next one of the same plan."""
        self.known, self.agreed = frozenset({self.memory.token}), assignment

    @property
    def has_carrier(self) -> bool:
        """Whether ranks can talk beside training."""
        return self._is_alone or self._background is not None

    def settle(self, deadline: Deadline | None = None, *, is_patient: bool = False) -> None:
        """Wait for the save in flight.

        Args:
            is_patient: warn of its failure instead of raising it.

        Raises:
            CheckpointError: it failed, and no call on this rank has raised that yet.
            SavePendingError: it has not ended by the deadline.
        """
        handle = self._pending
        if handle is None:
            return
        handle.wait(None if deadline is None else deadline.left_s)
        self._pending = None
        if handle.failed:
            # Some ranks may have stopped in the middle of an exchange.
            self._background = None
            self.num_failed += is_patient
        if (failure := handle.take_failure(and_went_on=is_patient)) is not None:
            if not is_patient:
                raise failure
            warnings.warn(str(failure), RuntimeWarning, stacklevel=2)

    def pass_over(self, address: str, error: RayCkptError) -> SaveHandle:
        """Go on although a save could not begin. Returns a handle that has failed."""
        self.num_failed += 1
        handle = SaveHandle.of_failure(address, error)
        warnings.warn(handle.described, RuntimeWarning, stacklevel=3)
        return handle

    def carrier(self, deadline: Deadline | None, *, anew: bool) -> Carrier:
        """For the thread beside training. All ranks call it.

        Args:
            anew: some rank has none.
        """
        if self._is_alone:
            return Alone()
        if self._background is None or anew:
            trainers = dist.group.WORLD
            assert trainers is not None, "several ranks have a group"
            self._background = dist.new_group(backend="gloo", timeout=timeout_of(trainers))
        return Star(self._background, deadline)

    def start(self, handle: SaveHandle, work: Callable[[], SaveReport]) -> None:
        def work_alone() -> SaveReport:
            try:
                return work()
            except LostContact as error:
                raise CheckpointError(
                    f"save failed: {error}; it may or may not have been committed, look for it at its target"
                ) from error

        self._pending = handle
        handle.start(work_alone)


_saver = Saver()


def saver() -> Saver:
    """This process's own."""
    return _saver


def _begin_in_child() -> None:
    """A forked process has neither the thread nor the memory of its parent's."""
    global _saver
    _saver = Saver()


os.register_at_fork(after_in_child=_begin_in_child)
