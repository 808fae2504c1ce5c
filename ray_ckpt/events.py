"""Events: what saves, loads and jobs went through, one after the other, for whoever counts or keeps them.

a verb, at its end    its report ── an event per phase, and one at the end ──> events(event)
                      its error  ── one at the end, which names the kind   ──> events(event)
a job                 the same of its verbs, and one per phase and training step of its own ──> `--events PATH`

An event is made of what the reports hold. It names no credentials: addresses come without them, and messages are those
of our errors, which show none.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType

from ray_ckpt.errors import RayCkptError, UsageError, WorkerError
from ray_ckpt.report import LoadReport, Phase, SaveReport, TransferReport, VerifyReport
from ray_ckpt.text import without_credentials

__all__ = [
    "Event",
    "EventFile",
    "Events",
    "Listeners",
    "Telling",
    "failure_of",
    "load_events",
    "save_events",
    "verify_event",
]

_logger = logging.getLogger(__name__)

BLOCKED, COPY, END, DURABLE = "blocked", "copy", "end", "durable"


@dataclass(frozen=True)
class Event:
    """A stretch of time of a save, a load or a job, as `events=` and `--events` tell it.

    Example:
        >>> import torch
        >>> from ray_ckpt import Event, save
        >>> told: list[Event] = []
        >>> report = save({"weight": torch.ones(3)}, "run", 7, events=told.append)
        >>> [(event.step, event.rank, event.num_bytes) for event in told if event.phase == "write"]
        [(7, 0, 12)]
    """

    operation: str
    """`save`, `load`, `verify`, `transfer`, or in a job also `train` and `job`."""
    phase: str
    """A phase as `Phase.name` has it; of a transfer `copy`: until the source's part was copied; `blocked`: the time
    until the call returned; `end`: the whole operation. In a job: `step`, `restart`, the job's own phases, and with a
    front `durable`: a step was found in the durable tier."""
    start_s: float
    """When it began, in seconds since the epoch by the clock of the rank's node."""
    seconds: float
    """Time spent."""
    step: int | None = None
    """The checkpoint's step in its store, or the training step; None where there is none."""
    rank: int | None = None
    """The rank; None for the driver."""
    num_bytes: int = 0
    """Bytes of tensors that were written, read or sent; at the `end` of a save or a check the size of all its files."""
    num_retries: int = 0
    """How often the storage was asked again after an error that may pass: counted at the `end`."""
    uri: str = ""
    """The checkpoint, without credentials and options; empty where none was found."""
    failure: str = ""
    """Kind of the error that ended it: the class, or `died` and `silent` of a worker. Empty when it succeeded."""
    message: str = ""
    """The error's message, if it is one of ours."""

    def to_json(self) -> str:
        """One line, with all fields."""
        return json.dumps(asdict(self))


Events = Callable[[Event], None]
"""Takes events, one at a time, on the thread of what they tell of."""


def save_events(report: SaveReport, rank: int | None = None) -> Iterator[Event]:
    """What a report of a save tells.

    Args:
        rank: whose phases; those of the coordinator are rank 0's. None for all.
    """
    for phase in report.phases:
        if rank in (None, phase.rank) or (rank == 0 and phase.rank is None):
            yield _of_phase("save", phase, phase.rank, report.step, report.uri)
    yield Event(
        "save",
        END,
        time.time() - report.seconds,
        report.seconds,
        report.step,
        rank,
        report.total_bytes,
        report.num_retries,
        report.uri,
    )


def load_events(report: LoadReport, rank: int) -> Iterator[Event]:
    """What a rank's report of a load tells."""
    for phase in report.phases:
        yield _of_phase("load", phase, rank, report.step, report.uri)
    began, seconds = time.time() - report.seconds, report.seconds
    yield Event("load", END, began, seconds, report.step, rank, report.num_bytes, report.num_retries, report.uri)


def verify_event(report: VerifyReport, rank: int | None = None) -> Event:
    """What the report of a check tells, which is the same on all ranks. Damage is a failure."""
    kind, message = ("IntegrityError", str(report.damages[0])) if report.damages else ("", "")
    began, seconds, size = time.time() - report.seconds, report.seconds, report.total_bytes
    return Event("verify", END, began, seconds, report.step, rank, size, 0, report.uri, kind, message)


