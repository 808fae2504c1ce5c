"""Run a function on several ranks of one gloo process group, each in a process of its own.

    run_ranks(function, world_size, tmp_path, *args) -> what the ranks returned, by rank

The processes come from a fork server that has torch loaded, so four of them start in about a tenth of a second. They
meet through a FileStore, so no port is involved. Each has a pipe: a rank that raises or dies is known at once, its
peers are stopped by handle, and `RanksError` names it. `function` is called as `function(rank, *args)` and must be at
the top level of a module; arguments and results travel by pickle.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

_PRELOAD = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "ray_ckpt.storage.checkpoint_reader",
    "ray_ckpt.dcp.writer",
    "ray_ckpt.recipes.pipeline_to_fsdp.ranks",
]
_GRACE_S = 0.5
"""How long after the first failure others may still report theirs: the first one heard is often a victim."""


class RanksError(AssertionError):
    """Some ranks failed. `failures` maps each to its traceback, or to how its process ended."""

    def __init__(self, failures: dict[int, str]) -> None:
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        self.failures = failures


def run_ranks(
    function: Callable[..., Any], world_size: int, directory: Path, *args: Any, timeout_s: float = 60.0
) -> list[Any]:
    """Run `function(rank, *args)` on every rank.

    Raises:
        RanksError: a rank raised, died, or was still running after `timeout_s`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    store = directory / f"store-{time.monotonic_ns()}"
    ranks = [_Rank(context, rank, world_size, store, function, args) for rank in range(world_size)]
    try:
        return _collect(ranks, time.monotonic() + timeout_s)
    finally:
        for rank in ranks:
            rank.stop()


class _Rank:
    """One process and the pipe that its result comes through."""

    def __init__(
        self,
        context: ForkServerContext,
        rank: int,
        world_size: int,
        store: Path,
        function: Callable[..., Any],
        args: tuple[Any, ...],
    ) -> None:
        self.rank = rank
        self.pipe, child_pipe = context.Pipe(duplex=False)
        # Not daemonic: a rank may start processes of its own, as a process-based `async_save` does.
        self.process: ForkServerProcess = context.Process(
            target=_main, args=(child_pipe, rank, world_size, str(store), function, args), daemon=False
        )
        self.process.start()
        child_pipe.close()

    def receive(self) -> tuple[bool, Any]:
        """(True, result) or (False, what went wrong)."""
        try:
            return pickle.loads(self.pipe.recv_bytes())  # type: ignore[no-any-return]
        except EOFError:
            self.process.join(5.0)
            return False, f"died with exit code {self.process.exitcode}"

    def stop(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join(5.0)
        self.pipe.close()


def _collect(ranks: list[_Rank], deadline: float) -> list[Any]:
    waiting: dict[Any, _Rank] = {rank.pipe: rank for rank in ranks}
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
        for pipe in ready:
            rank = waiting.pop(pipe)
            succeeded, value = rank.receive()
            if succeeded:
                results[rank.rank] = value
            else:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
                failures[rank.rank] = value
    if failures:
        raise RanksError(failures)
    if waiting:
        raise RanksError({rank.rank: "still running when the time was up" for rank in waiting.values()})
    return [results[rank.rank] for rank in ranks]


def _main(
    pipe: Connection, rank: int, world_size: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)  # as torchrun does
    outcome: tuple[bool, Any]
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=30),
        )
        value = function(rank, *args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        outcome = (False, traceback.format_exc())
    else:
        outcome = (True, value)
    pipe.send_bytes(pickle.dumps(outcome))  # `send` would pass tensors by a file that dies with this process
