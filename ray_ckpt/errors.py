"""Every exception that ray_ckpt raises on purpose.

    RayCkptError
    ├── UsageError                 what was asked for cannot be done; nothing was touched (exit code 2)
    │   └── CheckpointExistsError  the target already holds a committed checkpoint
    ├── GroupError                 a worker group failed as a whole
    │   ├── PlacementError         the cluster cannot place the group, or not in time
    │   ├── GroupTimeoutError      a call outlasted its timeout
    │   └── WorkerError            one or more ranks failed; `failures` names each of them
    ├── SavePendingError           a save in the background has not ended within `timeout_s`; it goes on
    ├── StorageError               a storage operation failed: operation, path, cause
    └── CheckpointError            a checkpoint is not what it should be
        ├── CheckpointNotFoundError  no committed checkpoint where one was asked for
        ├── FormatError              a manifest, `.metadata` or data file is truncated, damaged or of another format
        ├── UnsafeCheckpointError    reading it would run code, or leave the checkpoint's directory
        ├── IntegrityError           bytes differ from the checksum recorded when they were saved
        ├── SignatureError           it is not signed, or not as it was when it was, or by another key
        ├── CommitError              the coordinator refused to commit what the ranks wrote
        └── StateMismatchError       the checkpoint and the state it is loaded into disagree

A message says what was asked, what was found and what to do. It is at most 2 000 characters long and has no control
characters, whatever the names in a file are. Every exception survives `pickle`, fields included, because most of them
travel from a worker to the driver.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = [
    "DIED",
    "SILENT",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "CommitError",
    "FormatError",
    "GroupError",
    "GroupTimeoutError",
    "IntegrityError",
    "PlacementError",
    "RankFailure",
    "RayCkptError",
    "SavePendingError",
    "SignatureError",
    "StateMismatchError",
    "StorageError",
    "UnsafeCheckpointError",
    "UsageError",
    "WorkerError",
]


class RayCkptError(Exception):
    """Root of the tree: `except RayCkptError` catches everything ray_ckpt raises on purpose."""

    def __init__(self, message: str = "") -> None:
        super().__init__(_printable(message))

    def append(self, text: str) -> None:
        """Say more at the end of the message."""
        self.args = (_printable(f"{self}; {text}"),)

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive, (type(self), self.args, self.__dict__)


_LONGEST_MESSAGE, _LONGEST_END = 1990, 600


def _printable(message: str) -> str:
    """The message with control characters escaped, and its middle left out when it is too long: its end says what to
    do."""
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[: _LONGEST_MESSAGE - _LONGEST_END - 5]} ... {message[-_LONGEST_END:]}"
    if message.isprintable():
        return message
    escaped = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in message)
    return escaped if len(escaped) <= _LONGEST_MESSAGE else _printable(escaped)


def _revive(cls: type[RayCkptError], args: tuple[Any, ...], state: dict[str, Any]) -> RayCkptError:
    """Rebuild an exception without calling its `__init__`, which takes fields rather than a message."""
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class UsageError(RayCkptError):
    """What was asked for cannot be done as asked. Nothing was touched."""


class CheckpointExistsError(UsageError):
    """The target already holds a committed checkpoint and `overwrite` was not given."""


class GroupError(RayCkptError):
    """A worker group failed as a whole. The group is closed; form a new one to go on."""


class PlacementError(GroupError):
    """The cluster cannot place the group, or did not within the start timeout."""


class GroupTimeoutError(GroupError):
    """A call on the group did not finish within its `timeout_s`."""


class SavePendingError(RayCkptError, TimeoutError):
    """A save in the background has not ended within `timeout_s`. It goes on, and `result` may be called again."""


DIED = "died"
"""Error type of a rank whose process or node is gone."""

SILENT = "silent"
"""Error type of a rank that never answered while its peers lost the connection."""


@dataclass(frozen=True)
class RankFailure:
    """What is known of one failed rank, as plain data.

    Example:
        >>> from ray_ckpt import RankFailure, WorkerError
        >>> error = WorkerError((RankFailure(2, "node-a (10.0.0.7)", "ValueError", "no such file"),))
        >>> str(error)
        'rank 2 on node-a (10.0.0.7): ValueError: no such file'
        >>> error.ranks
        (2,)
    """

    rank: int
    node: str
    """Host name and address of the rank's node."""
    error_type: str
    """Qualified name of the exception's class, or `DIED` or `SILENT`."""
    message: str
    traceback: str = ""
    """The rank's own traceback, or empty when its process left none."""


