"""Shard a whole model over the ranks with FSDP. The model may still lie on the meta device."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

from ray_ckpt.parallel.stages import initialise, materialise


def shard(model: nn.Module, kind: str, device: torch.device, seed: int) -> nn.Module:
    """Shard every direct child, and then the rest, over all ranks of the default process group.

    Args:
        model: on the meta device; each rank allocates only its shards.
        kind: `fsdp2` (`fully_shard`) or `fsdp1` (`FullyShardedDataParallel`).
        device: where the shards belong.
        seed: for the initial values, which a load then replaces.

    Returns:
        The sharded module: for `fsdp2` the model itself, for `fsdp1` its wrapper. Its state dict holds DTensors.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    return {"fsdp1": _fsdp1, "fsdp2": _fsdp2}[kind](model, mesh, device, seed)


def _fsdp2(model: nn.Module, mesh: DeviceMesh, device: torch.device, seed: int) -> nn.Module:
    for name, child in model.named_children():
        # One layer at a time is whole on every rank, never the model.
        materialise(child, device, seed, prefix=name)
        fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _fsdp1(model: nn.Module, mesh: DeviceMesh, device: torch.device, seed: int) -> nn.Module:
    children = set(model.children())
    names = {module: name for name, module in model.named_modules()}

    def materialise_alone(module: nn.Module) -> None:
        module.to_empty(device=device, recurse=False)
        initialise(module, names[module], seed)

    return FullyShardedDataParallel(
        model,
        # Without a mesh its state dict holds the deprecated ShardedTensor.
        device_mesh=mesh,
        # On the CPU it has to be told, as it expects an accelerator.
        device_id=device,
        use_orig_params=True,
        auto_wrap_policy=partial(lambda_auto_wrap_policy, lambda_fn=children.__contains__),
        param_init_fn=materialise_alone,
    )
