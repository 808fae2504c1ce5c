"""The faster load planner plans what DCP's own plans, item for item."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, zeros

from ray_ckpt.parallel.load_plan import ShardLoadPlanner
from ray_ckpt.storage.reader import ArrowStorageReader
from ray_ckpt.storage.writer import ArrowStorageWriter
from tests.ranks import run_ranks

SHAPES = [(7, 5), (7, 5), (1, 5), (4, 4), (7,), ()]


def saved_state() -> dict[str, Any]:
    tensors = {f"t{i}": torch.arange(float(torch.Size(shape).numel())).reshape(shape) for i, shape in enumerate(SHAPES)}
    return {"model": tensors, "lr": 0.1}


def plan_both(rank: int, directory: str) -> list[list[str]]:
    dcp.save(saved_state(), storage_writer=ArrowStorageWriter(directory))
    mesh = init_device_mesh("cpu", (4,))
    plane = init_device_mesh("cpu", (2, 2))
    model: dict[str, Any] = {}
    for i, shape in enumerate(SHAPES):
        model[f"t{i}"] = zeros(*shape, device_mesh=mesh, placements=[Shard(0)]) if shape else torch.zeros(())
    model["t3"] = zeros(4, 4, device_mesh=plane, placements=[Shard(1), Replicate()])
    return [
        plan({"model": model, "lr": None}, planner, directory) for planner in (ShardLoadPlanner(), DefaultLoadPlanner())
    ]


def plan(state: dict[str, Any], planner: LoadPlanner, directory: str) -> list[str]:
    planner.set_up_planner(state, ArrowStorageReader(directory).read_metadata(), is_coordinator=True)
    return sorted(map(repr, planner.create_local_plan().items))


def test_both_planners_want_the_same(tmp_path: Path) -> None:
    plans = run_ranks(plan_both, 4, tmp_path, str(tmp_path / "run"))
    assert all(ours == stock for ours, stock in plans)
    # The control: ranks want different things, so equal plans are no accident.
    assert len({tuple(ours) for ours, _ in plans}) == 4


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_does_not_fit_is_refused_as_by_dcp(tmp_path: Path) -> None:
    dcp.save(saved_state(), storage_writer=ArrowStorageWriter(tmp_path), no_dist=True)
    with pytest.raises(ValueError, match="Size mismatch"):
        plan({"model": {"t0": torch.zeros(3)}}, ShardLoadPlanner(), str(tmp_path))
    with pytest.raises(RuntimeError, match="Missing key"):
        plan({"model": {"t99": torch.zeros(3)}}, ShardLoadPlanner(), str(tmp_path))
