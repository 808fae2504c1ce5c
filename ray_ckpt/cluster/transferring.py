"""transfer(source, state_of_source, target, state_of_target): a save and a load in one, without a store between.

source                          driver                                          target
    offer   ── names, parts ──>     plan_streams ── a record, as of a checkpoint ──>    open ... prepare, as a load
                                                <── what is wanted of which stream ──   expect
    send    ── window k ──> memory of Ray
    send    ── window k+1                           window k ─────────────────────>     take
    ...                             a thread sends, this one lets take                  ...
    end     it may go on            the record with what was sent ────────────────>     settle, finish, compare

At most two windows of a source rank are in memory at a time: one is copied out of the state while the other is taken.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from ray_ckpt.cluster import transfer_side, worker_side
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.cluster.loading import LoadAttempt
from ray_ckpt.errors import CheckpointError, RayCkptError, UsageError
from ray_ckpt.events import Events, Telling
from ray_ckpt.format.manifest import Manifest
from ray_ckpt.format.saved import Saved
from ray_ckpt.progress import Meter, Progress
from ray_ckpt.protocol.save_options import Cast, SaveOptions
from ray_ckpt.protocol.stream_plan import Proof, StreamPlan, plan_streams
from ray_ckpt.report import TransferReport
from ray_ckpt.storage.files import Storage
from ray_ckpt.text import listed

MEMORY_BYTES = 256 << 20
"""What the windows of one rank of the source take by default."""

LEAST_MEMORY_BYTES = 2 << 20

_logger = logging.getLogger("ray_ckpt")


@overload
def transfer(
    source: WorkerGroup,
    source_state_of: worker_side.StateOf | str,
    target: WorkerGroup,
    target_state_of: worker_side.StateOf | str,
    *,
    only: Sequence[str] | None = ...,
    cast: Cast | None = ...,
    key_map: Mapping[str, str | Saved] | None = ...,
    strict: bool = ...,
    atomic: bool = ...,
    memory_bytes: int = ...,
    blocking: Literal[True] = ...,
    timeout_s: float | None = ...,
    progress: Progress | None = ...,
    events: Events | None = ...,
) -> TransferReport: ...
@overload
def transfer(
    source: WorkerGroup,
    source_state_of: worker_side.StateOf | str,
    target: WorkerGroup,
    target_state_of: worker_side.StateOf | str,
    *,
    only: Sequence[str] | None = ...,
    cast: Cast | None = ...,
    key_map: Mapping[str, str | Saved] | None = ...,
    strict: bool = ...,
    atomic: bool = ...,
    memory_bytes: int = ...,
    blocking: Literal[False],
    timeout_s: float | None = ...,
    progress: Progress | None = ...,
    events: Events | None = ...,
) -> TransferHandle: ...
def transfer(
    source: WorkerGroup,
    source_state_of: worker_side.StateOf | str,
    target: WorkerGroup,
    target_state_of: worker_side.StateOf | str,
    *,
    only: Sequence[str] | None = None,
    cast: Cast | None = None,
    key_map: Mapping[str, str | Saved] | None = None,
    strict: bool = True,
    atomic: bool = False,
    memory_bytes: int = MEMORY_BYTES,
    blocking: bool = True,
    timeout_s: float | None = None,
    progress: Progress | None = None,
    events: Events | None = None,
) -> TransferReport | TransferHandle:
    """Give the workers of one group what those of another hold, whatever the layouts, without a store between.

    Everything is compared before anything is changed. Bytes go through Ray's object memory window by window, the next
    one copied while one is taken, and nothing of it is left. In the end what the target holds is compared with
    what was sent, over all tensors that both have, as `compare` does. Both groups stay open, whatever happens.

    Example:
        >>> import torch
        >>> from ray_ckpt import WorkerGroup, cluster
        >>> def trained(ctx):
        ...     return {f"layer{ctx.rank}": torch.full((3,), 1.0 + ctx.rank)}
        >>> def serving(ctx):
        ...     return ctx.objects.setdefault("all", {"layer0": torch.zeros(3), "layer1": torch.zeros(3)})
        >>> def total(ctx):
        ...     return sum(float(tensor.sum()) for tensor in serving(ctx).values())
        >>> with WorkerGroup(2, process_group=False) as trainers, WorkerGroup(1, process_group=False) as servers:
        ...     report = cluster.transfer(trainers, trained, servers, serving)
        ...     report.num_compared, servers.run(total)
        (2, [9.0])

    Args:
        source, source_state_of: who sends what, as for `cluster.save`: tensors, and values that are small.
        target, target_state_of: who takes it, as for `cluster.load`. It may be the same group.
        only, cast, key_map: what is sent, and how, as for `ray_ckpt.save`.
        strict: as for `ray_ckpt.load`.
        atomic: keep the target's old values until all bytes are there, in as much memory again.
        memory_bytes: of Ray's object memory, for the windows of each rank of the source: there, and on each node of the
            target that is another.
        blocking: whether to wait for the end. Otherwise the call returns once the source's part is copied and its state
            may change; leave the target alone until the handle has a result.
        timeout_s: time limit; by default the longer `call_timeout_s` of the two groups.
        progress: called with the bytes that the source has copied and all that it will.
        events: called with an `Event` each for the copying by the source, for the end, or failure, and for the time
            until this call returns; of a transfer in the background on its thread.

    Raises:
        WorkerError, GroupTimeoutError: workers of either group failed, died or were too slow, or what is sent does not
            fit what they hold; names each, and what the failed transfer has left on the target.
        CommitError, UsageError: the source's parts do not fit together, or cannot be sent.
        CheckpointError: the target does not hold what was sent; names the tensors.
    """
    if memory_bytes < LEAST_MEMORY_BYTES:
        raise UsageError(f"memory_bytes={memory_bytes} is less than the {LEAST_MEMORY_BYTES} that a transfer takes")
    options = SaveOptions.of(only, cast, key_map, fingerprints=True)
    seconds = max(source.call_timeout_s, target.call_timeout_s) if timeout_s is None else timeout_s
    sender = _Sender(source, memory_bytes // 2, time.monotonic() + seconds, Meter(progress))
    taker = LoadAttempt(target, target_state_of, seconds)
    handle, telling = TransferHandle(), Telling(events, "transfer")

    def run() -> TransferReport:
        with telling.failing(), taker.giving_up(), sender.ending():
            plan = sender.plan(source_state_of, options)
            report = _Transfer(sender, taker, plan, handle._free.set).run(target_state_of, strict, atomic=atomic)
        telling.transferred(report)
        return report

    outcome: TransferReport | TransferHandle = handle
    if blocking:
        outcome = run()
    else:
        handle._start(run)
        target.wait_for(handle._wait)
        handle._wait_for_source()
    telling.blocked()
    return outcome


class TransferHandle:
    """A transfer that goes on in the background, as `cluster.transfer(..., blocking=False)` returns it.

    Example:
        >>> import torch
        >>> from ray_ckpt import WorkerGroup, cluster
        >>> def state_of(ctx):
        ...     return ctx.objects.setdefault("stage", {f"stage{ctx.rank}": torch.ones(3)})
        >>> with WorkerGroup(2, process_group=False) as group:
        ...     handle = cluster.transfer(group, state_of, group, state_of, blocking=False)
        ...     handle.result(timeout_s=60).num_compared, handle.done()
        (2, True)
    """

    def __init__(self) -> None:
        self._future: Future[TransferReport] = Future()
        self._free = threading.Event()
        """Set when the source's part is copied."""

    def done(self) -> bool:
        """Whether it has ended, successfully or not."""
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> TransferReport:
        """Wait for its end.

        Args:
            timeout_s: how long to wait; None waits to the end.

        Raises:
            TimeoutError: it has not ended within `timeout_s`; it goes on.
            RayCkptError: it failed, as a blocking one would have.
        """
        return self._future.result(timeout_s)

    def _start(self, work: Callable[[], TransferReport]) -> None:
        threading.Thread(target=self._run, args=(work,), name="ray_ckpt-transfer", daemon=False).start()

    def _run(self, work: Callable[[], TransferReport]) -> None:
        try:
            self._future.set_result(work())
        except BaseException as error:
            _logger.warning("the transfer in the background failed: %s: %s", type(error).__name__, error)
            self._future.set_exception(error)
        finally:
            self._free.set()

    def _wait(self, timeout_s: float | None) -> None:
        with contextlib.suppress(RayCkptError):
            self.result(timeout_s)

    def _wait_for_source(self) -> None:
        self._free.wait()
        if self.done():
            self.result()  # what failed before the source was free is raised at once


