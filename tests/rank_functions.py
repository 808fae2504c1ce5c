"""Functions that tests run on the ranks of a group. Importable by the workers, so that they travel by name."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import torch
import torch.distributed as dist

from ray_ckpt.checkpoint.loading import load
from ray_ckpt.cluster.worker import WorkerContext
from ray_ckpt.parallel.state import TrainState
from tests import faulty


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


def remember(ctx: WorkerContext, value: Any) -> None:
    ctx.objects["value"] = value


def recall(ctx: WorkerContext) -> Any:
    return ctx.objects.get("value")


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


def move_into_own_directory(ctx: WorkerContext, parent: str) -> None:
    """Make relative places differ between ranks, as unshared disks would."""
    own = os.path.join(parent, str(ctx.rank))
    os.makedirs(own)
    os.chdir(own)


def stage_of(ctx: WorkerContext) -> dict[str, Any]:
    """A pipeline stage of this rank's own, one replica, and a row shard of a common tensor."""
    faulty.here = ctx.rank
    step = ctx.objects.get("value", 0)
    stage = torch.arange(1000.0 + ctx.rank) + step
    return {f"stage{ctx.rank}": stage, "common": torch.full((7,), float(step)), "step": step}


def grown_stage_of(ctx: WorkerContext) -> dict[str, Any]:
    """As `stage_of`, but one tensor has another shape, and one is new."""
    return {**stage_of(ctx), "common": torch.ones(8), f"new{ctx.rank}": torch.ones(3, ctx.rank + 1)}


def differing_replicas_of(ctx: WorkerContext) -> dict[str, Any]:
    return {"common": torch.full((7,), float(ctx.rank))}


def failing_state_of(ctx: WorkerContext, rank: int = 1) -> dict[str, Any]:
    if ctx.rank == rank:
        raise ValueError("the model is gone")
    return stage_of(ctx)


def dying_state_of(ctx: WorkerContext, rank: int = 1) -> dict[str, Any]:
    if ctx.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return stage_of(ctx)


def hanging_state_of(ctx: WorkerContext, rank: int = 1) -> dict[str, Any]:
    if ctx.rank == rank:
        threading.Event().wait()
    return stage_of(ctx)


def has_process_group(ctx: WorkerContext) -> bool:
    return dist.is_initialized()


def held_saves(ctx: WorkerContext) -> int:
    """Saves that still hold on to the state."""
    return len(ctx.objects["ray_ckpt.saves"])


def hold_step(ctx: WorkerContext, step: int) -> None:
    """Hold the state of `stage_of` at this step, from one call to the next."""
    ctx.objects["value"] = step
    ctx.objects["held"] = stage_of(ctx)


def held_state_of(ctx: WorkerContext) -> dict[str, Any]:
    held: dict[str, Any] = ctx.objects["held"]
    return held


def held_step(ctx: WorkerContext) -> int:
    """The step whose state is held; -1 when it is no step's."""
    held = ctx.objects["held"]
    step: int = held["step"]
    is_whole = torch.equal(held[f"stage{ctx.rank}"], torch.arange(1000.0 + ctx.rank) + step)
    return step if is_whole and torch.equal(held["common"], torch.full((7,), float(step))) else -1


def load_alone(ctx: WorkerContext, target: str) -> None:
    """Load what this worker holds, and leave what others hold."""
    load(ctx.objects["held"], target, strict=False)


def expect(ctx: WorkerContext, action: str, rank: int) -> None:
    """What is to go wrong when `faulty_state_of` is called next, and on which rank."""
    ctx.objects["fault"] = (action, rank)


def faulty_state_of(ctx: WorkerContext) -> dict[str, Any]:
    action, rank = ctx.objects["fault"]
    functions = {"raises": failing_state_of, "killed": dying_state_of, "hangs": hanging_state_of}
    return functions[action](ctx, rank)


def held_loads(ctx: WorkerContext) -> int:
    """Loads that still hold on to the state."""
    return len(ctx.objects["ray_ckpt.loads"])


def with_more_state_of(ctx: WorkerContext) -> dict[str, Any]:
    return {**stage_of(ctx), "more": 5}


def hold_own_run(ctx: WorkerContext, step: int) -> None:
    """A stage of a run that is this worker's alone."""
    ctx.objects["held"] = {f"run{ctx.rank}": {"weight": torch.full((9, 9), float(step)), "step": step}}


def own_run(ctx: WorkerContext) -> tuple[int, float]:
    run = ctx.objects["held"][f"run{ctx.rank}"]
    return run["step"], run["weight"].mean().item()


def replica_of(ctx: WorkerContext) -> TrainState:
    """The same model on every worker."""
    torch.manual_seed(0)
    return TrainState(torch.nn.Linear(3, 3), layout="ddp3")


def hold_layer(ctx: WorkerContext) -> None:
    """Hold the training state of one layer."""
    ctx.objects["held"] = TrainState(torch.nn.Linear(5, 3))


def held_weight(ctx: WorkerContext) -> torch.Tensor:
    state: TrainState = ctx.objects["held"]
    weight: torch.Tensor = state.model.weight.detach()
    return weight
