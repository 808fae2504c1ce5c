"""compare(state, target, step): find it; every rank takes fingerprints ── gather ──> coordinator: compare ──>"""

from __future__ import annotations

from collections.abc import Sequence

from ray_ckpt.checkpoint.exchange import TrainersExchange
from ray_ckpt.checkpoint.saving import State
from ray_ckpt.format.wanted_names import chosen
from ray_ckpt.protocol import comparison
from ray_ckpt.report import CompareReport
from ray_ckpt.storage.resolve import Target, checkpoint_at


def compare(
    state: State,
    target: Target,
    step: int | None = None,
    *,
    only: Sequence[str] | None = None,
    timeout_s: float | None = None,
) -> CompareReport:
    """Whether the ranks together hold now, in whatever layout, what a checkpoint holds. All ranks call it.

    By fingerprints alone: no tensor is gathered, and none of the checkpoint's is read. It must have been saved with
    `fingerprints=True`. Objects are compared by the checksums that every checkpoint of ours has.

    Example:
        >>> import torch
        >>> from ray_ckpt import compare, save
        >>> model = torch.nn.Linear(4, 4)
        >>> report = save({"model": model.state_dict()}, "run/step-1", fingerprints=True)
        >>> compare({"model": model.state_dict()}, "run/step-1").equal
        True
        >>> torch.nn.init.zeros_(model.bias)
        Parameter containing:
        ...
        >>> print(compare({"model": model.state_dict()}, "run/step-1"))
        NOT EQUAL to ...run/step-1: differ: model.bias (other elements)

    Args:
        state: as for `save`.
        target: the checkpoint's directory or a store, as for `load`.
        step: number of the step in the store; None takes the checkpoint at `target` itself, or else the latest
            committed step of the store there.
        only: names, such as `("model",)`; they and what lies below them are compared, and nothing else.
        timeout_s: time limit for waiting for other ranks; by default the process group's own.

    Returns:
        On every rank, what differs anywhere, by name.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint, or not that step.
        CheckpointError: ranks failed, or did not arrive within `timeout_s`; every rank learns which.
    """
    names = chosen(only)
    ranks = TrainersExchange("compare", timeout_s)
    found = ranks.broadcast(lambda: checkpoint_at(target, step))
    of_ranks = ranks.gather(lambda: comparison.held(state, names))
    return ranks.broadcast(lambda: comparison.compare(found, of_ranks, names))
