"""A save that goes on beside training, as whoever asked for it sees it. Needs no torch."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from ray_ckpt.errors import CheckpointError, SavePendingError
from ray_ckpt.report import SaveReport


class SaveHandle:
    """A save that is being written beside training."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._ended = threading.Event()
        self._report: SaveReport | None = None
        self._failure: BaseException | None = None
        self._seen = False
        self._told = False

    def staged(self, timeout_s: float | None = None) -> None:
        """Return once the state may change. It may already: `save` has copied it before it gave this handle."""

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._ended.is_set()

    def result(self, timeout_s: float | None = None) -> SaveReport:
        """Wait for the commit. An interrupt, as by Ctrl-C, ends the waiting and not the save.

        Args:
            timeout_s: None: as long as it takes.

        Raises:
            SavePendingError: it is still being written; it goes on, and may be asked again.
            CheckpointError: it failed, as `save` would have; what was wrong with each rank is said on every rank.
        """
        if not self._ended.wait(timeout_s):
            raise SavePendingError(f"the save of {self._address} has not ended within {timeout_s} s; it goes on")
        if self._report is None:
            self._seen = True
            assert self._failure is not None, "what has ended has a report or a failure"
            raise self._failure
        return self._report

    def wait(self) -> None:
        self._ended.wait()

    def start(self, work: Callable[[], SaveReport]) -> None:
        """Do it in a thread that Python waits for before the process ends."""
        returned = threading.Event()
        threading.Thread(target=self._run, args=(work, returned), name="ray_ckpt-save", daemon=False).start()
        returned.set()

    def take_failure(self) -> CheckpointError | None:
        """What went wrong, unless `result` has raised it already; to be raised now."""
        if self._failure is None or self._seen:
            return None
        self._seen = True
        return CheckpointError(f"{self._described()}; what was asked for now was not begun")

    @property
    def failed(self) -> bool:
        return self._failure is not None

    def tell(self) -> bool:
        """Say on standard error what went wrong, if nobody has seen it. Whether there was such a thing."""
        if self._failure is None or self._seen:
            return False
        if not self._told:
            self._told = True
            print(f"ray_ckpt: {self._described()}", file=sys.stderr, flush=True)
        return True

    def _run(self, work: Callable[[], SaveReport], returned: threading.Event) -> None:
        # Else it may keep the interpreter to itself for milliseconds before whoever starts it gets on. Not for longer
        # than that is worth: an interrupt may keep the word from coming.
        returned.wait(timeout=1.0)
        try:
            self._report = work()
        except BaseException as error:
            self._failure = error
        self._ended.set()
        if not threading.main_thread().is_alive():
            # The process ends, and may be a child of `multiprocessing` that runs no exit handlers.
            self.tell()

    def _described(self) -> str:
        error = self._failure
        return f"the save of {self._address} in the background failed: {type(error).__name__}: {error}"
