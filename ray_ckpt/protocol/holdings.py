"""What a rank holds of a state dict: names, boxes, and the tensors and objects behind them.

hold(state_dict) -> Holdings(items, values)     flattened as stock DCP does it, so that names and paths are the same
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.utils import find_state_dict_object
from torch.distributed.tensor import DTensor

from ray_ckpt.errors import UsageError
from ray_ckpt.format.torch_container import dtype_name
from ray_ckpt.format.torch_internals import (
    ShardedTensor,
    create_write_items,
    flatten_state_dict,
    local_tensor,
    locate_shard,
)
from ray_ckpt.protocol.messages import Item, TensorSpec


@dataclass(frozen=True)
class Holdings:
    """The items of a plan, and the tensor or object of each."""

    items: tuple[Item, ...]
    values: tuple[Any, ...]
    """One per item: a plain tensor with the elements of its box; or the object, or a `SavedObject`."""


def hold(state_dict: Mapping[str, Any]) -> Holdings:
    """Look through a state dict. Nothing is copied.

    Args:
        state_dict: nested dicts and lists of tensors (plain, DTensor, ShardedTensor) and anything else; a `Stateful`
            at its top level counts as its own state dict.

    Raises:
        UsageError: two entries have the same flat name, or a DTensor is a pending sum rather than a value.
    """
    flat = {name: value.state_dict() if is_stateful(value) else value for name, value in state_dict.items()}
    try:
        values, paths = flatten_state_dict(flat)
    except ValueError as error:
        raise UsageError(f"the state dict has two entries of one name: {error}") from error
    return _Holder().hold(values, paths)


def is_stateful(value: object) -> bool:
    """Whether it is a `Stateful`. Tensors are excluded first: asking the protocol takes a hundred times as long."""
    return not isinstance(value, torch.Tensor) and isinstance(value, Stateful)


class _Holder:
    """Makes specs once per distinct shape, mesh and placement: locating a DTensor's shard takes 0.1 ms."""

    def __init__(self) -> None:
        self._specs: dict[object, TensorSpec | None] = {}

    def hold(self, values: Mapping[str, Any], paths: Mapping[str, Any]) -> Holdings:
        items, held = [], []
        for name, value in values.items():
            path = paths[name] if len(paths[name]) > 1 else None
            for spec, part in self._parts(name, value):
                items.append(Item(name, path, spec))
                held.append(part)
        return Holdings(tuple(items), tuple(held))

    def _parts(self, name: str, value: Any) -> list[tuple[TensorSpec | None, Any]]:
        """The parts of one entry that this rank holds: usually one, none of a shard that is empty."""
        if isinstance(value, DTensor):
            spec = self._dtensor_spec(name, value)
            return [] if spec is None else [(spec, local_tensor(value))]
        if isinstance(value, ShardedTensor) or hasattr(value, "__create_write_items__"):
            return [
                (self._planned_spec(item), find_state_dict_object({name: value}, item.index))
                for item in create_write_items(name, value)
            ]
        if isinstance(value, torch.Tensor):
            return [(self._plain_spec(value), value)]
        return [(None, value)]

    def _plain_spec(self, tensor: torch.Tensor) -> TensorSpec:
        key = tensor.dtype, tensor.shape
        spec = self._specs.get(key)
        if spec is None:
            shape = tuple(tensor.shape)
            spec = self._specs[key] = TensorSpec(dtype_name(tensor.dtype), shape, (0,) * len(shape), shape)
        return spec

    def _dtensor_spec(self, name: str, tensor: DTensor) -> TensorSpec | None:
        key = tensor.dtype, tensor.shape, tensor.device_mesh, tensor.placements
        if key not in self._specs:
            self._specs[key] = _shard_spec(name, tensor)
        return self._specs[key]

    def _planned_spec(self, item: WriteItem) -> TensorSpec:
        data = item.tensor_data
        assert data is not None, "only tensors plan write items of their own"
        chunk = data.chunk
        return TensorSpec(dtype_name(data.properties.dtype), tuple(data.size), tuple(chunk.offsets), tuple(chunk.sizes))


def _shard_spec(name: str, tensor: DTensor) -> TensorSpec | None:
    """Where this rank's shard lies, or None when it has no element of the tensor."""
    if any(placement.is_partial() for placement in tensor.placements):
        raise UsageError(f"{name!r} is a pending sum over ranks ({tensor.placements}): redistribute it before the save")
    if tensor.device_mesh.get_coordinate() is None:
        return None
    sizes, offsets = locate_shard(tensor)
    if 0 in sizes and 0 not in tensor.shape:
        return None
    return TensorSpec(dtype_name(tensor.dtype), tuple(tensor.shape), offsets, sizes)
