"""Optimizers with a `state_dict` and `load_state_dict` of their own, and those that step by others."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ray_ckpt
from ray_ckpt import TrainState
from ray_ckpt.errors import StateMismatchError, UsageError
from tests.support.ranks import run_ranks


class Wrapping(torch.optim.AdamW):
    """Shows a part of its state of each parameter below a key of its own, as bitsandbytes does."""

    def state_dict(self) -> dict[str, Any]:
        shown = super().state_dict()
        shown["state"] = {
            number: {"step": state["step"], "wrapped": {k: v for k, v in state.items() if k != "step"}}
            for number, state in shown["state"].items()
        }
        return shown

    def load_state_dict(self, state: dict[str, Any]) -> None:
        plain = {n: {"step": each["step"], **each["wrapped"]} for n, each in state["state"].items()}
        super().load_state_dict({**state, "state": plain})


class Counting(torch.optim.AdamW):
    """Shows numbers of its own beside its state, as Ranger21 does."""

    calls = 0

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        super().step()
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.data.mul_(1 - 0.01 * self.calls)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "calls": self.calls, "a.b": (1, None)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.calls = state["calls"]


class Lookahead(torch.optim.Optimizer):
    """Averages what another optimizer steps; its state dict has a form of its own."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.slow, self.defaults = base, {}, base.defaults

    state = property(lambda self: self.base.state)
    param_groups = property(lambda self: self.base.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        self.base.step()
        for number, parameter in enumerate(p for group in self.param_groups for p in group["params"]):
            slow = self.slow.setdefault(number, torch.zeros_like(parameter))
            slow.lerp_(parameter.detach(), 0.5)
            parameter.data.copy_(slow)

    def state_dict(self) -> dict[str, Any]:
        return {"slow": {(0, number): slow for number, slow in self.slow.items()}, "base": self.base.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.slow = {number: slow.clone() for (_, number), slow in state["slow"].items()}
        self.base.load_state_dict(state["base"])


def hooked(params: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(params, lr=0.1)
    optimizer.register_state_dict_post_hook(
        lambda _, shown: {**shown, "state": {n: {"in": dict(s)} for n, s in shown["state"].items()}}
    )
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state: {**state, "state": {n: s["in"] for n, s in state["state"].items()}}
    )
    return optimizer


class Halved(torch.optim.SGD):
    """Keeps its momentum in another dtype than the parameter's, and has a load_state_dict that changes nothing."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for state in self.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].double()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)


class Shared(torch.optim.SGD):
    """Counts its steps for all parameters together, as MADGRAD does."""

    def step(self, closure: Any = None) -> None:
        super().step()
        seen = self.state["seen"].setdefault("steps", torch.zeros(()))
        seen += 1
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.data.mul_(1 - 0.1 * seen)


class Tracking(torch.optim.Optimizer):
    """Shows what it wraps, until it has stepped and has a state of its own, as TRAC does."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.defaults = base, base.defaults

    state = property(lambda self: self.base.state)
    param_groups = property(lambda self: self.base.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        self.base.step()
        own = self.state.setdefault("tracking", {"scale": torch.ones(()), "steps": deque(maxlen=2)})
        own["scale"] *= 0.5
        own["steps"].append(float(own["scale"]))
        for parameter in self.members:
            parameter.data.mul_(sum(own["steps"])).add_(own.setdefault(parameter, parameter.clone()), alpha=0.1)

    @property
    def members(self) -> list[Any]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """What is kept by parameter is shown by number."""
        shown = self.base.state_dict()
        if "tracking" in shown["state"]:
            numbers = {parameter: number for number, parameter in enumerate(self.members)}
            shown["state"]["tracking"] = {numbers.get(k, k): v for k, v in shown["state"]["tracking"].items()}
        return shown

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = state["state"].get("tracking", {})
        own = {self.members[key] if type(key) is int else key: value for key, value in own.items()}
        self.base.load_state_dict({**state, "state": {**state["state"], **({"tracking": own} if own else {})}})


OWN: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "wrapping": lambda params: Wrapping(params, lr=0.1),
    "counting": lambda params: Counting(params, lr=0.1),
    "lookahead": lambda params: Lookahead(torch.optim.AdamW(params, lr=0.1)),
    "tracking": lambda params: Tracking(torch.optim.AdamW(params, lr=0.1)),
    "hooks": hooked,
    "another dtype": lambda params: Halved(params, lr=0.1, momentum=0.9),
    "of all": lambda params: Shared(params, lr=0.1, momentum=0.9),
    "accelerate": lambda params: Accelerator(cpu=True).prepare(torch.optim.AdamW(params, lr=0.1)),
}


def made(seed: int, kind: Callable[[Any], torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return model, kind(model.parameters())


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("steps", [0, 1])
def test_it_trains_on_where_it_was(tmp_path: Path, kind: str, steps: int) -> None:
    """Loaded into a fresh optimizer, and into one that has stepped."""
    (model, optimizer), (target, other) = (made(seed, OWN[kind]) for seed in range(2))
    state = TrainState(model, optimizer)
    for _ in range(3):
        step(model, optimizer)
    for _ in range(steps):
        step(target, other)
    ray_ckpt.save(state, tmp_path / "run")
    report = ray_ckpt.load(TrainState(target, other), tmp_path / "run")
    assert report.missing == report.unexpected == ()
    for _ in range(2):
        step(model, optimizer)
        step(target, other)
    pairs = zip(model.parameters(), target.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_a_wrapper_that_adds_nothing_is_what_it_wraps(tmp_path: Path) -> None:
    model, optimizer = made(0, OWN["accelerate"])
    step(model, optimizer)
    ray_ckpt.save(TrainState(model, optimizer), tmp_path / "run")
    target, bare = made(1, lambda params: torch.optim.AdamW(params, lr=0.3))
    ray_ckpt.load(TrainState(target, bare), tmp_path / "run")
    assert torch.equal(bare.state[target[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])


class NoOptimizer:
    """Wraps one and adds to its state, as schedulefree's wrapper does; not an optimizer by its class."""

    def __init__(self, base: torch.optim.Optimizer, **shown: Any) -> None:
        self.base, self.shown = base, shown

    param_groups = property(lambda self: self.base.param_groups)

    def step(self) -> None:
        self.base.step()
        for own in self.base.state.values():
            own["z"] = own["exp_avg"] + 1

    def state_dict(self) -> dict[str, Any]:
        return {**self.base.state_dict(), **self.shown}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base.load_state_dict(state)


class Hollow(torch.optim.Optimizer):
    def __init__(self) -> None:
        """Nothing of what torch's constructor makes."""


def test_a_wrapper_that_is_no_optimizer_is_what_it_wraps_or_is_refused(tmp_path: Path) -> None:
    (model, base), (target, other) = (made(seed, lambda params: torch.optim.AdamW(params, lr=0.1)) for seed in range(2))
    model(torch.ones(2, 3)).sum().backward()
    wrapper, fresh = NoOptimizer(base), NoOptimizer(other)
    wrapper.step()
    for several in (wrapper, [wrapper], {"of weights": wrapper}):
        assert TrainState(model, several).optimizers == [base]  # type: ignore[arg-type]
    ray_ckpt.save(TrainState(model, wrapper), tmp_path / "run")  # type: ignore[arg-type]
    ray_ckpt.load(TrainState(target, fresh), tmp_path / "run")  # type: ignore[arg-type]
    assert torch.equal(other.state[target[0].weight]["z"], base.state[model[0].weight]["z"])
    for given, expected in (
        (NoOptimizer(base, mode=1), r"NoOptimizer is no torch\.optim\.Optimizer, nor shows the state of one"),
        (model, r"Sequential is no torch\.optim\.Optimizer"),
        (Hollow(), r"Hollow has no param_groups and no state"),
    ):
        with pytest.raises(UsageError, match=expected):
            TrainState(model, [given])


def test_a_wrapper_with_a_state_of_its_own_is_another_kind(tmp_path: Path) -> None:
    model, optimizer = made(0, OWN["tracking"])
    step(model, optimizer)
    ray_ckpt.save(TrainState(model, optimizer), tmp_path / "run")
    for kind in (torch.optim.AdamW, lambda params: Tracking(Counting(params))):
        with pytest.raises(StateMismatchError, match=r"kind of optimizer than .* was saved: Tracking over AdamW for"):
            ray_ckpt.load(TrainState(*made(1, kind)), tmp_path / "run")


def test_state_by_order_fits_the_same_order_only(tmp_path: Path) -> None:
    model, optimizer = made(0, OWN["lookahead"])
    step(model, optimizer)
    ray_ckpt.save(TrainState(model, optimizer), tmp_path / "run")
    target, other = made(1, lambda params: OWN["lookahead"](list(params)[::-1]))
    with pytest.raises(StateMismatchError, match=r"the Lookahead at optim\.others\.0 was saved .* in another order"):
        ray_ckpt.load(TrainState(target, other), tmp_path / "run")


class Deaf(Wrapping):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for own in self.state.values():
            own["exp_avg"] = own["exp_avg"] + 1


class Broken(Wrapping):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise KeyError("absmax")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Deaf, r"after the load Deaf does not show what was read as state\.0\.wrapped"),
        (Broken, r"Broken\.load_state_dict does not take what was read: KeyError: 'absmax'"),
    ],
)
def test_an_optimizer_that_does_not_take_its_state_is_an_error(tmp_path: Path, kind: Any, expected: str) -> None:
    model, optimizer = made(0, kind)
    step(model, optimizer)
    ray_ckpt.save(TrainState(model, optimizer), tmp_path / "run")
    with pytest.raises(StateMismatchError, match=expected):
        ray_ckpt.load(TrainState(*made(1, kind)), tmp_path / "run")


class Hiding(torch.optim.Optimizer):
    """Steps by another optimizer that its state dict does not show."""

    def __init__(self, params: Any) -> None:
        params = list(params)
        super().__init__(params, {"lr": 0.1})
        self.inner = torch.optim.AdamW(params, lr=0.1)

    def step(self, closure: Any = None) -> None:
        self.inner.step()


class HidingWithOwnLoad(Hiding):
    """As implementations of sharpness-aware minimization are: what it loads is its own, what it shows is not."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.inner.param_groups = self.param_groups


@pytest.mark.parametrize("kind", [Hiding, HidingWithOwnLoad])
def test_state_that_is_not_shown_is_refused(tmp_path: Path, kind: type[Hiding]) -> None:
    model, optimizer = made(0, kind)
    step(model, optimizer)
    with pytest.raises(
        UsageError, match=rf"{kind.__name__} steps by the AdamW in its attribute 'inner', whose state is not in"
    ):
        ray_ckpt.save(TrainState(model, optimizer), tmp_path / "run")
    ray_ckpt.save(TrainState(model, optimizer.inner), tmp_path / "run")
    model, numbered = made(0, torch.optim.AdamW)
    numbered.state[7] = {"steps": 1}  # type: ignore[index]
    with pytest.raises(UsageError, match=r"AdamW keeps state under 7, which is not one of its parameters"):
        ray_ckpt.save(TrainState(model, numbered), tmp_path / "numbered")


def zero_trained(rank: int, directory: str) -> list[bool]:
    """Each rank has the state of some parameters. Whether a fresh one goes on alike, and what one process had."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it warns
        from torch.distributed.optim import ZeroRedundancyOptimizer

    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        groups = [{"params": list(layer.parameters()), "lr": 0.1 + 0.1 * n} for n, layer in enumerate(model)]
        optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        states.append((DistributedDataParallel(model), optimizer, scheduler))
    (model, optimizer, scheduler), (target, fresh, follower) = states
    step(model, optimizer)
    scheduler.step()
    ray_ckpt.save(TrainState(model, optimizer, schedulers=scheduler), f"{directory}/zero")
    report = ray_ckpt.load(TrainState(target, fresh, schedulers=follower), f"{directory}/zero")
    for each in states:
        step(*each[:2])
        each[2].step()
    pairs = zip(model.parameters(), target.parameters(), strict=True)
    good = [torch.equal(one, two) for one, two in pairs] + [not report.missing, not report.unexpected]
    bare, adam, decay = single(2)
    ray_ckpt.load(TrainState(model, optimizer, schedulers=scheduler), f"{directory}/single")
    ray_ckpt.load(TrainState(bare, adam, schedulers=decay), f"{directory}/single")
    step(bare, adam)
    step(model, optimizer)
    return good + [torch.equal(one, two) for one, two in zip(model.parameters(), bare.parameters(), strict=True)]


def single(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    groups = [{"params": list(layer.parameters()), "lr": 0.1 + 0.1 * n} for n, layer in enumerate(model)]
    optimizer = torch.optim.AdamW(groups)
    return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def test_each_rank_of_a_zero_redundancy_optimizer_saves_its_part(tmp_path: Path) -> None:
    model, optimizer, scheduler = single(0)
    step(model, optimizer)
    scheduler.step()
    ray_ckpt.save(TrainState(model, optimizer, schedulers=scheduler), tmp_path / "single")
    assert all(map(all, run_ranks(zero_trained, 2, tmp_path, str(tmp_path))))
    target, fresh, follower = single(1)
    ray_ckpt.load(TrainState(target, fresh, schedulers=follower), tmp_path / "zero")
    pairs = zip(model.parameters(), target.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    states = zip(optimizer.state.values(), fresh.state.values(), strict=True)
    assert all(torch.equal(one["exp_avg"], two["exp_avg"]) for one, two in states)
    assert [group["lr"] for group in fresh.param_groups] == [0.05, 0.1]


class OneMoment(torch.optim.Optimizer):
    """Keeps one tensor under two keys, and one counter for all parameters; both are changed in place."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    moment = torch.zeros_like(parameter)
                    count = self.state[group["params"][0]].get("count", torch.zeros(()))
                    state |= {"moment": moment, "count": count, "kept": [moment, {"count": count}]}
                state["moment"].add_(parameter.grad)
                state["count"].add_(1)
                parameter.sub_(state["kept"][0] * group["lr"] / state["kept"][1]["count"])


@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "stepped"])
def test_what_is_one_tensor_stays_one(tmp_path: Path, steps: int) -> None:
    def trained(seed: int, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        optimizer = OneMoment(model.parameters())
        train(model, optimizer, steps)
        return model, optimizer

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()

    model, optimizer = trained(0, 3)
    ray_ckpt.save(TrainState(model, optimizer), tmp_path)
    other, fresh = trained(1, steps)
    ray_ckpt.load(TrainState(other, fresh), tmp_path)
    states = list(fresh.state.values())
    assert len(states) == 4
    assert all(state["moment"] is state["kept"][0] and state["count"] is states[0]["count"] for state in states)
    assert states[0]["moment"] is not states[1]["moment"]
    for trained_on in ((model, optimizer), (other, fresh)):
        train(*trained_on, 2)
    assert all(map(torch.equal, other.parameters(), model.parameters()))
