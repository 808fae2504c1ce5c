"""WorkerGroup: a fixed number of worker processes on a Ray cluster, which form one process group.

    WorkerGroup(4)
      connect      join or start a Ray cluster, if the process has none yet
      place        one placement group, one bundle per worker; on an autoscaled cluster it is the demand
      actors       one per bundle; ranks are ordered by node, then device
      rendezvous   rank 0 opens a store on port 0; everybody joins torch.distributed through it
    group.run(fn)  fn(ctx, *args) on every rank; results in rank order, or the error of the rank that failed
    group.call(fn) the same with arguments of each rank's own, and no harm to the group when a rank fails
    close          ask the ranks to leave, kill who does not, remove the placement group

Knows nothing of checkpoints.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ray_ckpt.cluster.connect import connect
from ray_ckpt.cluster.gather import gather
from ray_ckpt.cluster.ray_internals import held_resources
from ray_ckpt.cluster.resources import choose_demand, describe, describe_nodes, explain_shortage
from ray_ckpt.cluster.watching import Watch
from ray_ckpt.cluster.worker import BESIDE, PING, Rendezvous, Worker, WorkerInfo
from ray_ckpt.errors import GroupError, GroupTimeoutError, PlacementError, UsageError
from ray_ckpt.progress import Meter, Progress
from ray_ckpt.text import told

LEAVE_TIMEOUT_S = 5.0
"""How long the workers may take to leave the process group before they are killed."""

REMOVAL_TIMEOUT_S = 10.0
"""How long to wait for Ray to confirm that a removed placement group is gone."""


PING_TIMEOUT_S = 2.0
"""How long a worker that did not answer in time may take to show that its process runs."""


@dataclass(frozen=True)
class PlacementWait:
    """The state of a wait for placement."""

    asked: str
    """The group's demand, such as `4 x {CPU: 1, GPU: 1}`."""
    nodes: str
    """The nodes that are up, such as `1 node with {CPU: 8, GPU: 0}`."""
    waited_s: float


