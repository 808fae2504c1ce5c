"""States that contain themselves, or are nested without need: refused by name, wherever they lie."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ray_ckpt
from ray_ckpt import TrainState
from ray_ckpt.errors import UsageError
from ray_ckpt.protocol.holdings import hold
from ray_ckpt.state.hyperparameters import same


class Holder:
    def __init__(self, state: Any) -> None:
        self.state = {"v": state}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Extra(nn.Linear):
    def __init__(self, value: Any) -> None:
        super().__init__(2, 2)
        self.value = value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


def of_optimizer(value: Any, *, in_group: bool = False) -> TrainState:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (optimizer.param_groups[0] if in_group else optimizer.state[model.weight])["v"] = value
    return TrainState(model, optimizer)


def of_scheduler(value: Any) -> TrainState:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    scheduler.v = value  # type: ignore[attr-defined]
    return TrainState(model, optimizer, schedulers=scheduler)


PLACES: dict[str, Callable[[Any], Any]] = {
    "an object in a dict": lambda value: {"it": Holder(value)},
    "a value in a dict": lambda value: {"it": value},
    "an object in extra": lambda value: TrainState(nn.Linear(1, 1), extra={"it": Holder(value)}),
    "a value in extra": lambda value: TrainState(nn.Linear(1, 1), extra={"it": value}),
    "a counter": lambda value: TrainState(nn.Linear(1, 1), counters={"it": value}),
    "a data loader": lambda value: TrainState(nn.Linear(1, 1), dataloader=Holder(value)),
    "a scaler": lambda value: TrainState(nn.Linear(1, 1), scaler=Holder(value)),
    "a parameter's state": of_optimizer,
    "a parameter group": lambda value: of_optimizer(value, in_group=True),
    "a scheduler": of_scheduler,
    "extra state": lambda value: TrainState(Extra(value)),
}


def around(kind: str) -> Any:
    """A container that contains itself."""
    value: Any = {"dict": {}, "list": [1], "tuple": ([],), "ordered": OrderedDict(), "deque": deque()}[kind]
    inner = {"a": {"b": [value]}}
    if isinstance(value, dict):
        value["at"] = inner
    else:
        (value[0] if kind == "tuple" else value).append(inner)
    return value


@pytest.mark.parametrize("place", PLACES)
def test_what_contains_itself_is_named(tmp_path: Path, place: str) -> None:
    for kind in ("dict", "list", "tuple", "ordered", "deque"):
        with pytest.raises(UsageError, match=r"^'[^']*\ba\.b\.0' is the \w+ '\S*' that it lies in, so that .* no end"):
            ray_ckpt.save(PLACES[place](around(kind)), tmp_path / kind)
        assert not (tmp_path / kind).exists()


@pytest.mark.parametrize("place", PLACES)
def test_what_is_in_it_twice_is_saved(tmp_path: Path, place: str) -> None:
    shared = {"a": [1, {"b": (2.0, "x")}]}
    ray_ckpt.save(PLACES[place]([shared, [shared, shared]]), tmp_path / "run")
    other = {"a": [0, {"b": (0.0, "y")}]}
    target = PLACES[place]([other, [other, other]])
    before = repr(contents(target))
    ray_ckpt.load(target, tmp_path / "run")
    assert repr(contents(target)) != before
    assert same(contents(target), contents(PLACES[place]([shared, [shared, shared]])))


def contents(state: Any) -> Any:
    if isinstance(state, TrainState):
        return [leaf for part in state.state_dict().values() for leaf in part.values() if not torch.is_tensor(leaf)]
    return [value.state if isinstance(value, Holder) else value for value in state.values()]


@pytest.mark.parametrize("place", PLACES)
def test_what_is_nested_without_need_is_named(tmp_path: Path, place: str) -> None:
    value: Any = 1
    for _ in range(700):
        value = {"n": [({"n": value},)]}
    with pytest.raises(UsageError, match=r"^'\S+' is nested too deep: 200 levels .*RAY_CKPT_MAX_NESTING"):
        ray_ckpt.save(PLACES[place](value), tmp_path / "run")


@pytest.mark.parametrize("leaf", [1, torch.ones(1)])
@pytest.mark.parametrize("make", [lambda inner: {"n": inner}, lambda inner: [inner], lambda inner: (inner,)])
def test_what_is_saved_is_never_too_deep_for_the_load(tmp_path: Path, make: Callable[[Any], Any], leaf: Any) -> None:
    value, loads = leaf, []
    for level in range(204):
        value = make(value)
        try:
            held = None if level < 195 else hold({"it": Holder(value)})
        except UsageError:
            held = None
        if held is not None:
            loads.append(level)
            ray_ckpt.save({"it": Holder(value)}, tmp_path / str(level))
            target = Holder(make(leaf))
            ray_ckpt.load({"it": target}, tmp_path / str(level))
            assert same(target.state["v"], value)
    assert 195 in loads
    assert 203 not in loads


@pytest.mark.parametrize("place", ["an object in a dict", "a value in a dict", "an object in extra", "a scaler"])
def test_a_target_that_contains_itself_is_named(tmp_path: Path, place: str) -> None:
    ray_ckpt.save(PLACES[place]({"at": 3}), tmp_path / "run")
    with pytest.raises(UsageError, match=r"is the dict '\S+' that it lies in"):
        ray_ckpt.load(PLACES[place](around("dict")), tmp_path / "run")
    target = PLACES[place]({"at": 2})
    ray_ckpt.load(target, tmp_path / "run")
    assert "3" in repr(contents(target))


class Mirror:
    """An object whose state is that of what it is in."""

    def __init__(self) -> None:
        self.of: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"of": self.of.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.of.load_state_dict(state["of"])


@pytest.mark.parametrize("form", ["dict", "extra", "state"])
def test_objects_that_are_in_each_others_states_are_named(tmp_path: Path, form: str) -> None:
    one, other = Mirror(), Mirror()
    one.of, other.of = other, one
    extra: dict[str, Any] = {"it": one}
    state: Any = {"it": one} if form == "dict" else TrainState(nn.Linear(1, 1), extra=extra)
    if form == "state":
        extra["it"] = state
    with pytest.raises(UsageError, match=r"it': the state_dict of \S+\.(Mirror|TrainState) calls itself without end"):
        ray_ckpt.save(state, tmp_path / "run")
    other.of = Holder(3)
    extra["it"] = one
    ray_ckpt.save(state, tmp_path / "run")