class WorkerError(GroupError):
    """One or more ranks failed. `failures` holds one entry per failed rank, the causes first."""

    def __init__(self, failures: tuple[RankFailure, ...]) -> None:
        super().__init__(_describe_failures(failures))
        self.failures = failures

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that failed, the causes first."""
        return tuple(failure.rank for failure in self.failures)

    def tracebacks(self) -> str:
        """Every distinct traceback once, headed by the ranks that share it."""
        by_text: dict[str, list[int]] = {}
        for failure in self.failures:
            if failure.traceback:
                by_text.setdefault(failure.traceback, []).append(failure.rank)
        return "\n".join(f"--- {_ranks(ranks)}\n{text}" for text, ranks in by_text.items())


def _describe_failures(failures: tuple[RankFailure, ...]) -> str:
    """One clause per distinct error: equal errors are grouped, and every rank is named with its node."""
    grouped: dict[tuple[str, str], list[RankFailure]] = {}
    for failure in failures:
        grouped.setdefault((failure.error_type, failure.message), []).append(failure)
    clauses = []
    for (error_type, message), group in grouped.items():
        nodes = ", ".join(sorted({failure.node for failure in group}))
        clauses.append(f"{_ranks([f.rank for f in group])} on {nodes}: {error_type}: {message}")
    return "; ".join(clauses)


def _ranks(ranks: list[int]) -> str:
    names = ", ".join(str(rank) for rank in sorted(ranks))
    return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"


class StorageError(RayCkptError):
    """A storage operation failed, after all retries when the cause was transient."""

    def __init__(self, operation: str, path: str, cause: str, *, transient: bool = False) -> None:
        super().__init__(f"cannot {operation} {path}: {cause}")
        self.operation = operation
        self.path = path
        self.cause = cause
        self.transient = transient
        """Whether the same operation may succeed later, as after throttling or a reset connection."""


class CheckpointError(RayCkptError):
    """A checkpoint is not what it should be."""


class CheckpointNotFoundError(CheckpointError):
    """There is no committed checkpoint where one was asked for."""


class FormatError(CheckpointError):
    """A manifest, `.metadata` or data file is truncated, damaged or of another format."""


class UnsafeCheckpointError(CheckpointError):
    """Reading the checkpoint would run code from it, or leave its directory."""


class IntegrityError(CheckpointError):
    """Bytes read from storage differ from the checksum recorded when they were saved."""

    def __init__(
        self, *, file: str, start: int, end: int, tensor: str, expected: str, found: str, hint: str = ""
    ) -> None:
        super().__init__(
            f"{file} bytes [{start}, {end}) of {tensor!r} are damaged: checksum {found}, saved with {expected}"
            + (f"; {hint}" if hint else "")
        )
        self.file = file
        self.start = start
        self.end = end
        self.tensor = tensor
        self.expected = expected
        self.found = found


class SignatureError(CheckpointError):
    """A checkpoint is not signed, or not as it was when it was, or not by the owner of the key."""


class CommitError(CheckpointError):
    """The coordinator refused to commit: what the ranks wrote is incomplete or contradictory."""


class StateMismatchError(CheckpointError):
    """The checkpoint and the state it is loaded into disagree on names, shapes, dtypes or hyper-parameters."""
