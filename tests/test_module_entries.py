"""Modules whose hooks show something else than their tensors by name: what is read does not overwrite itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_ckpt import TrainState, load, save
from ray_ckpt.errors import CheckpointError, StateMismatchError
from ray_ckpt.state.module_entries import has_own_form


class Hooked(nn.Module):
    """Two tensors of one shape, shown and taken in another way; `takes=False` leaves the loading to torch."""

    def __init__(self, seed: int, takes: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(3, 5))
        self.register_state_dict_post_hook(lambda module, state, prefix, _: module.show(state, prefix))
        if takes:
            self.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: module.take(state, prefix))

    @staticmethod
    def show(state: dict[str, Any], prefix: str) -> None:
        raise NotImplementedError

    @staticmethod
    def take(state: dict[str, Any], prefix: str) -> None:
        raise NotImplementedError


class Swapped(Hooked):
    """Each is shown under the other's name."""

    @staticmethod
    def show(state: dict[str, Any], prefix: str) -> None:
        state[f"{prefix}a"], state[f"{prefix}b"] = state[f"{prefix}b"], state[f"{prefix}a"]

    take = show


class Doubled(Hooked):
    @staticmethod
    def show(state: dict[str, Any], prefix: str) -> None:
        state[f"{prefix}a"] = state[f"{prefix}a"] * 2

    @staticmethod
    def take(state: dict[str, Any], prefix: str) -> None:
        state[f"{prefix}a"] = state[f"{prefix}a"] / 2


class Halves(Hooked):
    """Shown as views of the tensor, and put together in the order that the class says."""

    order = (0, 1)

    @staticmethod
    def show(state: dict[str, Any], prefix: str) -> None:
        state[f"{prefix}a.0"], state[f"{prefix}a.1"] = state.pop(f"{prefix}a").split([1, 2])

    @classmethod
    def take(cls, state: dict[str, Any], prefix: str) -> None:
        state[f"{prefix}a"] = torch.cat([state.pop(f"{prefix}a.{number}") for number in (0, 1)][:: cls.step()])

    @classmethod
    def step(cls) -> int:
        return 1 if cls.order == (0, 1) else -1


class Turned(Halves):
    order = (1, 0)


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sum(parameter.square().sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", [Swapped, Doubled, Halves])
def test_what_hooks_show_comes_back_through_them(tmp_path: Path, kind: type[Hooked]) -> None:
    model, target = nn.Sequential(kind(0)), nn.Sequential(kind(1))
    optimizer = trained(model)
    save(TrainState(model, optimizer), tmp_path)
    other = torch.optim.AdamW(target.parameters())
    assert not torch.equal(target[0].a, model[0].a)
    load(TrainState(target, other), tmp_path)
    for name, parameter in model.named_parameters():
        found = target.get_parameter(name)
        assert torch.equal(found, parameter)
        assert torch.equal(other.state[found]["exp_avg"], optimizer.state[parameter]["exp_avg"])


@pytest.mark.parametrize("kind", [Swapped, Doubled])
def test_also_from_the_meta_device(tmp_path: Path, kind: type[Hooked]) -> None:
    model = nn.Sequential(kind(0))
    save(TrainState(model), tmp_path)
    with torch.device("meta"):
        target = nn.Sequential(kind(1))
    load(TrainState(target), tmp_path)
    assert all(map(torch.equal, target.parameters(), model.parameters()))


@pytest.mark.parametrize("make", [lambda seed: Swapped(seed, takes=False), Turned], ids=["shown only", "turned round"])
def test_a_module_that_does_not_take_what_it_shows_is_an_error(tmp_path: Path, make: Any) -> None:
    save(TrainState(make(0)), tmp_path)
    with pytest.raises(StateMismatchError, match=r"after the load \w+ does not show what was read as a"):
        load(TrainState(make(1)), tmp_path)


@pytest.mark.parametrize("make", [lambda seed: Swapped(seed, takes=False), Turned], ids=["shown only", "turned round"])
@pytest.mark.parametrize("place", ["in a dict", "alone"])
def test_so_it_is_without_a_training_state(tmp_path: Path, make: Any, place: str) -> None:
    model, target = make(0), make(1)
    save({"model": model} if place == "in a dict" else model, tmp_path)
    with pytest.raises(CheckpointError, match=r"after the load \w+ does not show what was read as a"):
        load({"model": target} if place == "in a dict" else target, tmp_path)


@pytest.mark.parametrize("kind", [Swapped, Doubled, Halves])
def test_a_module_in_a_dict_goes_through_its_hooks_too(tmp_path: Path, kind: type[Hooked]) -> None:
    model, target, part = kind(0), kind(1), kind(2)
    save({"model": model}, tmp_path / "whole")
    load({"model": target}, tmp_path / "whole")
    assert all(map(torch.equal, target.parameters(), model.parameters()))
    # What was not saved stays as it is.
    name, value = next((name, value) for name, value in model.state_dict().items() if name[0] == "b")
    save({f"model.{name}": value}, tmp_path / "part")
    before = {key: tensor.clone() for key, tensor in part.state_dict().items()}
    load({"model": part}, tmp_path / "part", strict=False)
    assert torch.equal(part.state_dict()[name], value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in part.state_dict().items() if key != name)


def test_torchs_own_modules_show_their_tensors_by_name() -> None:
    own = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.MultiheadAttention(2, 1), nn.LSTM(2, 2))
    assert not has_own_form(own)
    assert not has_own_form(torch.optim.swa_utils.AveragedModel(own))
    assert has_own_form(nn.Sequential(own, Swapped(0)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module(tmp_path: Path) -> None:
    model, target = (torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))) for _ in range(2))
    optimizer, other = trained(model), torch.optim.AdamW(target.parameters())
    assert not torch.equal(target.state_dict()["0.weight"], model.state_dict()["0.weight"])
    save(TrainState(model, optimizer), tmp_path)
    load(TrainState(target, other), tmp_path)
    assert all(map(torch.equal, target.state_dict().values(), model.state_dict().values()))
    moments = [[each["exp_avg"] for each in of.state.values()] for of in (optimizer, other)]
    assert all(map(torch.equal, *moments))


