"""The functions that the verbs call on each worker. Between calls, a save or load is kept in `ctx.objects`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.cluster.worker import WorkerContext, resolve
from ray_ckpt.errors import GroupError
from ray_ckpt.format.manifest import Manifest
from ray_ckpt.format.wanted_names import Names
from ray_ckpt.progress import Meter
from ray_ckpt.protocol.messages import Assignment, LoadOffer, LocalPlan, RankRecord
from ray_ckpt.protocol.save_options import SaveOptions
from ray_ckpt.report import LoadReport, VerifyReport

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful

    from ray_ckpt.protocol.comparison import Held
    from ray_ckpt.protocol.rank_load import RankLoad
    from ray_ckpt.protocol.rank_save import PlanMemory, RankSave
    from ray_ckpt.protocol.share_plan import SharePlan, Wants
    from ray_ckpt.storage.files import Storage

T = TypeVar("T")

StateOf = Callable[[WorkerContext], "Stateful | Mapping[str, Any]"]
"""A top-level function that returns what a worker holds: a `TrainState`, another `Stateful`, or a state dict."""

CLEANUP_TIMEOUT_S = 3.0
"""How long the workers may take to release the state of a save or load, and to remove the files of a failed one."""

_MEMORY = "ray_ckpt.plan_memory"
_HOST_COPY = "ray_ckpt.host_copy"
_SAVES = "ray_ckpt.saves"
LOADS = "ray_ckpt.loads"
_COMPARISON = "ray_ckpt.comparison"


@dataclass(frozen=True)
class SaveOffer:
    """A worker's plan for a save."""

    plan: LocalPlan
    layout: str | None
    """The layout that its `TrainState` names."""


def plan(
    ctx: WorkerContext,
    attempt: str,
    state_of: StateOf | str,
    storage: Storage,
    known: frozenset[str],
    options: SaveOptions,
) -> SaveOffer:
    """Look through the state and plan how to write it.

    Args:
        attempt: names the save: an earlier one that failed may still be writing here, on the worker's other thread.
        known: tokens of plans that the driver still has.
        options: what of the state is saved, and how.
    """
    # The driver loads this module too, and goes without torch.
    from ray_ckpt.protocol.rank_save import PlanMemory, RankSave
    from ray_ckpt.state.train_state import TrainState

    memory: PlanMemory = ctx.objects.setdefault(_MEMORY, PlanMemory())
    save = RankSave(storage, options=options)
    _saves(ctx)[attempt] = save
    state = resolve(state_of)(ctx)
    return SaveOffer(save.plan(state, memory, known), state.layout if isinstance(state, TrainState) else None)


def stage(ctx: WorkerContext, assignment: Assignment) -> None:
    """Copy what this rank is to write, so that the state may change."""
    from ray_ckpt.protocol.host_copy import HostCopy

    host_copy: HostCopy = ctx.objects.setdefault(_HOST_COPY, HostCopy())
    _saves(ctx)[assignment.attempt].stage(assignment, host_copy)


def write(ctx: WorkerContext, assignment: Assignment) -> RankRecord:
    """Write what this rank is to write. May be called again after a failure."""
    meter = Meter(ctx.progress)
    record = _saves(ctx)[assignment.attempt].write(assignment, meter)
    meter.end()
    return record


def finish(ctx: WorkerContext, attempt: str) -> None:
    """Release the state."""
    _saves(ctx).pop(attempt, None)


def discard(ctx: WorkerContext, attempt: str) -> None:
    """Remove the files that this rank has begun, and release the state."""
    if save := _saves(ctx).pop(attempt, None):
        save.discard()


def stock_record(ctx: WorkerContext, manifest: Manifest) -> bytes:
    """The `.metadata` for stock DCP, made on a worker because it takes torch."""
    from ray_ckpt.format import dcp_metadata

    return dcp_metadata.dumps(manifest)


def open_load(
    ctx: WorkerContext,
    attempt: str,
    storage: Storage,
    options: Mapping[str, Any],
    state_of: StateOf | str,
    record: bytes | None,
) -> bool:
    """Read what the checkpoint says of itself, and tell whether its names may have to be translated for the state.

    Args:
        options: fields of `LoadOptions`.
        record: the bytes of `manifest.json`, where the driver has read them for all.
    """
    from ray_ckpt.protocol.load_options import LoadOptions
    from ray_ckpt.protocol.rank_load import RankLoad
    from ray_ckpt.state.train_state import TrainState

    load = RankLoad(storage, LoadOptions(**options))
    load.open(record)
    _loads(ctx)[attempt] = load
    return load.may_be_foreign and isinstance(resolve(state_of)(ctx), TrainState)


