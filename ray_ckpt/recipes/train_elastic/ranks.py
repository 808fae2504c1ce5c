"""What runs on each rank: start, train a step. Plain data in, plain data out."""

from __future__ import annotations

import torch

from ray_ckpt.cluster.worker import WorkerContext
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.parallel.parallelize import parallelize
from ray_ckpt.parallel.stages import parts_of
from ray_ckpt.recipes.model import batch, blueprint, build, learning_rates, loss_function
from ray_ckpt.recipes.training import Trainer, grouped_by_part, parameters_of
from ray_ckpt.recipes.workload import Workload, num_microbatches
from ray_ckpt.state.train_state import TrainState


def start(ctx: WorkerContext, workload: Workload, layout: Layout, fresh: bool) -> None:
    """Build the model and its optimizer.

    Args:
        fresh: whether this is the beginning of the training. Otherwise a checkpoint is loaded next: nothing is
            initialized that it would replace, and the optimizer has one group, which the load splits.
    """
    model = build(workload)
    parallel = parallelize(model, layout, ctx.device, seed=workload.seed if fresh else None)
    grouped = grouped_by_part(parallel, learning_rates(parts_of(model)))
    optimizer = torch.optim.Adam(grouped if fresh else parameters_of(parallel).values())
    trainer = Trainer(parallel, optimizer, loss_function(model), num_microbatches=num_microbatches(layout))
    # The losses travel with the checkpoint, so that a job that takes over knows the whole curve.
    extra: dict[str, object] = {"losses": []}
    state = TrainState(parallel.chunks, optimizer, step=0, extra=extra, tied=parallel.tied, layout=parallel.layout)
    ctx.objects |= {"trainer": trainer, "state": state, "extra": extra}


def state_of(ctx: WorkerContext) -> TrainState:
    """The training state that this rank saves, or loads into."""
    state: TrainState = ctx.objects["state"]
    return state


def losses(ctx: WorkerContext) -> list[float]:
    """One per step that has been trained."""
    found: list[float] = ctx.objects["extra"]["losses"]
    return found


def state_bytes(ctx: WorkerContext, workload: Workload) -> int:
    """Bytes of a checkpoint: the model, and as much for each of Adam's two moments of what is trained."""
    held = build(workload).state_dict()
    return 3 * sum(int(tensor.nbytes) for tensor in held.values())


def train_step(ctx: WorkerContext, workload: Workload, step: int) -> float:
    """Train one step. Returns the loss."""
    trainer: Trainer = ctx.objects["trainer"]
    loss = trainer.step(*batch(workload, blueprint(workload), step))
    losses(ctx).append(loss)
    state_of(ctx).step = step + 1
    return loss
