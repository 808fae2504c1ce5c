"""Optimizers that keep one state of all their parameters, under the first: it fits the same ones in the same order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from ray_ckpt import TrainState, load, save
from ray_ckpt.errors import StateMismatchError, UsageError
from tests.support.ranks import RanksError, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=2, history_size=2)


class Joined(torch.optim.Optimizer):
    """Momentum of all parameters in one tensor, by a class that is not torch's."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        closure()
        members = [parameter for group in self.param_groups for parameter in group["params"]]
        gradient = torch.cat([parameter.grad.reshape(-1) for parameter in members])
        kept = self.state[members[0]].setdefault("momentum", torch.zeros_like(gradient))
        kept.mul_(0.5).add_(gradient)
        for parameter, piece in zip(members, kept.split([p.numel() for p in members]), strict=True):
            parameter.data.sub_(piece.view_as(parameter), alpha=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.linspace(-1, 1, 8).reshape(2, 4)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


OPTIMIZERS = pytest.mark.parametrize("kind", [lbfgs, Joined])


@OPTIMIZERS
def test_it_goes_on_with_the_same_parameters_in_the_same_order_only(tmp_path: Path, kind: Any) -> None:
    model = net(0)
    optimizer = kind(model.parameters())
    step(model, optimizer)
    save(TrainState(model, optimizer), tmp_path)
    target = net(1)
    for chosen in (list(target.parameters())[::-1], list(target.parameters())[2:]):
        before = [parameter.clone() for parameter in target.parameters()]
        with pytest.raises(StateMismatchError, match=r"keeps one state of all its parameters .* than it has now"):
            load(TrainState(target, kind(chosen)), tmp_path)
        assert all(torch.equal(one, two) for one, two in zip(before, target.parameters(), strict=True))
    other = kind(target.parameters())
    report = load(TrainState(target, other), tmp_path)
    assert report.missing == report.unexpected == ()
    step(model, optimizer)
    step(target, other)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), target.parameters(), strict=True))


def test_what_others_saved_is_taken_in_the_order_of_their_groups(tmp_path: Path) -> None:
    model = net(0)
    optimizer = lbfgs(model.parameters())
    step(model, optimizer)
    names = StateDictOptions(flatten_optimizer_state_dict=False)
    state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer, options=names)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    target = net(1)
    with pytest.raises(StateMismatchError, match="LBFGS keeps one state of all its parameters"):
        load(TrainState(target, lbfgs(list(target.parameters())[::-1])), tmp_path)
    other = lbfgs(target.parameters())
    load(TrainState(target, other), tmp_path)
    step(model, optimizer)
    step(target, other)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), target.parameters(), strict=True))


def test_a_state_of_what_is_trained_needs_an_optimizer_of_what_is_trained(tmp_path: Path) -> None:
    model = net(0)
    model[1].requires_grad_(False)
    everything, trained = (
        lbfgs(p for p in model.parameters() if p.requires_grad or frozen) for frozen in (True, False)
    )
    for optimizer in (everything, trained):
        step(model, optimizer)
    with pytest.raises(UsageError, match=r"trainable_only leaves out 1\.weight, 1\.bias: give it only those"):
        save(TrainState(model, everything, trainable_only=True), tmp_path)
    save(TrainState(model, trained, trainable_only=True), tmp_path)


# --------------------------------------------------------------------------------------------------------- layouts


def stage_of(rank: int, seed: int) -> tuple[nn.Module, nn.Module]:
    """The model with the other rank's layer on the meta device, and this rank's stage."""
    model = net(seed)[:2]
    stage = nn.Sequential(model[rank])
    model[1 - rank] = nn.Linear(4, 4, device="meta")
    return model, stage


def trained_stage(rank: int, path: str, seed: int) -> list[torch.Tensor]:
    """Saves with the first seed, and loads with another."""
    model, stage = stage_of(rank, seed)
    optimizer = lbfgs(stage.parameters())
    if seed:
        load(TrainState(model, optimizer), path)
    else:
        step(stage, optimizer)
        save(TrainState(model, optimizer), path)
    step(stage, optimizer)
    return [parameter.detach().clone() for parameter in stage.parameters()]


def test_stages_of_a_pipeline(tmp_path: Path) -> None:
    path = str(tmp_path / "at")
    saved, loaded = (run_ranks(trained_stage, 2, tmp_path, path, seed) for seed in range(2))
    for one, two in zip(saved, loaded, strict=True):
        assert all(map(torch.equal, one, two))
    whole = net(1)[:2]
    with pytest.raises(StateMismatchError, match=r"in another order \(1\.weight, 1\.bias\) than it has now \(0\.w"):
        load(TrainState(whole, lbfgs(whole.parameters())), path)


def sharded(rank: int, path: str, kind: str) -> list[torch.Tensor]:
    model: nn.Module = net(0)
    if kind == "fsdp1":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    else:
        fully_shard(model)
    optimizer = lbfgs(model.parameters())
    step(model, optimizer)
    save(TrainState(model, optimizer), path)
    step(model, optimizer)
    return [parameter.full_tensor().detach() for parameter in model.parameters()]  # type: ignore[operator]


def test_shards(tmp_path: Path) -> None:
    expected = run_ranks(sharded, 2, tmp_path, str(tmp_path / "at"), "fsdp2")[0]
    model = net(1)
    optimizer = lbfgs(model.parameters())
    load(TrainState(model, optimizer), tmp_path / "at")
    step(model, optimizer)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), expected, strict=True))
    with pytest.raises(RanksError, match="under FSDP1 LBFGS works on flattened pieces"):
        run_ranks(sharded, 2, tmp_path, str(tmp_path / "flat"), "fsdp1")
