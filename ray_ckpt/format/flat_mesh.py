"""A device mesh for modules that FSDP1 wrapped without one, so that their state dicts hold DTensors.

Without a mesh they would hold ShardedTensors, which can be neither compared nor filled as tensors. The process groups
that FSDP1 works with say which mesh it is: one axis that shards, and under HYBRID_SHARD one that replicates before it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from ray_ckpt.errors import UsageError

_HYBRID = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)

_meshes: weakref.WeakKeyDictionary[nn.Module, DeviceMesh] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def with_device_mesh(root: nn.Module) -> Iterator[None]:
    """Within this block every FSDP1 module has a device mesh; afterwards only those that were made with one.

    Raises:
        UsageError: the ranks of a hybrid module form no grid.
    """
    bare = [module for module in FullyShardedDataParallel.fsdp_modules(root) if module._device_mesh is None]
    try:
        for module in bare:
            module._device_mesh = _mesh_of(module)
        yield
    finally:
        for module in bare:
            module._device_mesh = None


def _mesh_of(module: FullyShardedDataParallel) -> DeviceMesh:
    if module not in _meshes:
        assert module.compute_device is not None, "FSDP1 has set it when it wrapped the module"
        assert module.process_group is not None, "as the device"
        kind = module.compute_device.type
        if module.sharding_strategy in _HYBRID:
            groups = [module._inter_node_pg, module.process_group]
            grid = _grid(*map(dist.get_process_group_ranks, groups))
            _meshes[module] = DeviceMesh.from_group(groups, kind, grid, mesh_dim_names=("replicate", "shard"))
        else:
            _meshes[module] = DeviceMesh.from_group(module.process_group, kind)
    return _meshes[module]


def _grid(replicas: list[int], shards: list[int]) -> torch.Tensor:
    """The ranks as [replicas, shards], of which this rank knows the row and the column that it is in."""
    grid = torch.arange(len(replicas) * len(shards)).reshape(len(replicas), len(shards))
    if shards not in grid.tolist() or replicas not in grid.T.tolist():
        raise UsageError(
            f"FSDP1 was given process groups of ranks {shards} and {replicas}, which are no row and column of a grid: "
            "give it device_mesh="
        )
    return grid
