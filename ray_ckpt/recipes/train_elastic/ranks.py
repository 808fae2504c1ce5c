"""What runs on each rank: start or resume, train a step, save beside training. Plain data in, plain data out."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from ray_ckpt.checkpoint.saving import save
from ray_ckpt.cluster.worker import WorkerContext
from ray_ckpt.errors import RayCkptError, SavePendingError
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


def state_bytes(ctx: WorkerContext, workload: Workload) -> int:
    """Bytes of a checkpoint: the model, and as much for each of Adam's two moments of what is trained."""
    held = build(workload).state_dict()
    return 3 * sum(int(tensor.nbytes) for tensor in held.values())


@dataclass(frozen=True)
class SaveOutcome:
    """How a save beside training has ended."""

    report: SaveReport | None = None
    failure: tuple[str, str] | None = None
    """Kind and message; None where there is a report."""


@dataclass(frozen=True)
class Trained:
    """What a step has brought."""

    loss: float
    save_failed: bool
    """Whether the save that was going on beside has failed meanwhile."""


def train_step(ctx: WorkerContext, workload: Workload, step: int) -> Trained:
    """Train one step."""
    trainer: Trainer = ctx.objects["trainer"]
    loss = trainer.step(*batch(workload, blueprint(workload), step))
    losses(ctx).append(loss)
    state_of(ctx).step = step + 1
    saving: SaveHandle | None = ctx.objects.get("save")
    return Trained(loss, saving is not None and saving.done() and saving.failed)


def begin_save(ctx: WorkerContext, store: CheckpointStore, step: int, overwrite: bool) -> SaveOutcome | None:
    """Save this step beside the training that goes on. A failure is told by the next call, and ends nothing.

    Args:
        overwrite: replace the step, which is there and damaged.

    Returns:
        How the save before has ended; None before the first one.
    """
    before: SaveHandle | None = ctx.objects.get("save")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the driver tells it
        # What it tells is asked for by the driver while `finish_save` waits.
        ctx.objects["save"] = save(
            state_of(ctx),
            store,
            step=step,
            blocking=False,
            overwrite=overwrite,
            on_error="warn",
            progress=ctx.progress,
        )
    return None if before is None else _outcome(before, 0)


def finish_save(ctx: WorkerContext, timeout_s: float) -> SaveOutcome | None:
    """Wait until what is being saved is committed, or has failed. None when nothing is being saved."""
    handle: SaveHandle | None = ctx.objects.pop("save", None)
    return None if handle is None else _outcome(handle, timeout_s)


def _outcome(handle: SaveHandle, timeout_s: float) -> SaveOutcome:
    """How it has ended.

    Raises:
        SavePendingError: it has not, within that time.
    """
    try:
        return SaveOutcome(handle.result(timeout_s))
    except SavePendingError:
        raise
    except RayCkptError as error:
        return SaveOutcome(failure=(type(error).__name__, str(error)))
