"""Collect one call's outcomes from all ranks, and tell the rank that failed from those that suffered for it.

The first error to arrive is often a victim's: neighbors of a dead rank report a lost connection before Ray reports the
death, and ranks further away sit in a collective until its timeout. So after a first error the others get a short
grace, and failures are then ranked by `Severity`.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
)

from ray_ckpt.cluster.worker import CallOutcome, WorkerInfo
from ray_ckpt.errors import DIED, SILENT, GroupTimeoutError, RankFailure, WorkerError

CAUSE_GRACE_S = 1.0
"""After a rank's own error: time for other ranks to report errors of their own."""

VICTIM_GRACE_S = 3.5
"""After a lost connection: time for Ray to report the death behind it (1.7 s measured for a removed node)."""

POLL_S = 0.5
"""Ray's wait is left this often, so that Python runs the handlers of signals meanwhile."""

_LOST_PEER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out waiting|wait timeout|failed to recv"
    r"|remote process exited|NCCL|watchdog",
    re.IGNORECASE,
)
"""What gloo, TCPStore and NCCL say when a peer is gone."""


class Severity(IntEnum):
    """How a rank failed; the lower, the surer it is a cause. A rank that never answered has none."""

    DIED = 0
    """Its process or node is gone: ActorDiedError, ActorUnavailableError."""
    RAISED = 1
    """It raised an error of its own."""
    LOST_PEER = 2
    """It lost a peer, which is to blame: connection errors and time-outs of torch.distributed."""

    @classmethod
    def of(cls, failure: RankFailure) -> Severity:
        if failure.error_type == DIED:
            return cls.DIED
        in_collective = "torch/distributed" in failure.traceback
        return cls.LOST_PEER if in_collective and _LOST_PEER.search(failure.message) else cls.RAISED

    @property
    def is_cause(self) -> bool:
        return self is not Severity.LOST_PEER


@dataclass
class _Answers:
    values: dict[int, Any] = field(default_factory=dict)
    failures: dict[int, RankFailure] = field(default_factory=dict)

    @property
    def grace_s(self) -> float:
        """How long the other ranks are still waited for: the sooner over, the surer the cause is known."""
        if not self.failures:
            return math.inf
        has_cause = any(Severity.of(failure).is_cause for failure in self.failures.values())
        return CAUSE_GRACE_S if has_cause else VICTIM_GRACE_S


def gather(
    refs: Mapping[int, Any],
    workers: Sequence[WorkerInfo],
    timeout_s: float,
    again: Callable[[int], Any | None] = lambda rank: None,
    find_stopped: Callable[[Sequence[int]], Sequence[int]] = lambda ranks: (),
    look: Callable[[], None] = lambda: None,
) -> dict[int, Any]:
    """The values of one call, by rank.

    Args:
        refs: rank -> object reference to its `CallOutcome`.
        workers: where each rank runs.
        timeout_s: for the whole call.
        again: called with a rank that raised an error of its own; calls it once more and returns the new reference, or
            None to let the failure stand.
        find_stopped: called with ranks that did not answer in time, while no rank failed; returns those whose process
            does not respond to anything, and for which the others may have waited.
        look: called whenever somebody has answered, and at least every `POLL_S`.

    Raises:
        WorkerError: one or more ranks failed; `failures` has the causes first and names every rank that failed.
        GroupTimeoutError: nobody failed, but not all ranks answered in time.
    """
    ranks = {ref: rank for rank, ref in refs.items()}
    answers = _Answers()
    pending = list(ranks)
    deadline = time.monotonic() + timeout_s
    while pending and (left := deadline - time.monotonic()) > 0:
        ready, pending = ray.wait(pending, num_returns=1, timeout=min(left, POLL_S))
        for ref in ready:
            grace_before_s = answers.grace_s
            repeated = _take(ref, ranks[ref], workers, answers, again)
            if repeated is not None:
                ranks[repeated] = ranks[ref]
                pending.append(repeated)
            elif answers.grace_s < grace_before_s:
                deadline = min(deadline, time.monotonic() + answers.grace_s)
        look()
    silent = sorted(ranks[ref] for ref in pending)
    if answers.failures:
        raise WorkerError(_in_order_of_blame(answers, silent, workers))
    if silent:
        names = ", ".join(f"rank {rank} on {workers[rank].node}" for rank in silent)
        stopped = ", ".join(f"rank {rank} (process {workers[rank].pid})" for rank in find_stopped(silent))
        told = f"; {stopped} responds to nothing: stopped, or stuck" if stopped else ""
        raise GroupTimeoutError(
            f"no answer within {round(timeout_s, 1):g} s from {names}{told}; `ray stack` there shows where it is, and "
            "a longer timeout waits longer"
        )
    return {rank: answers.values[rank] for rank in refs}


