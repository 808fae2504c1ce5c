"""Schedulers of any make: lists with an item per parameter group follow the groups, wrapped ones are found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from accelerate.scheduler import AcceleratedScheduler
from torch import nn
from torch.optim import lr_scheduler

import ray_ckpt
from ray_ckpt import TrainState
from ray_ckpt.errors import StateMismatchError, UsageError
from tests.test_state_parts import linear, step_once

FIRST = [0.1, 0.2, 0.4]


class Rated(lr_scheduler.LRScheduler):
    """Sets rates of its own, which lie somewhere in its state, and knows steps at which they halve."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, make: Callable[[list[float]], Any], rates: list[float]
    ) -> None:
        self.kept = make(rates)
        self.halve_at = [1] * 3
        super().__init__(optimizer)

    def rates(self) -> list[float]:
        kept = self.kept
        while not isinstance(kept, (list, tuple, torch.Tensor)) and 0 not in kept:
            [kept] = kept.values()
        return [float(kept[n]) for n in range(len(kept))]

    def get_lr(self) -> list[float]:
        return [rate * 0.5 ** sum(at <= self.last_epoch for at in self.halve_at) for rate in self.rates()]


PLACES: dict[str, Callable[[list[float]], Any]] = {
    "list": list,
    "tuple": tuple,
    "nested": lambda rates: {"deep": {"a.b": tuple(rates)}},
    "by number": lambda rates: dict(enumerate(rates)),
    "tensor": torch.tensor,
    "tensors": lambda rates: [torch.tensor(rate) for rate in rates],
    "numpy": lambda rates: [numpy.float64(rate) for rate in rates],
    "small numpy": lambda rates: tuple(numpy.float32(rate) for rate in rates),
}


def rates_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[float]:
    """By layer, whatever the order of the groups."""
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    return [float(rates[id(layer.weight)]) for layer in model]


def reordered(rates: Sequence[float]) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, _ = linear(list(rates))
    groups = [{"params": list(layer.parameters()), "lr": rate} for layer, rate in zip(model, rates, strict=True)]
    return model, torch.optim.AdamW(groups[::-1])


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("groups", ["reordered", "split"])
def test_any_list_with_an_item_per_group_follows_the_groups(tmp_path: Path, kind: str, groups: str) -> None:
    model, optimizer = linear(FIRST)
    scheduler = Rated(optimizer, PLACES[kind], FIRST)
    step_once(model, optimizer)
    scheduler.step()
    scheduler.halve_at = [1, 3, 3]
    ray_ckpt.save(TrainState(model, optimizer, schedulers=scheduler), tmp_path / "run")
    if groups == "split":
        target, _ = linear([7.0] * 3)
        fresh = torch.optim.AdamW(target.parameters(), lr=7.0)
        follower = Rated(fresh, PLACES[kind], [7.0])
    else:
        target, fresh = reordered([0.0] * 3)
        follower = Rated(fresh, PLACES[kind], [9.0, 8.0, 7.0])
    follower.halve_at = [1, 3, 3]
    ray_ckpt.load(TrainState(target, fresh, schedulers=follower), tmp_path / "run")
    assert type(follower.kept) is type(scheduler.kept)
    assert follower.halve_at == [1, 3, 3]  # three items by chance
    for one, other in ((optimizer, scheduler), (fresh, follower)):
        one.step()
        other.step()
    assert rates_of(fresh, target) == pytest.approx(rates_of(optimizer, model))
    assert rates_of(fresh, target) == pytest.approx([0.05, 0.1, 0.2])


