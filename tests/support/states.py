"""Training states of one small model in several layouts and with every kind of optimizer, for tests of what arrives.

All ranks see the same batch, so replicas agree and every layout computes what one process does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ray_ckpt.format.snapshot import Snapshot, compare
from ray_ckpt.parallel.stages import take_stage
from ray_ckpt.state.hyperparameters import IMPLEMENTATION
from ray_ckpt.state.train_state import TrainState

LAYOUTS = {"single": 1, "ddp2": 2, "fsdp1x2": 2, "fsdp2x2": 2, "fsdp2x3": 3, "pp2": 2}
"""Name -> ranks."""

STAGES = (["first", "frozen"], ["second", "unused", "last"])

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
    "adam_fused": lambda groups: torch.optim.Adam(groups, lr=0.01, fused=True),
    "adam_foreach": lambda groups: torch.optim.Adam(groups, lr=0.01, foreach=True),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01, initial_accumulator_value=0.1, lr_decay=0.1),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
    "tensor_lr": lambda groups: torch.optim.Adam(groups, lr=torch.tensor(0.01), foreach=False),
}


class Scaled(nn.Module):
    """Multiplies by a persistent buffer that counts calls, and adds one that is not saved."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("factor", torch.rand(dim) + 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shift", torch.full((dim,), 0.25), persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
        return hidden * self.factor + self.shift


class Model(nn.Module):
    """Uneven sizes, a frozen layer, and one whose parameters never get a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(37, 61), nn.Tanh(), Scaled(61))
        self.frozen = nn.Linear(61, 61).requires_grad_(False)
        self.second = nn.Linear(61, 113)
        self.unused = nn.Linear(3, 5)
        self.last = nn.Linear(113, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for child in (self.first, self.frozen, self.second, self.last):
            inputs = child(inputs) if child is not None else inputs
        return inputs


def build(layout: str, optimizer: str, seed: int, **options: Any) -> tuple[TrainState, nn.Module]:
    """A fresh state in this layout, and the module to call for a training step."""
    torch.manual_seed(seed)
    whole = Model()
    model = wrap(whole, layout)
    make = OPTIMIZERS[optimizer]
    return TrainState(model, make(groups_of(model)), **options), whole if layout == "pp2" else model


def wrap(model: nn.Module, layout: str) -> nn.Module:
    if layout == "single":
        return model
    if layout == "pp2":
        return take_stage(model, STAGES[dist.get_rank()])
    if layout == "ddp2":
        return DistributedDataParallel(model, find_unused_parameters=True)
    mesh = init_device_mesh("cpu", (LAYOUTS[layout],))
    if layout.startswith("fsdp1"):
        return FullyShardedDataParallel(model, device_mesh=mesh, device_id=torch.device("cpu"), use_orig_params=True)
    for child in model.children():
        fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Weights and biases apart, with hyper-parameters of their own."""
    named = list(model.named_parameters())
    return [
        {"params": [parameter for name, parameter in named if name.endswith("weight")]},
        {"params": [parameter for name, parameter in named if name.endswith("bias")], "lr": 0.02},
    ]


def train(state: TrainState, module: nn.Module, steps: int, seed: int = 0) -> list[float]:
    """Real steps. Returns the losses."""
    losses = []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        inputs = torch.randn(6, 37, generator=generator)
        for optimizer in state.optimizers:
            optimizer.zero_grad()
        loss = (module(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        loss.backward()
        for optimizer in state.optimizers:
            optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def differing(saved: Sequence[Snapshot], loaded: Sequence[Snapshot]) -> list[str]:
    """Names under which something else was loaded than was saved, but for what a load leaves to the target."""
    return [
        f"{mismatch.name}: {mismatch.expected} -> {mismatch.found}"
        for mismatch in compare(saved, loaded).mismatches
        if mismatch.name.rpartition(".")[2] not in IMPLEMENTATION
    ]
