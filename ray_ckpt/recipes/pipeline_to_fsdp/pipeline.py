"""What runs on each rank of the pipeline group: train one stage. Plain data in, plain data out."""

from __future__ import annotations

import torch
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from ray_ckpt.cluster.worker import WorkerContext
from ray_ckpt.parallel.stages import cut_evenly, materialise, take_stage
from ray_ckpt.parallel.state import TrainState
from ray_ckpt.recipes.pipeline_to_fsdp.model import batch, build, loss_function, stage_learning_rate
from ray_ckpt.recipes.pipeline_to_fsdp.workload import Workload


def train(ctx: WorkerContext, workload: Workload, steps: int) -> list[float]:
    """Train this rank's stage with the 1F1B schedule. The last rank returns the loss of every step, others nothing."""
    model = build(workload)
    stage_model = take_stage(model, cut_evenly(model, ctx.world_size)[ctx.rank])
    materialise(stage_model, ctx.device, workload.seed)
    optimizer = torch.optim.Adam(stage_model.parameters(), lr=stage_learning_rate(ctx.rank))
    ctx.objects["state"] = TrainState(stage_model, optimizer)
    stage = PipelineStage(stage_model, ctx.rank, ctx.world_size, ctx.device)
    schedule = Schedule1F1B(stage, workload.num_microbatches, loss_fn=loss_function(model))
    losses = []
    for step in range(steps):
        inputs, targets = (tensor.to(ctx.device) for tensor in batch(workload, model, step))
        microbatch_losses: list[torch.Tensor] = []
        optimizer.zero_grad()
        schedule.step(
            *([inputs] if stage.is_first else []),
            target=targets if stage.is_last else None,
            losses=microbatch_losses if stage.is_last else None,
        )
        optimizer.step()
        if stage.is_last:
            losses.append(float(torch.stack(microbatch_losses).mean()))
    return losses
