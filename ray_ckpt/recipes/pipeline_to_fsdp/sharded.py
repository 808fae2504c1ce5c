"""What runs on each rank of the FSDP group: shard a fresh model, train on. Plain data in, plain data out."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from ray_ckpt.cluster.worker import WorkerContext
from ray_ckpt.parallel.stages import cut_evenly, materialise
from ray_ckpt.parallel.state import TrainState
from ray_ckpt.parallel.wrap import shard
from ray_ckpt.recipes.pipeline_to_fsdp.model import batch, build, loss_function, stage_learning_rate
from ray_ckpt.recipes.pipeline_to_fsdp.workload import Workload


def shard_fresh_model(ctx: WorkerContext, workload: Workload, target: str) -> None:
    """Build the whole model with other values than it was trained from, and shard it."""
    model = shard(build(workload), target, ctx.device, seed=workload.seed + 1)
    ctx.objects["state"] = TrainState(model, torch.optim.Adam(model.parameters()))


def resume(ctx: WorkerContext, workload: Workload, first_step: int, steps: int) -> list[float]:
    """Train on under FSDP, each rank on its rows of every batch. Every rank returns the loss of the whole batch."""
    state: TrainState = ctx.objects["state"]
    model = build(workload)
    losses = []
    for step in range(first_step, first_step + steps):
        inputs, targets = (
            tensor.chunk(ctx.world_size)[ctx.rank].to(ctx.device) for tensor in batch(workload, model, step)
        )
        state.optimizer.zero_grad()
        loss = loss_function(model)(state.model(inputs), targets)
        loss.backward()
        state.optimizer.step()
        total = loss.detach()
        dist.all_reduce(total)
        losses.append(float(total) / ctx.world_size)
    return losses


def reference(ctx: WorkerContext, workload: Workload, steps: int, resumed_steps: int) -> list[float]:
    """The same training in one process, uninterrupted, on rank 0. Other ranks return nothing.

    Each batch runs in the parts that it is compared with: micro-batches, then one part per FSDP rank. In other parts
    the matrix products would round differently, and now and then a ReLU at zero would tip over and part the curves.
    """
    if ctx.rank != 0:
        return []
    model = build(workload)
    stages = cut_evenly(model, workload.num_stages)
    materialise(model, ctx.device, workload.seed)
    optimizer = torch.optim.Adam(
        {
            "params": [parameter for name in children for parameter in model.get_submodule(name).parameters()],
            "lr": stage_learning_rate(stage),
        }
        for stage, children in enumerate(stages)
    )
    losses = []
    for step in range(steps + resumed_steps):
        num_parts = workload.num_microbatches if step < steps else ctx.world_size
        inputs, targets = (tensor.to(ctx.device) for tensor in batch(workload, model, step))
        losses.append(_train_step(model, optimizer, inputs, targets, num_parts))
    return losses


def _train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, targets: torch.Tensor, num_parts: int
) -> float:
    """One step on the mean of the parts' gradients. Returns the mean of their losses."""
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
