"""What really steps: the optimizers and schedulers within the wrappers that frameworks hand out.

A wrapper that shows the state of what it wraps and nothing else, such as accelerate's `AcceleratedOptimizer` and
`AcceleratedScheduler`, is taken for what it wraps. One with a state of its own stays what it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ray_ckpt.errors import UsageError
from ray_ckpt.state.hyperparameters import MEMBERS, same

_METHODS = ("state_dict", "load_state_dict", "step")


def is_scheduler(value: object) -> bool:
    """Whether it is an LR scheduler, or a wrapper of one."""
    return _can_step(value) and optimizer_of(value) is not None


def optimizer_of(scheduler: Any) -> torch.optim.Optimizer | None:
    """The optimizer of a scheduler, or of the one that it wraps; None if there is none."""
    own = getattr(scheduler, "optimizer", None)
    if isinstance(own, torch.optim.Optimizer):
        return stepping_optimizer(own)
    return next((found for inner in _schedulers_within(scheduler) if (found := optimizer_of(inner)) is not None), None)


def stepping_schedulers(given: Any) -> list[Any]:
    """The schedulers that a scheduler, a wrapper of one, or a container of several stands for.

    Raises:
        UsageError: it is none of these.
    """
    if not is_scheduler(given):
        kind = type(given)
        raise UsageError(
            f"{kind.__module__}.{kind.__qualname__} is no LR scheduler: it has no state_dict, load_state_dict, step or "
            "optimizer. If it wraps one, give that"
        )
    within = list(_schedulers_within(given))
    if within and same(given.state_dict(), within[0].state_dict()):
        return [scheduler for inner in within for scheduler in stepping_schedulers(inner)]
    return [given]


def stepping_optimizer(given: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that has the state, within wrappers that add nothing to it.

    Raises:
        UsageError: a `ZeroRedundancyOptimizer` has not made it yet.
    """
    if _is_partitioned(given):
        if not isinstance(part := getattr(given, "optim", None), torch.optim.Optimizer):
            raise UsageError(
                "ZeroRedundancyOptimizer(overlap_with_ddp=True) steps by what is no optimizer with a state_dict: use "
                "overlap_with_ddp=False"
            )
        return part
    for inner in vars(given).values():
        if isinstance(inner, torch.optim.Optimizer) and _shows_only(given, inner):
            return stepping_optimizer(inner)
    return given


class Partitions:
    """The optimizers that really step, and the `ZeroRedundancyOptimizer`s that they are each a rank's part of."""

    def __init__(self) -> None:
        self._wholes: dict[int, torch.optim.Optimizer] = {}
        self._wrappers: dict[int, str] = {}

    def stepping(self, given: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
        """Those within wrappers, containers and partitions. A container is an optimizer that has a list of others.

        Raises:
            UsageError: a partition is not known yet.
        """
        for several in vars(given).values():
            if isinstance(several, list) and several and all(isinstance(o, torch.optim.Optimizer) for o in several):
                return [inner for optimizer in several for inner in self.stepping(optimizer)]
        inner = stepping_optimizer(given)
        self._wrappers[id(inner)] = type(given).__qualname__
        if inner is not given and _is_partitioned(given):
            self._wholes[id(inner)] = given
        return [inner]

    def whole(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer that has all parameters, of which it has some; itself, if that has them."""
        return self._wholes.get(id(optimizer), optimizer)

    def kinds(self, optimizer: torch.optim.Optimizer) -> tuple[str, str]:
        """Names of its class, and of the outermost wrapper's. Some wrappers have a state of their own as soon as they
        have stepped, and are then what is saved."""
        own = type(optimizer).__qualname__
        return own, self._wrappers.get(id(optimizer), own)

    def take_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Give a part the hyper-parameters of the whole, as the whole itself does before it steps."""
        _copy_groups(self.whole(optimizer), optimizer)

    def give_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the whole the hyper-parameters of its part."""
        _copy_groups(optimizer, self.whole(optimizer))


def _copy_groups(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    if source is not target:
        for one, other in zip(source.param_groups, target.param_groups, strict=True):
            if one["params"] and other["params"]:
                other |= {key: value for key, value in one.items() if key not in MEMBERS}


def _is_partitioned(given: torch.optim.Optimizer) -> bool:
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    return zero is not None and isinstance(given, zero.ZeroRedundancyOptimizer)


def _shows_only(wrapper: torch.optim.Optimizer, inner: torch.optim.Optimizer) -> bool:
    return (
        wrapper.param_groups is inner.param_groups
        and wrapper.state is inner.state
        and same(wrapper.state_dict(), inner.state_dict())
    )


def _schedulers_within(wrapper: Any) -> Iterator[Any]:
    """What steps like a scheduler among its attributes, and in lists of them."""
    for value in getattr(wrapper, "__dict__", {}).values():
        for inner in value if isinstance(value, (list, tuple)) else [value]:
            if inner is not wrapper and _can_step(inner):
                yield inner


def _can_step(value: object) -> bool:
    others = (torch.Tensor, torch.optim.Optimizer, nn.Module, type)
    return not isinstance(value, others) and all(callable(getattr(value, name, None)) for name in _METHODS)
