"""The front of a store with two tiers: where a step is committed first, and copied from in the background.

    FrontStorage.order_copy ──> RegisteredFileSystem.copy_out ──> whoever keeps the front's files (registered.py)

Who copies is not the process that saves. So a front is a storage whose files somebody else keeps and everybody sees.
"""

from __future__ import annotations

import logging

from ray_ckpt.errors import StorageError, UsageError
from ray_ckpt.report import CopyReport
from ray_ckpt.storage.address import parse
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.registered import REGISTERED, CopyOrder, RegisteredFileSystem

__all__ = ["Front", "FrontStorage"]

_logger = logging.getLogger("ray_ckpt")


class Front:
    """A store in front of a durable one.

    Args:
        storage: of the store in front.
        durable: of the durable one.
        every: steps that are multiples of this are copied.

    Raises:
        UsageError: nobody keeps the files of the front but the processes that save; it is the durable store itself; or
            `every` is below 1.
    """

    def __init__(self, storage: Storage, durable: Storage, every: int) -> None:
        if parse(storage.uri).scheme not in REGISTERED:
            raise UsageError(
                f"front={storage.address} cannot be copied in the background, as no other process keeps its files; it "
                "can be memory of the cluster: front='ram://run?replicas=1'"
            )
        if storage.address == durable.address:
            raise UsageError(f"front={storage.address} is the durable store itself: give one of the two another place")
        if every < 1:
            raise UsageError(f"durable_every={every} must be at least 1: every that many steps one becomes durable")
        self.storage = storage
        self.durable = durable
        self.every = every

    def order(self, step: int, *, overwrite: bool) -> CopyReport:
        """Have a committed step copied, and all multiples of `every` that have not been.

        Raises:
            StorageError: the front does not answer.
        """
        filesystem = self._filesystem
        order = CopyOrder(self._path, self.durable, self.every, step, overwrite)
        return self.storage.perform("order a copy of", "", lambda: filesystem.copy_out(order))

    def copying(self) -> CopyReport:
        """What has not been copied.

        Raises:
            StorageError: the front does not answer.
        """
        filesystem = self._filesystem
        return self.storage.perform("look for", "", lambda: filesystem.copying(self._path))

    @property
    def _filesystem(self) -> RegisteredFileSystem:
        filesystem = self.storage.filesystem
        assert isinstance(filesystem, RegisteredFileSystem), "as its scheme says"
        return filesystem

    @property
    def _path(self) -> str:
        return parse(self.storage.uri).path.strip("/")


class FrontStorage(Storage):
    """A step's directory in a front."""

    tier = "front"

    def __init__(self, front: Front, step: int, directory: str) -> None:
        vars(self).update(vars(front.storage.child(directory)))
        self.durable = front.durable.child(directory)
        self._front = front
        self._step = step

    def order_copy(self, *, overwrite: bool) -> tuple[str, ...]:
        """What follows a commit. The step is saved by now: a failure is told, and not raised.

        Returns:
            What could not be copied so far, here and of the steps before.
        """
        front = self._front
        try:
            report = front.order(self._step, overwrite=overwrite) if self._is_copied else front.copying()
        except StorageError as error:
            problems: tuple[str, ...] = (
                f"step {self._step} is not durable: nobody took the order to copy it: {error}",
            )
        else:
            problems = report.problems
        for problem in problems:
            _logger.warning("%s: %s", front.durable.address, problem)
        return problems

    @property
    def _is_copied(self) -> bool:
        return self._step % self._front.every == 0
