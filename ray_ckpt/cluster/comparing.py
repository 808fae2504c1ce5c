"""compare(group, state_of, target): the workers take fingerprints, the driver compares them with the checkpoint's."""

from __future__ import annotations

from collections.abc import Sequence

from ray_ckpt.cluster import worker_side
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.format.wanted_names import chosen
from ray_ckpt.report import CompareReport
from ray_ckpt.storage.resolve import Target, checkpoint_at


def compare(
    group: WorkerGroup,
    state_of: worker_side.StateOf | str,
    target: Target,
    step: int | None = None,
    *,
    only: Sequence[str] | None = None,
    timeout_s: float | None = None,
) -> CompareReport:
    """Whether the workers together hold now, in whatever layout, what a checkpoint holds.

    By fingerprints alone, as `ray_ckpt.compare`.

    Example:
        >>> import torch
        >>> from ray_ckpt import WorkerGroup, cluster
        >>> def state_of(ctx):
        ...     return ctx.objects.setdefault("stage", {f"stage{ctx.rank}": torch.ones(3)})
        >>> with WorkerGroup(2, process_group=False) as group:
        ...     report = cluster.save(group, state_of, "run/step-1", fingerprints=True)
        ...     cluster.compare(group, state_of, "run/step-1").equal
        True

    Args:
        state_of: as for `cluster.save`.
        target: the checkpoint's directory as the driver knows it, or a store.
        step: number of the step in the store; None takes the checkpoint at `target` itself, or else the latest
            committed step of the store there.
        only: names, such as `("model",)`; they and what lies below them are compared, and nothing else.
        timeout_s: time limit; by default the group's `call_timeout_s`.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint, or not that step.
        WorkerError: workers failed or died; names each.
        GroupTimeoutError: workers did not answer in time; names each.
    """
    from ray_ckpt.protocol import comparison  # the driver goes without torch until somebody compares

    names, found = chosen(only), checkpoint_at(target, step)
    args_of = dict.fromkeys(range(group.num_workers), (state_of, names))
    of_ranks = group.call(worker_side.compare, args_of, timeout_s=timeout_s)
    return comparison.compare(found, list(of_ranks.values()), names)
