"""What a rank of either group keeps from one phase to the next: its training state."""

from __future__ import annotations

from ray_ckpt.cluster.worker import WorkerContext
from ray_ckpt.format.snapshot import Snapshot
from ray_ckpt.parallel.state import TrainState


def state_of(ctx: WorkerContext) -> TrainState:
    state: TrainState = ctx.objects["state"]
    return state


def take_snapshot(ctx: WorkerContext) -> Snapshot:
    """Fingerprints of what this rank's live model and optimizer hold."""
    return state_of(ctx).snapshot(ctx.rank)
