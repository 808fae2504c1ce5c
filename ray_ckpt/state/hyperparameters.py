"""Hyper-parameters of optimizers by parameter name: compared, grouped by their values, and set.

torch fills a parameter group of the target from the *first* name in it, so one group over four pipeline stages would
silently take stage 0's learning rate. Here groups are split until each holds one distinct set of saved values.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ray_ckpt.format.torch_internals import local_tensor
from ray_ckpt.text import listed

Values = Mapping[str, Any]
"""Hyper-parameter name -> value."""

MEMBERS = frozenset({"params", "param_names"})
"""Keys of a parameter group that list its members instead of holding a hyper-parameter."""

IMPLEMENTATION = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Hyper-parameters that choose how a step is computed, not what it computes: saved, but the target keeps its own."""

IDENTIFYING = frozenset({"decoupled_weight_decay"})
"""Hyper-parameters that tell one kind of optimizer from another (Adam from AdamW): saved and live ones must agree."""


def members(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """All parameters of an optimizer, in the order in which its own state dict numbers them."""
    for group in optimizer.param_groups:
        yield from group["params"]


def of_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of a parameter group."""
    return {key: value for key, value in group.items() if key not in MEMBERS}


def required_names(defaults: Mapping[str, Any]) -> list[str]:
    """The hyper-parameters that a checkpoint must have: those with a number. Later versions of torch added flags."""
    return [key for key, value in of_group(defaults).items() if value is not None and not isinstance(value, bool)]


def find_problems(
    kind: str, group: Mapping[str, Any], required: Sequence[str], saved: Mapping[str, Values]
) -> list[str]:
    """Say why the saved values cannot belong to this optimizer; an empty list if they can.

    Args:
        kind: class name of the optimizer, for the message.
        group: live parameter group.
        required: hyper-parameters that every optimizer of this kind has.
        saved: parameter name -> saved hyper-parameters, for the members of the group that have any.
    """
    problems = []
    lacking: dict[str, list[str]] = {}
    for name, values in saved.items():
        for key in required:
            if key in group and key not in values:
                lacking.setdefault(key, []).append(name)
    for key, names in lacking.items():
        problems.append(
            f"another kind of optimizer than {kind} was saved: it has no {key!r} for {listed(names, at_most=4)}"
        )
    for key in IDENTIFYING & group.keys():
        if names := [name for name, values in saved.items() if key in values and values[key] != group[key]]:
            found = saved[names[0]][key]
            problems.append(
                f"another kind of optimizer than {kind} was saved: {key}={found} for {listed(names, at_most=4)}"
            )
    return problems


def find_doubts(kind: str, group: Mapping[str, Any], saved: Mapping[str, Values]) -> list[str]:
    """Say why the saved values may be another kind's: it has hyper-parameters of torch's that this one has not."""
    found = {key: name for name, values in saved.items() for key in values if key in _telling() and key not in group}
    if not found:
        return []
    return [
        f"another kind of optimizer than {kind} was saved, as it has {listed(sorted(found), at_most=4)} for "
        f"{listed(sorted(set(found.values())), at_most=4)}"
    ]


@functools.cache
def _telling() -> frozenset[str]:
    """The hyper-parameters by which torch's kinds of optimizers differ, without those that later versions added."""
    kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type)]
    kinds = [kind for kind in kinds if issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer]
    names = {name for kind in kinds for name in inspect.signature(kind).parameters}
    return frozenset(names - IMPLEMENTATION - IDENTIFYING - {"params", "lr", "weight_decay", "maximize"})


def grouped_by_values(saved: Mapping[str, Values]) -> list[tuple[list[str], Values]]:
    """Names with equal values, and those values without `IMPLEMENTATION`, in order of first appearance."""
    parts: list[tuple[list[str], Values]] = []
    for name, values in saved.items():
        learned = {key: value for key, value in values.items() if key not in IMPLEMENTATION}
        for members, common in parts:
            if same(common, learned):
                members.append(name)
                break
        else:
            parts.append(([name], learned))
    return parts


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal. Tensors are compared by their elements, DTensors by those on this rank."""
    if one is other:
        return True
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, DTensor) and isinstance(other, DTensor):
        # Of whole ones torch would ask the other ranks, which may not be here.
        return same(local_tensor(one), local_tensor(other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def without_numpy(value: Any) -> Any:
    """Scalars of NumPy's as those of Python's where it computes alike with both. Of others, as of a `float32`, it
    rounds otherwise: they stay."""
    numpy = sys.modules.get("numpy")
    if numpy and isinstance(value, (numpy.bool_, numpy.int64, numpy.float64, numpy.complex128, numpy.str_)):
        return value.item()
    if type(value) is dict:
        return {key: without_numpy(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(without_numpy, value))
    return value


def conflict(parts: Sequence[tuple[Sequence[str], Values]], advice: str) -> str:
    """The message for a group whose members were saved with different values and that cannot be split."""
    differing = sorted({key for _, values in parts for key in values if not same(values[key], parts[0][1].get(key))})
    found = "; ".join(
        f"{', '.join(names)}: " + ", ".join(f"{key}={values.get(key)}" for key in differing) for names, values in parts
    )
    return (
        "one parameter group of the optimizer holds parameters that were saved with different hyper-parameters "
        f"({found}). {advice}"
    )


def adopt(group: dict[str, Any], values: Values) -> None:
    """Set a group's hyper-parameters. A tensor stays the tensor that it is, as captured graphs read its memory."""
    for key, value in values.items():
        live = group.get(key)
        if isinstance(live, torch.Tensor):
            with torch.no_grad():
                live.copy_(torch.as_tensor(value))
        elif isinstance(value, torch.Tensor) and isinstance(live, (int, float)):
            group[key] = value.item()
        else:
            group[key] = value
