"""TrainState: names, what is in it, and hyper-parameters that differ between the members of one target group."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)

import ray_ckpt
from ray_ckpt.errors import StateMismatchError, UsageError
from ray_ckpt.parallel.stages import build_on_meta, take_stage
from ray_ckpt.recipes.model import PipelineModel
from ray_ckpt.state.hyperparameters import same
from ray_ckpt.state.train_state import TrainState

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
NAMES = ["layer1.weight", "layer1.bias", "layer2.weight", "layer2.bias"]


def trained(rates: tuple[float, float] = (0.1, 0.2), steps: int = 2) -> TrainState:
    torch.manual_seed(0)
    model = PipelineModel(dim=5, layers=2)
    groups = [
        {"params": list(model.get_submodule(f"layer{i + 1}").parameters()), "lr": rate} for i, rate in enumerate(rates)
    ]
    return train(TrainState(model, torch.optim.Adam(groups)), steps)


def train(state: TrainState, steps: int) -> TrainState:
    for _ in range(steps):
        state.optimizer.zero_grad()
        state.model(torch.ones(3, 5)).square().mean().backward()
        state.optimizer.step()
    return state


def fresh() -> TrainState:
    torch.manual_seed(1)
    model = PipelineModel(dim=5, layers=2)
    return TrainState(model, torch.optim.Adam(model.parameters(), lr=0.5))


def test_state_is_keyed_by_parameter_name() -> None:
    state = trained().state_dict()
    assert list(state["model"]) == NAMES
    assert {f"state.{name}.{key}" for name in NAMES for key in ("exp_avg", "exp_avg_sq", "step")} == {
        key for key in state["optim"] if key.startswith("state.")
    }
    assert [state["optim"][f"param_groups.{name}.lr"] for name in NAMES] == [0.1, 0.1, 0.2, 0.2]


def test_what_a_stage_does_not_hold_is_not_in_its_state() -> None:
    whole = build_on_meta(lambda: PipelineModel(5, 2))
    stage = take_stage(whole, ["layer2"]).to_empty(device="cpu")
    state = TrainState(stage, torch.optim.Adam(stage.parameters())).state_dict()
    assert list(state["model"]) == ["layer2.weight", "layer2.bias"]
    assert not [key for key in state["optim"] if "layer1" in key]


def test_meta_tensors_are_left_out() -> None:
    whole = build_on_meta(lambda: PipelineModel(5, 2))
    whole.get_submodule("layer1").to_empty(device="cpu")
    optimizer = torch.optim.Adam(whole.get_submodule("layer1").parameters())
    state = TrainState(whole, optimizer).state_dict()
    assert list(state["model"]) == ["layer1.weight", "layer1.bias"]


def test_every_learning_rate_arrives_in_a_single_group_optimizer() -> None:
    source, target = trained(), fresh()
    assert len(target.optimizer.param_groups) == 1
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert [group["lr"] for group in target.optimizer.param_groups] == [0.1, 0.2]
    assert [len(group["params"]) for group in target.optimizer.param_groups] == [2, 2]
    assert source.snapshot(0) == target.snapshot(0)
    # It also trains on alike.
    train(source, 2)
    train(target, 2)
    assert source.snapshot(0) == target.snapshot(0)


def test_stock_dcp_loses_the_second_rate() -> None:
    """The trap that splitting groups is for. If torch ever mends it, this test says so."""
    source, target = trained(), fresh()
    saved = get_optimizer_state_dict(source.model, source.optimizer, options=FLAT)
    set_optimizer_state_dict(target.model, target.optimizer, saved, options=FLAT)
    assert [group["lr"] for group in target.optimizer.param_groups] == [0.1]


def test_equal_hyperparameters_leave_the_groups_alone() -> None:
    target = fresh()
    [group] = target.optimizer.param_groups
    target.load_state_dict(trained((0.1, 0.1)).state_dict())
    assert target.optimizer.param_groups == [group]
    assert group["lr"] == 0.1


def test_a_used_optimizer_is_not_split_behind_its_users_back(tmp_path: Path) -> None:
    ray_ckpt.save(trained(), tmp_path / "run")
    target = train(fresh(), 1)
    with pytest.raises(StateMismatchError, match=r"layer1\.weight, layer1\.bias: lr=0\.1; layer2\.weight.*: lr=0\.2"):
        ray_ckpt.load(target, tmp_path / "run")
    assert len(target.optimizer.param_groups) == 1


def test_a_snapshot_holds_tensors_and_values_by_flat_name() -> None:
    snapshot = trained().snapshot(3)
    assert snapshot.rank == 3
    assert len(snapshot.fingerprints) == 4 * 4
    assert snapshot.values["optim.param_groups.layer2.bias.betas"] == (0.9, 0.999)
    other = trained(steps=3).snapshot(3)
    assert (
        snapshot.fingerprints["optim.state.layer1.weight.step"] != other.fingerprints["optim.state.layer1.weight.step"]
    )
    assert isinstance(snapshot.values["optim.param_groups.layer2.bias.lr"], float)


def test_tensors_of_modules_without_optimizer_state_are_there() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    snapshot = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1)).snapshot(0)
    assert "model.1.running_mean" in snapshot.fingerprints


def test_saving_an_optimizer_that_has_not_stepped_changes_nothing(tmp_path: Path) -> None:
    """torch's own state dict takes a step with learning rate 0 there, which Adam remembers, with weight decay in it."""
    for optimizer_of in (torch.optim.Adam, torch.optim.Adagrad, torch.optim.SGD, torch.optim.Adafactor):
        state = fresh()
        state = TrainState(state.model, optimizer_of(state.model.parameters(), lr=0.1, weight_decay=0.5))
        weights = [parameter.detach().clone() for parameter in state.model.parameters()]
        remembered = copy.deepcopy(state.optimizer.state_dict())
        name = tmp_path / optimizer_of.__name__
        ray_ckpt.save(state, name)
        assert all(parameter.grad is None for parameter in state.model.parameters())
        assert all(torch.equal(*pair) for pair in zip(weights, state.model.parameters(), strict=True))
        assert same(state.optimizer.state_dict(), remembered)
        # Loaded into one that has stepped, nothing is remembered there either.
        saved = state.snapshot(0)
        used = TrainState(state.model, optimizer_of(state.model.parameters(), lr=0.1, weight_decay=0.5))
        train(used, 1)
        assert used.snapshot(0) != saved
        ray_ckpt.load(used, name)
        assert used.snapshot(0) == saved
        assert same(used.optimizer.state_dict(), remembered)