class WorkerGroup:
    """Worker processes on a Ray cluster that form one process group. A context manager.

    Example:
        >>> from ray_ckpt import WorkerGroup
        >>> def add_up(ctx, number):
        ...     import torch
        ...     total = torch.tensor(ctx.rank + number)
        ...     torch.distributed.all_reduce(total)
        ...     return total.item()
        >>> with WorkerGroup(2) as group:
        ...     group.run(add_up, 10)  # on every rank; the results in rank order
        [21, 21]

    Construction is all or nothing: when it raises, nothing of the group is left in the cluster. A failed `run` closes
    the group, because its process group cannot be trusted any more; form a new one to go on.

    Args:
        num_workers: number of processes, and of ranks of the process group.
        cpus_per_worker: CPUs of each worker; by default one, or the fraction that lets all workers fit on the cluster.
        gpus_per_worker: GPUs of each worker; by default one where the cluster has GPUs, or the fraction that lets all
            workers fit.
        backend: backend of the process group; by default `cpu:gloo,cuda:nccl` with a GPU per worker, else `gloo`.
        process_group: whether the workers form a process group. Without one, they know nothing of each other.
        start_timeout_s: time limit for the cluster to place the workers (an autoscaled cluster has to start nodes) and
            for the workers to start.
        call_timeout_s: time limit of each call that gives none of its own.
        collective_timeout_s: time limit of the rendezvous and of each collective of the process group.
        on_wait: called about once a second while the cluster cannot place the group yet.

    Raises:
        UsageError: the arguments contradict each other or what the cluster has.
        PlacementError: the group could not be placed within `start_timeout_s`; says which resource is missing.
        WorkerError: a worker failed to start or to join the process group.
    """

    def __init__(
        self,
        num_workers: int,
        *,
        cpus_per_worker: float | None = None,
        gpus_per_worker: float | None = None,
        backend: str | None = None,
        process_group: bool = True,
        start_timeout_s: float = 300.0,
        call_timeout_s: float = 1800.0,
        collective_timeout_s: float = 120.0,
        on_wait: Callable[[PlacementWait], None] | None = None,
    ) -> None:
        if num_workers < 1:
            raise UsageError(f"a group needs at least one worker, not {num_workers}")
        self.call_timeout_s = call_timeout_s
        self._resources = contextlib.ExitStack()
        self._placement: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._unread: list[Any] = []
        """Results that nobody waits for any more."""
        self._background: Callable[[float | None], None] | None = None
        self.workers: tuple[WorkerInfo, ...] = ()
        try:
            if not ray.is_initialized():
                self._resources.enter_context(connect(num_cpus=math.ceil(num_workers * (cpus_per_worker or 1))))
            self.demand = choose_demand(_live_nodes(), num_workers, cpus_per_worker, gpus_per_worker, backend)
            deadline = time.monotonic() + start_timeout_s
            self._place(num_workers, start_timeout_s, on_wait)
            self._start_actors(num_workers, deadline)
            self._enlist(collective_timeout_s if process_group else None, deadline)
        except BaseException:
            self._give_up()
            raise

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error, or Ctrl-C, the ranks may sit in a collective: asking them to leave would only cost time.
        self.close(patience_s=LEAVE_TIMEOUT_S if kind is None else 0.0)

    @property
    def num_workers(self) -> int:
        """Number of workers."""
        return len(self.workers)

    @property
    def closed(self) -> bool:
        """Whether the workers have ended, by `close` or after a failure."""
        return not self._actors

    def run(
        self,
        fn: Callable[..., Any] | str,
        *args: Any,
        timeout_s: float | None = None,
        progress: Progress | None = None,
    ) -> list[Any]:
        """Call `fn(ctx, *args)` on every rank and return the results in rank order.

        `fn` should be a top-level function that takes and returns plain data; `ctx` is a `WorkerContext`. It may also
        be named, as `"package.module:function"`: then only the workers load what its module imports.

        Args:
            timeout_s: time limit; by default the group's `call_timeout_s`.
            progress: called about twice a second, on this thread, with the sums of what the ranks' `ctx.progress` was
                last called with, such as the bytes that are done and all bytes.

        Raises:
            WorkerError: one or more ranks raised or died. Names each within 5 s, though others may sit in a
                collective; the group is closed. A save with `blocking=False` gets 5 s more to end.
            GroupTimeoutError: the call outlasted `timeout_s` (by default the group's `call_timeout_s`); the group is
                closed.
            GroupError: the group is closed already.
            UsageError: `fn` or its arguments do not pickle. The group stays open.
        """
        actors = self._open_actors()
        timeout_s = self.call_timeout_s if timeout_s is None else timeout_s
        with self._watched(range(len(actors)), progress, beside=False) as look:
            return self._gather([_send(actor.call, fn, args, False) for actor in actors], timeout_s, look)

    def call(
        self,
        fn: Callable[..., Any] | str,
        args_of: Mapping[int, tuple[Any, ...]],
        *,
        timeout_s: float | None = None,
        beside: bool = False,
        retries: int = 0,
        progress: Progress | None = None,
    ) -> dict[int, Any]:
        """Call `fn(ctx, *args)` on some ranks, each with arguments of its own. The group stays open, whatever happens.

        Use no collectives in `fn`: after a failure the other ranks would sit in them.

        Args:
            args_of: rank -> arguments. Ranks that are not in it are left alone.
            beside: run on a second thread of each worker, beside the calls without `beside`; one at a time as well.
            retries: how often a rank that raises is called once more, in all; the others are not called again.
            progress: as for `run`.

        Returns:
            Rank -> result.

        Raises:
            WorkerError, GroupTimeoutError: as `run`, but the group is not closed, and ranks that have not answered yet
                go on with what they do.
            GroupError: the group is closed.
            UsageError: `fn` or its arguments do not pickle.
        """
        actors = self._open_actors()
        timeout_s = self.call_timeout_s if timeout_s is None else timeout_s
        options = {"concurrency_group": BESIDE} if beside else {}
        tries: Counter[int] = Counter()

        def start(rank: int) -> Any:
            return _send(actors[rank].call.options(**options), fn, args_of[rank], beside)

        def again(rank: int) -> Any | None:
            tries[rank] += 1
            return start(rank) if tries[rank] <= retries else None

        with self._watched(list(args_of), progress, beside=beside) as look:
            refs = {rank: start(rank) for rank in args_of}
            return gather(refs, self.workers, timeout_s, again, self._find_stopped, look)

    @contextlib.contextmanager
    def _watched(
        self, ranks: Sequence[int], progress: Progress | None, *, beside: bool
    ) -> Iterator[Callable[[], None]]:
        """Tell how far the call is that is made within the block, as often as what this yields is called."""
        if progress is None:
            yield lambda: None
            return
        actors = self._actors

        def ask() -> list[Any]:
            return [actors[rank].progress.options(concurrency_group=PING).remote(beside) for rank in ranks]

        watch = Watch(ask, Meter(progress))
        try:
            yield watch.look
            watch.end()
        finally:
            self._unread += watch.leave()

    def wait_for(self, wait: Callable[[float | None], None]) -> None:
        """Let `close` wait for something that goes on beside the calls, on a thread of this process.

        Args:
            wait: `wait(timeout_s)` returns when it has ended, or raises `TimeoutError` after that time (None: never).
                Its own calls on the workers fail once these are killed, so that it ends soon after.
        """
        self._background = wait

    def close(self, patience_s: float = LEAVE_TIMEOUT_S) -> None:
        """End the workers and give their resources back. May be called twice.

        Args:
            patience_s: how long the ranks may take to leave the process group together; 0 kills them at once.
        """
        try:
            if patience_s > 0 and self._actors:
                if self._background is not None:
                    self._background(None)
                refs = [actor.leave.remote() for actor in self._actors]
                ready, _ = ray.wait(refs, num_returns=len(refs), timeout=patience_s)
                _drop_results(ready)
        finally:
            self._tear_down()

    def _open_actors(self) -> list[Any]:
        """The workers, by rank.

        Raises:
            GroupError: the group is closed.
        """
        if self.closed:
            raise GroupError("the group is closed: form a new one")
        return self._actors

    def _place(self, num_workers: int, timeout_s: float, on_wait: Callable[[PlacementWait], None] | None) -> None:
        bundle = self.demand.bundle
        if not bundle:
            raise UsageError("a worker must ask for some CPU or GPU, or the cluster cannot place it")
        placement = self._placement = placement_group([bundle] * num_workers, strategy="PACK")
        start = time.monotonic()
        while not placement.wait(timeout_seconds=1):
            waited_s = time.monotonic() - start
            if waited_s >= timeout_s:
                shortage = explain_shortage(bundle, num_workers, _live_nodes(), ray.available_resources())
                raise PlacementError(f"the group was not placed within {timeout_s:g} s: {shortage}")
            if on_wait is not None:
                asked = f"{num_workers} x {describe(bundle)}"
                on_wait(PlacementWait(asked, describe_nodes(_live_nodes()), waited_s))

    def _start_actors(self, num_workers: int, deadline: float) -> None:
        assert self._placement is not None
        # As a mapping, because the types that Ray ships leave `concurrency_groups` out.
        settings: dict[str, Any] = {
            "max_restarts": 0,
            "max_task_retries": 0,
            "concurrency_groups": {BESIDE: 1, PING: 1},
        }
        actor_class: Any = ray.remote(**settings)(Worker)
        actors = [
            actor_class.options(
                num_cpus=self.demand.cpus,
                num_gpus=self.demand.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=i),
            ).remote()
            for i in range(num_workers)
        ]
        self._actors = actors
        # Workers are numbered by their bundles until they have told on which devices they are.
        self.workers = _placed_workers(self._placement)
        refs = [actor.describe.remote(place) for place, actor in enumerate(actors)]
        try:
            infos: list[WorkerInfo] = self._gather(refs, max(1.0, deadline - time.monotonic()))
        except GroupTimeoutError as error:
            raise GroupTimeoutError(f"not all workers have started: {error}") from error
        order = sorted(range(num_workers), key=lambda i: (infos[i].position, i))
        self._actors = [actors[i] for i in order]
        self.workers = tuple(infos[i] for i in order)

    def _enlist(self, collective_timeout_s: float | None, deadline: float) -> None:
        """Tell every worker its rank, and let them form their process group unless `collective_timeout_s` is None."""
        timeout_s = max(1.0, deadline - time.monotonic())
        local_ranks = [
            sum(other.node_id == worker.node_id for other in self.workers[:rank])
            for rank, worker in enumerate(self.workers)
        ]
        placed = list(enumerate(zip(self._actors, local_ranks, strict=True)))
        if collective_timeout_s is None:
            self._gather(
                [actor.enlist.remote(rank, self.num_workers, local) for rank, (actor, local) in placed], timeout_s
            )
            return
        one_node = len({worker.node_id for worker in self.workers}) == 1
        ref = self._actors[0].serve_store.remote(self.num_workers, collective_timeout_s, one_node)
        [(host, port)] = self._gather([ref], timeout_s)
        rendezvous = Rendezvous(host, port, self.num_workers, self.demand.backend, one_node, collective_timeout_s)
        self._gather([actor.join.remote(rendezvous, rank, local) for rank, (actor, local) in placed], timeout_s)

    def _gather(self, refs: list[Any], timeout_s: float, look: Callable[[], None] = lambda: None) -> list[Any]:
        try:
            by_rank = dict(enumerate(refs))
            found = gather(by_rank, self.workers, timeout_s, find_stopped=self._find_stopped, look=look)
            return list(found.values())
        except BaseException as error:
            if self._background is not None and isinstance(error, GroupError):
                # A save of what all workers had copied may need no more of the one that died.
                with contextlib.suppress(TimeoutError):
                    self._background(LEAVE_TIMEOUT_S)
            self._give_up(refs)
            raise

    def _find_stopped(self, ranks: Sequence[int]) -> list[int]:
        """The ranks whose process does not respond, on any thread, as when it was sent SIGSTOP."""
        actors = self._actors  # none, if the group has been closed meanwhile
        started = [rank for rank in ranks if actors and self.workers[rank].pid]
        pings = {actors[rank].ping.options(concurrency_group=PING).remote(): rank for rank in started}
        if not pings:
            return []
        responded, silent = ray.wait(list(pings), num_returns=len(pings), timeout=PING_TIMEOUT_S)
        _drop_results(responded)
        self._unread += silent
        return sorted(pings[ping] for ping in silent)

    def _give_up(self, unread: Sequence[Any] = ()) -> None:
        """Tear down after an error, which says more than that Ray does not confirm the end."""
        with contextlib.suppress(GroupError):
            self._tear_down(unread)

    def _tear_down(self, unread: Sequence[Any] = ()) -> None:
        with self._resources:  # whose end is Ray's, if it is ours
            for actor in self._actors:
                ray.kill(actor)
            self._actors = []
            _drop_results([*unread, *self._unread])
            if self._background is not None:
                # Before Ray is gone: a call to it would start another one.
                with contextlib.suppress(TimeoutError):
                    self._background(LEAVE_TIMEOUT_S)
                self._background = None
            if self._placement is not None:
                placement, self._placement = self._placement, None
                remove_placement_group(placement)
                _wait_until_removed(placement)


