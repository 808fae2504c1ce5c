"""What runs on each rank: start or resume, train a step, save beside training. Plain data in, plain data out."""

from __future__ import annotations

import torch

from ray_ckpt.checkpoint.saving import save
from ray_ckpt.cluster.worker import WorkerContext
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.parallel.parallelize import parallelize
from ray_ckpt.parallel.stages import parts_of
from ray_ckpt.protocol.save_handle import SaveHandle
from ray_ckpt.recipes.model import batch, blueprint, build, learning_rates, loss_function
from ray_ckpt.recipes.training import Trainer, grouped_by_part, parameters_of
from ray_ckpt.recipes.workload import Workload, num_microbatches
from ray_ckpt.report import SaveReport
from ray_ckpt.state.train_state import TrainState
from ray_ckpt.storage.store import CheckpointStore


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


def train_step(ctx: WorkerContext, workload: Workload, step: int) -> float:
    """Train one step. Returns its loss."""
    trainer: Trainer = ctx.objects["trainer"]
    loss = trainer.step(*batch(workload, blueprint(workload), step))
    losses(ctx).append(loss)
    state_of(ctx).step = step + 1
    return loss


def begin_save(ctx: WorkerContext, store: CheckpointStore, step: int, overwrite: bool) -> SaveReport | None:
    """Save this step beside the training that goes on. Raises the failure of the save before, if it failed.

    Args:
        overwrite: replace the step, which is there and damaged.

    Returns:
        The report of the save before, which has ended; None before the first one.
    """
    before: SaveHandle | None = ctx.objects.get("save")
    # What it tells is asked for by the driver while `finish_save` waits.
    handle = save(state_of(ctx), store, step=step, blocking=False, overwrite=overwrite, progress=ctx.progress)
    ctx.objects["save"] = handle
    return None if before is None else before.result(timeout_s=0)


def finish_save(ctx: WorkerContext, timeout_s: float) -> SaveReport | None:
    """Wait until what is being saved is committed. Returns the report; None when nothing is being saved."""
    handle: SaveHandle | None = ctx.objects.pop("save", None)
    return None if handle is None else handle.result(timeout_s)
