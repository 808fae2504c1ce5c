"""Expert parallel: every rank of the `ep` axis holds some of a layer's experts and sees all tokens.

    hidden ──┬─ rank 0: experts 0, 1 ──┐
             └─ rank 1: experts 2, 3 ──┴─ sum ──> hidden

A layer of experts holds its weights as parameters whose dim 0 counts experts, keeps their number in `num_experts`, and
is called as `forward(hidden [tokens, dim], expert_of [tokens, k], weight_of [tokens, k])`, where the index
`num_experts` stands for no expert: transformers' mixture-of-experts layers are like that. Its weights become DTensors,
`Shard(0)` over `ep`.

What enters is a copy per rank and what leaves a sum over ranks, so backwards the gradients of what enters are summed:
Megatron's f and g (https://arxiv.org/abs/1909.08053, section 3).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ray_ckpt.errors import UsageError


def layers_of_experts(model: nn.Module, num_ranks: int, *, required: bool = True) -> list[nn.Module]:
    """Modules with `num_experts` whose own parameters have three dims, the first of which counts experts.

    Raises:
        UsageError: there is none although one is required, or its experts cannot be shared out evenly.
    """
    found = [
        module
        for module in model.modules()
        if isinstance(num := getattr(module, "num_experts", None), int)
        and (own := list(module.parameters(recurse=False)))
        and all(parameter.dim() == 3 and parameter.shape[0] == num for parameter in own)
    ]
    if required and not found:
        raise UsageError(f"{type(model).__name__} has no layer of experts to split over {num_ranks} ranks")
    for experts in found:
        if _count(experts) % num_ranks:
            raise UsageError(
                f"the {_count(experts)} experts of {type(experts).__name__} cannot be shared out among {num_ranks} "
                "ranks: their number must be a multiple"
            )
    return found


def split_experts(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Give each rank of a one-axis mesh its share of a layer's experts."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        shard = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(shard, parameter.requires_grad))
    num_local = _count(experts) // mesh.size()
    first = mesh.get_local_rank() * num_local
    local: Any = copy.copy(experts)
    local.num_experts = num_local
    group = mesh.get_group()

    def forward(hidden: torch.Tensor, expert_of: torch.Tensor, weight_of: torch.Tensor) -> torch.Tensor:
        mine = (expert_of >= first) & (expert_of < first + num_local)
        here = torch.where(mine, expert_of - first, num_local)
        weights = {name: _local(parameter) for name, parameter in experts.named_parameters(recurse=False)}
        inputs = _Copy.apply(hidden, group), here, _Copy.apply(weight_of, group)  # type: ignore[no-untyped-call]
        total: torch.Tensor = _Sum.apply(  # type: ignore[no-untyped-call]
            torch.func.functional_call(local, weights, inputs), group
        )
        return total

    experts.forward = forward


def _count(experts: nn.Module) -> int:
    return experts.num_experts  # type: ignore[return-value]


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class _Copy(torch.autograd.Function):
    """The same on every rank; backwards the gradients are summed."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Sum(torch.autograd.Function):
    """Sum over the ranks; backwards every rank gets the whole gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = tensor.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None
