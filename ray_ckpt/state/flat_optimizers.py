"""Optimizers of parameters that FSDP1 has flattened, by the names and as the DTensors of the original ones."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ray_ckpt.errors import UsageError
from ray_ckpt.format.wrappers import is_made_of_others
from ray_ckpt.state import hyperparameters
from ray_ckpt.state.named_model import sharded_state_dicts
from ray_ckpt.state.own_optimizers import states_in
from ray_ckpt.state.wrappers import stepping


def flat_states(
    flat: FullyShardedDataParallel, optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, Sequence[str]]
) -> dict[str, Mapping[str, Any]]:
    """Original name -> state as DTensors, of an optimizer of parameters that FSDP1 has flattened. Collective."""
    check_elementwise(optimizer)
    state_dict = optimizer.state_dict()
    if not states_in(state_dict) and "state" not in state_dict:
        raise UsageError(
            f"under FSDP1 the state_dict of {type(optimizer).__name__}, which is not of torch's form, cannot be told "
            "apart by parameter: use fully_shard, or the optimizer that it wraps"
        )
    blank = _fill_blanks(optimizer, state_dict["state"], names)
    with sharded_state_dicts(flat), _quiet():
        converted = FullyShardedDataParallel.optim_state_dict(flat, optimizer, state_dict)
    states = {name.replace("_orig_mod.", ""): state for name, state in converted["state"].items() if state}
    return {name: state for name, state in states.items() if name not in blank}


def _fill_blanks(
    optimizer: torch.optim.Optimizer,
    states: dict[int, dict[str, Any]],
    names: Mapping[nn.Parameter, Sequence[str]],
) -> set[str]:
    """Put a stand-in where no rank remembers anything of a parameter, and return the names of such parameters.

    torch converts the state of what was flattened together all at once, or not at all.
    """
    remembered = {
        name for number, p in enumerate(hyperparameters.members(optimizer)) if states.get(number) for name in names[p]
    }
    of_ranks: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(of_ranks, remembered)
    anywhere = set().union(*of_ranks)
    example: dict[str, Any] = next((state for state in states.values() if state), {})
    blank: set[str] = set()
    for number, parameter in enumerate(hyperparameters.members(optimizer)):
        if anywhere and not anywhere.intersection(names[parameter]):
            blank.update(names[parameter])
            states[number] = {
                key: torch.zeros_like(parameter) if isinstance(value, torch.Tensor) and value.dim() else value
                for key, value in example.items()
            }
    return blank


def check_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Raises:
    UsageError: what it remembers of flattened pieces of parameters fits no other layout.
    """
    kinds = (torch.optim.Adafactor, torch.optim.LBFGS)
    if isinstance(stepping(optimizer), kinds) or any(map(_has_other_tensors, optimizer.state.items())):
        raise UsageError(
            f"under FSDP1 {type(stepping(optimizer)).__name__} works on flattened pieces of the parameters, and what "
            "it remembers of them fits no other layout: use fully_shard, DDP, or another optimizer"
        )


def _has_other_tensors(item: tuple[Any, Any]) -> bool:
    """Whether the state of a flattened piece has tensors that torch cannot take apart along with it."""
    parameter, state = item
    if not isinstance(parameter, torch.Tensor) or not isinstance(state, Mapping):
        return False
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    return any(
        is_made_of_others(tensor) or (tensor.dim() and tensor.numel() != parameter.numel()) for tensor in tensors
    )


def load_flat(
    flat: FullyShardedDataParallel,
    optimizer: torch.optim.Optimizer,
    names: Mapping[nn.Parameter, Sequence[str]],
    states: Mapping[str, Mapping[str, Any]],
    others: Mapping[str, Any],
) -> None:
    """The inverse of `flat_states`. Collective.

    Args:
        others: what else is in its state dict.
    """
    groups = [
        {**hyperparameters.of_group(group), "params": [name for member in group["params"] for name in names[member]]}
        for group in optimizer.param_groups
    ]
    state_dict = {"state": {name: state for name, state in states.items() if state}, "param_groups": groups}
    with sharded_state_dicts(flat), _quiet():
        converted = FullyShardedDataParallel.optim_state_dict_to_load(flat, optimizer, state_dict)
    optimizer.load_state_dict({**converted, **others})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings about its own use of what it has deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
