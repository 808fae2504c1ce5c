"""A frozen model with adapters of low rank, in several layouts."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ray_ckpt import TrainState


class Adapted(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width)
        self.down = nn.Parameter(torch.randn(2, width))
        self.up = nn.Parameter(torch.randn(width, 2))
        self.base.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 6, bias=False).requires_grad_(False)
        self.layers = nn.ModuleList([Adapted(6), Adapted(6)])
        self.norm = nn.BatchNorm1d(6, affine=False)
        self.scale = nn.Parameter(torch.randn(3), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def adapted(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net()


def trained(model: Net) -> tuple[Net, torch.optim.Optimizer]:
    """With an optimizer that has all parameters, also those that have no gradient."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125)
    for step in range(2):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 24).reshape(4, 6).square() + step).square().sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def lay_out(layout: str, rank: int, *, seed: int) -> TrainState:
    """The model of a seed, as one of two ranks holds it, without an optimizer."""
    model = adapted(seed)
    if layout == "ddp2":
        return TrainState(DistributedDataParallel(model), trainable_only=True)
    if layout == "fsdp2":
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    elif layout == "fsdp1":
        cpu = torch.device("cpu")
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)
        return TrainState(wrapped, trainable_only=True)
    elif layout == "tp2":
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        for layer in model.layers:
            for owner, name, dim in ((layer.base, "weight", 0), (layer.base, "bias", 0), (layer, "up", 0)):
                old = getattr(owner, name)
                cut = distribute_tensor(old.detach(), mesh, [Shard(dim)])
                setattr(owner, name, nn.Parameter(cut, requires_grad=old.requires_grad))
    elif layout == "pp2":
        model = stage_of(model, rank)
    return TrainState(model, trainable_only=True)


def stage_of(model: Net, rank: int) -> Net:
    """With the other rank's parameters and buffers on the meta device."""
    mine = ("head.", "layers.0.") if rank == 0 else ("layers.1.", "norm.", "scale")
    for name, parameter in list(model.named_parameters()):
        if not name.startswith(mine):
            owner, _, last = name.rpartition(".")
            away = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            setattr(model.get_submodule(owner), last, away)
    for name, buffer in list(model.named_buffers()):
        if not name.startswith(mine):
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, buffer.to("meta"))
    return model
