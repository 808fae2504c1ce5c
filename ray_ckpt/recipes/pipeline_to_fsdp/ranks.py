"""What runs on each rank of either group: train, hold what is saved or loaded, train on. Plain data in and out.

try_model    reference      in one process, on rank 0                            alone.py
next_steps                  from copies of what is live, in double precision     next_step.py
"""

from __future__ import annotations

import torch

from ray_ckpt.cluster.worker import WorkerContext
from ray_ckpt.format.snapshot import Snapshot
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.parallel.parallelize import parallelize
from ray_ckpt.parallel.stages import parts_of
from ray_ckpt.recipes.model import batch, blueprint, build, learning_rates, loss_function
from ray_ckpt.recipes.pipeline_to_fsdp.alone import reference, try_model
from ray_ckpt.recipes.pipeline_to_fsdp.next_step import next_steps
from ray_ckpt.recipes.training import Trainer, grouped_by_part, parameters_of
from ray_ckpt.recipes.workload import Workload, num_microbatches
from ray_ckpt.state.train_state import TrainState

__all__ = ["next_steps", "prepare", "reference", "resume", "state_of", "take_snapshot", "train", "try_model"]


def train(ctx: WorkerContext, workload: Workload, layout: Layout, steps: int) -> list[float]:
    """Train from the start, every part of the model with its own learning rate. Returns the loss of every step."""
    model = build(workload)
    rates = learning_rates(parts_of(model))
    parallel = parallelize(model, layout, ctx.device, seed=workload.seed)
    optimizer = torch.optim.Adam(grouped_by_part(parallel, rates))
    _keep(ctx, Trainer(parallel, optimizer, loss_function(model), num_microbatches=num_microbatches(layout)))
    return _train(ctx, workload, 0, steps)


def prepare(ctx: WorkerContext, workload: Workload, layout: Layout) -> None:
    """Build what a checkpoint is loaded into: other values than training started from, and one group of parameters."""
    model = build(workload)
    parallel = parallelize(model, layout, ctx.device, seed=workload.seed + 1)
    optimizer = torch.optim.Adam(parameters_of(parallel).values())
    _keep(ctx, Trainer(parallel, optimizer, loss_function(model), num_microbatches=num_microbatches(layout)))


def state_of(ctx: WorkerContext) -> TrainState:
    """What this rank saves, or loads into."""
    state: TrainState = ctx.objects["state"]
    return state


def take_snapshot(ctx: WorkerContext) -> Snapshot:
    """Fingerprints of what this rank's live model and optimizer hold."""
    return state_of(ctx).snapshot(ctx.rank)


def resume(ctx: WorkerContext, workload: Workload, first_step: int, steps: int) -> list[float]:
    """Train on from what was loaded. Returns the loss of every step."""
    return _train(ctx, workload, first_step, steps)


def _keep(ctx: WorkerContext, trainer: Trainer) -> None:
    parallel = trainer.parallel
    ctx.objects["trainer"] = trainer
    ctx.objects["state"] = TrainState(
        parallel.chunks, trainer.optimizer, step=0, tied=parallel.tied, layout=parallel.layout
    )


def _train(ctx: WorkerContext, workload: Workload, first_step: int, steps: int) -> list[float]:
    trainer: Trainer = ctx.objects["trainer"]
    model = blueprint(workload)
    losses = []
    for step in range(first_step, first_step + steps):
        losses.append(trainer.step(*batch(workload, model, step)))
        state_of(ctx).step = step + 1
    return losses