def _send(call: Any, fn: Callable[..., Any] | str, args: tuple[Any, ...], beside: bool) -> Any:
    """Call `fn` on a worker. Returns the reference to its `CallOutcome`.

    Raises:
        UsageError: the function or its arguments do not pickle.
    """
    try:
        # One by one, as Ray puts what is large into its object store: with it would go an address with credentials.
        return call.remote(fn, beside, *((arg,) for arg in args))
    except Exception as error:  # whatever the user's own `__reduce__` raises, or a page by Ray about its cause
        raise UsageError(
            f"cannot send {fn if isinstance(fn, str) else getattr(fn, '__qualname__', fn)} and its arguments to the "
            f"workers: {told(error.__cause__ or error)}; they have to pickle, as those of a top-level function and "
            "plain data do"
        ) from error


def _placed_workers(placement: PlacementGroup) -> tuple[WorkerInfo, ...]:
    """What is known of the workers before they have started: each one's node."""
    nodes = {node["NodeID"]: node for node in ray.nodes()}
    infos = []
    for _, node_id in sorted(placement_group_table(placement)["bundles_to_node_id"].items()):
        node = nodes.get(node_id, {})
        address = node.get("NodeManagerAddress", "unknown address")
        infos.append(WorkerInfo(node_id, address, node.get("NodeManagerHostname", "a lost node"), 0, ()))
    return tuple(infos)


def _live_nodes() -> list[dict[str, float]]:
    """The resources of each node, without those that this very process holds, as a task or an actor of Ray."""
    own_node, held = ray.get_runtime_context().get_node_id(), held_resources()
    return [
        {
            name: amount - held.get(name, 0) if node["NodeID"] == own_node else amount
            for name, amount in node["Resources"].items()
        }
        for node in ray.nodes()
        if node["Alive"]
    ]


def _drop_results(refs: Sequence[Any]) -> None:
    """Look at results nobody wants: Ray prints a traceback at exit for every failed one that was never read."""
    for ref in refs:
        with contextlib.suppress(RayError):
            ray.get(ref, timeout=1)


def _wait_until_removed(placement: PlacementGroup) -> None:
    deadline = time.monotonic() + REMOVAL_TIMEOUT_S
    while placement_group_table(placement).get("state") != "REMOVED":
        if time.monotonic() > deadline:
            raise GroupError(f"Ray did not confirm within {REMOVAL_TIMEOUT_S:g} s that the placement group is removed")
        time.sleep(0.01)
