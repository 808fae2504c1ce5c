"""Models for `--model tests.support.models:...`: a user's own, and some that misbehave at an exact point of the job.

Those that die do it once: they leave a marker file, in a directory that tests/conftest.py names, for the second run.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ray_ckpt.recipes.model import PipelineModel
from tests.support import struck

DOOMED_RANK = 1


class Perceptron(nn.Sequential):
    """A Sequential with its own data and loss, a persistent buffer, and layers without parameters."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 37), nn.Tanh(), Scale(37), nn.Linear(37, 61), nn.GELU(), nn.Linear(61, 3))

    def sample_batch(self, batch_size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = torch.randn(batch_size, 6, generator=generator)
        return inputs, inputs[:, :3] * 2

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.l1_loss(outputs, targets)


class Scale(nn.Module):
    """Multiplies by a persistent buffer, and adds one that is not saved."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("factor", torch.empty(dim))
        self.register_buffer("shift", torch.empty(dim), persistent=False)

    def reset_parameters(self) -> None:
        self.factor.uniform_(0.5, 1.5)
        self.shift.fill_(0.25)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.factor + self.shift


class Nested(nn.Module):
    """Its parts lie at different depths, and one of its modules keeps a buffer that belongs to no part."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.first = nn.Linear(5, 7, bias=False)
        self.inner.blocks = nn.ModuleList(nn.Linear(7, 7, bias=False) for _ in range(2))
        self.scale = Shift()
        self.head = nn.Linear(7, 9, bias=False)

    def pipeline_parts(self) -> list[str]:
        return ["inner.first", "inner.blocks.0", "inner.blocks.1", "head"]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.inner.first is not None:
            hidden = self.scale(self.inner.first(hidden))
        for block in self.inner.blocks:
            hidden = block(hidden)
        return hidden if self.head is None else self.head(hidden)


class Shift(nn.Module):
    """Adds a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.empty(7), persistent=False)

    def reset_parameters(self) -> None:
        self.shift.fill_(0.25)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.shift


class DyingLinear(nn.Linear):
    """Kills its process, on one rank, when it is first run, saved or loaded."""

    def __init__(self, dim: int, moment: str) -> None:
        super().__init__(dim, dim)
        self.moment = moment

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self._reached("train")
        return super().forward(hidden)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.weight.dtype != torch.float64:  # what the job looks at in double precision is a copy
            self._reached("save")
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._reached("load")
        super()._load_from_state_dict(*args, **kwargs)

    def _reached(self, moment: str) -> None:
        marker = Path(os.environ["RAY_CKPT_TEST_MARKERS"], moment)
        if moment == self.moment and dist.get_rank() == DOOMED_RANK and not marker.exists():
            marker.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


class Regularized(nn.Sequential):
    """Has dropout and batch norm, which a step in training mode would make another one every time."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, 3))

    def sample_batch(self, batch_size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = torch.randn(batch_size, 6, generator=generator)
        return inputs, inputs[:, :3] * 2


class SinglePrecision(PipelineModel):
    """Cannot compute in double precision."""

    def __init__(self) -> None:
        super().__init__(dim=24, layers=2)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return outputs.matmul(torch.ones(24, 1, dtype=torch.float32)).sub(targets[:, :1]).square().mean()


class CodedLinear(nn.Linear):
    """Has a parameter of integers, which is not trained."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)
        self.codes = nn.Parameter(torch.zeros(dim, dtype=torch.int8), requires_grad=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "codes"):
            self.codes.fill_(3)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) + self.codes


class Coded(PipelineModel):
    def __init__(self) -> None:
        super().__init__(dim=24, layers=2)
        self.layer1 = CodedLinear(24)


class Contrastive(PipelineModel):
    """Compares the samples of a part of a batch with one another, so that its loss depends on the parts."""

    def __init__(self) -> None:
        super().__init__(dim=24, layers=2)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs @ targets.T, torch.arange(len(outputs)))


class DyingModel(PipelineModel):
    def __init__(self, moment: str) -> None:
        super().__init__(dim=16, layers=0)
        for number in range(1, 3):
            self.add_module(f"layer{number}", DyingLinear(16, moment))


def dies_in_train() -> nn.Module:
    return DyingModel("train")


def dies_in_save() -> nn.Module:
    return DyingModel("save")


def dies_in_load() -> nn.Module:
    return DyingModel("load")


class Noisy(PipelineModel):
    """Gives another loss every time, so that no run repeats another."""

    def __init__(self) -> None:
        super().__init__(dim=8, layers=2)
        with open(Path(os.environ["RAY_CKPT_TEST_MARKERS"], f"built-by-{os.getpid()}"), "a") as mark:
            mark.write("+")

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(outputs, targets) * (1 + torch.rand(()))


class StruckWhileSaving(PipelineModel):
    """The second rank dies as it begins to look through its state for a save."""

    def __init__(self) -> None:
        super().__init__(dim=8, layers=2)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if dist.is_initialized() and dist.get_rank() == DOOMED_RANK:
            struck.strike_at("ray_ckpt.protocol.rank_save:plan")
        return nn.functional.mse_loss(outputs, targets)


class Failing(PipelineModel):
    """Fails in its first step, in every process."""

    def __init__(self) -> None:
        super().__init__(dim=8, layers=2)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        raise ValueError(f"process {os.getpid()} cannot learn this")


def tied() -> nn.Module:
    model = PipelineModel(dim=8, layers=2)
    model.layer2.weight = model.layer1.weight
    return model


def without_data() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def not_a_model() -> str:
    return "a string"


class Headed(PipelineModel):
    """Owns a parameter beside its layers."""

    def __init__(self) -> None:
        super().__init__(dim=8, layers=2)
        self.temperature = nn.Parameter(torch.ones(1))


def raising() -> nn.Module:
    raise KeyError("no such setting")
