"""compare(group, state_of, target): the workers take fingerprints, the driver compares them with the checkpoint's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ray_ckpt.cluster import worker_side
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.cluster.loading import LoadAttempt
from ray_ckpt.format.wanted_names import chosen
from ray_ckpt.report import CompareReport
from ray_ckpt.storage.record_files import read_for_all
from ray_ckpt.storage.resolve import Target, checkpoint_at, held


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

    By checksums and fingerprints, as `ray_ckpt.compare`.

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
    # The driver goes without torch until somebody compares.
    from ray_ckpt.protocol.comparison import compare_with
    from ray_ckpt.storage.checkpoint_reader import CheckpointReader

    names = chosen(only)
    comparison = LoadAttempt(group, state_of, group.call_timeout_s if timeout_s is None else timeout_s)
    with held(lambda: checkpoint_at(target, step)) as found:
        record = read_for_all(found.storage)
        manifest = CheckpointReader(found.storage).read_manifest(record)
        needing = comparison.call(worker_side.begin_compare, state_of, names, found.storage, record)
        of_ranks = comparison.call(worker_side.compare, frozenset[str]().union(*needing))
    return replace(compare_with(manifest, of_ranks, names), uri=found.storage.address, step=found.step)
