"""What optimizers keep and do not show is named when they are saved; whatever else they hold is not."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import ray_ckpt
from ray_ckpt import TrainState


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


class Slow(torch.optim.SGD):
    """An optimizer with slow weights that it does not show."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.slow: Any = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for slow, parameter in zip(self.slow, self.param_groups[0]["params"], strict=True):
            slow.lerp_(parameter.detach(), 0.5)


class SlowByParameter(Slow):
    """One that keeps them by parameter, of some alone."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        first = self.param_groups[0]["params"][0]
        self.slow, self.average = [], {first: {"mean": torch.full((7,), 3.0)}}

    step = torch.optim.SGD.step


class Wrapper(torch.optim.Optimizer):
    """A wrapper that shows its inner optimizer alone, and keeps its own in `state`."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.state = defaultdict(dict)
        super().__init__([{"params": group["params"]} for group in inner.param_groups], {})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["slow"] = parameter.detach() + 1

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)


class Stranger:
    """A wrapper that is no optimizer of torch's."""

    def __init__(self, inner: torch.optim.Optimizer, model: nn.Module) -> None:
        self.inner = inner
        self.averaged = AveragedModel(model)
        self.averaged.update_parameters(model)
        with torch.no_grad():
            for parameter in self.averaged.parameters():
                parameter.add_(1)

    def step(self) -> None:
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)


class Shown(Slow):
    """One that shows copies of them."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "slow": [slow.clone() for slow in self.slow]}

    def load_state_dict(self, state_dict: Any) -> None:
        self.slow = [slow.clone() for slow in state_dict["slow"]]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "slow"})


class Scratch(torch.optim.SGD):
    """One with tensors that are no state: of other shapes, of one parameter's shape, gradients, the model itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.1)
        several = list(model.parameters())
        self.map, self.overflow, self.table = torch.ones(3), torch.zeros(1), [torch.ones(8) for _ in several]
        self.model, self.order = model, {parameter: place for place, parameter in enumerate(several)}
        self.gradients: list[Any] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]


def tied(model: nn.Module) -> Wrapper:
    """A wrapper and an optimizer that hold each other."""
    inner: Any = Slow(model.parameters())
    inner.wrapper = wrapper = Wrapper(inner)
    return wrapper


HIDING: dict[str, tuple[Callable[[nn.Module], Any], tuple[str, ...]]] = {
    "a list": (lambda model: Slow(model.parameters()), ("Slow.slow",)),
    "by parameter": (lambda model: SlowByParameter(model.parameters()), ("SlowByParameter.average",)),
    "state": (lambda model: Wrapper(Slow(model.parameters())), ("Wrapper.inner.slow", "Wrapper.state")),
    "each other": (tied, ("Wrapper.inner.slow", "Wrapper.state")),
    "a module": (lambda model: Stranger(torch.optim.Adam(model.parameters()), model), ("Stranger.averaged",)),
    "shown": (lambda model: Shown(model.parameters()), ()),
    "scratch": (Scratch, ()),
    "torch's": (lambda model: torch.optim.Adam(model.parameters(), amsgrad=True), ()),
}


@pytest.mark.parametrize("form", ["state", "dict"])
@pytest.mark.parametrize("kind", HIDING)
def test_what_is_kept_and_not_shown_is_named(
    tmp_path: Path, kind: str, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, expected = HIDING[kind]
    model = net()
    optimizer = make(model)
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    state: Any = TrainState(model, optimizer) if form == "state" else {"model": model, "optim": optimizer}
    with caplog.at_level(logging.WARNING):
        report = ray_ckpt.save(state, tmp_path / "run", blocking=kind != "a list")
        if isinstance(report, ray_ckpt.SaveHandle):
            report = report.result()
    assert report is not None
    assert report.unsaved == expected
    assert [name in caplog.text for name in expected] == [True] * len(expected)
    assert ("no state_dict shows" in caplog.text) == bool(expected)


def test_what_is_given_beside_it_is_saved(tmp_path: Path) -> None:
    model = net()
    optimizer = Slow(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    extra = {f"slow{place}": slow for place, slow in enumerate(optimizer.slow)}
    report = ray_ckpt.save(TrainState(model, optimizer, extra=extra), tmp_path / "run")
    assert report.unsaved == ()
    assert ray_ckpt.save(TrainState(model, optimizer), tmp_path / "again").unsaved == ("Slow.slow",)
    kept = copy.deepcopy(optimizer.slow)
    for slow in optimizer.slow:
        slow.zero_()
    ray_ckpt.load(TrainState(model, optimizer, extra=extra), tmp_path / "run")
    assert all(map(torch.equal, optimizer.slow, kept))


def test_a_part_without_the_optimizer_says_nothing_of_it(tmp_path: Path) -> None:
    model = net()
    optimizer = Slow(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert ray_ckpt.save(TrainState(model, optimizer), tmp_path / "run", only=("model",)).unsaved == ()


def test_a_gradient_without_memory_of_its_own_does_no_harm(tmp_path: Path) -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = Slow(model.parameters())
    for group in optimizer.param_groups:
        group["momentum"] = 0
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert model.weight.grad is not None
    assert model.weight.grad.is_sparse
    assert ray_ckpt.save(TrainState(model, optimizer), tmp_path / "run").unsaved == ("Slow.slow",)
