"""A storage that fails where a test tells it to. Otherwise a real Storage, of real files or a real server."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ray_ckpt.storage.files import RetryPolicy, Storage

T = TypeVar("T")

AT_ONCE = RetryPolicy(attempts=5, first_wait_s=0.001, max_wait_s=0.002)


def _raise(error: Exception) -> None:
    raise error


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


ACTIONS: dict[str, tuple[int, Callable[[], None]]] = {
    "raises": (10**9, lambda: _raise(PermissionError(errno.EACCES, "Permission denied"))),
    "no space": (10**9, lambda: _raise(OSError(errno.ENOSPC, "No space left on device"))),
    "throttled": (3, lambda: _raise(OSError("AWS Error SLOW_DOWN: Please reduce your request rate"))),
    "slow": (5, lambda: time.sleep(0.05)),
    "killed": (10**9, _die),
    "hangs": (10**9, lambda: threading.Event().wait() and None),
    "raises twice": (2, lambda: _raise(PermissionError(errno.EACCES, "Permission denied"))),
}
"""What happens -> how often, and how."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong on one rank in some operations of its storage."""

    action: str
    operations: tuple[str, ...]
    rank: int = 0
    name: str = ""
    """Only files whose name contains this."""


happened: set[Fault] = set()
"""What this process has carried out."""


class FaultyStorage(Storage):
    """Carries out a fault on the rank that it is for."""

    def __init__(self, target: str, fault: Fault, rank: int) -> None:
        super().__init__(target, retry=AT_ONCE)
        self.fault = fault
        self.left = ACTIONS[fault.action][0] if rank == fault.rank else 0

    def perform(self, operation: str, name: str, action: Callable[[], T]) -> T:
        def faulty() -> T:
            if self.left and operation in self.fault.operations and self.fault.name in name:
                self.left -= 1
                happened.add(self.fault)
                ACTIONS[self.fault.action][1]()
            return action()

        return super().perform(operation, name, faulty)


here: int | None = None
"""Rank of this process, where a storage arrives from a driver that cannot know which one it will be."""


class TravellingStorage(FaultyStorage):
    """Carries out its fault in the process whose `here` is the fault's rank."""

    def __init__(self, target: str, fault: Fault) -> None:
        super().__init__(target, fault, fault.rank)

    def perform(self, operation: str, name: str, action: Callable[[], T]) -> T:
        if here != self.fault.rank:
            return action()
        return super().perform(operation, name, action)


class LyingStorage(Storage):
    """Says that every write to a data file has succeeded, and loses some or all of it.

    Args:
        loses: `all` of the bytes, the `last` byte of each file, or the `file` itself once it is finished.
    """

    def __init__(self, target: str | os.PathLike[str], loses: str) -> None:
        super().__init__(target)
        self.loses = loses

    def perform(self, operation: str, name: str, action: Callable[[], T]) -> T:
        if not name.endswith(".distcp"):
            return super().perform(operation, name, action)
        if operation == "write" and self.loses == "all":
            return None  # type: ignore[return-value]
        value = super().perform(operation, name, action)
        if operation == "sync":
            path = self.path(name)
            if self.loses == "file":
                os.remove(path)
            elif self.loses == "last":
                os.truncate(path, os.path.getsize(path) - 1)
        return value


class CountedStorage(Storage):
    """Counts operations, and dies by SIGKILL at the one that it is told."""

    def __init__(self, target: str, die_at: int | None = None) -> None:
        super().__init__(target)
        self.die_at = die_at
        self.num_operations = 0

    def perform(self, operation: str, name: str, action: Callable[[], T]) -> T:
        self.num_operations += 1
        if self.num_operations == self.die_at:
            _die()
        return super().perform(operation, name, action)


class CountedReads(Storage):
    """Counts the bytes that are read, on any thread."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self._sizes: list[int] = []

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes)

    def perform(self, operation: str, name: str, action: Callable[[], T]) -> T:
        found = super().perform(operation, name, action)
        if operation == "read":
            self._sizes.append(found if isinstance(found, int) else len(found))  # type: ignore[arg-type]
        return found


class GatedStorage(Storage):
    """Waits before it creates a data file, until a gate is opened: as slow as a test needs it, and no slower."""

    def __init__(self, target: str | os.PathLike[str], gate: Path) -> None:
        super().__init__(target)
        self.gate = gate
        self.waiting = False

    def perform(self, operation: str, name: str, action: Callable[[], T]) -> T:
        if operation == "create" and name.endswith(".distcp"):
            self.waiting = True
            wait_until(self.gate.exists)
        return super().perform(operation, name, action)


WITHOUT_WAITING_S = 30.0
"""What takes longer has waited for one of the limits of a minute that the tests give. It takes 1 s or two."""


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{condition} did not come true within {timeout_s} s"
        time.sleep(0.002)
