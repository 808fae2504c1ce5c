"""What a group holds of which a worker dies in the middle of a save. Importable by the workers."""

from __future__ import annotations

import random

import numpy
import torch

from ray_ckpt.cluster.worker import WorkerContext
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.recipes.train_elastic import ranks
from ray_ckpt.recipes.workload import Workload
from ray_ckpt.state.train_state import TrainState
from tests.support import struck


def hold(ctx: WorkerContext, workload: Workload, layout: Layout) -> None:
    """Build a model, and train it for one step; the random generators of all ranks differ."""
    ranks.start(ctx, workload, layout, True)
    trainer = ctx.objects["trainer"]
    ctx.objects["state"] = TrainState(
        trainer.parallel.chunks, trainer.optimizer, step=0, rng=True, layout=str(layout), extra=ctx.objects["extra"]
    )
    train(ctx, workload)
    random.seed(ctx.rank)
    numpy.random.seed(ctx.rank)
    torch.manual_seed(ctx.rank)


def train(ctx: WorkerContext, workload: Workload) -> None:
    """Another step."""
    state = ranks.state_of(ctx)
    ranks.train_step(ctx, workload, state.step or 0)


def state_of(ctx: WorkerContext) -> TrainState:
    return ranks.state_of(ctx)


def dict_of(ctx: WorkerContext) -> dict[str, object]:
    """The same on every rank, and no layout is named."""
    return {"weight": torch.arange(1000.0), "step": 3}


def strike_at(ctx: WorkerContext, function: str) -> None:
    """Let SIGKILL strike this process as a function is entered on this thread.

    Args:
        function: `"module:name"`.
    """
    struck.strike_at(function)


def generator(ctx: WorkerContext) -> list[int]:
    """The state of this rank's random generator."""
    found: list[int] = torch.get_rng_state().tolist()
    return found
