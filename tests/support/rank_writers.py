"""Rank functions that write one file per rank, as verl, accelerate and torch_checkpointing do, and load them again."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, StateDictType, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ray_ckpt import TrainState, load


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 12), nn.Linear(12, 7), nn.Linear(7, 3))


def _steps(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(4, 5)).sum().backward()
        optimizer.step()
    return optimizer


def parallel(layout: str, seed: int) -> nn.Module:
    model = net(seed)
    if layout == "fsdp1":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    if layout == "hsdp":
        return fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard")))
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("fsdp", "tp"))
    if mesh["tp"].size() > 1:
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    for module in model:
        fully_shard(module, mesh=mesh["fsdp"])
    return fully_shard(model, mesh=mesh["fsdp"])


def write(rank: int, directory: str, layout: str) -> dict[str, torch.Tensor]:
    """Model and optimizer in the manners of all three. Returns the whole tensors, the optimizer's among them."""
    warnings.simplefilter("ignore")
    model = parallel(layout, seed=0)
    optimizer = _steps(model)
    at, size = Path(directory), dist.get_world_size()
    if layout == "fsdp1":
        FullyShardedDataParallel.set_state_dict_type(
            model, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(offload_to_cpu=True)
        )
        torch.save(model.state_dict(), at / f"model_world_size_{size}_rank_{rank}.pt")
        with FullyShardedDataParallel.summon_full_params(model):
            return {name.replace("_fsdp_wrapped_module.", ""): p.clone() for name, p in model.named_parameters()}
    extra = {"rng": torch.full((3,), rank), "lr_scheduler": {"last_epoch": 2}}
    torch.save(model.state_dict(), at / f"model_world_size_{size}_rank_{rank}.pt")
    torch.save(optimizer.state_dict(), at / f"optim_world_size_{size}_rank_{rank}.pt")
    torch.save(extra, at / f"extra_state_world_size_{size}_rank_{rank}.pt")
    wholes = {name: value.full_tensor() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        wholes[f"{name} exp_avg"] = optimizer.state[parameter]["exp_avg"].full_tensor()
    return wholes


def normed(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Linear(12, 3))


def decayed(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def write_as_verl(rank: int, directory: str) -> dict[str, torch.Tensor]:
    """A model whose statistics differ between ranks, with the scheduler and the generators beside it, as verl does."""
    warnings.simplefilter("ignore")
    model = fully_shard(normed(0), mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    scheduler = decayed(optimizer)
    for _ in range(2):
        model(torch.arange(20.0).reshape(4, 5) * (1 + rank)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    random.seed(rank)
    torch.manual_seed(rank)
    rng = {"cpu": torch.get_rng_state(), "numpy": numpy.random.get_state(), "random": random.getstate()}
    for item, state in {
        "model": model.state_dict(),
        "optim": optimizer.state_dict(),
        "extra_state": {"lr_scheduler": scheduler.state_dict(), "rng": rng},
    }.items():
        torch.save(state, Path(directory) / f"{item}_world_size_2_rank_{rank}.pt")
    shown = model.state_dict()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value.clone() for name, value in shown.items()}


class Loader:
    """A data loader whose state has lists, dicts with digits for keys, and a tensor."""

    def __init__(self, position: int = 0) -> None:
        self.state = {
            "position": position,
            "lists": [[position, 1], {"of": (1, 2)}],
            "generator": torch.full((2,), position),
            "workers": {"0": {"at": 5}, "1": {"at": 6}},
            "same": [1, 2],
        }

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def write_loaders(rank: int, directory: str) -> None:
    """In torch_checkpointing's manner: each rank with a data loader of its own."""
    items = {"model": fully_shard(net(0)).state_dict(), "dataloader": Loader(10 + rank).state, "step": 7}
    for item, state in items.items():
        torch.save(state, Path(directory) / f"{item}_{rank}.pt")


def load_loaders(rank: int, directory: str, layout: str | None) -> tuple[dict[str, Any], str | None]:
    loader = Loader()
    state = TrainState(fully_shard(net(1)), dataloader=loader, step=0, layout=layout)
    report = load(state, directory)
    assert state.step == 7
    return loader.state, report.dataloader


def load_sharded(rank: int, directory: str) -> dict[str, torch.Tensor]:
    """Model and optimizer in another layout, whole again after the load."""
    warnings.simplefilter("ignore")
    model = parallel("fsdp2", seed=1)
    optimizer = torch.optim.AdamW(model.parameters())
    load(TrainState(model, optimizer), directory, only=("model", "optim"))
    wholes = {name: value.full_tensor() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        wholes[f"{name} exp_avg"] = optimizer.state[parameter]["exp_avg"].full_tensor()
    return wholes