def _of_phase(operation: str, phase: Phase, rank: int | None, step: int | None, uri: str) -> Event:
    return Event(operation, phase.name, phase.start_s, phase.seconds, step, rank, phase.num_bytes, uri=uri)


def failure_of(error: BaseException) -> tuple[str, str]:
    """The kind of a failure, and what may be said of it."""
    message = str(error) if isinstance(error, RayCkptError) else ""
    if isinstance(error, WorkerError) and error.failures:
        return error.failures[0].error_type.rpartition(".")[2], message
    return type(error).__name__, message


class Listeners:
    """Those who are told events. One that raises is told no more, and there is a warning."""

    def __init__(self, *listeners: Events) -> None:
        self._listeners = list(listeners)

    def add(self, listener: Events) -> None:
        self._listeners.append(listener)

    def __bool__(self) -> bool:
        return bool(self._listeners)

    def __call__(self, event: Event) -> None:
        for listener in list(self._listeners):
            try:
                listener(event)
            except Exception as error:
                self._listeners = [other for other in self._listeners if other is not listener]
                text = f"events= raised {type(error).__name__}: {error}; it was not called again"
                _logger.warning("%s", text)
                warnings.warn(text, RuntimeWarning, stacklevel=2)


class Telling:
    """Tells of one operation.

    Args:
        tell: None when nobody asked.
        rank: the rank of this process; None for the driver of a group.
    """

    def __init__(
        self, tell: Events | None, operation: str, uri: str = "", step: int | None = None, rank: int | None = None
    ) -> None:
        self._listeners = Listeners(*filter(None, [tell]))
        self._operation = operation
        self._uri = uri
        self._step = step
        self._rank = rank
        self._began = time.time()
        self._since = time.monotonic()

    def at(self, uri: str, step: int | None) -> None:
        """What the operation is of, where that is known only later."""
        self._uri, self._step = uri, step

    def blocked(self) -> None:
        """The call returns."""
        self._say([self._event(BLOCKED)])

    def saved(self, report: SaveReport) -> None:
        """The save has ended."""
        if self._listeners:
            self._say(save_events(report, self._rank))

    def loaded(self, reports: Sequence[LoadReport]) -> None:
        """The load has ended: the report of this rank, or on a driver those of all."""
        if self._listeners:
            for rank, report in enumerate(reports):
                self._say(load_events(report, rank if self._rank is None else self._rank))

    def verified(self, report: VerifyReport) -> None:
        """The check has ended."""
        self._say([verify_event(report, self._rank)])

    def transferred(self, report: TransferReport) -> None:
        """The transfer has ended."""
        began = time.time() - report.seconds
        stretches = ((COPY, report.source_seconds), (END, report.seconds))
        self._say([Event("transfer", phase, began, took, num_bytes=report.num_bytes) for phase, took in stretches])

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Tell what the block raises."""
        try:
            yield
        except BaseException as error:
            failure, message = failure_of(error)
            self._say([self._event(END, failure, message)])
            raise

    def _event(self, phase: str, failure: str = "", message: str = "") -> Event:
        seconds = time.monotonic() - self._since
        return Event(
            self._operation,
            phase,
            self._began,
            seconds,
            self._step,
            self._rank,
            uri=self._uri,
            failure=failure,
            message=message,
        )

    def _say(self, events: Iterator[Event] | Sequence[Event]) -> None:
        for event in events:
            self._listeners(event)


class EventFile:
    """Appends events to a file, one JSON object per line. A context manager, and callable as `events=` takes it.

    Example:
        >>> import torch
        >>> from ray_ckpt import EventFile, save
        >>> with EventFile("events.jsonl") as events:
        ...     report = save({"weight": torch.ones(3)}, "run", 7, events=events)
        >>> import json, pathlib
        >>> [json.loads(line)["operation"] for line in pathlib.Path("events.jsonl").read_text().splitlines()][-1]
        'save'

    Args:
        path: a file on this machine; what it holds already stays, as of a run that is resumed.

    Raises:
        UsageError: it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        try:
            self._file = open(path, "a", buffering=1)  # noqa: SIM115  -- closed by close
        except OSError as error:
            # The path without credentials, as somebody may have given the URI of a storage.
            told = f"cannot write events to {without_credentials(path)}: {error.strerror}; give a file that can be made"
            raise UsageError(told) from None
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Write the line of an event. It can be read at once."""
        with self._lock:
            self._file.write(event.to_json() + "\n")

    def __enter__(self) -> EventFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._file.close()
