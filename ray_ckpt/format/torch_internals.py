"""The only home of torch's private names; `tests/test_torch_internals.py` says what of each is relied on.

DCP      StorageInfo, ExtensionRegistry, StreamTransformExtension, ShardedTensor, create_write_items,
         flatten_state_dict, set_element, names_of
DTensor  local_tensor, locate_shard, placed, StridedShard
tensors  is_wrapper, STORAGE_TYPES, TENSOR_CLASSES, rebuild_tensor_v2, rebuild_tensor_v3, narrow, copy_each
modules  replace_tensors, with_own_tensors, has_entry, without_weak_references
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
import torch.serialization
from torch import nn
from torch._utils import _rebuild_tensor_v2 as rebuild_tensor_v2
from torch._utils import _rebuild_tensor_v3 as rebuild_tensor_v3
from torch.distributed._shard._utils import narrow_tensor_by_index as narrow
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
from torch.distributed.checkpoint.planner_helpers import _create_write_items as create_write_items
from torch.distributed.checkpoint.state_dict import _get_fqns
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_wrapper

__all__ = [
    "STORAGE_TYPES",
    "TENSOR_CLASSES",
    "ExtensionRegistry",
    "ShardedTensor",
    "StorageInfo",
    "StreamTransformExtension",
    "StridedShard",
    "copy_each",
    "create_write_items",
    "flatten_state_dict",
    "has_entry",
    "is_wrapper",
    "local_tensor",
    "locate_shard",
    "names_of",
    "narrow",
    "placed",
    "rebuild_tensor_v2",
    "rebuild_tensor_v3",
    "replace_tensors",
    "set_element",
    "with_own_tensors",
    "without_weak_references",
]

STORAGE_TYPES: Mapping[torch.dtype, str] = torch.storage._dtype_to_storage_type_map()
"""Dtype -> name of the typed storage class that stands for it in a pickle by `torch.save`. Newer dtypes have none."""

TENSOR_CLASSES: Collection[type] = torch._tensor_classes
"""The typed tensor classes, such as `torch.FloatTensor`: calling one with a size allocates that much."""


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's shard on this rank, without the gradient that `to_local` would track; any other tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def locate_shard(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and offsets of this rank's shard in the global tensor, in elements; not of a strided shard."""
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(sizes), tuple(offsets)


def placed(local: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
    """A DTensor of this very local tensor: `from_local` takes a view of it, which some subclasses do not have.

    Args:
        shape: of the whole tensor.
    """
    size = torch.Size(shape)
    meta = TensorMeta(size, torch.empty(size, device="meta").stride(), local.dtype)
    return DTensor(local, DTensorSpec(mesh, tuple(placements), tensor_meta=meta), requires_grad=False)


def names_of(module: nn.Module, name: str) -> set[str]:
    """The names that state dicts have for a parameter or buffer, without those of the wrappers around its module."""
    return set(_get_fqns(module, name))


def copy_each(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source to its target by one call, without waiting for copies from a GPU."""
    torch._foreach_copy_(targets, sources, non_blocking=True)


def replace_tensors(module: nn.Module, replace: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put `replace(tensor)` in place of every parameter's data and of every buffer, in all submodules."""
    module._apply(replace)


def has_entry(module: nn.Module, name: str) -> bool:
    """Whether a module itself has a parameter or buffer of that name, were it None."""
    return name in module._parameters or name in module._buffers


@contextlib.contextmanager
def without_weak_references(module: nn.Module) -> Iterator[None]:
    """Within this block a recurrent module holds no weak references to its weights, which would forbid to swap them."""
    if not isinstance(module, nn.RNNBase):
        yield
        return
    module._flat_weight_refs = []
    try:
        yield
    finally:
        module._init_flat_weights()


def with_own_tensors(module: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A shallow copy of a module with `make(tensor)` for each parameter and buffer that it owns itself."""
    copied = copy.copy(module)
    copied._parameters = {
        key: None if value is None else nn.Parameter(make(value), value.requires_grad)
        for key, value in module._parameters.items()
    }
    copied._buffers = {key: None if value is None else make(value) for key, value in module._buffers.items()}
    return copied
