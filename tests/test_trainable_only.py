"""`TrainState(trainable_only=True)`: adapters are saved and loaded, the base that they belong to is compared."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from ray_ckpt import TrainState, inspect, load, save
from ray_ckpt.errors import StateMismatchError
from ray_ckpt.storage.checkpoint_reader import CheckpointReader
from tests.support.ranks import RanksError, run_ranks
from tests.support.trainable import adapted, lay_out, trained

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ADAPTERS = [f"layers.{n}.{part}" for n in range(2) for part in ("down", "up")]


def saved_by(path: Path) -> TrainState:
    model, optimizer = trained(adapted(0))
    state = TrainState(model, optimizer, step=3, trainable_only=True)
    save(state, path)
    return state


def test_adapters_come_back_and_the_base_is_compared(tmp_path: Path) -> None:
    expected = saved_by(tmp_path).model
    manifest = CheckpointReader(tmp_path).read_manifest()
    tensors = {name for name in manifest.tensors if name.startswith("model.")}
    assert tensors == {f"model.{name}" for name in ADAPTERS} | {f"model.norm.{name}" for name in BUFFERS}
    assert {name.split(".")[1] for name in manifest.objects if name.startswith("optim.")} <= {"param_groups", "kinds"}
    assert not any("base" in name for name in (*manifest.tensors, *manifest.objects))
    model = adapted(0)
    with torch.no_grad():
        for name in ADAPTERS:
            model.get_parameter(name).fill_(7)
    optimizer = torch.optim.AdamW(model.parameters())
    report = load(TrainState(model, optimizer, step=0, trainable_only=True), tmp_path)
    assert report.base == "6 frozen tensors are those of the save"
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    assert optimizer.param_groups[0]["lr"] == 0.125
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[parameter] for parameter in optimizer.state} == set(ADAPTERS)


BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("change", ["element", "dtype", "moved"])
def test_another_base_is_refused_by_name(tmp_path: Path, change: str) -> None:
    saved_by(tmp_path)
    model = adapted(0)
    base = model.get_parameter("layers.1.base.weight")
    with torch.no_grad():
        if change == "element":
            base[0, 0] += 1e-6
        elif change == "dtype":
            base.data = base.data.double()
        else:
            base[[0, 1]] = base[[1, 0]]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = TrainState(model, trainable_only=True)
    options: dict[str, Any] = {"only": ("model",)}
    with pytest.raises(StateMismatchError, match=r"another base: the frozen model\.layers\.1\.base\.weight have"):
        load(state, tmp_path, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = load(state, tmp_path, strict=False, **options)
    assert report.base is not None
    assert re.search(r"^5 frozen.*1 are others than those of the save: model\.layers\.1\.base\.weight$", report.base)


def test_a_second_save_of_the_same_process_has_the_fingerprints_of_its_own_base(tmp_path: Path) -> None:
    save(TrainState(adapted(0), trainable_only=True), tmp_path / "first")
    save(TrainState(adapted(1), trainable_only=True), tmp_path / "second")
    report = load(TrainState(adapted(1), trainable_only=True), tmp_path / "second")
    assert report.base == "6 frozen tensors are those of the save"
    with pytest.raises(StateMismatchError, match=r"another base"):
        load(TrainState(adapted(0), trainable_only=True), tmp_path / "second")
    # The same names without a base: what was known of the one before is not said of this.
    plain = TrainState(adapted(1), trainable_only=True).state_dict()
    save(plain, tmp_path / "third")
    assert not inspect(tmp_path / "third").manifest.fingerprints


CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "through data": lambda weight: weight.data[0, 0].add_(1),
    "through a view of numpy's": lambda weight: weight.detach().numpy().__setitem__((0, 0), 9.0),
    "another memory": lambda weight: setattr(weight, "data", weight.detach() + 1),
    "the same bytes in another dtype": lambda weight: setattr(weight, "data", weight.detach().view(torch.int32)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_that_changes_between_two_saves_of_one_state_is_seen(tmp_path: Path, change: str) -> None:
    """No version counter tells of most of these."""
    model = adapted(0)
    state = TrainState(model, trainable_only=True)
    save(state, tmp_path / "first")
    first = inspect(tmp_path / "first").manifest.fingerprints
    save(state, tmp_path / "again")
    assert inspect(tmp_path / "again").manifest.fingerprints == first
    CHANGES[change](model.get_parameter("layers.0.base.weight"))
    save(state, tmp_path / "second")
    second = inspect(tmp_path / "second").manifest.fingerprints
    assert {name for name in first if first[name] != second[name]} == {"model.layers.0.base.weight"}
    save(TrainState(model, trainable_only=True), tmp_path / "fresh")
    assert inspect(tmp_path / "fresh").manifest.fingerprints == second
    with pytest.raises(StateMismatchError, match=r"another base: the frozen model\.layers\.0\.base\.weight"):
        load(state, tmp_path / "first")


def test_a_base_without_fingerprints_is_told(tmp_path: Path) -> None:
    model, _ = trained(adapted(0))
    dcp.save(TrainState(model, trainable_only=True).state_dict(), checkpoint_id=tmp_path, no_dist=True)
    report = load(TrainState(adapted(1), trainable_only=True), tmp_path)
    assert report.base is not None
    assert report.base.startswith("6 could not be compared, as the checkpoint has no fingerprint of them: model.head")


def test_a_whole_checkpoint_with_fingerprints_is_compared_too(tmp_path: Path) -> None:
    save(TrainState(adapted(0)), tmp_path, fingerprints=True)
    with pytest.raises(StateMismatchError, match=r"another base"):
        load(TrainState(adapted(1), trainable_only=True), tmp_path)
    report = load(TrainState(adapted(0), trainable_only=True), tmp_path, strict=False)
    assert report.base == "6 frozen tensors are those of the save"
    assert "model.layers.0.base.weight" in report.unexpected


def test_stock_reads_what_was_saved(tmp_path: Path) -> None:
    expected = saved_by(tmp_path).state_dict()
    found = {name: torch.zeros_like(value) for name, value in expected["model"].items()}
    dcp.load({"model": found}, checkpoint_id=tmp_path, no_dist=True)
    assert all(torch.equal(found[name], value) for name, value in expected["model"].items())


def test_adapters_on_meta_get_memory_and_a_base_on_meta_is_refused(tmp_path: Path) -> None:
    expected = saved_by(tmp_path).model.state_dict()
    model = adapted(0)
    for name in ADAPTERS:
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Parameter(model.get_parameter(name).to("meta")))
    load(TrainState(model, trainable_only=True), tmp_path, only=("model",))
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    with torch.device("meta"):
        bare = adapted(0)
    with pytest.raises(StateMismatchError, match=r"the frozen scale, head\.weight, .* are on the meta device"):
        load(TrainState(bare, trainable_only=True), tmp_path, only=("model",))


def test_tied_and_averaged_weights(tmp_path: Path) -> None:
    model, optimizer = trained(adapted(0))
    model.again = model.layers[0]
    average = torch.optim.swa_utils.AveragedModel(model)
    save(TrainState(model, optimizer, ema=average, trainable_only=True), tmp_path)
    names = CheckpointReader(tmp_path).read_manifest().tensors
    assert not any("base" in name or "again" in name for name in names)
    assert "ema.layers.0.up" in names
    other = adapted(0)
    other.again = other.layers[0]
    fresh = torch.optim.AdamW([parameter for parameter in other.parameters() if parameter.requires_grad])
    report = load(
        TrainState(other, fresh, ema=torch.optim.swa_utils.AveragedModel(other), trainable_only=True), tmp_path
    )
    assert report.base == "6 frozen tensors are those of the save"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())


# ------------------------------------------------------------------------------------------------------- layouts


def save_in(rank: int, layout: str, path: str) -> None:
    save(lay_out(layout, rank, seed=0), path)


def load_in(rank: int, layout: str, path: str, seed: int) -> str | None:
    state = lay_out(layout, rank, seed=seed)
    return load(state, path).base


LAYOUTS = ["single", "ddp2", "fsdp1", "fsdp2", "tp2", "pp2"]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [*zip(LAYOUTS, (*LAYOUTS[1:], LAYOUTS[0]), strict=True)])
def test_from_one_layout_to_another(tmp_path: Path, source: str, target: str) -> None:
    path = str(tmp_path / "at")
    run_ranks(save_in, 1 if source == "single" else 2, tmp_path, source, path)
    num_ranks = 1 if target == "single" else 2
    assert set(run_ranks(load_in, num_ranks, tmp_path, target, path, 0)) == {"6 frozen tensors are those of the save"}
    with pytest.raises(RanksError, match=r"another base: the frozen model\.head\.weight"):
        run_ranks(load_in, num_ranks, tmp_path, target, path, 1)
    alone, expected = lay_out("single", 0, seed=0), lay_out("single", 0, seed=0).model.state_dict()
    with torch.no_grad():
        for name in ADAPTERS:
            alone.model.get_parameter(name).zero_()
    load(alone, path)
    assert all(torch.equal(value, expected[name]) for name, value in alone.model.state_dict().items())


def save_replicas(rank: int, path: str) -> None:
    state = lay_out("ddp2", rank, seed=0)
    if rank:
        with torch.no_grad():
            state.model.module.head.weight.add_(1)
    save(state, path)


def test_replicas_of_the_base_that_differ_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RanksError, match=r"the frozen 'model\.head\.weight' is not one tensor on all ranks"):
        run_ranks(save_replicas, 2, tmp_path, str(tmp_path / "at"))
