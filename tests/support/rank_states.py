"""What the ranks of a group save and load in tests. Importable by the workers, as `tests.support.rank_functions` is."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import torch

from ray_ckpt.checkpoint.following import WeightFollower
from ray_ckpt.checkpoint.loading import load
from ray_ckpt.cluster.worker import WorkerContext
from ray_ckpt.state.train_state import TrainState
from ray_ckpt.storage.store import CheckpointStore
from tests.support import faulty


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


def stage_of_a_follower(ctx: WorkerContext) -> dict[str, Any]:
    """Zeros for what `stage_of` has. While this is asked for, its publisher deletes the step that is loaded."""
    if ctx.rank == 0 and (store := ctx.objects.pop("publisher", None)) is not None:
        store.delete(store.steps()[-1])
    kept = {name: torch.zeros_like(value) for name, value in stage_of(ctx).items() if name != "step"}
    state: dict[str, Any] = ctx.objects.setdefault("follower", {**kept, "step": 0})
    return state


def set_publisher(ctx: WorkerContext, target: str) -> None:
    ctx.objects["publisher"] = CheckpointStore(target)


def value_of_follower(ctx: WorkerContext) -> list[float]:
    return [float(tensor.sum()) for tensor in ctx.objects["follower"].values() if isinstance(tensor, torch.Tensor)]


class Versioned:
    """Takes only state of its own version."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        return {"version": self.version, "value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]
        if state["version"] != self.version:
            raise ValueError(f"version {state['version']} is not {self.version}")


def versioned_state_of(ctx: WorkerContext) -> TrainState:
    """The same model on all workers, and an object that `set_version` can make refuse what was saved."""
    if "versioned" not in ctx.objects:
        model = torch.nn.Linear(2, 2, bias=False)
        torch.nn.init.ones_(model.weight)
        ctx.objects["object"] = Versioned(1)
        ctx.objects["versioned"] = TrainState(model, step=1, extra={"object": ctx.objects["object"]})
    state: TrainState = ctx.objects["versioned"]
    return state


def set_version(ctx: WorkerContext, rank: int, version: int) -> None:
    """Another version on one rank; other weights and values on all."""
    torch.nn.init.zeros_(versioned_state_of(ctx).model.weight)
    versioned: Versioned = ctx.objects["object"]
    versioned.value = 5
    versioned.version = version if ctx.rank == rank else 1


def versioned_sum(ctx: WorkerContext) -> tuple[float, int]:
    """Sum of the weights, and the object's value."""
    return float(versioned_state_of(ctx).model.weight.sum()), ctx.objects["object"].value


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


def train_in_place(ctx: WorkerContext) -> None:
    """Change every element of what is held, as training does."""
    held = ctx.objects["held"]
    for value in held.values():
        if isinstance(value, torch.Tensor):
            value.add_(1)
    held["step"] += 1


def wide_matrix_of(ctx: WorkerContext) -> dict[str, Any]:
    """A matrix of this rank's own, of several checksum blocks, each of several rows."""
    return {f"wide{ctx.rank}": torch.arange(3000.0 * 1024).view(3000, 1024) + ctx.rank}


def weights_of(ctx: WorkerContext) -> dict[str, Any]:
    """Rows of a matrix, and a tensor that all ranks hold."""
    rows = torch.arange(40_000, dtype=torch.float32).view(100, 400).bfloat16() + ctx.rank
    return ctx.objects.setdefault("weights", {f"rows{ctx.rank}": rows, "common": torch.zeros(3000)})


def learn(ctx: WorkerContext, step: int) -> None:
    """Change a few elements."""
    weights = weights_of(ctx)
    weights[f"rows{ctx.rank}"][step] *= 3
    weights["common"][step] = step + 0.5


def weights_or_failure_of(ctx: WorkerContext) -> dict[str, Any]:
    if ctx.rank == 1 and ctx.objects.pop("fails", False):
        raise ValueError("the model is gone")
    return weights_of(ctx)


def set_failing(ctx: WorkerContext) -> None:
    ctx.objects["fails"] = True


def optimizer_of(ctx: WorkerContext) -> dict[str, Any]:
    return {"optim": {f"momentum{ctx.rank}": torch.ones(3)}}


def follow(ctx: WorkerContext, target: str, step: int) -> tuple[int, dict[str, Any]]:
    """What this worker reads of a version, by a follower of its own, and what it holds then."""
    follower = ctx.objects.setdefault("weight follower", WeightFollower(target))
    blank = {f"rows{rank}": torch.ones(100, 400).bfloat16() for rank in range(2)} | {"common": torch.ones(3000)}
    served: dict[str, Any] = ctx.objects.setdefault("followed", blank)
    return follower.fetch(served, step).num_bytes, served
