"""compare(state, target, step): find it; every rank takes fingerprints ── gather ──> coordinator: compare ──>"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

from ray_ckpt.checkpoint.exchange import TrainersExchange
from ray_ckpt.checkpoint.saving import State
from ray_ckpt.format.wanted_names import chosen
from ray_ckpt.protocol.comparison import Comparing, compare_with
from ray_ckpt.report import CompareReport
from ray_ckpt.storage.checkpoint_reader import CheckpointReader
from ray_ckpt.storage.record_files import read_for_all
from ray_ckpt.storage.resolve import Location, Target, checkpoint_at, held


def compare(
    state: State,
    target: Target,
    step: int | None = None,
    *,
    only: Sequence[str] | None = None,
    timeout_s: float | None = None,
) -> CompareReport:
    """Whether the ranks together hold now, in whatever layout, what a checkpoint holds. All ranks call it.

    No tensor is gathered, and none of the checkpoint's is read. Where ranks hold whole checksum blocks of what was
    saved (whole tensors, most shards along dim 0) and not on a GPU, the checksums are compared that every checkpoint of
    ours has, at the speed of memory. Other parts of tensors are compared by fingerprints, if it was saved with
    `fingerprints=True`; else the report has them as `unknown`.

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
    with contextlib.ExitStack() as holds:

        def find() -> tuple[Location, bytes | None]:
            location = holds.enter_context(held(lambda: checkpoint_at(target, step)))
            return location, read_for_all(location.storage)

        found, record = ranks.broadcast(find)
        manifest = ranks.on_all(lambda: CheckpointReader(found.storage).read_manifest(record))
        mine = ranks.on_all(lambda: Comparing(state, names, manifest))
        needing = ranks.gather(mine.needing)
        by_fingerprint = ranks.broadcast(lambda: frozenset[str]().union(*needing))
        of_ranks = ranks.gather(lambda: mine.held(by_fingerprint))
        report = ranks.broadcast(lambda: compare_with(manifest, of_ranks, names))
    return replace(report, uri=found.storage.address, step=found.step)
