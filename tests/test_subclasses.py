"""Tensors that are made of other tensors: saved as those, and back in place, in any layout; or refused by name."""

from __future__ import annotations

import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.two_tensor import TwoTensor

import ray_ckpt
from ray_ckpt import ArrowStorageReader, ArrowStorageWriter, TrainState
from ray_ckpt.errors import CheckpointError, StateMismatchError, UsageError
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.format.snapshot import compare
from ray_ckpt.format.torch_internals import local_tensor
from ray_ckpt.format.torch_internals import placed as sharded
from ray_ckpt.format.wrappers import with_memory
from tests.support.ranks import run_ranks
from tests.support.records import edit_record
from tests.support.subclasses import (
    KINDS,
    BlockInt8,
    Hidden,
    Packed4,
    Range,
    Rounding,
    RowInt8,
    Scheme,
    inner_bits,
    same,
)

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


@functools.cache
def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape)


def placed(name: str, kind: str, whole: torch.Tensor) -> torch.Tensor:
    """Each rank's rows, as a subclass of their own."""
    _, shape, placements = MESHES[name]
    if shape is None:
        return KINDS[kind](whole)
    mesh = mesh_of(shape)
    parts = torch.chunk(whole, shape[-1])
    rank = mesh.get_local_rank(mesh.ndim - 1)
    local = KINDS[kind](parts[rank] if rank < len(parts) else whole[:0])
    return sharded(local, mesh, placements, whole.shape)


def kinds(name: str) -> set[str]:
    """Blocks in row-major order are refused where torch would split them otherwise than the rows."""
    return KINDS.keys() - ({"block", "split"} if name == "uneven" else set())


def save_rows(rank: int, name: str, directory: Path) -> None:
    ray_ckpt.save({kind: placed(name, kind, values(0)) for kind in kinds(name)}, directory / name)


def load_rows(rank: int, name: str, sources: list[str], directory: Path) -> int:
    count = 0
    for source in sources:
        common = sorted(kinds(source) & kinds(name))
        live = {kind: placed(name, kind, values(1)) for kind in common}
        expected = {kind: placed(name, kind, values(0)) for kind in common}
        parts = [(local_tensor(live[kind]), local_tensor(expected[kind])) for kind in common]
        assert not any(same(*pair) for pair in parts)
        ray_ckpt.load(live, directory / source, only=common)
        assert all(same(*pair) for pair in parts), (source, name)
        count += len(common)
    return count


def test_inner_tensors_are_resharded_with_the_outer_one(tmp_path: Path) -> None:
    names = ["whole", "rows2", "uneven", "hybrid"]
    for name in names:
        run_ranks(save_rows, MESHES[name][0], tmp_path, name, tmp_path)
    for name in names:
        count = sum(len(kinds(source) & kinds(name)) for source in names)
        assert set(run_ranks(load_rows, MESHES[name][0], tmp_path, name, names, tmp_path)) == {count}


class Stepper(torch.optim.Optimizer):
    """Keeps momentum in 8 bits, as blocks or rows of each rank's shard, made when it first steps."""

    def __init__(self, parameters: Any, kind: str) -> None:
        super().__init__(parameters, {"lr": 0.1, "kind": kind})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                before = self.state[parameter].get("momentum")
                kept = before._local_tensor if isinstance(before, DTensor) else before
                momentum = (0 if kept is None else kept.values() * 0.9) + local * 0.5
                made = KINDS[group["kind"]](momentum)
                if isinstance(parameter, DTensor):
                    made = sharded(made, parameter.device_mesh, parameter.placements, parameter.shape)
                self.state[parameter]["momentum"] = made
                local.sub_(momentum, alpha=group["lr"])


def trained(kind: str, seed: int, *, shards: bool, steps: int) -> TrainState:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Linear(8, 16, bias=False))
    if shards:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = Stepper(model.parameters(), kind)
    for _ in range(steps):
        optimizer.step()
    return TrainState(model, optimizer)


def train_sharded(rank: int, kind: str, source: Path | None, target: Path) -> Any:
    """Load into a fresh optimizer, and one more step; or train from the beginning, and save."""
    state = trained(kind, 1 if source else 0, shards=True, steps=0 if source else 2)
    if source is None:
        ray_ckpt.save(state, target)
    else:
        ray_ckpt.load(state, source)
    before = state.snapshot(rank)
    state.optimizer.step()
    return before, state.snapshot(rank)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("block", marks=pytest.mark.slow),
        "packed",
        pytest.param("doubled", marks=pytest.mark.slow),
        "hidden",
        pytest.param("split", marks=pytest.mark.slow),
    ],
)
def test_a_fresh_optimizer_gets_the_kind_that_was_saved_in_any_layout(tmp_path: Path, kind: str) -> None:
    from_ranks = run_ranks(train_sharded, 2, tmp_path, kind, None, tmp_path / "two")
    alone = trained(kind, 0, shards=False, steps=2)
    ray_ckpt.save(alone, tmp_path / "one")
    assert compare([before for before, _ in from_ranks], [alone.snapshot(0)]).mismatches == ()
    fresh = trained(kind, 1, shards=False, steps=0)
    ray_ckpt.load(fresh, tmp_path / "two")
    assert compare([alone.snapshot(0)], [fresh.snapshot(0)]).mismatches == ()
    for state in (alone, fresh):
        state.optimizer.step()
    to_ranks = run_ranks(train_sharded, 2, tmp_path, kind, tmp_path / "one", tmp_path)
    for after in (fresh.snapshot(0),), [after for _, after in from_ranks], [after for _, after in to_ranks]:
        assert compare([alone.snapshot(0)], after).mismatches == ()


