"""Every optimizer and LR scheduler of torch, in the modes that a CPU has: a loaded run goes on bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

import ray_ckpt
from ray_ckpt import TrainState

Make = Callable[[Any], torch.optim.Optimizer]

_SETTINGS: dict[str, list[dict[str, Any]]] = {
    "ASGD": [{"t0": 2}],
    "Adadelta": [{}],
    "Adafactor": [{}],
    "Adagrad": [{"initial_accumulator_value": 0.1, "lr_decay": 0.1}, {"fused": True}],
    "Adam": [
        {"amsgrad": True},
        {"fused": True},
        {"lr": torch.tensor(0.01)},
        {"betas": (torch.tensor(0.8), torch.tensor(0.9))},
    ],
    "AdamW": [{"amsgrad": True}, {"fused": True}],
    "Adamax": [{}],
    "LBFGS": [{"max_iter": 3, "history_size": 2}, {"line_search_fn": "strong_wolfe"}],
    "Muon": [{}],
    "NAdam": [{"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "RAdam": [{"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "RMSprop": [{"momentum": 0.9, "centered": True}],
    "Rprop": [{}],
    "SGD": [{"momentum": 0.9, "dampening": 0.5}, {}, {"momentum": 0.9, "nesterov": True}, {"fused": True}],
    "SparseAdam": [{}],
}
"""Class -> keyword arguments that make it keep more."""

_MODES: list[dict[str, Any]] = [{"foreach": True}, {"foreach": False}, {"maximize": True}]
_WITHOUT_MODES = {"LBFGS": ["foreach", "maximize"], "Muon": ["foreach", "maximize"], "SparseAdam": ["foreach"]}

TABLE = [
    (kind, settings)
    for kind, several in _SETTINGS.items()
    for settings in [
        *several,
        *({**several[0], **mode} for mode in _MODES if not mode.keys() & set(_WITHOUT_MODES.get(kind, ()))),
    ]
]

CLASSES = {
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}


class Net(nn.Module):
    def __init__(self, seed: int, *, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(5, 3, sparse=sparse)
        self.layer = nn.Linear(3, 4, bias=not sparse)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = torch.tanh(self.layer(self.embed(tokens)))
        return hidden


class Run:
    """A model, its optimizer and what follows the optimizer, from a seed."""

    def __init__(self, kind: str, settings: dict[str, Any], seed: int) -> None:
        is_sparse = kind == "SparseAdam"
        self.model = Net(seed, sparse=is_sparse)
        several = self.model.parameters()
        chosen = [p for p in several if p.dim() == 2] if kind == "Muon" else list(several)
        # A tensor of the settings would be one for the saved and the loaded run.
        own = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in settings.items()}
        self.optimizer = getattr(torch.optim, kind)(chosen[:1] if is_sparse else chosen, **own)
        self.state = TrainState(self.model, self.optimizer)

    def train(self, first: int, last: int) -> Run:
        for turn in range(first, last):
            tokens = torch.tensor([turn % 5, (turn + 2) % 5])

            def closure(tokens: torch.Tensor = tokens) -> torch.Tensor:
                self.optimizer.zero_grad()
                loss: torch.Tensor = self.model(tokens).square().mean()
                loss.backward()
                return loss

            if isinstance(self.optimizer, torch.optim.LBFGS):
                self.optimizer.step(closure)
            else:
                closure()
                self.optimizer.step()
        return self

    def parameters(self) -> list[torch.Tensor]:
        return [parameter.detach() for parameter in self.model.parameters()]


def same(one: Run, other: Run) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


def test_the_table_has_all_of_torch() -> None:
    assert {kind for kind, _ in TABLE} >= CLASSES


@pytest.mark.parametrize("kind", sorted(_SETTINGS))
def test_an_optimizer_goes_on_bit_for_bit(tmp_path: Path, kind: str) -> None:
    if not hasattr(torch.optim, kind):
        pytest.skip("this torch does not have it")
    for number, (_, settings) in enumerate(entry for entry in TABLE if entry[0] == kind):
        straight, saved, loaded = (Run(kind, settings, seed) for seed in (0, 0, 1))
        straight.train(0, 6)
        ray_ckpt.save(saved.train(0, 3).state, tmp_path / str(number))
        report = ray_ckpt.load(loaded.state, tmp_path / str(number))
        assert report.missing == report.unexpected == ()
        assert not same(straight, loaded)
        assert same(straight, loaded.train(3, 6)), settings


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.9**step),
    "MultiplicativeLR": partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda step: 0.9),
    "StepLR": partial(lr_scheduler.StepLR, step_size=2),
    "MultiStepLR": partial(lr_scheduler.MultiStepLR, milestones=[2, 4, 4]),
    "ConstantLR": partial(lr_scheduler.ConstantLR, total_iters=4),
    "LinearLR": partial(lr_scheduler.LinearLR, total_iters=5),
    "ExponentialLR": partial(lr_scheduler.ExponentialLR, gamma=0.9),
    "PolynomialLR": partial(lr_scheduler.PolynomialLR, total_iters=8, power=2.0),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=4),
    "CosineAnnealingWarmRestarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=2, T_mult=2),
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2, mode="exp_range", gamma=0.9),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=8, three_phase=True),
    "ReduceLROnPlateau": partial(lr_scheduler.ReduceLROnPlateau, patience=1, cooldown=1),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer, 0.1), lr_scheduler.CosineAnnealingLR(optimizer, 4)], milestones=[2]
    ),
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)], optimizer=optimizer
    ),
    "SWALR": partial(swa_utils.SWALR, swa_lr=0.05, anneal_epochs=4),
}


def test_the_table_has_all_schedulers_of_torch() -> None:
    kinds = {
        name
        for name, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler) and name[0] != "_"
    }
    assert kinds - {"LRScheduler"} <= SCHEDULERS.keys()


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_schedulers_averages_and_scalers_go_on(tmp_path: Path, optimizer: str) -> None:
    """With cycled momentum, or betas, where the scheduler cycles them."""

    def made(kind: str, seed: int) -> tuple[Run, Any, Any, Any]:
        run = Run(optimizer, {"lr": 0.1, **({"momentum": 0.9} if optimizer == "SGD" else {})}, seed)
        scheduler = SCHEDULERS[kind](run.optimizer)
        average = swa_utils.AveragedModel(run.model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0 + seed, growth_interval=2)
        run.state = TrainState(run.model, run.optimizer, schedulers=scheduler, ema=average, scaler=scaler)
        return run, scheduler, average, scaler

    def train(parts: tuple[Run, Any, Any, Any], first: int, last: int) -> None:
        run, scheduler, average, scaler = parts
        for turn in range(first, last):
            run.optimizer.zero_grad()
            scaler.scale(run.model(torch.tensor([turn % 5, 1])).square().mean()).backward()
            scaler.step(run.optimizer)
            scaler.update()
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
            average.update_parameters(run.model)

    for kind in SCHEDULERS:
        saved, loaded = made(kind, 0), made(kind, 1)
        train(saved, 0, 3)
        ray_ckpt.save(saved[0].state, tmp_path / kind)
        assert ray_ckpt.load(loaded[0].state, tmp_path / kind).missing == ()
        for parts in (saved, loaded):
            train(parts, 3, 7)
        assert same(saved[0], loaded[0]), kind
        groups, others = saved[0].optimizer.param_groups, loaded[0].optimizer.param_groups
        values = [{key: value for key, value in each[0].items() if key != "params"} for each in (groups, others)]
        assert values[0] == values[1], kind
        assert saved[1].state_dict().keys() == loaded[1].state_dict().keys()
        assert all(map(torch.equal, saved[2].parameters(), loaded[2].parameters())), kind
        assert saved[3].state_dict() == loaded[3].state_dict(), kind
