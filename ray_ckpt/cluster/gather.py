"""Collect one call's outcomes from all ranks, and tell the rank that failed from those that suffered for it.

The first error to arrive is often a victim's: neighbors of a dead rank report a lost connection before Ray reports the
death, and ranks further away sit in a collective until its timeout. So after a first error the others get a short
grace, and failures are then ranked:

    0  the process is gone, or its node is         ActorDiedError, ActorUnavailableError
    1  the rank raised an error of its own
    2  the rank lost a peer                        connection errors and time-outs of torch.distributed
    -  silent: it never answered
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from ray_ckpt.cluster.worker import Outcome, WorkerInfo
from ray_ckpt.errors import DIED, SILENT, GroupTimeoutError, RankFailure, WorkerError

CAUSE_GRACE_S = 1.0
"""After a rank's own error: time for other ranks to report errors of their own."""

VICTIM_GRACE_S = 3.5
"""After a lost connection: time for Ray to report the death behind it (1.7 s measured for a removed node)."""

_LOST_PEER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out waiting|wait timeout|failed to recv"
    r"|remote process exited|NCCL|watchdog",
    re.IGNORECASE,
)
"""What gloo, TCPStore and NCCL say when a peer is gone."""


@dataclass
class _Progress:
    values: dict[int, Any] = field(default_factory=dict)
    failures: dict[int, RankFailure] = field(default_factory=dict)

    @property
    def has_cause(self) -> bool:
        return any(_severity(failure) < 2 for failure in self.failures.values())


def gather(
    refs: Mapping[int, Any],
    workers: Sequence[WorkerInfo],
    timeout_s: float,
    again: Callable[[int], Any | None] = lambda rank: None,
) -> dict[int, Any]:
    """The values of one call, by rank.

    Args:
        refs: rank -> object reference to its `Outcome`.
        workers: where each rank runs.
        timeout_s: for the whole call.
        again: called with a rank that raised an error of its own; calls it once more and returns the new reference, or
            None to let the failure stand.

    Raises:
        WorkerError: one or more ranks failed; `failures` has the causes first and names every rank that failed.
        GroupTimeoutError: nobody failed, but not all ranks answered in time.
    """
    ranks = {ref: rank for rank, ref in refs.items()}
    progress = _Progress()
    pending = list(ranks)
    deadline = time.monotonic() + timeout_s
    while pending and (left := deadline - time.monotonic()) > 0:
        ready, pending = ray.wait(pending, num_returns=1, timeout=min(left, 0.5))
        for ref in ready:
            rank = ranks[ref]
            failed_before = bool(progress.failures)
            had_cause = progress.has_cause
            _take(ref, rank, workers[rank], progress)
            failure = progress.failures.get(rank)
            if failure is not None and _severity(failure) == 1 and (repeated := again(rank)) is not None:
                del progress.failures[rank]
                ranks[repeated] = rank
                pending.append(repeated)
            elif progress.has_cause and not had_cause:
                deadline = min(deadline, time.monotonic() + CAUSE_GRACE_S)
            elif progress.failures and not failed_before:
                deadline = min(deadline, time.monotonic() + VICTIM_GRACE_S)
    silent = sorted(ranks[ref] for ref in pending)
    if progress.failures:
        raise WorkerError(_in_order_of_blame(progress, silent, workers))
    if silent:
        names = ", ".join(f"rank {rank} on {workers[rank].node}" for rank in silent)
        raise GroupTimeoutError(f"no answer within {timeout_s:g} s from {names}")
    return {rank: progress.values[rank] for rank in refs}


def _take(ref: Any, rank: int, worker: WorkerInfo, progress: _Progress) -> None:
    try:
        outcome: Outcome = ray.get(ref)
    except RayError as error:
        progress.failures[rank] = _from_ray(error, rank, worker)
        return
    if outcome.failure is not None:
        progress.failures[rank] = outcome.failure
    else:
        progress.values[rank] = outcome.value


def _severity(failure: RankFailure) -> int:
    """0: the process is gone; 1: an error of its own; 2: it lost a peer."""
    if failure.error_type == DIED:
        return 0
    in_collective = "torch/distributed" in failure.traceback
    return 2 if in_collective and _LOST_PEER.search(failure.message) else 1


def _from_ray(error: RayError, rank: int, worker: WorkerInfo) -> RankFailure:
    """What Ray knows of a call that returned nothing, in one line of Ray's many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not isinstance(error, RayActorError):
        return RankFailure(rank, worker.node, type(error).__name__, lines[-1] if lines else "")
    message = f"process {worker.pid} is gone"
    if isinstance(error, ActorUnavailableError):
        message = f"process {worker.pid} or its node cannot be reached any more"
    elif details := [line for line in lines if "exit detail" in line.lower()]:
        # Ray appends a list of common causes, the same for every death.
        message += ": " + details[0].partition("detail:")[2].partition("Some common causes")[0].strip(" .")
    return RankFailure(rank, worker.node, DIED, message)


def _in_order_of_blame(
    progress: _Progress, silent: Sequence[int], workers: Sequence[WorkerInfo]
) -> tuple[RankFailure, ...]:
    """Causes only, when there are any. Among mere victims the silent ranks are the suspects and come first."""
    causes = [failure for failure in progress.failures.values() if _severity(failure) < 2]
    if causes:
        return tuple(sorted(causes, key=lambda failure: (_severity(failure), failure.rank)))
    suspects = [
        RankFailure(rank, workers[rank].node, SILENT, "never answered; its peers lost the connection")
        for rank in silent
    ]
    return tuple(suspects) + tuple(progress.failures[rank] for rank in sorted(progress.failures))
