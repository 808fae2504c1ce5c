"""load(group, state_of, target): the phases of `protocol/rank_load.py`, carried by actor calls.

driver                                    every worker
    find the step
    open    ── storage, options, record ─>  the manifest
    names   ── state_of ─────────────────>  only where somebody else may have written it   <── Names ──
    adapt   ── what all are called ──────>  the manifest under our names
    offer   ── state_of ─────────────────>  compare; refuse what is missing  <── LoadOffer ──
    agree
    prepare ── what they agreed on ──────>  refuse what is left over; hand over what may be refused
    want    ─────────────────────────────>  only where it is worth it: what is to be read  <── Wants ──
    share_out
    read    ── who reads what for whom ──>  bytes into the live tensors
    finish  ─────────────────────────────>  set everything else              <── LoadReport ──

A phase begins when all workers have come through the one before. The manifest tells each where its bytes are: nobody
waits for another, and no process group is needed. Where there is one, bytes that several workers want of an object
store are read by one of them and go through it to the others.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from ray_ckpt.cluster import worker_side
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.errors import RayCkptError
from ray_ckpt.format.saved import Saved
from ray_ckpt.format.wanted_names import chosen, join_names
from ray_ckpt.progress import Progress
from ray_ckpt.protocol.agreement import agree
from ray_ckpt.protocol.share_plan import Share, is_shared, share_out
from ray_ckpt.report import LoadReport
from ray_ckpt.storage.record_files import read_for_all
from ray_ckpt.storage.resolve import Target, checkpoint_at


def load(
    group: WorkerGroup,
    state_of: worker_side.StateOf | str,
    target: Target,
    step: int | None = None,
    *,
    strict: bool = True,
    cast: bool = False,
    only: Sequence[str] | None = None,
    key_map: Mapping[str, str | Saved] | Callable[[str], str] | None = None,
    hyperparameters: Literal["from-checkpoint", "from-optimizer"] = "from-checkpoint",
    fallback: bool = False,
    trusted: bool = False,
    share: Share = "auto",
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> list[LoadReport]:
    """Load a checkpoint into what the workers hold, whatever layout saved it. The group stays open, whatever happens.

    Everything is compared, on all workers, before anything is changed; objects that may refuse what was saved take it
    before the tensors are read, as in `ray_ckpt.load`. After an error while reading, the tensors hold parts of both
    states, and the error says which parts of the state are new. Where a worker's own state takes part in collectives
    (FSDP1's does), a worker that fails leaves the others in them until the group's collective timeout.

    Example:
        >>> import torch
        >>> from ray_ckpt import WorkerGroup, cluster
        >>> def state_of(ctx):
        ...     return ctx.objects.setdefault("stage", {f"stage{ctx.rank}": torch.ones(3)})
        >>> with WorkerGroup(2, process_group=False) as group:
        ...     report = cluster.save(group, state_of, "run/step-1")
        ...     reports = cluster.load(group, state_of, "run/step-1")
        >>> [report.num_bytes for report in reports]
        [12, 12]

    Args:
        state_of: as for `save`; a state dict is filled in place, so return the one that the worker uses.
        target: the checkpoint's directory as every worker's node and the driver know it, or a store; or what others
            wrote, as for `ray_ckpt.load`.
        step: number of the step in the store; None loads the checkpoint at `target` itself, or else the latest
            committed step of the store there.
        strict, cast, only, key_map, hyperparameters, fallback, trusted, share: as for `ray_ckpt.load`; a function as
            `key_map` must be one that pickles, and bytes are shared where the group has a process group.
        timeout_s: time limit of the whole load; by default the group's `call_timeout_s`.
        progress: as for `save`, with the bytes that the workers have read and all that they will.

    Returns:
        One `LoadReport` per worker, in rank order.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint, or not that step.
        WorkerError: workers failed or died, or the checkpoint does not fit what they hold; names each.
        GroupTimeoutError: workers did not answer in time; names each.
    """
    options: dict[str, Any] = {"strict": strict, "cast": cast, "only": chosen(only)}
    options |= {"key_map": key_map, "hyperparameters": hyperparameters, "trusted": trusted}
    found = checkpoint_at(target, step, fallback=fallback)
    record, shared = read_for_all(found.storage), is_shared(share, found.storage)
    attempt = uuid.uuid4().hex[:12]
    deadline = time.monotonic() + (group.call_timeout_s if timeout_s is None else timeout_s)

    def left_s() -> float:
        return max(0.0, deadline - time.monotonic())

    def call(fn: Callable[..., Any], *args: Any, progress: Progress | None = None) -> list[Any]:
        args_of = dict.fromkeys(range(group.num_workers), (attempt, *args))
        return list(group.call(fn, args_of, timeout_s=left_s(), progress=progress).values())

    try:
        if any(call(worker_side.open_load, found.storage, options, state_of, record)):
            call(worker_side.adapt_load, join_names(call(worker_side.name_load, state_of)))
        verdict = agree(call(worker_side.offer_load, state_of))
        call(worker_side.prepare_load, verdict)
        plan = share_out(call(worker_side.want_load)) if shared else None
        call(worker_side.read_load, plan, left_s(), progress=progress)
        reports = call(worker_side.finish_load, verdict)
        return [replace(report, step=found.step, passed_over=found.passed_over) for report in reports]
    except BaseException as error:
        _give_up(group, attempt, error)
        raise


def _give_up(group: WorkerGroup, attempt: str, error: BaseException) -> None:
    """Undo on all workers what can be undone, and let the error say what is new on which rank."""
    told = worker_side.tell_all(group, worker_side.give_up_load, attempt)
    if isinstance(error, RayCkptError):
        for text in dict.fromkeys(filter(None, told.values())):
            ranks = ", ".join(str(rank) for rank in told if told[rank] == text)
            error.append(f"rank {ranks}: {text}")
