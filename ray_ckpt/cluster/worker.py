"""What runs in a worker process: the actor of one rank, and the context that it hands to functions."""

from __future__ import annotations

import importlib
import os
import pkgutil
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ray

from ray_ckpt.errors import RankFailure
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.text import message_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class WorkerInfo:
    """Where a worker runs."""

    node_id: str
    node_ip: str
    hostname: str
    pid: int
    """0 as long as the worker has not said it."""
    gpu_ids: tuple[str, ...]

    @property
    def node(self) -> str:
        """The node as a person reads it."""
        return _node_name(self.hostname, self.node_ip)

    @property
    def position(self) -> tuple[object, ...]:
        """Sorts by node, then by device; GPU 10 comes after GPU 2."""
        return self.node_ip, self.node_id, [(len(gpu), gpu) for gpu in self.gpu_ids]


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of a group meet, and the process group that they form there."""

    host: str
    port: int
    world_size: int
    backend: str
    one_node: bool
    """Whether all ranks are on one node: then nothing listens where other hosts could reach it."""
    timeout_s: float
    """Timeout of the rendezvous and of every collective after it."""


@dataclass
class WorkerContext:
    """The first argument of every function that `WorkerGroup.run` calls: which worker it runs on.

    Example:
        >>> from ray_ckpt import WorkerContext, WorkerGroup
        >>> def count(ctx: WorkerContext) -> int:
        ...     ctx.objects["calls"] = ctx.objects.get("calls", 0) + 1
        ...     return 10 * ctx.rank + ctx.objects["calls"]
        >>> with WorkerGroup(2, process_group=False) as group:
        ...     group.run(count), group.run(count)
        ([1, 11], [2, 12])
    """

    rank: int
    world_size: int
    """Number of workers in the group."""
    local_rank: int
    """Rank among the group's workers on this node."""
    device: torch.device
    """Where this rank's tensors belong: its GPU if it has one, else the CPU."""
    backend: str
    """Backend of the process group; empty when the workers form none."""
    objects: dict[str, Any] = field(default_factory=dict)
    """Keeps objects (a model, an optimizer) from one call to the next, in the worker's process."""
    told: tuple[int, int] = (0, 0)
    """What `progress` was last called with, in the call that runs."""

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        """Let the driver know how far this call is, for the `progress` of `WorkerGroup.run`. Costs next to nothing.

        Example:
            >>> from ray_ckpt import WorkerContext, WorkerGroup
            >>> def work(ctx: WorkerContext) -> None:
            ...     ctx.progress(10, 10)  # or save(..., progress=ctx.progress)
            >>> told = []
            >>> with WorkerGroup(2, process_group=False) as group:
            ...     done = group.run(work, progress=lambda done, total: told.append((done, total)))
            >>> told[-1]
            (20, 20)
        """
        self.told = done_bytes, total_bytes


@dataclass(frozen=True)
class CallOutcome:
    """The result of a call on one rank, a value or a failure, as plain data that always pickles."""

    value: Any = None
    failure: RankFailure | None = None


LONGEST_TEXT = 10_000
"""Characters of a message or a traceback that a worker sends."""

BESIDE = "beside"
"""Ray's concurrency group for calls that run beside the others, on a second thread of the worker's process."""

PING = "ping"
"""Ray's concurrency group for calls that only ask whether the process runs, on a third thread."""


