"""save(state, uri): the phases of `protocol/`, carried by collectives.

every rank     hold -> plan ── gather ──> coordinator: merge ── scatter ──>
every rank     write files  ── gather ──> coordinator: check, publish ── broadcast ──> SaveReport
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful

from ray_ckpt.checkpoint.together import Exchange
from ray_ckpt.format import dcp_metadata
from ray_ckpt.protocol.coordinator import Coordinator
from ray_ckpt.protocol.rank import PlanMemory, RankSave
from ray_ckpt.report import SaveReport
from ray_ckpt.storage.files import Storage


def save(state: Stateful | Mapping[str, Any], uri: str, *, overwrite: bool = False) -> SaveReport:
    """Save what every rank holds as one checkpoint at `uri`. All ranks call it.

    Args:
        state: a `TrainState`, anything else with a `state_dict`, or a state dict: nested dicts and lists of tensors
            (plain, DTensor, ShardedTensor) and other objects. Ranks may hold different things; what several hold under
            one name is saved once.

    Raises:
        CheckpointExistsError: `uri` holds a committed checkpoint already and `overwrite` was not given.
        CommitError: the ranks' parts do not fit together, or ranks hold different things under one name.
        CheckpointError: a rank failed; names each of them, on every rank. Nothing was committed.
    """
    storage, ranks = Storage(uri), Exchange("save")
    writer = RankSave(storage)
    coordinator = Coordinator(storage, overwrite=overwrite, saved_by={"torch": torch.__version__})
    plans = ranks.gather(lambda: writer.plan(state, PlanMemory(), frozenset()))
    assignment = ranks.scatter(lambda: coordinator.merge(plans))
    try:
        records = ranks.gather(lambda: writer.write(assignment))
        ranks.broadcast(lambda: coordinator.check(records))
    except BaseException:
        writer.discard()
        raise
    return ranks.broadcast(lambda: coordinator.publish(dcp_metadata.dumps(coordinator.manifest)))
