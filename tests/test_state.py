"""TrainState: names, what is in it, and hyper-parameters that differ between the members of one target group."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import ray_ckpt
from ray_ckpt.errors import StateMismatchError
from ray_ckpt.parallel.stages import build_on_meta, materialise, take_stage
from ray_ckpt.parallel.state import TrainState
from ray_ckpt.recipes.pipeline_to_fsdp.model import PipelineModel

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
    stage = take_stage(whole, ["layer2"])
    materialise(stage, torch.device("cpu"), seed=0)
    state = TrainState(stage, torch.optim.Adam(stage.parameters())).state_dict()
    assert list(state["model"]) == ["layer2.weight", "layer2.bias"]
    assert not [key for key in state["optim"] if "layer1" in key]


def test_meta_tensors_are_left_out() -> None:
    whole = build_on_meta(lambda: PipelineModel(5, 2))
    materialise(whole.get_submodule("layer1"), torch.device("cpu"), seed=0, prefix="layer1")
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
