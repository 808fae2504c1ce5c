"""What runs on each rank of either group: train, hold what is saved or loaded, train on. Plain data in and out."""

from __future__ import annotations

import torch
from torch import nn

from ray_ckpt.cluster.worker import WorkerContext
from ray_ckpt.format.snapshot import Snapshot
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.parallel.materialize import materialize
from ray_ckpt.parallel.parallelize import parallelize
from ray_ckpt.parallel.stages import parts_of
from ray_ckpt.recipes.model import batch, build, learning_rates, loss_function
from ray_ckpt.recipes.training import Trainer, grouped_by_part, parameters_of
from ray_ckpt.recipes.workload import Workload, num_microbatches, num_parts
from ray_ckpt.state.train_state import TrainState


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


def reference(ctx: WorkerContext, workload: Workload, runs: list[tuple[Layout, int]]) -> list[float]:
    """The same training in one process, uninterrupted, on rank 0. Other ranks return nothing.

    Each batch runs in the parts that it is compared with: a layout's shares of a batch, and their micro-batches. In
    other parts the matrix products would round differently, and now and then a ReLU at zero would tip over and part the
    curves.

    Args:
        runs: layouts, and how many steps were trained in each.
    """
    if ctx.rank != 0:
        return []
    model = build(workload)
    materialize(model, ctx.device, workload.seed)
    rates = learning_rates(parts_of(model))
    optimizer = torch.optim.Adam(
        {"params": [p for name, p in model.named_parameters() if name.startswith(f"{part}.")], "lr": rate}
        for part, rate in rates.items()
    )
    parts_of_step = [num_parts(layout) for layout, steps in runs for _ in range(steps)]
    return [_train_alone(ctx, model, optimizer, workload, step, parts) for step, parts in enumerate(parts_of_step)]


def _keep(ctx: WorkerContext, trainer: Trainer) -> None:
    parallel = trainer.parallel
    ctx.objects["trainer"] = trainer
    ctx.objects["state"] = TrainState(
        parallel.chunks, trainer.optimizer, step=0, tied=parallel.tied, layout=parallel.layout
    )


def _train(ctx: WorkerContext, workload: Workload, first_step: int, steps: int) -> list[float]:
    trainer: Trainer = ctx.objects["trainer"]
    model = build(workload)
    losses = []
    for step in range(first_step, first_step + steps):
        losses.append(trainer.step(*batch(workload, model, step)))
        state_of(ctx).step = step + 1
    return losses


def _train_alone(
    ctx: WorkerContext,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    workload: Workload,
    step: int,
    num_parts: int,
) -> float:
    """One step on the mean of the parts' gradients. Returns the mean of their losses."""
    inputs, targets = (tensor.to(ctx.device) for tensor in batch(workload, model, step))
    optimizer.zero_grad()
    losses = []
    for part, part_targets in zip(inputs.chunk(num_parts), targets.chunk(num_parts), strict=True):
        loss = loss_function(model)(model(part), part_targets)
        loss.backward()
        losses.append(loss.detach())
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(num_parts)
    optimizer.step()
    return float(torch.stack(losses).mean())
