"""Drives DCP's protocol over several ranks in one process, without a process group: every plan and result is pickled.

save(states, writers)    plans -> global plan -> writes -> commit, as `dcp.save` does it with collectives
load(states, readers)    each rank for itself
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult


def _travelled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def write(
    states: Sequence[dict[str, Any]], writers: Sequence[StorageWriter]
) -> tuple[Metadata, list[list[WriteResult]]]:
    """Everything before the commit."""
    planners = [DefaultSavePlanner() for _ in states]
    plans = []
    for rank, (state, planner, writer) in enumerate(zip(states, planners, writers, strict=True)):
        planner.set_up_planner(dict(state), None, rank == 0)
        writer.set_up_storage_writer(rank == 0, rank=rank)
        plans.append(_travelled(writer.prepare_local_plan(planner.create_local_plan())))
    plans, metadata = planners[0].create_global_plan(plans)
    plans = writers[0].prepare_global_plan(plans)
    results = []
    for planner, writer, plan in zip(planners, writers, plans, strict=True):
        future = writer.write_data(planner.finish_plan(_travelled(plan)), planner)
        results.append(_travelled(future.wait()))
    return metadata, results


def save(states: Sequence[dict[str, Any]], writers: Sequence[StorageWriter]) -> None:
    metadata, results = write(states, writers)
    writers[0].finish(metadata, results)


def load(state: dict[str, Any], reader: StorageReader) -> dict[str, Any]:
    """Load in place, and return the state."""
    planner = DefaultLoadPlanner()
    metadata = reader.read_metadata()
    planner.set_up_planner(state, metadata, True)
    reader.set_up_storage_reader(metadata, True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    plan = reader.prepare_global_plan(planner.create_global_plan([plan]))[0]
    reader.read_data(planner.finish_plan(plan), planner).wait()
    return state
