"""What optimizers and other objects keep, of any kind: saved as it is and given back as it was, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import ray_ckpt
from ray_ckpt import TrainState
from ray_ckpt.errors import UsageError
from ray_ckpt.state.hyperparameters import same, without_numpy


class Keeping(torch.optim.Optimizer):
    """Keeps what it is told to, and steps by the sum of it."""

    def __init__(self, params: Any, keep: Callable[[torch.Tensor], dict[Any, Any]], **defaults: Any) -> None:
        super().__init__(params, {"lr": 0.1, **defaults})
        self.keep = keep

    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if not self.state[parameter]:
                self.state[parameter].update(self.keep(parameter))


STATES: dict[str, Callable[[torch.Tensor], dict[Any, Any]]] = {
    "lists of tensors": lambda p: {"step": 3, "Q": [torch.rand(d) for d in p.shape], "order": ()},
    "numbers as keys": lambda p: {"blocks": {0: torch.rand(2), 1: torch.rand(3)}, "pending": {}},
    "dots in keys": lambda p: {"stats.mean": torch.rand(2), "exp_avg": torch.rand_like(p)},
    "nested": lambda p: {"a": {"b": {"c": torch.rand(2), "d": None}}, "seen": {4, 5}},
    "numbers of numpy": lambda p: {"scale": numpy.float64(0.5), "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("kind", STATES)
def test_state_comes_back_as_it_was(tmp_path: Path, kind: str) -> None:
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    rates = {"betas": (torch.tensor(0.9), torch.tensor(0.5)), "rate": numpy.int64(7)}
    keep = Keeping(models[0].parameters(), STATES[kind], **rates)
    fresh = Keeping(models[1].parameters(), STATES[kind], betas=(torch.tensor(0.1), torch.tensor(0.2)), rate=3)
    keep.step()
    ray_ckpt.save(TrainState(models[0], keep), tmp_path / "run")
    assert ray_ckpt.load(TrainState(models[1], fresh), tmp_path / "run").missing == ()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert same(fresh.state[other], {key: without_numpy(value) for key, value in keep.state[one].items()})
    assert [float(beta) for beta in fresh.param_groups[0]["betas"]] == pytest.approx([0.9, 0.5])
    assert fresh.param_groups[0]["rate"] == 7
    # What is there is read in place, and everything is there now.
    ray_ckpt.load(TrainState(models[1], fresh), tmp_path / "run")


def test_state_that_belongs_to_no_parameter_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state["global"] = {"steps": 3}  # type: ignore[index]
    with pytest.raises(UsageError, match=r"SGD keeps state under 'global', which is not one of its parameters"):
        ray_ckpt.save(TrainState(model, optimizer), tmp_path / "run")


@pytest.mark.parametrize("extra", [{"data": {"x": 1}, "data.seed": 3}, {"a": [torch.ones(1)], "a.$0": 5}])
def test_names_within_names_are_refused(tmp_path: Path, extra: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"extra\['\S+\.\S+'\] lies within extra\['\w+'\]"):
        ray_ckpt.save(TrainState(nn.Linear(2, 2), extra=extra), tmp_path / "run")
    apart = {"data": {"x": 1}, "data-seed": 3, "data2.seed": 4}
    ray_ckpt.save(TrainState(nn.Linear(2, 2), extra=apart), tmp_path / "apart")


def test_two_models_of_one_set_of_names_are_refused_equal_or_not(tmp_path: Path) -> None:
    policy, target = nn.Linear(2, 2), nn.Linear(2, 2)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"two of the 2 modules have a parameter 'weight': .* nn\.ModuleDict"):
            ray_ckpt.save(TrainState([policy, target]), tmp_path / "run")
        target.load_state_dict(policy.state_dict())
