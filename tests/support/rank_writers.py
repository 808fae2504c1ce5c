"""Rank functions that write one file per rank, as verl, accelerate and torch_checkpointing do, and load them again."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, StateDictType, fully_shard
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