class Replacing(nn.Linear):
    """Makes new parameters when it is loaded, as quantized layers do."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in ("weight", "bias"):
            setattr(self, name, nn.Parameter(state_dict[prefix + name].clone(), self.weight.requires_grad))


def test_an_optimizer_does_not_go_on_with_parameters_that_the_load_has_replaced(tmp_path: Path) -> None:
    def built(*, frozen: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(Replacing(3, 3), nn.Linear(3, 2))
        model[0].requires_grad_(not frozen)
        return model, torch.optim.AdamW(model.parameters())

    model = built()[0]
    save(TrainState(model, trained(model)), tmp_path)
    with pytest.raises(
        StateMismatchError, match=r"has made new parameters 0\.weight, 0\.bias, and the optimizer would"
    ):
        load(TrainState(*built()), tmp_path)
    load(TrainState(*built(frozen=True)), tmp_path)
    target = built()[0]
    load(TrainState(target), tmp_path, only=("model",))
    optimizer = torch.optim.AdamW(target.parameters())
    load(TrainState(target, optimizer), tmp_path, only=("optim",))
    assert all(map(torch.equal, target.parameters(), model.parameters()))
    assert len(optimizer.state) == 4


class Spoiled(nn.Linear):
    """Takes what was read, and writes something else to the same memory, or keeps another value than it was given."""

    def __init__(self, how: str, version: int = 1) -> None:
        super().__init__(3, 3)
        self.version = version
        self.how = how
        if how == "before":
            self.register_load_state_dict_pre_hook(lambda module, state, *_: state["weight"].zero_())
        if how == "after":
            self.register_load_state_dict_post_hook(lambda module, _: module.weight.data.zero_().sum().item() or None)

    def get_extra_state(self) -> int:
        return self.version

    def set_extra_state(self, state: int) -> None:
        self.version = self.version if self.how == "extra state" else state


@pytest.mark.parametrize("how", ["before", "after", "extra state"])
@pytest.mark.parametrize("in_a_dict", [False, True])
def test_what_a_load_makes_of_its_own_memory_is_an_error(tmp_path: Path, how: str, in_a_dict: bool) -> None:
    def state_of(model: nn.Module) -> Any:
        return {"model": model} if in_a_dict else TrainState(model)

    save(state_of(Spoiled("")), tmp_path)
    load(state_of(good := Spoiled("", 2)), tmp_path)
    assert good.version == 1
    name = "_extra_state" if how == "extra state" else "weight"
    with pytest.raises(CheckpointError, match=rf"does not show what was read as {name}:"):
        load(state_of(Spoiled(how, 2)), tmp_path)