def test_lists_of_two_stages_are_one_list_of_the_whole(tmp_path: Path) -> None:
    """The schedulers of two optimizers go by one name, as those of two pipeline stages do."""
    model, _ = linear([0.1, 0.2])
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.1 * n) for n, layer in enumerate(model, 1)]
    schedulers = [Rated(optimizer, tuple, [optimizer.param_groups[0]["lr"]]) for optimizer in optimizers]
    ray_ckpt.save(TrainState(model, optimizers, schedulers=schedulers), tmp_path / "run")
    target, _ = linear([0.0, 0.0])
    whole = torch.optim.AdamW(target.parameters(), lr=7.0)
    follower = Rated(whole, tuple, [7.0])
    ray_ckpt.load(TrainState(target, whole, schedulers=follower), tmp_path / "run")
    assert follower.kept == (0.1, 0.2)
    assert rates_of(whole, target) == [0.1, 0.2]


def test_a_list_that_may_follow_the_groups_or_not_is_refused_where_it_matters(tmp_path: Path) -> None:
    """A history has as many items as there are groups, by chance; the live one has none yet."""
    model, optimizer = linear([0.1, 0.2])
    scheduler = Rated(optimizer, list, [0.1, 0.2])
    scheduler.history = [0.5, 0.25]
    ray_ckpt.save(TrainState(model, optimizer, schedulers=scheduler), tmp_path / "run")
    target, fresh = reordered([0.0, 0.0])
    follower = Rated(fresh, list, [0.0, 0.0])
    follower.history = []
    with pytest.raises(StateMismatchError, match=r"schedulers\.0: nothing tells whether the items of history follow"):
        ray_ckpt.load(TrainState(target, fresh, schedulers=follower), tmp_path / "run")
    same_groups, other = linear([0.0, 0.0])
    follower = Rated(other, list, [0.0, 0.0])
    follower.history = []
    ray_ckpt.load(TrainState(same_groups, other, schedulers=follower), tmp_path / "run")
    assert follower.history == [0.5, 0.25]


class Warmup(lr_scheduler.LRScheduler):
    """Holds the scheduler that comes after it."""

    def __init__(self, optimizer: torch.optim.Optimizer, after: Any) -> None:
        self.after_scheduler, self.finished = after, False
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        if self.last_epoch <= 2:
            return [base * self.last_epoch / 2 for base in self.base_lrs]
        self.after_scheduler.step()
        self.finished = True
        return self.after_scheduler.get_last_lr()


