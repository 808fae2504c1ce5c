"""SaveHandle: a save in the background, as its caller sees it. Needs no torch.

A failure is never dropped: `result` raises it, or else the next save, or else it is printed when the process ends,
which then has the exit code 1.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable

from ray_ckpt.errors import CheckpointError, RayCkptError, SavePendingError, UsageError
from ray_ckpt.report import SaveReport

_logger = logging.getLogger(__name__)


def check_on_error(on_error: str, blocking: bool) -> None:
    """Refuse what cannot be.

    Raises:
        UsageError: `on_error` is neither "raise" nor "warn", or a save that is waited for is not to raise.
    """
    if on_error not in ("raise", "warn"):
        raise UsageError(f"on_error={on_error!r} is neither 'raise' nor 'warn'")
    if blocking and on_error == "warn":
        raise UsageError("on_error='warn' is for saves in the background: say blocking=False, or catch the error")


class SaveHandle:
    """A save that goes on in the background, as `save(..., blocking=False)` returns it.

    Example:
        >>> import torch
        >>> from ray_ckpt import save
        >>> state = {"weight": torch.ones(3)}
        >>> handle = save(state, "run/step-1", blocking=False)
        >>> state["weight"] += 1  # the state has been copied: training may go on
        >>> handle.result(timeout_s=60).num_files
        1
        >>> handle.done()
        True
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._ended = threading.Event()
        self._report: SaveReport | None = None
        self._failure: BaseException | None = None
        self._told = False

    @classmethod
    def of_failure(cls, address: str, error: RayCkptError) -> SaveHandle:
        """Of a save that could not begin, whose failure is known to the caller."""
        handle = cls(address)
        handle._failure = error
        handle._ended.set()
        _logger.warning("%s", handle.described)
        return handle

    def staged(self) -> None:
        """Return once the state may change. That is at once: `save` copies the state before it returns the handle."""

    def done(self) -> bool:
        """Whether the save has ended, successfully or not."""
        return self._ended.is_set()

    def result(self, timeout_s: float | None = None) -> SaveReport:
        """Wait for the commit. An interrupt, as by Ctrl-C, ends the wait but not the save.

        Args:
            timeout_s: how long to wait; None waits until the save has ended.

        Raises:
            SavePendingError: the save has not ended within `timeout_s`; it goes on, and `result` may be called again.
            RayCkptError: the save failed, as a blocking `save` would have; every rank learns each rank's failure.
        """
        self.wait(timeout_s)
        if self._report is None:
            _unseen.discard(self)
            assert self._failure is not None, "what has ended has a report or a failure"
            raise self._failure
        return self._report

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the save has ended, successfully or not.

        Raises:
            SavePendingError: as `result`.
        """
        if not self._ended.wait(timeout_s):
            raise SavePendingError(f"the save of {self._address} has not ended within {timeout_s:.3g} s; it goes on")

    def start(self, work: Callable[[], SaveReport]) -> None:
        """Run `work` in a thread that Python waits for before the process ends."""
        returned = threading.Event()
        _unseen.add(self)
        threading.Thread(target=self._run, args=(work, returned), name="ray_ckpt-save", daemon=False).start()
        returned.set()

    def take_failure(self, *, and_went_on: bool = False) -> CheckpointError | None:
        """The failure for the caller to raise; None if there is none or `result` has raised it already.

        Args:
            and_went_on: whether the caller begins the next save all the same.
        """
        if self._failure is None or self not in _unseen:
            return None
        _unseen.discard(self)
        now = "the one now begins all the same" if and_went_on else "what was asked for now was not begun"
        return CheckpointError(f"{self.described}; {now}")

    @property
    def failed(self) -> bool:
        """Whether the save has ended with a failure."""
        return self._failure is not None

    def tell(self) -> None:
        """Say on standard error what went wrong."""
        if not self._told:
            self._told = True
            print(f"ray_ckpt: {self.described}", file=sys.stderr, flush=True)

    def _run(self, work: Callable[[], SaveReport], returned: threading.Event) -> None:
        # Otherwise this thread may hold the interpreter for milliseconds before the caller continues. The wait is
        # short, because an interrupt in the caller may keep the event from being set.
        returned.wait(timeout=1.0)
        try:
            self._report = work()
            _unseen.discard(self)
        except BaseException as error:
            self._failure = error
            _logger.warning("%s", self.described)
        self._ended.set()
        if self.failed and not threading.main_thread().is_alive():
            # The process ends, and may be a child of `multiprocessing` that runs no exit handlers.
            self.tell()

    @property
    def described(self) -> str:
        """The failure, in a sentence."""
        error = self._failure
        return f"the save of {self._address} in the background failed: {type(error).__name__}: {error}"


_unseen: set[SaveHandle] = set()
"""Saves that have begun, without those that ended well and those whose failure was raised."""


def _tell_at_exit() -> None:
    """Python has waited for the threads before this, but need not have in a child of `multiprocessing`."""
    for handle in list(_unseen):
        handle.wait()
        if handle.failed:
            handle.tell()
    if _unseen:
        # What an exit handler raises does not reach the exit code.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


# A forked process has none of its parent's threads.
os.register_at_fork(after_in_child=_unseen.clear)
atexit.register(_tell_at_exit)
