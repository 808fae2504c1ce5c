"""verify(group, target): the workers share the files, the driver merges their reports."""

from __future__ import annotations

from dataclasses import replace

from ray_ckpt.cluster import worker_side
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.report import VerifyReport
from ray_ckpt.storage.resolve import Target, committed_at


def verify(
    group: WorkerGroup,
    target: Target,
    step: int | None = None,
    *,
    trusted: bool = False,
    timeout_s: float | None = None,
) -> VerifyReport:
    """Read and check every byte of a committed checkpoint on the workers, beside their other calls.

    Each worker reads a share of the files; otherwise as `ray_ckpt.verify`.

    Example:
        >>> import torch
        >>> from ray_ckpt import WorkerGroup, cluster
        >>> def state_of(ctx):
        ...     return ctx.objects.setdefault("stage", {f"stage{ctx.rank}": torch.ones(3)})
        >>> with WorkerGroup(2, process_group=False) as group:
        ...     report = cluster.save(group, state_of, "run/step-1")
        ...     cluster.verify(group, "run/step-1").verified
        True

    Args:
        target: the checkpoint's directory or file as every worker's node and the driver know it, or a store.
        step: number of the step in the store; None verifies the checkpoint at `target` itself, or else the latest
            committed step of the store there.
        trusted: as for `ray_ckpt.verify`.
        timeout_s: time limit; by default the group's `call_timeout_s`.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint, or not that step.
        WorkerError: workers failed or died, or the storage does not answer them; names each.
        GroupTimeoutError: workers did not answer in time; names each.
    """
    found = committed_at(target, step)
    args = (found.storage, group.num_workers, trusted)
    shares = group.call(
        worker_side.verify, dict.fromkeys(range(group.num_workers), args), timeout_s=timeout_s, beside=True
    )
    return replace(VerifyReport.merge(list(shares.values())), step=found.step)