class Worker:
    """The actor of one rank. Calls run one at a time and always on the same thread, those `BESIDE` on another."""

    def __init__(self) -> None:
        self._store: Any = None
        self._contexts: dict[bool, WorkerContext] = {}
        """Context of the calls by whether they are beside the others."""

    def describe(self, place: int) -> CallOutcome:
        """Where this worker, number `place` of the group until ranks are given, runs: a `WorkerInfo`."""
        return attempt(place, self._describe)

    def _describe(self) -> WorkerInfo:
        # The slow part of joining the process group: here all ranks do it at the same time.
        load_module("ray_ckpt.parallel.group")
        runtime = ray.get_runtime_context()
        return WorkerInfo(
            node_id=runtime.get_node_id(),
            node_ip=ray.util.get_node_ip_address(),
            hostname=socket.gethostname(),
            pid=os.getpid(),
            gpu_ids=_gpu_ids(),
        )

    def serve_store(self, world_size: int, timeout_s: float, one_node: bool) -> CallOutcome:
        """Open the group's store in this process; the value is its host and port."""
        return attempt(0, self._serve_store, world_size, timeout_s, one_node)

    def _serve_store(self, world_size: int, timeout_s: float, one_node: bool) -> tuple[str, int]:
        # torch is imported here rather than above, so that the driver, which also loads this module, goes without it.
        from ray_ckpt.parallel.group import serve_store

        host = _own_address(one_node)
        self._store = serve_store(host, world_size, timeout_s)
        return host, self._store.port

    def enlist(self, rank: int, world_size: int, local_rank: int) -> CallOutcome:
        """Become rank `rank` of the workers, without a process group."""
        return attempt(rank, self._enlist, rank, world_size, local_rank)

    def _enlist(self, rank: int, world_size: int, local_rank: int, backend: str = "") -> torch.device:
        import torch

        # Ray narrows CUDA_VISIBLE_DEVICES to this worker's GPU, which is therefore number 0. Without a GPU it leaves
        # the variable alone, so `torch.cuda.is_available()` would not tell.
        device = torch.device("cuda", 0) if _gpu_ids() else torch.device("cpu")
        context = WorkerContext(rank, world_size, local_rank, device, backend)
        self._contexts = {False: context, True: replace(context)}  # with the same objects
        return device

    def join(self, rendezvous: Rendezvous, rank: int, local_rank: int) -> CallOutcome:
        """Become rank `rank` of the process group."""
        return attempt(rank, self._join, rendezvous, rank, local_rank)

    def _join(self, rendezvous: Rendezvous, rank: int, local_rank: int) -> None:
        from ray_ckpt.parallel.group import join

        device = self._enlist(rank, rendezvous.world_size, local_rank, rendezvous.backend)
        join(
            rendezvous.host,
            rendezvous.port,
            rank=rank,
            world_size=rendezvous.world_size,
            backend=rendezvous.backend,
            device=device,
            host=_own_address(rendezvous.one_node),
            timeout_s=rendezvous.timeout_s,
        )

    def call(self, fn: Callable[..., Any] | str, beside: bool, *wrapped: tuple[Any]) -> CallOutcome:
        """Run `fn(ctx, *args)`, or the function of that name.

        Args:
            beside: whether this runs beside other calls.
            wrapped: the arguments, each in a tuple.
        """
        assert self._contexts, "the group calls functions only after every rank has joined"
        context = self._contexts[beside]
        context.told = 0, 0
        return attempt(context.rank, lambda: resolve(fn)(context, *(arg for (arg,) in wrapped)))

    def progress(self, beside: bool) -> tuple[int, int]:
        """How far the call that runs is, as it has told."""
        return self._contexts[beside].told

    def ping(self) -> None:
        """Show that the process runs."""

    def leave(self) -> None:
        from ray_ckpt.parallel.group import leave

        leave()


def load_module(name: str) -> None:
    """Import a module. torch and what is built on it make millions of objects that are there to stay: looking through
    them for garbage on the way takes a fifth of the time."""
    with collector_paused():
        importlib.import_module(name)


def _own_address(one_node: bool) -> str:
    """Where this worker listens for its peers."""
    return "127.0.0.1" if one_node else ray.util.get_node_ip_address()


def _node_name(hostname: str, address: str) -> str:
    return f"{hostname} ({address})"


def _gpu_ids() -> tuple[str, ...]:
    return tuple(ray.get_runtime_context().get_accelerator_ids().get("GPU", ()))


def resolve(fn: Callable[..., Any] | str) -> Callable[..., Any]:
    """The function, or the one of that name (`"package.module:function"`)."""
    with collector_paused():  # as in `load_module`
        found: Callable[..., Any] = pkgutil.resolve_name(fn) if isinstance(fn, str) else fn
    return found


def attempt(rank: int, fn: Callable[..., Any], *args: Any) -> CallOutcome:
    """Call `fn`; turn whatever it raises into plain data, as not every exception pickles.

    `CheckpointException`, which DCP raises, is a BaseException and would otherwise end the process.
    """
    try:
        return CallOutcome(value=fn(*args))
    except BaseException as error:
        kind = type(error)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        node = _node_name(socket.gethostname(), ray.util.get_node_ip_address())
        return CallOutcome(
            failure=RankFailure(rank, node, name, _shortened(message_of(error)), _shortened(_trace_of(error)))
        )


def _trace_of(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except BaseException:
        return "".join(traceback.format_tb(error.__traceback__))


def _shortened(text: str) -> str:
    """Without its middle, where that is long: a person reads it, and every rank may send one."""
    half = LONGEST_TEXT // 2
    return text if len(text) <= LONGEST_TEXT else f"{text[:half]} ... {len(text) - 2 * half} more ... {text[-half:]}"
