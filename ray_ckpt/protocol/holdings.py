"""What a rank holds of a state dict: names, boxes, and the tensors and objects behind them.

hold(state_dict) -> Holdings(items, values)     flattened as stock DCP does it, so that names and paths are the same
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.utils import find_state_dict_object
from torch.distributed.tensor import DTensor

from ray_ckpt.errors import UsageError
from ray_ckpt.format.boxes import shared_box
from ray_ckpt.format.fingerprint import CURRENT
from ray_ckpt.format.fingerprinting import sum_of_part
from ray_ckpt.format.memory import fault
from ray_ckpt.format.shards import LocalBox, local_boxes
from ray_ckpt.format.torch_container import dtype_name
from ray_ckpt.format.torch_internals import (
    ShardedTensor,
    create_write_items,
    local_tensor,
)
from ray_ckpt.format.wrappers import join
from ray_ckpt.protocol.messages import Item, TensorSpec
from ray_ckpt.state import nesting
from ray_ckpt.state.plain_state import check_leaves, flattened, is_stateful, key_records
from ray_ckpt.state.subclasses import inner_of
from ray_ckpt.storage.staging import Converted


@dataclass(frozen=True)
class Holdings:
    """The items of a plan, and the tensor or object of each."""

    items: tuple[Item, ...]
    values: tuple[Any, ...]
    """One per item: a plain tensor with the elements of its box, or a `Converted` one; or the object, or a
    `SavedObject`."""
    elsewhere: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    """Dtype and shape of the tensors that are in the state, and of which this rank holds no element."""


def fingerprint_sum(spec: TensorSpec, part: torch.Tensor | Converted, formula: int = CURRENT) -> int:
    """The fingerprint's sum of a part that a rank holds, in the dtype in which it is saved."""
    box = shared_box(spec.offsets, spec.sizes)
    if isinstance(part, Converted):
        return sum_of_part(part.tensor, box, spec.shape, part.convert, formula)
    return sum_of_part(part, box, spec.shape, formula=formula)


def hold(state_dict: Mapping[str, Any]) -> Holdings:
    """Look through a state dict. Nothing is copied.

    Args:
        state_dict: nested dicts and lists of tensors (plain, DTensor, ShardedTensor) and anything else; a `Stateful`
            at its top level counts as its own state dict.

    Raises:
        UsageError: two entries have the same flat name, one contains itself or is nested too deep, an object with a
            state of its own is not at the top, a DTensor is a pending sum rather than a value, or a tensor subclass
            cannot be taken apart.
    """
    states = {name: nesting.asked(name, value) for name, value in state_dict.items() if is_stateful(value)}
    try:
        values, paths = flattened({**state_dict, **states, **key_records(states)})
    except ValueError as error:
        raise UsageError(f"the state dict has two entries of one name: {error}") from error
    nesting.check_paths(paths)
    check_leaves(values)
    return _Holder().hold(*_apart(values, paths))


def _apart(values: Mapping[str, Any], paths: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """With the inner tensors of those that are made of others in their place."""
    inner = inner_of(values)
    if not inner:
        return values, paths
    flat: dict[str, Any] = {}
    flat_paths: dict[str, Any] = {}
    for name, value in values.items():
        for below, entry in inner[name].items() if name in inner else (("", value),):
            flat[join(name, below)] = entry
            flat_paths[join(name, below)] = (*paths[name], *below.split(".")) if below else paths[name]
    return flat, flat_paths


class _Holder:
    """Makes specs once per distinct shape, mesh and placement: locating a DTensor's shard takes 0.1 ms."""

    def __init__(self) -> None:
        self._specs: dict[object, TensorSpec] = {}
        self._shards: dict[object, list[tuple[TensorSpec, LocalBox]]] = {}

    def hold(self, values: Mapping[str, Any], paths: Mapping[str, Any]) -> Holdings:
        items, held, elsewhere = [], [], {}
        for name, value in values.items():
            path = paths[name] if len(paths[name]) > 1 else None
            parts = self._parts(name, value)
            for spec, part in parts:
                items.append(Item(name, path, spec))
                held.append(part)
            if not parts:
                elsewhere[name] = dtype_name(value.dtype), tuple(value.size())
        return Holdings(tuple(items), tuple(held), elsewhere)

    def _parts(self, name: str, value: Any) -> list[tuple[TensorSpec | None, Any]]:
        """The parts of one entry that this rank holds: usually one, none of a shard that is empty."""
        if isinstance(value, DTensor):
            local = local_tensor(value)
            return [(spec, part.of(local)) for spec, part in self._shard(name, value)]
        if isinstance(value, ShardedTensor) or hasattr(value, "__create_write_items__"):
            return [
                (self._planned_spec(item), find_state_dict_object({name: value}, item.index))
                for item in create_write_items(name, value)
            ]
        if isinstance(value, torch.Tensor):
            if value.is_nested:
                raise UsageError(f"{name!r} {fault(value)}")
            return [(self._plain_spec(value), value)]
        return [(None, value)]

    def _plain_spec(self, tensor: torch.Tensor) -> TensorSpec:
        key = tensor.dtype, tensor.shape
        spec = self._specs.get(key)
        if spec is None:
            shape = tuple(tensor.shape)
            spec = self._specs[key] = TensorSpec(dtype_name(tensor.dtype), shape, (0,) * len(shape), shape)
        return spec

    def _shard(self, name: str, tensor: DTensor) -> list[tuple[TensorSpec, LocalBox]]:
        key = tensor.dtype, tensor.shape, tensor.device_mesh, tensor.placements
        if key not in self._shards:
            self._shards[key] = _shard_specs(name, tensor)
        return self._shards[key]

    def _planned_spec(self, item: WriteItem) -> TensorSpec:
        data = item.tensor_data
        assert data is not None, "only tensors plan write items of their own"
        chunk = data.chunk
        return TensorSpec(dtype_name(data.properties.dtype), tuple(data.size), tuple(chunk.offsets), tuple(chunk.sizes))


def _shard_specs(name: str, tensor: DTensor) -> list[tuple[TensorSpec, LocalBox]]:
    """The parts of the tensor that this rank holds."""
    if any(placement.is_partial() for placement in tensor.placements):
        raise UsageError(f"{name!r} is a pending sum over ranks ({tensor.placements}): redistribute it before the save")
    try:
        parts = local_boxes(tensor)
    except UsageError as error:
        raise UsageError(f"{name!r}: {error}") from None
    dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
    return [(TensorSpec(dtype, shape, part.box.offsets, part.box.sizes), part) for part in parts]
