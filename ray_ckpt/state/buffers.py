"""The buffers in which ranks may differ: each has seen other batches, as the statistics of a BatchNorm have.

`DistributedDataParallel` goes on with the first rank's before the next forward, so the first rank's are saved. Not so
the buffers of a module whose own parameters are split by tensor or expert parallelism: they may be parts of one whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from torch.distributed.tensor import DTensor

from ray_ckpt.state.train_state import TrainState

_SPLITTING = {"tp", "ep"}
"""Names of the mesh axes over which a module is split."""


def buffers_of(state: object) -> frozenset[str]:
    """Flat names, in a checkpoint, of all buffers in which the ranks that hold a state may differ."""
    if isinstance(state, TrainState):
        return frozenset(
            f"{model.section}.{name}"
            for model in state.named_models
            for module in model.modules
            for name in model.names_of(module, _own_buffers(module))
        )
    if isinstance(state, Mapping):
        modules = {name: value for name, value in state.items() if isinstance(value, nn.Module)}
        return frozenset(f"{name}.{key}" for name, module in modules.items() for key in _own_buffers(module))
    return frozenset(_own_buffers(state) if isinstance(state, nn.Module) else ())


def _own_buffers(module: nn.Module) -> Iterable[str]:
    for prefix, child in module.named_modules():
        buffers = dict(child.named_buffers(recurse=False, remove_duplicate=False))
        if buffers and not _is_split(child):
            for name, buffer in buffers.items():
                if name not in child._non_persistent_buffers_set and not isinstance(buffer, DTensor):
                    yield f"{prefix}.{name}" if prefix else name


def _is_split(module: nn.Module) -> bool:
    meshes = [parameter.device_mesh for parameter in module.parameters(recurse=False) if isinstance(parameter, DTensor)]
    return any(_SPLITTING.intersection(mesh.mesh_dim_names or ()) for mesh in meshes)