def test_several_optimizers_are_one_set_of_names(tmp_path: Path) -> None:
    source = trained()
    ray_ckpt.save(source, tmp_path / "one")
    model = fresh().model
    parts = {name: torch.optim.Adam(model.get_submodule(name).parameters()) for name in ("layer1", "layer2")}
    two = TrainState(model, parts)
    ray_ckpt.load(two, tmp_path / "one")
    assert two.snapshot(0) == source.snapshot(0)
    assert [parts[name].param_groups[0]["lr"] for name in parts] == [0.1, 0.2]
    ray_ckpt.save(two, tmp_path / "two")
    target = fresh()
    ray_ckpt.load(target, tmp_path / "two")
    assert target.snapshot(0) == source.snapshot(0)
    with pytest.raises(UsageError, match="this state has 2 optimizers"):
        _ = two.optimizer


def test_a_parameter_has_one_optimizer_and_is_the_models() -> None:
    model = PipelineModel(5, 2)
    twice = [torch.optim.SGD(model.parameters()), torch.optim.Adam(model.layer2.parameters())]
    with pytest.raises(UsageError, match=r"optimizers 0 and 1 both have layer2\.weight"):
        TrainState(model, twice).state_dict()
    with pytest.raises(
        UsageError, match=r"optimizer 0 \(SGD\) has a parameter of shape \[3, 3\] that is not one of the mod"
    ):
        TrainState(model, torch.optim.SGD(nn.Linear(3, 3).parameters())).state_dict()