def _take(
    ref: Any, rank: int, workers: Sequence[WorkerInfo], answers: _Answers, again: Callable[[int], Any | None]
) -> Any | None:
    """Note what a rank has answered, or the reference to its next try."""
    try:
        outcome: CallOutcome = ray.get(ref)
    except RayError as error:
        outcome = CallOutcome(failure=_from_ray(error, rank, workers[rank]))
    failure = outcome.failure
    if failure is None:
        answers.values[rank] = outcome.value
        return None
    repeated = again(rank) if Severity.of(failure) is Severity.RAISED else None
    if repeated is None:
        answers.failures[rank] = failure
    return repeated


def _from_ray(error: RayError, rank: int, worker: WorkerInfo) -> RankFailure:
    """What Ray knows of a call that returned nothing, in one line of Ray's many."""
    if isinstance(error, (RayActorError, OutOfMemoryError)):
        return RankFailure(rank, worker.node, DIED, _describe_death(error, worker.pid))
    kind, said = type(error).__name__, _lines(error)[-1]
    if isinstance(error, RayTaskError):  # not of the function, as that is caught on the worker
        kind = type(error.cause).__name__
        on_the_way_there = isinstance(error.cause, RaySystemError)
        said = f"{'the worker cannot read its arguments' if on_the_way_there else 'its result does not pickle'}: {said}"
    elif isinstance(error, RaySystemError):
        said = f"its result cannot be read here: {said}"
    return RankFailure(rank, worker.node, kind, said)


def _describe_death(error: RayError, pid: int) -> str:
    lines = _lines(error)
    known = [line.removeprefix("pid: ") for line in lines if line.startswith("pid: ")]
    process = f"process {pid or (known[0] if known else 'of unknown number')}"
    if isinstance(error, OutOfMemoryError):
        return f"{process} was killed by Ray, as its node ran out of memory: use fewer workers per node"
    if isinstance(error, ActorUnavailableError):
        return f"{process} or its node cannot be reached any more"
    reason = _reason(lines)
    if "connection error code 2" in reason:  # all that Ray knows when the process has not said that it ends
        return (
            f"{process} is gone without a word: killed by a signal, as by the kernel when memory runs out (see `dmesg` "
            "on its node), or crashed"
        )
    return f"{process} is gone: {reason}"


def _reason(lines: Sequence[str]) -> str:
    """What Ray says of a death, without its list of common causes, which is the same for every death."""
    for mark in ("detail:", "because its "):
        for line in lines:
            if mark in line:
                return line.partition(mark)[2].partition("Some common causes")[0].strip(" .")
    return lines[-1]  # of an error in the actor's own code


def _lines(error: RayError) -> list[str]:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines or [type(error).__name__]


def _in_order_of_blame(
    answers: _Answers, silent: Sequence[int], workers: Sequence[WorkerInfo]
) -> tuple[RankFailure, ...]:
    """Causes only, when there are any. Among mere victims the silent ranks are the suspects and come first."""
    failures = sorted(answers.failures.values(), key=lambda failure: (Severity.of(failure), failure.rank))
    if causes := [failure for failure in failures if Severity.of(failure).is_cause]:
        return tuple(causes)
    suspects = [
        RankFailure(rank, workers[rank].node, SILENT, "never answered; its peers lost the connection")
        for rank in silent
    ]
    return (*suspects, *failures)