class Passing:
    """Shows the state of what it wraps, as frameworks' wrappers do."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def step(self) -> None:
        self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state)


class Counting(Passing):
    """Has a state of its own beside that of what it wraps."""

    steps = 0

    def step(self) -> None:
        self.steps += 1
        self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.scheduler.state_dict(), "steps": self.steps, "kind": "counting", "a.b": [1, 2]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.scheduler.load_state_dict(state["inner"])


def cosine(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.CosineAnnealingLR(optimizer, 9)


WRAPPED: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "accelerate": lambda optimizer: AcceleratedScheduler(cosine(optimizer), optimizer, step_with_optimizer=False),
    "within": lambda optimizer: Warmup(optimizer, cosine(optimizer)),
    "twice": lambda optimizer: Passing(Passing(Warmup(optimizer, Warmup(optimizer, cosine(optimizer))))),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [Warmup(optimizer, cosine(optimizer)), cosine(optimizer)], [4]
    ),
    "chained": lambda optimizer: lr_scheduler.ChainedScheduler(
        [Warmup(optimizer, cosine(optimizer)), lr_scheduler.ConstantLR(optimizer, 0.5, 3)]
    ),
    "counting": lambda optimizer: Counting(cosine(optimizer)),
    "restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2, 2),
    "cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, [0.01, 0.02], [0.1, 0.2], 3, cycle_momentum=False),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_schedulers_go_on_where_they_were(tmp_path: Path, kind: str) -> None:
    runs = []
    for _ in range(2):
        model, optimizer = linear([0.1, 0.2])
        runs.append((model, optimizer, WRAPPED[kind](optimizer)))
    (model, optimizer, scheduler), (target, fresh, follower) = runs
    for _ in range(3):
        step_once(model, optimizer)
        scheduler.step()
    ray_ckpt.save(TrainState(model, optimizer, schedulers=scheduler), tmp_path / "run")
    assert rates_of(fresh, target) != rates_of(optimizer, model)
    ray_ckpt.load(TrainState(target, fresh, schedulers={"0": follower}), tmp_path / "run")
    for _ in range(3):
        assert rates_of(fresh, target) == rates_of(optimizer, model)
        for one, other in ((optimizer, scheduler), (fresh, follower)):
            one.step()
            other.step()


def test_what_is_no_scheduler_is_named() -> None:
    model, optimizer = linear([0.1])
    with pytest.raises(UsageError, match=r"collections\.OrderedDict is no LR scheduler"):
        TrainState(model, optimizer, schedulers=[model.state_dict()])  # type: ignore[list-item]


def test_another_scheduler_within_is_refused(tmp_path: Path) -> None:
    model, optimizer = linear([0.1])
    ray_ckpt.save(TrainState(model, optimizer, schedulers=Warmup(optimizer, cosine(optimizer))), tmp_path / "run")
    for after in (None, lr_scheduler.StepLR(optimizer, 1)):
        with pytest.raises(StateMismatchError, match=r"was saved by a (Warmup over after_s|CosineAnnealingLR)"):
            ray_ckpt.load(TrainState(model, optimizer, schedulers=Warmup(optimizer, after)), tmp_path / "run")


class Forgetful(lr_scheduler.StepLR):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({**state, "gamma": 0.125})


def test_a_scheduler_that_does_not_take_its_state_is_an_error(tmp_path: Path) -> None:
    model, optimizer = linear([0.1])
    ray_ckpt.save(TrainState(model, optimizer, schedulers=Forgetful(optimizer, 3, gamma=0.5)), tmp_path / "run")
    follower = Forgetful(optimizer, 3)
    with pytest.raises(StateMismatchError, match=r"schedulers\.0 \(Forgetful\) does not show what was read as gamma"):
        ray_ckpt.load(TrainState(model, optimizer, schedulers=follower), tmp_path / "run")


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_the_lists_of_another_program_fit_the_same_order_of_groups_only(tmp_path: Path, order: list[int]) -> None:
    def made(order: Sequence[int], rates: list[float]) -> tuple[nn.Module, Any, Rated]:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        groups = [{"params": list(model[n].named_parameters(prefix=str(n)))} for n in order]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        return model, optimizer, Rated(optimizer, list, rates)

    model, optimizer, scheduler = made([0, 1], [0.25, 0.5])
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "state.pt")
    target, other, follower = made(order, [1.0, 2.0])
    state = TrainState(target, other, schedulers=follower)
    if order == [0, 1]:
        ray_ckpt.load(state, tmp_path / "state.pt")
        assert follower.kept == [0.25, 0.5]
    else:
        with pytest.raises(StateMismatchError, match=r"schedulers\.0\.\w+ has an item .* saved in another order"):
            ray_ckpt.load(state, tmp_path / "state.pt")


class Falling:
    """A schedule with settings of its own, whose order is not that of their names."""

    def __init__(self, rate: float, floor: float) -> None:
        self.rate, self.floor = rate, floor

    def __call__(self, step: int) -> float:
        return max(self.floor, self.rate**step)


def test_settings_of_a_schedule_are_the_same_in_any_order(tmp_path: Path) -> None:
    model, optimizer = linear([0.1])
    scheduler = lr_scheduler.LambdaLR(optimizer, [Falling(0.9, 0.2)])
    ray_ckpt.save(TrainState(model, optimizer, schedulers=scheduler), tmp_path)
    follower = lr_scheduler.LambdaLR(optimizer, [Falling(0.5, 0.1)])
    ray_ckpt.load(TrainState(model, optimizer, schedulers=follower), tmp_path)
    [schedule] = follower.lr_lambdas
    assert vars(schedule) == {"rate": 0.9, "floor": 0.2}