@dataclass
class _Sender:
    """The driver's side of the source."""

    group: WorkerGroup
    window_bytes: int
    deadline: float
    meter: Meter
    attempt: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    proofs: list[Proof] = field(default_factory=list)
    """What the windows of each rank have told."""
    num_bytes: int = 0
    num_windows: int = 0
    has_failed: bool = False
    _left: list[int] = field(default_factory=list)
    """Ranks that have more to send."""

    def plan(self, state_of: worker_side.StateOf | str, options: SaveOptions) -> StreamPlan:
        ranks = range(self.group.num_workers)
        offers = self._call(transfer_side.offer, dict.fromkeys(ranks, (self.attempt, state_of, options)))
        plan = plan_streams([offers[rank] for rank in ranks], self.attempt)
        self.proofs, self._left = [Proof() for _ in ranks], list(ranks)
        self.meter.expect(sum(tensor.num_bytes for tensor in plan.manifest.tensors.values()))
        return plan

    def begin(self, plan: StreamPlan, by_fingerprint: frozenset[str]) -> None:
        self._call(transfer_side.begin, {each.rank: (each, by_fingerprint) for each in plan.assignments})

    def send(self) -> dict[int, transfer_side.Sent]:
        """Let each rank that has more copy its next window. Nothing when none has."""
        if not self._left:
            return {}
        sent = self._call(transfer_side.send, dict.fromkeys(self._left, (self.attempt, self.window_bytes)))
        for rank, window in sent.items():
            self.proofs[rank].add(window.proof)
            self.num_bytes += window.num_bytes
            self.meter.add(window.num_bytes)
        self.num_windows += 1
        self._left = [rank for rank, window in sent.items() if not window.is_last]
        return sent

    @property
    def is_done(self) -> bool:
        return not self._left

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """In the end, let the workers release their states."""
        try:
            yield
        finally:
            worker_side.tell_all(self.group, transfer_side.end, self.attempt)

    def _call(self, fn: Callable[..., Any], args_of: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        try:
            return self.group.call(fn, args_of, timeout_s=max(0.0, self.deadline - time.monotonic()))
        except RayCkptError as error:
            self.has_failed = True
            error.append("it is the source of a transfer")
            raise


@dataclass
class _Transfer:
    """One transfer, once the source has said what it sends."""

    sender: _Sender
    taker: LoadAttempt
    plan: StreamPlan
    on_free: Callable[[], None]
    """Called when the source may go on."""
    start: float = field(default_factory=time.monotonic)

    def run(self, target_state_of: worker_side.StateOf | str, strict: bool, *, atomic: bool) -> TransferReport:
        taker = self.taker
        storage = Storage(f"ram://transfer-{taker.id}")  # a name for messages: no store is begun
        args = storage, {"strict": strict}, atomic, target_state_of, self.plan.manifest
        try:
            taker.prepare(taker.call(transfer_side.open_transfer, *args))
            expected = taker.call(transfer_side.expect, target_state_of, self.plan.planned)
            by_fingerprint = frozenset[str]().union(*(needing for _, needing in expected))
            self.sender.begin(self.plan, by_fingerprint)
            source_s = self._move([wants for wants, _ in expected])
            proof = self.plan.proven(self.sender.proofs)
            taker.call(transfer_side.settle)
            reports = taker.finish()
            num_compared = self._compare(proof, target_state_of, by_fingerprint)
        except RayCkptError as error:
            if not self.sender.has_failed:
                error.append("it is the target of a transfer")
            raise
        self.sender.meter.end()
        return TransferReport(
            num_bytes=self.sender.num_bytes,
            seconds=time.monotonic() - self.start,
            source_seconds=source_s,
            num_windows=self.sender.num_windows,
            num_compared=num_compared,
            missing=reports[0].missing,
            unexpected=reports[0].unexpected,
        )

    def _move(self, wants: Sequence[Any]) -> float:
        """All windows. Returns the seconds after which the source was free."""
        sender, source_s = self.sender, 0.0
        with ThreadPoolExecutor(1, thread_name_prefix="ray_ckpt-transfer") as pool:
            coming = pool.submit(sender.send)
            while sent := coming.result():
                if sender.is_done:
                    source_s = time.monotonic() - self.start
                    self.on_free()
                coming = pool.submit(sender.send)
                self._take(sent, wants)
        return source_s

    def _take(self, sent: Mapping[int, transfer_side.Sent], wants: Sequence[Any]) -> None:
        windows: dict[int, dict[int, Any]] = {}
        for rank, window in sent.items():
            for target in self.plan.wanted_by(wants, rank, window.start, window.end) if window.num_bytes else ():
                windows.setdefault(target, {})[rank] = window.object
        left_s = self.taker.left_s
        self.taker.call_some(transfer_side.take, {rank: (of_rank, left_s) for rank, of_rank in windows.items()})

    def _compare(self, proof: Manifest, state_of: worker_side.StateOf | str, by_fingerprint: frozenset[str]) -> int:
        """Whether the target holds what was sent. Returns the number of tensors."""
        from ray_ckpt.protocol.comparison import compare_with  # it loads torch

        found = compare_with(proof, self.taker.call_plain(transfer_side.compare, state_of, proof, by_fingerprint))
        if found.differing:
            told = listed([f"{name} ({reason})" for name, reason in found.differing.items()])
            raise CheckpointError(f"the target holds something else than what was sent: {told}")
        return found.num_compared