def test_groups_without_parameters_and_frozen_ones(tmp_path: Path) -> None:
    def state_of(seed: int) -> TrainState:
        torch.manual_seed(seed)
        model = PipelineModel(5, 2)
        model.layer1.requires_grad_(False)
        groups = [{"params": [], "lr": 9.0}, {"params": list(model.parameters()), "lr": 0.1 + seed}]
        return TrainState(model, torch.optim.Adam(groups))

    source, target = train(state_of(0), 2), state_of(1)
    ray_ckpt.save(source, tmp_path / "run")
    ray_ckpt.load(target, tmp_path / "run")
    assert source.snapshot(0) == target.snapshot(0)
    assert [group["lr"] for group in target.optimizer.param_groups] == [9.0, 0.1]
    assert set(target.optimizer.state) == set(target.model.layer2.parameters())


class Unusual(torch.optim.Optimizer):
    """Keeps wider numbers than its parameters, a plain count, and nested state."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(count=0, master=parameter.double(), nested={"sums": torch.zeros(3), "kind": "x"})
                state["count"] += 1
                state["master"] -= group["lr"] * parameter.grad
                state["nested"]["sums"] += 1.5
                parameter.copy_(state["master"])


def test_state_is_kept_as_the_optimizer_made_it(tmp_path: Path) -> None:
    def state_of(seed: int) -> TrainState:
        torch.manual_seed(seed)
        model = PipelineModel(5, 2).to(torch.bfloat16)
        return TrainState(model, Unusual(model.parameters(), lr=0.1))

    def step(state: TrainState) -> None:
        state.optimizer.zero_grad()
        state.model(torch.ones(3, 5, dtype=torch.bfloat16)).square().mean().backward()
        state.optimizer.step()

    source, target = state_of(0), state_of(1)
    step(source)
    step(source)
    ray_ckpt.save(source, tmp_path / "run")
    ray_ckpt.load(target, tmp_path / "run")
    assert source.snapshot(0) == target.snapshot(0)
    [remembered, *_] = target.optimizer.state.values()
    assert (remembered["count"], remembered["master"].dtype) == (2, torch.float64)
    assert remembered["nested"]["sums"].tolist() == [3.0] * 3
    step(source)
    step(target)
    assert source.snapshot(0) == target.snapshot(0)


def test_chunks_of_an_interleaved_pipeline_are_one_state(tmp_path: Path) -> None:
    source = trained()
    ray_ckpt.save(source, tmp_path / "run")
    model = fresh().model
    chunks = [take_stage(model, [name]) for name in ("layer1", "layer2")]
    state = TrainState(chunks, [torch.optim.Adam(chunk.parameters()) for chunk in chunks])
    ray_ckpt.load(state, tmp_path / "run")
    assert state.snapshot(0) == source.snapshot(0)
    assert list(state.state_dict()["model"]) == NAMES
    with pytest.raises(UsageError, match="this state has 2 model chunks"):
        _ = state.model


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_stock_dcp_takes_it_as_a_stateful(tmp_path: Path) -> None:
    """DCP fills what is there: an optimizer that has stepped; for a fresh one it says that nothing arrived."""
    source, target = trained(), trained((0.3, 0.4), steps=1)
    dcp.save({"run": source}, checkpoint_id=tmp_path / "stock", no_dist=True)
    dcp.load({"run": target}, checkpoint_id=tmp_path / "stock", no_dist=True)
    assert target.snapshot(0) == source.snapshot(0)
    with pytest.warns(UserWarning, match="no optimizer state arrived"):
        dcp.load({"run": fresh()}, checkpoint_id=tmp_path / "stock", no_dist=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_stock_dcp_loads_what_we_saved(tmp_path: Path) -> None:
    source, target = trained(), train(fresh(), 1)
    ray_ckpt.save(source, tmp_path / "run")
    model, optim = get_state_dict(target.model, target.optimizer, options=FLAT)
    dcp.load({"model": model, "optim": optim}, checkpoint_id=tmp_path / "run", no_dist=True)
    assert torch.equal(model["layer2.weight"], source.model.layer2.weight)
    assert torch.equal(optim["state.layer1.bias.exp_avg"], source.optimizer.state[source.model.layer1.bias]["exp_avg"])
    assert optim["param_groups.layer2.bias.lr"] == 0.2