REFUSED_IN_A_SAVE: dict[str, tuple[Any, str]] = {
    "an odd context": (
        lambda: RowInt8(*inner_bits(RowInt8.of(values(0))), object()),
        r"'w' is a tests\.support\.subclasses\.RowInt8, .* a builtins\.object is neither a plain value",
    ),
    "a lambda": (lambda: RowInt8(*inner_bits(RowInt8.of(values(0))), lambda: 0), "a builtins.function is neither"),
    "meta": (lambda: RowInt8(torch.empty(2, 2, device="meta"), torch.ones(2, 1)), "'w.codes' is on the meta device"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        r"'w' is a torch\.\S+NestedTensor, .*its shape is not fixed",
    ),
}


@pytest.mark.parametrize("what", list(REFUSED_IN_A_SAVE))
@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_no_record_can_hold_is_refused_by_name(tmp_path: Path, what: str, blocking: bool) -> None:
    make, message = REFUSED_IN_A_SAVE[what]

    def save() -> None:
        handle = ray_ckpt.save({"w": make()}, tmp_path, blocking=blocking)
        if not blocking:
            handle.result()

    with pytest.raises(UsageError, match=message):
        save()


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    for state in ({"w": RowInt8.of(values(0)), "w.codes": 1}, {"w.$subclass": 1, "w": RowInt8.of(values(0))}):
        with pytest.raises(UsageError, match=r"'w' is made of a tensor '\S+', whose name w\.\S+ another entry has"):
            ray_ckpt.save(state, tmp_path)
    model = nn.Module()
    model.register_buffer("w", RowInt8.of(values(0)))
    extra = {"w": RowInt8.of(values(0)), "w.scale": torch.ones(1)}
    with pytest.raises(UsageError, match=r"w\.scale"):
        ray_ckpt.save(TrainState(model, extra=extra), tmp_path)


def with_context(context: Any) -> Any:
    return RowInt8(*inner_bits(RowInt8.of(values(1))), context)


MISFITS: dict[str, tuple[Any, str]] = {
    "another class": (lambda: Packed4.of(values(1)), r"w: saved RowInt8 of float32\[8, 16\], wanted Packed4 of"),
    "a plain tensor": (lambda: values(1), r"w: saved RowInt8 of float32\[8, 16\], wanted float32\[8, 16\]"),
    "another shape": (lambda: RowInt8.of(values(1, rows=4)), r"saved RowInt8 of float32\[8, 16\], wanted RowInt8 of "),
    "another range": (lambda: with_context(Scheme(range=Range(-7, 7))), r"range\[0\]: saved -127, wanted -7"),
    "another member": (
        lambda: with_context(Scheme(Rounding.STOCHASTIC)),
        r"rounding: saved Rounding\.NEAREST, wanted Rounding\.STOCHASTIC",
    ),
    "another kind of context": (lambda: with_context(None), "context: saved .*Scheme.*, wanted None"),
    "another scale": (
        lambda: RowInt8(torch.ones(8, 16, dtype=torch.int8), torch.ones(8, 2)),
        r"scale: saved float32\[8, 1\], wanted float32\[8, 2\]",
    ),
    "another dtype inside": (
        lambda: RowInt8(torch.ones(8, 16, dtype=torch.uint8), torch.ones(8, 1)),
        r"codes: saved int8\[8, 16\], wanted uint8\[8, 16\]",
    ),
}


@pytest.mark.parametrize("what", list(MISFITS))
def test_another_recipe_is_refused_by_name_and_changes_nothing(tmp_path: Path, what: str) -> None:
    ray_ckpt.save({"a": torch.ones(3), "w": RowInt8.of(values(0))}, tmp_path)
    make, message = MISFITS[what]
    target = {"a": torch.zeros(3), "w": make()}
    for options in ({}, {"strict": False, "cast": True}):
        with pytest.raises(StateMismatchError, match=message):
            ray_ckpt.load(target, tmp_path, **options)
    assert not target["a"].any()
    before = make()
    assert torch.equal(before, target["w"]) if what == "a plain tensor" else same(before, target["w"])


