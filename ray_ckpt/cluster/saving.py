"""save(group, state_of, target, step): the phases of `protocol/`, carried by actor calls, without any collective.

driver                                    every worker
    plan    ── state_of ───────────────>  look through the state          <── LocalPlan ──
    merge, refuse what does not fit
    write   ── Assignment ─────────────>  write files (again, if asked)   <── RankRecord ──
    check, see the files; publish

The driver loads no torch: its part is merging and checking names, shapes and checksums.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from ray_ckpt.cluster import worker_side
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.protocol.coordinator import Coordinator, PlanCache
from ray_ckpt.report import SaveReport
from ray_ckpt.storage.resolve import Target, destination

_plans: WeakKeyDictionary[WorkerGroup, PlanCache] = WeakKeyDictionary()
"""Of the last save of each group: a worker whose plan has not changed sends a token instead."""


def save(
    group: WorkerGroup,
    state_of: worker_side.StateOf | str,
    target: Target,
    *,
    step: int | None = None,
    overwrite: bool = False,
    layout: str | None = None,
    retries: int = 0,
    timeout_s: float | None = None,
) -> SaveReport:
    """Save what the workers hold as one checkpoint at `target`. The group stays open, whatever happens.

    Example:
        >>> import torch
        >>> from ray_ckpt import WorkerGroup, cluster
        >>> def state_of(ctx):
        ...     return ctx.objects.setdefault("stage", {f"stage{ctx.rank}": torch.ones(3)})
        >>> with WorkerGroup(2, process_group=False) as group:
        ...     report = cluster.save(group, state_of, "run/step-1")
        >>> report.num_files
        2

    Args:
        state_of: a top-level function that returns a worker's state, given its `WorkerContext`: a `TrainState`,
            anything else with a `state_dict`, or a state dict. By name (`"package.module:function"`) the driver need
            not load its module.
        target: the checkpoint's directory as every worker's node knows it (a path, a URI, or a `Storage`), or with
            `step` the store that it is a step of (the same, or a `CheckpointStore`).
        layout: how the state lies across the workers, for the manifest; by default what rank 0's `TrainState` says.
        retries: how often a worker whose write failed writes once more, by itself.
        timeout_s: for the whole save; by default the group's `call_timeout_s`.

    Raises:
        CheckpointExistsError: `target` holds a committed checkpoint already and `overwrite` was not given.
        CommitError: the workers' parts do not fit together, or differ under one name; or the driver, which commits,
            does not see at `target` what the workers have written.
        WorkerError: workers failed or died; names each. Nothing was committed.
        GroupTimeoutError: workers did not answer in time; names each. Nothing was committed.
    """
    storage = destination(target, step)
    ranks = range(group.num_workers)
    deadline = time.monotonic() + (group.call_timeout_s if timeout_s is None else timeout_s)
    cache = _plans.setdefault(group, PlanCache())
    saved_by = {"torch": importlib.metadata.version("torch")}
    coordinator = Coordinator(storage, overwrite=overwrite, saved_by=saved_by, cache=cache, called="the driver")

    def call(fn: Callable[..., Any], args_of: Mapping[int, tuple[Any, ...]], **options: Any) -> dict[int, Any]:
        return group.call(fn, args_of, timeout_s=max(0.0, deadline - time.monotonic()), **options)

    try:
        offers = call(worker_side.plan, dict.fromkeys(ranks, (coordinator.attempt, state_of, storage, cache.tokens)))
        coordinator.layout = layout or offers[0].layout
        assignments = coordinator.merge([offer.plan for offer in offers.values()])
        args_of = {assignment.rank: (assignment,) for assignment in assignments}
        records = call(worker_side.write, args_of, beside=True, retries=retries)
        coordinator.check(list(records.values()))
        [stock_record] = call(worker_side.stock_record, {0: (coordinator.manifest,)}, beside=True).values()
    except BaseException:
        # What a dead worker leaves behind is for the store's clean-up.
        worker_side.tell_all(group, worker_side.discard, coordinator.attempt)
        raise
    try:
        return coordinator.publish(stock_record)
    finally:
        # Whether it is committed may be the storage's secret: the files stay, and only the state is let go of.
        worker_side.tell_all(group, worker_side.finish, coordinator.attempt)
