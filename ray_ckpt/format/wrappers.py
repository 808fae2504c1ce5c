"""Tensors that are made of other tensors: which they are, of what, and new ones like them.

`torch.utils._python_dispatch` calls them traceable wrapper subclasses: `__tensor_flatten__` names their inner tensors,
and `__tensor_unflatten__` makes one of such. They have no memory of their own. A DTensor counts by its local tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from ray_ckpt.errors import UsageError
from ray_ckpt.format.memory import fault
from ray_ckpt.format.torch_internals import is_wrapper, local_tensor, placed

Nodes = dict[str, torch.Tensor]
"""Name below a tensor's -> each tensor that it is made of, at any depth; the empty name is itself."""

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_made_of_others(tensor: torch.Tensor) -> bool:
    """Whether the tensor, or this rank's shard of it, has no elements but those of its inner tensors."""
    if type(tensor) in _PLAIN:
        return False
    local = local_tensor(tensor)
    return type(local) not in _PLAIN and is_wrapper(local)


def is_inner_wrapper(tensor: torch.Tensor) -> bool:
    """Whether an inner tensor is to be taken apart again; a DTensor of plain elements is not."""
    return not isinstance(tensor, DTensor) and is_made_of_others(tensor)


def flatten(tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], Any]:
    """Attribute -> inner tensor, and the context.

    Raises:
        UsageError: there are none, or they are no tensors.
    """
    attributes, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = {attribute: getattr(tensor, attribute, None) for attribute in attributes}
    if wrong := [attribute for attribute, value in inner.items() if not isinstance(value, torch.Tensor)]:
        raise UsageError(f"its __tensor_flatten__ names {wrong[0]!r}, which is no tensor")
    if not inner:
        raise UsageError("its __tensor_flatten__ names no tensors")
    return inner, context  # type: ignore[return-value]


def nodes_of(tensor: torch.Tensor) -> Nodes:
    """The tensor and all that it is made of.

    Raises:
        UsageError: as `flatten`.
    """
    nodes = {"": tensor}
    for attribute, inner in flatten(tensor)[0].items():
        below = nodes_of(inner) if is_inner_wrapper(inner) else {"": inner}
        nodes |= {join(attribute, name): node for name, node in below.items()}
    return nodes


def join(attribute: str, name: str) -> str:
    return f"{attribute}.{name}" if name else attribute


def are_alike(one: torch.Tensor, other: torch.Tensor, are_parts: Callable[[torch.Tensor, torch.Tensor], bool]) -> bool:
    """Whether two tensors are alike, whatever they are made of; of DTensors, the shards.

    Args:
        are_parts: whether two that are made of no others are.
    """
    one, other = local_tensor(one), local_tensor(other)
    if is_made_of_others(one) or is_made_of_others(other):
        if type(one) is not type(other):
            return False
        parts, others = flatten(one)[0], flatten(other)[0]
        return parts.keys() == others.keys() and all(
            are_alike(part, others[name], are_parts) for name, part in parts.items()
        )
    return are_parts(one, other)


def are_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are one memory, or hold the same bits, whatever they are made of; of DTensors, the shards."""
    return are_alike(one, other, _have_same_bits)


def _have_same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape) or fault(one) or fault(other):
        return False
    lying = [(part.data_ptr(), part.stride(), part.is_conj(), part.is_neg()) for part in (one, other)]
    if lying[0] == lying[1]:
        return True
    # By their bits, as a NaN is not equal to itself.
    resolved = [part.detach().resolve_conj().resolve_neg() for part in (one, other.to(one.device))]
    return torch.equal(*(part.contiguous().reshape(-1).view(torch.uint8) for part in resolved))


class FilledInPlace(TorchFunctionMode):
    """Within it, a tensor that is made of others is not copied onto itself: some cannot be, or are made anew by it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_copy = func is torch.Tensor.copy_ and len(args) > 1 and isinstance(args[1], torch.Tensor)
        if is_copy and is_made_of_others(args[0]) and are_same(args[0], args[1]):
            return args[0]
        return func(*args, **(kwargs or {}))


def with_memory(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A new tensor like this one, with uninitialized memory on the device, whatever it is made of."""
    if not is_made_of_others(tensor):
        return torch.empty_like(tensor, device=device)
    local = local_tensor(tensor)
    parts, context = flatten(local)
    inner = {attribute: with_memory(part.detach(), device) for attribute, part in parts.items()}
    made = type(local).__tensor_unflatten__(inner, _moved(context, device), local.shape, local.stride())  # type: ignore[attr-defined]
    return placed_like(tensor, made)


def plain_like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized tensor of plain elements, of the shape and sharding of this one."""
    if not is_made_of_others(tensor):
        return torch.empty_like(tensor, dtype=dtype)
    local = local_tensor(tensor)
    return placed_like(tensor, torch.empty(local.shape, dtype=dtype, device=local.device))


def placed_like(tensor: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A DTensor of this local tensor, sharded as the other one is; the local tensor itself if that is none."""
    return placed(local, tensor.device_mesh, tensor.placements, tensor.shape) if isinstance(tensor, DTensor) else local


def _moved(context: Any, device: torch.device) -> Any:
    """The context of a tensor on another device."""
    if isinstance(context, torch.device):
        return device
    if type(context) in (list, tuple):
        return type(context)(_moved(item, device) for item in context)
    if type(context) is dict:
        return {key: _moved(item, device) for key, item in context.items()}
    return context
