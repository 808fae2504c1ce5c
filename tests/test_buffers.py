"""Buffers in which data-parallel ranks differ: the first rank's are saved, and named. Not so parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import ray_ckpt
from ray_ckpt import TrainState
from ray_ckpt.errors import CommitError
from tests.support.ranks import run_ranks


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


def trained(kind: str, rank: int) -> nn.Module:
    model: nn.Module = net()
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))
    for _ in range(2):
        model(torch.randn(8, 4, generator=torch.Generator().manual_seed(rank))).sum().backward()
    return model


def refused(state: Any, path: str) -> str:
    try:
        ray_ckpt.save(state, path)
    except CommitError as error:
        return str(error)
    return "saved"


class Scaled(nn.Linear):
    """Under tensor parallelism its buffer may be a part of a whole, as its weight is."""

    def __init__(self, rank: int) -> None:
        super().__init__(4, 4)
        self.register_buffer("scale", torch.full((2,), float(rank)))


def save_all(rank: int, directory: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in ("ddp", "fsdp", "hsdp"):
        model = trained(kind, rank)
        states = {"state": TrainState(model), "plain": {"model": model}}
        for name, state in states.items():
            report = ray_ckpt.save(state, f"{directory}/{kind}-{name}")
            again = ray_ckpt.save(state, f"{directory}/{kind}-{name}-again")
            assert again.differing_buffers == report.differing_buffers
            found[f"{kind}-{name}"] = report.differing_buffers
        found[kind] = model.state_dict()["module.1.running_mean" if kind == "ddp" else "1.running_mean"]
    replicas = net()
    with torch.no_grad():
        replicas[0].bias += rank
    found["parameter"] = refused(TrainState(replicas), f"{directory}/parameter")
    split = Scaled(rank)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    split.weight = nn.Parameter(distribute_tensor(split.weight, mesh, [Shard(0)]))
    split.bias = None
    found["split"] = refused(TrainState(split), f"{directory}/split")
    return found


def test_the_first_ranks_buffers_are_saved_and_named(tmp_path: Path) -> None:
    first, second = run_ranks(save_all, 2, tmp_path, str(tmp_path))
    named = ("model.1.running_mean", "model.1.running_var")
    for kind in ("ddp", "fsdp", "hsdp"):
        assert not torch.equal(first[kind], second[kind])
        assert first[f"{kind}-state"] == second[f"{kind}-state"] == named
        assert len(first[f"{kind}-plain"]) == 2
        target = net()
        ray_ckpt.load(TrainState(target), tmp_path / f"{kind}-state-again")
        assert torch.equal(target[1].running_mean, first[kind])
    for answer in (first, second):
        assert (
            "different things under one name, of which only one would survive: 'model.0.bias' on ranks"
            in answer["parameter"]
        )
        assert "'model.scale' on ranks" in answer["split"]
