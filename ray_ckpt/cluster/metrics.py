"""Events as metrics of Ray, which its nodes offer to Prometheus.

an event ── Metrics ──> ray.util.metrics ──> the metrics endpoint of the node, as `ray_ckpt_...`

Without Ray, `events=` is called with the same events, and counts them in whatever way it likes.
"""

from __future__ import annotations

import time

from ray.util.metrics import Counter, Gauge, Histogram

from ray_ckpt.events import BLOCKED, DURABLE, END, Event

__all__ = ["MemoryFill", "Metrics"]

_SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
"""Upper bounds of the histogram's buckets."""


class Metrics:
    """Counts events as metrics of Ray. For `events=`, in a process that has joined a cluster; every job does so.

    Example:
        >>> import torch
        >>> from ray_ckpt import WorkerGroup, cluster
        >>> def state_of(ctx):
        ...     return ctx.objects.setdefault("state", {f"part{ctx.rank}": torch.ones(3)})
        >>> with WorkerGroup(2, process_group=False) as group:
        ...     report = cluster.save(group, state_of, "run", 1, events=cluster.Metrics())
    """

    def __init__(self) -> None:
        by_operation = ("operation",)
        self._phases = Histogram(
            "ckpt_phase_seconds",
            "Time that a rank, or the coordinator, spent in a phase of a save, load, check or transfer; `end`: in all.",
            boundaries=_SECONDS,
            tag_keys=("operation", "phase"),
        )
        self._bytes = Counter(
            "ckpt_bytes", "Bytes that saves have written, loads and checks have read, and transfers sent.", by_operation
        )
        self._rate = Gauge("ckpt_bytes_per_second", "Rate of the last save, load, check or transfer.", by_operation)
        self._retries = Counter("ckpt_retries", "Further tries of storage after errors that may pass.", by_operation)
        self._failures = Counter("ckpt_failures", "What failed, by kind of error.", ("operation", "kind"))
        self._blocked = Counter("ckpt_blocked_seconds", "Time for which saves and transfers have held up training.")
        self._newest = Gauge("ckpt_newest_step", "The newest step that was committed.", ("tier",))
        self._committed = Gauge("ckpt_newest_step_timestamp", "When it was committed, since the epoch.", ("tier",))
        self._steps = Counter("ckpt_train_steps", "Steps that were trained, those included that were lost again.")
        self._useful = Gauge("ckpt_useful_steps", "Steps that are trained and not lost, since this job's first.")
        self._goodput = Gauge("ckpt_goodput_steps_per_second", "Useful steps over all seconds of this job.")
        self._restarts = Counter("ckpt_restarts", "Restarts of training after a failure.")
        self._began = time.monotonic()
        self._first_step: int | None = None

    def __call__(self, event: Event) -> None:
        """Count an event."""
        operation = {"operation": event.operation}
        if event.failure:
            self._failures.inc(1, {**operation, "kind": event.failure})
        elif event.operation == "train":
            self._count_training(event)
        elif event.phase == BLOCKED:
            _add(self._blocked, event.seconds)
        elif event.phase == DURABLE:
            self._set_newest(event, "durable")
        elif event.operation in ("save", "load", "verify", "transfer"):
            self._phases.observe(event.seconds, {**operation, "phase": event.phase})
            if event.phase == END:
                self._count_end(event, operation)

    def _count_end(self, event: Event, operation: dict[str, str]) -> None:
        _add(self._bytes, event.num_bytes, operation)
        _add(self._retries, event.num_retries, operation)
        if event.seconds > 0:
            self._rate.set(event.num_bytes / event.seconds, operation)
        if event.operation == "save":
            self._set_newest(event, "front" if event.uri.startswith("ram://") else "durable")

    def _set_newest(self, event: Event, tier: str) -> None:
        if event.step is not None:
            self._newest.set(event.step, {"tier": tier})
            self._committed.set(event.start_s + event.seconds, {"tier": tier})

    def _count_training(self, event: Event) -> None:
        if event.phase == "restart":
            self._restarts.inc()
        elif event.phase == "step" and event.step is not None:
            self._steps.inc()
            if self._first_step is None:
                self._first_step = event.step - 1
            useful = event.step - self._first_step  # a step that is trained again follows an earlier one
            self._useful.set(useful)
            self._goodput.set(useful / max(1e-3, time.monotonic() - self._began))


class MemoryFill:
    """How full the memory of a `ram://` store is.

    Args:
        store: its name.
    """

    def __init__(self, store: str) -> None:
        keys = ("store", "node")
        self._store = store
        self._used = Gauge("ckpt_memory_used_bytes", "Bytes of the files of a ram:// store on a node.", keys)
        self._capacity = Gauge("ckpt_memory_capacity_bytes", "Bytes that they may take there.", keys)

    def tell(self, nodes: dict[str, tuple[int, int]]) -> None:
        """What is used, and may be, by node id."""
        for node, (used, capacity) in nodes.items():
            tags = {"store": self._store, "node": node}
            self._used.set(used, tags)
            self._capacity.set(capacity, tags)


def _add(counter: Counter, amount: float, tags: dict[str, str] | None = None) -> None:
    if amount > 0:  # Ray takes nothing else
        counter.inc(amount, tags or {})
