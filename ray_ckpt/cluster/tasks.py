"""run_tasks(fn, args_of): independent Ray tasks, a bounded number at a time, wherever the cluster has room.

Unlike the workers of a group they know nothing of each other: there is no placement group and no rank that waits for
another, and a task whose node is lost is started again elsewhere. So `fn` must do no harm when it runs twice.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from ray_ckpt.cluster.gather import CAUSE_GRACE_S, POLL_S
from ray_ckpt.cluster.worker import CallOutcome, attempt, resolve
from ray_ckpt.errors import DIED, GroupTimeoutError, RankFailure, WorkerError
from ray_ckpt.progress import Meter
from ray_ckpt.text import first_line

SUBMITTED_AT_ONCE = 64
"""Tasks that Ray holds, with their arguments."""

CANCEL_TIMEOUT_S = 5.0
"""How long tasks that are no longer wanted may take to end."""

RESTARTS = 2
"""How often a task is started again when the process or node that ran it is lost."""


def run_tasks(
    fn: Callable[..., Any] | str,
    args_of: Mapping[int, tuple[Any, ...]],
    *,
    timeout_s: float,
    cpus: float = 1.0,
    on_done: Callable[[int, Any], None] = lambda number, value: None,
    meter: Meter | None = None,
) -> dict[int, Any]:
    """Call `fn(*args)` for every number of `args_of`, as tasks of the Ray cluster this process is connected to.

    At most `SUBMITTED_AT_ONCE` are with Ray at a time, which runs those that the cluster has CPUs for; the others are
    the demand that an autoscaler sees. After a failure no further task is submitted, those that run get a moment to
    report failures of their own, and the rest is canceled.

    Args:
        fn: a top-level function, or its name as `"package.module:function"`, which takes and returns plain data.
        args_of: number of the task -> arguments, which are asked for when the task is submitted.
        timeout_s: time limit of all tasks together.
        cpus: number of CPUs that each task asks for.
        on_done: called in this process with the number and value of each task that has succeeded.
        meter: when somebody asked for the progress, `fn` gets a meter as one more argument, and what the meters of all
            tasks count is counted here too, from about twice a second to once a task.

    Returns:
        Number -> value.

    Raises:
        WorkerError: tasks raised or died; `failures` names each by its number, as `rank`.
        GroupTimeoutError: the time limit was reached; names the unfinished tasks. Running ones are canceled.
    """
    counts = _Counts(meter) if meter is not None and meter.is_heard else None
    run = _Run(fn, args_of, cpus, on_done, counts, deque(args_of))
    try:
        run.to_the_end(time.monotonic() + timeout_s)
    finally:
        run.cancel()
        if counts is not None:
            counts.close()
    if run.failures:
        raise WorkerError(tuple(run.failures[number] for number in sorted(run.failures)))
    if left := sorted(args_of.keys() - run.values.keys()):
        raise GroupTimeoutError(f"not done within {timeout_s:g} s: tasks {', '.join(map(str, left))}")
    return {number: run.values[number] for number in args_of}


@dataclass
class _Run:
    fn: Callable[..., Any] | str
    args_of: Mapping[int, tuple[Any, ...]]
    cpus: float
    on_done: Callable[[int, Any], None]
    counts: _Counts | None
    waiting: deque[int]
    """Numbers of the tasks that are not with Ray yet."""
    running: dict[Any, int] = field(default_factory=dict)
    values: dict[int, Any] = field(default_factory=dict)
    failures: dict[int, RankFailure] = field(default_factory=dict)

    def to_the_end(self, deadline: float) -> None:
        """Until all have ended, or the deadline; after a failure that is near."""
        while (self.waiting and not self.failures) or self.running:
            while self.waiting and not self.failures and len(self.running) < SUBMITTED_AT_ONCE:
                number = self.waiting.popleft()
                self.running[self._start(number, self.args_of[number])] = number
            left = deadline - time.monotonic()
            if left <= 0:
                return
            done, _ = ray.wait(list(self.running), num_returns=1, timeout=min(left, POLL_S))
            for ref in done:
                had_failed = bool(self.failures)
                self._take(ref, self.running.pop(ref))
                if self.failures and not had_failed:
                    deadline = min(deadline, time.monotonic() + CAUSE_GRACE_S)
            if self.counts is not None:
                self.counts.look()

    def cancel(self) -> None:
        """End what still runs, and wait until it has."""
        for ref in self.running:
            ray.cancel(ref, force=True)
        if self.running:
            done, _ = ray.wait(list(self.running), num_returns=len(self.running), timeout=CANCEL_TIMEOUT_S)
            for ref in done:
                # Ray prints a traceback at exit for every failed result that was never read.
                with contextlib.suppress(RayError):
                    ray.get(ref)

    def _start(self, number: int, args: tuple[Any, ...]) -> Any:
        # As a mapping, because the types that Ray ships know no `SPREAD` here.
        settings: dict[str, Any] = {
            "num_cpus": self.cpus,
            "max_retries": RESTARTS,
            "scheduling_strategy": "SPREAD",
            "name": f"ray_ckpt task {number}",
        }
        counter = None if self.counts is None else self.counts.counter
        return ray.remote(**settings)(_call).remote(number, self.fn, counter, *((arg,) for arg in args))

    def _take(self, ref: Any, number: int) -> None:
        try:
            outcome, num_bytes = ray.get(ref)
        except RayError as error:
            told = f"{type(error).__name__}: {first_line(error)}"
            message = f"its process was lost {RESTARTS + 1} times: {told}"
            self.failures[number] = RankFailure(number, "a node of the cluster", DIED, message)
            return
        if outcome.failure is not None:
            self.failures[number] = outcome.failure
        else:
            self.values[number] = outcome.value
            if self.counts is not None:
                self.counts.finish(number, num_bytes)
            self.on_done(number, outcome.value)


def _call(
    number: int, fn: Callable[..., Any] | str, counter: Any | None, *wrapped: tuple[Any]
) -> tuple[CallOutcome, int]:
    """Runs in the task's process. What `fn` raises comes back as plain data, as not every exception pickles.

    Args:
        wrapped: the arguments, each in a tuple: one by one, as Ray puts what is large into its object store.

    Returns:
        What came of it, and the bytes that were counted.
    """
    args = [arg for (arg,) in wrapped]
    if counter is None:
        return attempt(number, lambda: resolve(fn)(*args)), 0
    meter = Meter(lambda done, total: counter.set.remote(number, done))
    outcome = attempt(number, lambda: resolve(fn)(*args, meter))
    return outcome, meter.done


class _Counts:
    """What the tasks of one run have counted, as it becomes known.

    Tasks tell an actor, which this asks, and nobody waits for it. Where it is lost, or has no place to run, tasks are
    counted when they have ended.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._known: dict[int, int] = {}
        self._finished: set[int] = set()
        actor: Any = ray.remote(num_cpus=0)(_Counter)
        self.counter = actor.remote()
        self._asked = self.counter.get.remote()

    def look(self) -> None:
        """Take in what the actor has answered, and ask it again."""
        if not ray.wait([self._asked], timeout=0)[0]:
            return
        with contextlib.suppress(RayError):
            for number, num_bytes in ray.get(self._asked).items():
                self._note(number, num_bytes)
        self._asked = self.counter.get.remote()

    def finish(self, number: int, num_bytes: int) -> None:
        """A task has ended, and has counted so many bytes in all."""
        self._note(number, num_bytes)
        self._finished.add(number)

    def close(self) -> None:
        """Nobody asks any more."""
        ray.kill(self.counter)

    def _note(self, number: int, num_bytes: int) -> None:
        if number not in self._finished:
            self._meter.add(num_bytes - self._known.get(number, 0))
            self._known[number] = num_bytes


class _Counter:
    """Bytes that tasks have counted, by their numbers."""

    def __init__(self) -> None:
        self._counted: dict[int, int] = {}

    def set(self, number: int, num_bytes: int) -> None:
        self._counted[number] = num_bytes

    def get(self) -> dict[int, int]:
        return self._counted
