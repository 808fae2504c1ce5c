"""Functions that tests run on the ranks of a group. Importable by the workers, so that they travel by name.

Imports nothing that takes a worker long to load: tests state how long a call may take.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ray_ckpt.cluster.worker import WorkerContext

if TYPE_CHECKING:
    from ray_ckpt.storage.files import Storage


def describe(ctx: WorkerContext, *args: Any) -> dict[str, Any]:
    total = torch.tensor([float(ctx.rank)], device=ctx.device)
    dist.all_reduce(total)
    return {
        "rank": ctx.rank,
        "world_size": ctx.world_size,
        "local_rank": ctx.local_rank,
        "device": str(ctx.device),
        "backend": dist.get_backend(),
        "sum_of_ranks": total.item(),
        "pid": os.getpid(),
        "args": args,
    }


def versions(ctx: WorkerContext) -> dict[str, str]:
    import ray

    return {"ray": ray.__version__, "torch": torch.__version__}


def remember(ctx: WorkerContext, value: Any) -> None:
    ctx.objects["value"] = value


def recall(ctx: WorkerContext) -> Any:
    return ctx.objects.get("value")


def return_a_lock(ctx: WorkerContext) -> Any:
    return threading.Lock()


def move_into(ctx: WorkerContext, directory: str) -> None:
    """What is relative is then the same for all workers, and something else for the driver."""
    os.chdir(directory)


class UnpicklableError(Exception):
    """Cannot travel: it holds a lambda."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.callback = lambda: None


def raise_on(ctx: WorkerContext, ranks: list[int], kind: str = "ValueError") -> None:
    """Raise on some ranks; the others sit in a collective that cannot end."""
    if ctx.rank in ranks:
        if kind == "unpicklable":
            raise UnpicklableError("the disk of the rank is on fire")
        if kind == "checkpoint":
            from torch.distributed.checkpoint.api import CheckpointException

            raise CheckpointException("save", {})
        raise ValueError("the disk of the rank is on fire")
    dist.all_reduce(torch.ones(1))


def die_on(ctx: WorkerContext, rank: int, how: str) -> None:
    """End one rank's process in the middle of a loop of collectives."""
    for round_number in range(1_000_000):
        if ctx.rank == rank and round_number == 10:
            if how == "SIGKILL":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(7)
        dist.all_reduce(torch.ones(1))


def stop_answering(ctx: WorkerContext, rank: int) -> None:
    """One rank never returns, as if its disk hung; the others do."""
    if ctx.rank == rank:
        signal.pause()


def has_process_group(ctx: WorkerContext) -> bool:
    return dist.is_initialized()


def move_into_own_directory(ctx: WorkerContext, parent: str) -> None:
    """Make relative places differ between ranks, as unshared disks would."""
    own = os.path.join(parent, str(ctx.rank))
    os.makedirs(own)
    os.chdir(own)


def zero_one_average(ctx: WorkerContext) -> None:
    """Set one element of the main job's live optimizer state to zero, on rank 0."""
    if ctx.rank == 0:
        state = ctx.objects["trainer"].optimizer.state
        average = next(iter(state.values()))["exp_avg"].to_local()
        average[tuple(average.nonzero()[0].tolist())] = 0.0


def sizes_of(ctx: WorkerContext, storage: Storage, large: bytes) -> tuple[int, int]:
    return len(storage.uri), len(large)
