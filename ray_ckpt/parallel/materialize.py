"""Memory and initial values for a model that was built on the meta device: what this rank holds, and no more.

    skeleton = copy of the whole model on meta   before anything is split
    wrap                                         its parameters become shards, still on meta
    allocate(model, device)                      memory for the shards
    set_initial_values(model, skeleton, seed)    module by module: the values of the whole module, then this shard

Values depend on the seed and on each module's name only, so every layout starts from the same model.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ray_ckpt.format.initial_values import initializer
from ray_ckpt.format.shards import local_boxes
from ray_ckpt.format.torch_internals import local_tensor, replace_tensors, with_own_tensors


def materialize(whole: nn.Module, device: torch.device, seed: int) -> Callable[[], None]:
    """Give a whole model its memory and its initial values, on this process alone.

    Returns:
        Sets the initial values once more.
    """
    skeleton, tied = copy.deepcopy(whole), tied_names(whole)
    allocate(whole, device, tied)
    set_values = partial(set_initial_values, whole, skeleton, tied, seed)
    set_values()
    return set_values


def tied_names(model: nn.Module) -> dict[str, str]:
    """Weights that share memory: every further name -> the first one."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        canonical = first.setdefault(id(parameter), name)
        if canonical != name:
            tied[name] = canonical
    return tied


def allocate(model: nn.Module, device: torch.device, tied: Mapping[str, str]) -> None:
    """Give every tensor on meta memory of undefined content; tied weights share theirs.

    Args:
        tied: name -> the name of the weight whose memory it shares, as `tied_names` has it.
    """
    replace_tensors(model, lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    tie(model, tied)


def tie(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Make tied weights one parameter again, after each was replaced separately."""
    for alias, canonical in tied.items():
        if _has(model, alias) and _has(model, canonical):
            parent, _, name = alias.rpartition(".")
            setattr(model.get_submodule(parent), name, model.get_parameter(canonical))


def set_initial_values(
    model: nn.Module, skeleton: nn.Module, tied: Mapping[str, str], seed: int, *, parameters: bool = True
) -> None:
    """Set the initial values of what this rank holds. One module at a time is whole in memory.

    Args:
        model: a part of the whole model, whose parameters may be shards.
        skeleton: the whole model on meta, as it was before it was split.
        parameters: whether to set parameters too; buffers that are not saved have to be set in any case.
    """
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False)) if parameters else {}
        buffers = dict(module.named_buffers(recurse=False))
        if not own and not buffers:
            continue
        values = values_of(skeleton, name, seed, _device_of(module))
        for key, parameter in own.items():
            canonical = tied.get(_join(name, key))
            if canonical is None:
                _copy_shard(parameter, values[key])
            elif not _has(model, canonical):
                # The canonical weight is on another stage, and starts from the same values there.
                home, _, own_key = canonical.rpartition(".")
                _copy_shard(parameter, values_of(skeleton, home, seed, _device_of(module))[own_key])
        for key, buffer in buffers.items():
            buffer.copy_(values[key])


@torch.no_grad()
def values_of(skeleton: nn.Module, name: str, seed: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The initial values of the parameters and buffers that a module of the whole model owns itself, by their names."""
    module = with_own_tensors(skeleton.get_submodule(name), lambda tensor: torch.empty_like(tensor, device=device))
    reset = initializer(skeleton, module)
    assert reset is not None, "build_on_meta has checked that every module can be initialized"
    torch.manual_seed(seed + zlib.crc32(name.encode()))
    reset()
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))


def owns_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))


@torch.no_grad()
def _copy_shard(parameter: nn.Parameter, whole: torch.Tensor) -> None:
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    for part in local_boxes(parameter):
        values = whole
        for dim, (offset, size) in enumerate(zip(part.box.offsets, part.box.sizes, strict=True)):
            values = values.narrow(dim, offset, size)
        part.of(local_tensor(parameter)).copy_(values)


def _device_of(module: nn.Module) -> torch.device:
    return next(tensor.device for group in (module.parameters(False), module.buffers(False)) for tensor in group)


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_parameter(name)
    except AttributeError:
        return False
    return True


def _join(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key
