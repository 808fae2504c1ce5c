"""Tensors that are made of other tensors: saved as those, and back in place, in any layout; or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import ray_ckpt
from ray_ckpt import ArrowStorageReader, ArrowStorageWriter, TrainState
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.format.snapshot import compare
from ray_ckpt.format.torch_internals import placed as sharded
from tests.support.ranks import run_ranks
from tests.support.subclasses import KINDS, Packed4, RowInt8, same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

KIND = pytest.mark.parametrize("kind", list(KINDS))


def values(seed: int, rows: int = 8) -> torch.Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


class Frozen(nn.Module):
    """A frozen weight and a buffer that are made of others, beside a plain parameter that is trained."""

    def __init__(self, kind: str, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(KINDS[kind](values(seed)), requires_grad=False)
        self.register_buffer("table", KINDS[kind](values(seed + 1)))
        self.trained = nn.Parameter(values(seed + 2))


def stepped(model: Frozen, kind: str, seed: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([model.trained], lr=0.1, momentum=0.9)
    optimizer.state[model.trained]["momentum_buffer"] = KINDS[kind](values(seed))
    return optimizer


@KIND
@pytest.mark.parametrize("blocking", [True, False])
def test_a_training_state_brings_it_back_in_place(tmp_path: Path, kind: str, blocking: bool) -> None:
    model = Frozen(kind, 0)
    state = TrainState(model, stepped(model, kind, 9))
    handle = ray_ckpt.save(state, tmp_path, blocking=blocking)
    if not blocking:
        handle.result()
    saved = state.snapshot(0)
    for stepped_before in (True, False):
        other = Frozen(kind, 5)
        optimizer = stepped(other, kind, 4) if stepped_before else torch.optim.SGD([other.trained], 0.1, momentum=0.9)
        target = TrainState(other, optimizer)
        weight, inner = other.weight, other.weight.__tensor_flatten__()[0][-1]
        assert compare([saved], [target.snapshot(0)]).mismatches
        ray_ckpt.load(target, tmp_path)
        assert compare([saved], [target.snapshot(0)]).mismatches == ()
        assert other.weight is weight, inner
        assert same(other.weight.data, KINDS[kind](values(0)))
        assert same(other.table, KINDS[kind](values(1)))
        assert same(optimizer.state[other.trained]["momentum_buffer"], KINDS[kind](values(9)))


@KIND
def test_stock_dcp_reads_the_inner_tensors_by_name(tmp_path: Path, kind: str) -> None:
    model = Frozen(kind, 0)
    state = TrainState(model)
    dcp.save({"run": state}, storage_writer=ArrowStorageWriter(tmp_path / "dcp"), no_dist=True)
    ray_ckpt.save(state, tmp_path / "own")
    ray_ckpt.save({"w": KINDS[kind](values(0))}, tmp_path / "plain")
    expected = {
        name: tensor for name, tensor in state.state_dict()["model"].items() if isinstance(tensor, torch.Tensor)
    }
    assert len(expected) > 3
    for place, prefix in (("dcp", "run.model"), ("own", "model")):
        found = {f"{prefix}.{name}": torch.zeros_like(tensor) for name, tensor in expected.items()}
        dcp.load(found, checkpoint_id=str(tmp_path / place), no_dist=True)
        assert all(torch.equal(found[f"{prefix}.{name}"], tensor) for name, tensor in expected.items())
    found = {
        f"w.{name.removeprefix('weight.')}": torch.zeros_like(t) for name, t in expected.items() if "weight" in name
    }
    ray_ckpt.load(found, tmp_path / "plain")
    assert all(torch.equal(found[name], expected[f"weight{name[1:]}"]) for name in found)


def test_dcp_loads_a_training_state_in_place(tmp_path: Path) -> None:
    ray_ckpt.save({"run": TrainState(Frozen("row", 0))}, tmp_path)
    other = Frozen("row", 5)
    dcp.load({"run": TrainState(other)}, storage_reader=ArrowStorageReader(tmp_path), no_dist=True)
    assert same(other.weight.data, RowInt8.of(values(0)))


def test_inner_names_are_those_of_the_class(tmp_path: Path) -> None:
    ray_ckpt.save({"w": KINDS["doubled"](values(0)), "deep": {"w": Packed4.of(values(0))}}, tmp_path)
    manifest = json.loads((tmp_path / MANIFEST_NAME).read_bytes())
    assert sorted(manifest["tensors"]) == [
        *("deep.w.packed", "deep.w.scale"),
        *("w.first.codes", "w.first.scale", "w.second.codes", "w.second.scale"),
    ]
    assert sorted(manifest["objects"]) == ["deep.w.$subclass", "w.$subclass"]
    assert all("value" in entry for entry in manifest["objects"].values())


MESHES: dict[str, tuple[int, Any, Any]] = {
    "whole": (1, None, None),
    "rows2": (2, (2,), [Shard(0)]),
    "uneven": (3, (3,), [Shard(0)]),
    "hybrid": (4, (2, 2), [Replicate(), Shard(0)]),
    "empty": (4, (4,), [Shard(0)]),
}


def placed(name: str, kind: str, whole: torch.Tensor) -> torch.Tensor:
    """Each rank's rows, as a subclass of their own."""
    _, shape, placements = MESHES[name]
    if shape is None:
        return KINDS[kind](whole)
    mesh = init_device_mesh("cpu", shape)
    parts = torch.chunk(whole, shape[-1])
    rank = mesh.get_local_rank(mesh.ndim - 1)
    local = KINDS[kind](parts[rank] if rank < len(parts) else whole[:0])
    return sharded(local, mesh, placements, whole.shape)


def kinds(name: str) -> set[str]:
    """Blocks in row-major order are refused where torch would split them otherwise than the rows."""
    return KINDS.keys() - ({"block"} if name == "uneven" else set())


def save_rows(rank: int, name: str, directory: Path) -> None:
    for kind in kinds(name):
        ray_ckpt.save({"w": placed(name, kind, values(0))}, directory / name / kind)


def load_rows(rank: int, name: str, sources: list[str], directory: Path) -> int:
    count = 0
    for source in sources:
        for kind in kinds(source) & kinds(name):
            live, expected = placed(name, kind, values(1)), placed(name, kind, values(0))
            parts = [t._local_tensor if isinstance(t, DTensor) else t for t in (live, expected)]
            assert not same(*parts)
            ray_ckpt.load({"w": live}, directory / source / kind)
            assert same(*parts), (kind, source, name)
            count += 1
    return count


def test_inner_tensors_are_resharded_with_the_outer_one(tmp_path: Path) -> None:
    names = ["whole", "rows2", "uneven", "hybrid"]
    for name in names:
        run_ranks(save_rows, MESHES[name][0], tmp_path, name, tmp_path)
    for name in names:
        count = sum(len(kinds(source) & kinds(name)) for source in names)
        assert set(run_ranks(load_rows, MESHES[name][0], tmp_path, name, names, tmp_path)) == {count}
