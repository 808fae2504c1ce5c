"""What the verbs call on each worker: its side of a save, kept in `ctx.objects` from one call to the next."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ray_ckpt.cluster.worker import WorkerContext
from ray_ckpt.format.manifest import Manifest
from ray_ckpt.protocol.messages import Assignment, LocalPlan, RankRecord
from ray_ckpt.report import VerifyReport

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful

    from ray_ckpt.protocol.rank import PlanMemory, RankSave
    from ray_ckpt.storage.files import Storage

StateOf = Callable[[WorkerContext], "Stateful | Mapping[str, Any]"]
"""A top-level function that returns what a worker holds: a `TrainState`, another `Stateful`, or a state dict."""

_MEMORY = "ray_ckpt.plan_memory"
_SAVES = "ray_ckpt.saves"


def plan(
    ctx: WorkerContext, attempt: str, state_of: StateOf | str, storage: Storage, known: frozenset[str]
) -> LocalPlan:
    """Look through the state, and get ready to write it.

    Args:
        attempt: names the save: an earlier one that failed may still be writing here, on the worker's other thread.
        known: tokens of plans that the driver still has.
    """
    # The driver loads this module too, and goes without torch.
    from ray_ckpt.protocol.rank import PlanMemory, RankSave

    memory: PlanMemory = ctx.objects.setdefault(_MEMORY, PlanMemory())
    save = RankSave(storage)
    _saves(ctx)[attempt] = save
    return save.plan(_resolve(state_of)(ctx), memory, known)


def write(ctx: WorkerContext, assignment: Assignment) -> RankRecord:
    """Write what this rank is to write. May be called again after a failure."""
    return _saves(ctx)[assignment.attempt].write(assignment)


def finish(ctx: WorkerContext, attempt: str) -> None:
    """Let go of the state."""
    _saves(ctx).pop(attempt, None)


def discard(ctx: WorkerContext, attempt: str) -> None:
    """Remove the files that this rank has begun, and let go of the state."""
    if save := _saves(ctx).pop(attempt, None):
        save.discard()


def stock_record(ctx: WorkerContext, manifest: Manifest) -> bytes:
    """The `.metadata` for stock DCP, made on a worker because it takes torch."""
    from ray_ckpt.format import dcp_metadata

    return dcp_metadata.dumps(manifest)


def verify(ctx: WorkerContext, storage: Storage, num_ranks: int) -> VerifyReport:
    """Check this rank's share of a checkpoint."""
    from ray_ckpt.storage.audit import audit
    from ray_ckpt.storage.reader import ArrowStorageReader

    return audit(storage, ArrowStorageReader(storage).read_manifest(), rank=ctx.rank, num_ranks=num_ranks)


def _saves(ctx: WorkerContext) -> dict[str, RankSave]:
    """Attempt -> this rank's side of it."""
    saves: dict[str, RankSave] = ctx.objects.setdefault(_SAVES, {})
    return saves


def _resolve(state_of: StateOf | str) -> StateOf:
    """The function, or the one of that name."""
    found: StateOf = pkgutil.resolve_name(state_of) if isinstance(state_of, str) else state_of
    return found