def name_load(ctx: WorkerContext, attempt: str, state_of: StateOf | str) -> Names | None:
    """What this rank's part of the state is called."""
    return _loads(ctx)[attempt].names(resolve(state_of)(ctx))


def adapt_load(ctx: WorkerContext, attempt: str, names: Names | None) -> None:
    """Translate the names of somebody else's checkpoint."""
    _loads(ctx)[attempt].adapt(names)


def offer_load(ctx: WorkerContext, attempt: str, state_of: StateOf | str) -> LoadOffer:
    """Compare the checkpoint with the state."""
    return _loads(ctx)[attempt].offer(resolve(state_of)(ctx))


def prepare_load(ctx: WorkerContext, attempt: str, verdict: LoadOffer) -> None:
    """Hand over what may be refused, unless something is left over that nobody wants."""
    _loads(ctx)[attempt].prepare(verdict)


def want_load(ctx: WorkerContext, attempt: str) -> Wants:
    """What is to be read into the state; nothing where there is no process group to share it through."""
    import torch.distributed as dist

    from ray_ckpt.protocol.share_plan import Wants

    is_of_group = dist.is_initialized() and (dist.get_rank(), dist.get_world_size()) == (ctx.rank, ctx.world_size)
    return _loads(ctx)[attempt].want() if is_of_group else Wants({})


def read_load(ctx: WorkerContext, attempt: str, plan: SharePlan | None, timeout_s: float) -> None:
    """Read into the state.

    Args:
        plan: who reads what for whom; None where each worker reads all that it wants.
        timeout_s: how long other workers may be waited for.
    """
    from ray_ckpt.protocol.peers import Peers

    meter = Meter(ctx.progress)
    peers = None if plan is None else Peers.of_all(timeout_s)
    _loads(ctx)[attempt].read(meter, plan, peers)
    meter.end()


def finish_load(ctx: WorkerContext, attempt: str, verdict: LoadOffer) -> LoadReport:
    """Set what is not read in place, and release the state."""
    report = _loads(ctx)[attempt].finish(verdict)
    del _loads(ctx)[attempt]
    return report


def give_up_load(ctx: WorkerContext, attempt: str) -> str:
    """Undo what can be undone, release the state, and tell which parts of it are new."""
    load = _loads(ctx).pop(attempt, None)
    return "" if load is None else load.give_up()


def verify(ctx: WorkerContext, storage: Storage, num_ranks: int, scan_nan: bool, trusted: bool) -> VerifyReport:
    """Check this rank's share of a checkpoint."""
    from ray_ckpt.storage.audit import verify_share

    meter = Meter(ctx.progress)
    return verify_share(storage, rank=ctx.rank, num_ranks=num_ranks, scan_nan=scan_nan, trusted=trusted, meter=meter)


def begin_compare(
    ctx: WorkerContext,
    attempt: str,
    state_of: StateOf | str,
    only: Sequence[str] | None,
    storage: Storage,
    record: bytes | None,
) -> frozenset[str]:
    """Look through the state. Returns the tensors that this worker needs fingerprints for."""
    from ray_ckpt.protocol.comparison import Comparing
    from ray_ckpt.storage.checkpoint_reader import CheckpointReader

    comparing = Comparing(resolve(state_of)(ctx), only, CheckpointReader(storage).read_manifest(record))
    # One that has failed on another worker has left this one's behind.
    ctx.objects[_COMPARISON] = attempt, comparing
    return comparing.needing()


def compare(ctx: WorkerContext, attempt: str, by_fingerprint: frozenset[str]) -> Held:
    """What this worker holds, as the record tells or as fingerprints."""
    begun, comparing = ctx.objects.pop(_COMPARISON)
    assert begun == attempt, "a group compares one thing at a time"
    held: Held = comparing.held(by_fingerprint)
    return held


def _saves(ctx: WorkerContext) -> dict[str, RankSave]:
    """Attempt -> this rank's side of it."""
    saves: dict[str, RankSave] = ctx.objects.setdefault(_SAVES, {})
    return saves


def _loads(ctx: WorkerContext) -> dict[str, RankLoad]:
    """Attempt -> this rank's side of it."""
    loads: dict[str, RankLoad] = ctx.objects.setdefault(LOADS, {})
    return loads


def tell_all(group: WorkerGroup, fn: Callable[..., T], attempt: str, without: Collection[int] = ()) -> dict[int, T]:
    """Call `fn(ctx, attempt)` on every worker, beside its other calls; the answers by rank, none if one is late.

    Args:
        without: ranks that are gone.
    """
    with contextlib.suppress(GroupError):
        args_of = {rank: (attempt,) for rank in range(group.num_workers) if rank not in without}
        answers: dict[int, T] = group.call(fn, args_of, timeout_s=CLEANUP_TIMEOUT_S, beside=True)
        return answers
    return {}