def test_a_plain_tensor_does_not_become_one_that_is_made_of_others(tmp_path: Path) -> None:
    ray_ckpt.save({"w": values(0)}, tmp_path)
    with pytest.raises(StateMismatchError, match=r"w: saved as a plain tensor, wanted RowInt8 of float32\[8, 16\]"):
        ray_ckpt.load({"w": RowInt8.of(values(1))}, tmp_path)


def test_a_class_that_is_not_loaded_is_not_imported(tmp_path: Path) -> None:
    ray_ckpt.save(trained("row", 0, shards=False, steps=1), tmp_path)

    def rename(record: dict[str, Any]) -> None:
        kind = record["objects"]["optim.state.0.weight.momentum.$subclass"]["value"]["$tuple"][0]["$tuple"]
        assert kind == ["tests.support.subclasses", "RowInt8"]
        kind[:] = ["antigravity", "Flying"]

    edit_record(tmp_path, rename)
    fresh = trained("row", 1, shards=False, steps=0)
    before = fresh.snapshot(0)
    with pytest.raises(StateMismatchError, match=r"'antigravity\.Flying' is no tensor subclass that this process has"):
        ray_ckpt.load(fresh, tmp_path)
    assert compare([before], [fresh.snapshot(0)]).mismatches == ()
    assert "antigravity" not in sys.modules


def save_what_does_not_follow(rank: int, what: str, directory: Path) -> str:
    mesh = init_device_mesh("cpu", (2,))
    whole = values(0)
    rows = whole[rank * 4 :][:4]
    if what == "uneven blocks":
        rows = whole[:3][2 * rank :][: 2 - rank]
        local, shape = BlockInt8.of(rows), (3, 16)
    else:
        scale = rows.abs().max()
        local, shape = Hidden((rows / scale * 127).round().to(torch.int8), scale), (8, 16)
    with pytest.raises((CheckpointError, UsageError)) as caught:
        ray_ckpt.save({"w": sharded(local, mesh, [Shard(0)], shape)}, directory)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("uneven blocks", r"'w' is a \S+BlockInt8, .*its scale does not follow its sharding"),
        ("one scale per shard", r"'w' is a \S+Hidden, .*its scale \[\] has no part for each part of dim 0"),
    ],
)
def test_inner_tensors_that_do_not_follow_are_refused_by_name(tmp_path: Path, what: str, message: str) -> None:
    for text in run_ranks(save_what_does_not_follow, 2, tmp_path, what, tmp_path / "run"):
        assert re.search(message, text)
    assert not (tmp_path / "run" / MANIFEST_NAME).exists()


def test_dcp_itself_does_not_get_a_tensor_without_memory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match="'w' is a TwoTensor, which has no elements of its own"):
        dcp.save(
            {"w": TwoTensor(torch.ones(2), torch.ones(2))}, storage_writer=ArrowStorageWriter(tmp_path), no_dist=True
        )


def test_dcp_does_not_load_another_recipe_into_a_training_state(tmp_path: Path) -> None:
    model, other = nn.Module(), nn.Module()
    model.register_buffer("w", RowInt8.of(values(0)))
    other.register_buffer("w", with_context(Scheme(range=Range(-7, 7))))
    ray_ckpt.save({"run": TrainState(model)}, tmp_path)
    with pytest.raises(StateMismatchError, match=r"model\.w: range\[0\]: saved -127, wanted -7"):
        dcp.load({"run": TrainState(other)}, storage_reader=ArrowStorageReader(tmp_path), no_dist=True)


class Stiff(RowInt8):
    """Cannot be copied."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            raise NotImplementedError("a Stiff cannot be copied")
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_a_parameter_that_cannot_be_copied_is_filled_where_it_lies(tmp_path: Path) -> None:
    model, other = nn.Module(), nn.Module()
    model.weight = nn.Parameter(Stiff.of(values(0)), requires_grad=False)
    other.weight = nn.Parameter(Stiff.of(values(1)), requires_grad=False)
    ray_ckpt.save(TrainState(model), tmp_path)
    ray_ckpt.load(TrainState(other), tmp_path)
    assert same(other.weight.data, Stiff.of(values(0)))


@KIND
def test_a_model_on_meta_gets_the_memory_of_its_inner_tensors(tmp_path: Path, kind: str) -> None:
    ray_ckpt.save(TrainState(Frozen(kind, 0)), tmp_path)
    model, meta = Frozen(kind, 1), torch.device("meta")
    model.weight = nn.Parameter(with_memory(model.weight.detach(), meta), requires_grad=False)
    model.table = with_memory(model.table, meta)
    model.trained = nn.Parameter(model.trained.detach().to(meta))
    ray_ckpt.load(TrainState(model), tmp_path)
    assert same(model.weight.data, KINDS[kind](values(0)))
    assert same(model.table, KINDS[kind](values(1)))
