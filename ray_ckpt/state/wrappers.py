"""What really steps: the optimizers and schedulers within the wrappers that frameworks hand out.

A wrapper that is no optimizer of torch's, such as schedulefree's, is taken for what it wraps if it shows nothing else.

A scheduler that shows the state of what it wraps and nothing else, such as accelerate's `AcceleratedScheduler`, is
taken for what it wraps. An optimizer may share the state of another one and show nothing else today, as accelerate's
does, and more once it has stepped: so it saves and loads by its own methods, and is called by the class of what it
wraps for as long as it shows no more.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ray_ckpt.errors import UsageError
from ray_ckpt.state.hyperparameters import MEMBERS, same

_METHODS = ("state_dict", "load_state_dict", "step")


def optimizer_in(given: Any) -> torch.optim.Optimizer:
    """What is given as an optimizer: itself, or what it wraps if it is none and shows nothing else.

    Raises:
        UsageError: it is none, and nothing tells which optimizer it stands for.
    """
    name = f"{type(given).__module__}.{type(given).__qualname__}"
    if isinstance(given, torch.optim.Optimizer):
        if lacking := [needed for needed in ("param_groups", "state") if not hasattr(given, needed)]:
            raise UsageError(
                f"{name} has no {' and no '.join(lacking)}, which every optimizer of torch's has: give the optimizer "
                "that it wraps, and what else it keeps in TrainState(extra=...)"
            )
        return given
    inner = [value for value in getattr(given, "__dict__", {}).values() if isinstance(value, torch.optim.Optimizer)]
    if len(inner) == 1 and _can_step(given) and same(given.state_dict(), inner[0].state_dict()):
        return inner[0]
    raise UsageError(
        f"{name} is no torch.optim.Optimizer, nor shows the state of one that it wraps: give that one, and what else "
        "it keeps in TrainState(extra=...)"
    )


def is_optimizer(value: object) -> bool:
    """Whether it is an optimizer, or steps by one that it holds."""
    if isinstance(value, torch.optim.Optimizer):
        return True
    inner = getattr(value, "__dict__", {}).values() if _can_step(value) else ()
    return any(isinstance(each, torch.optim.Optimizer) for each in inner) and not is_scheduler(value)


def is_scheduler(value: object) -> bool:
    """Whether it is an LR scheduler, or a wrapper of one."""
    return _can_step(value) and optimizer_of(value) is not None


def optimizer_of(scheduler: Any) -> torch.optim.Optimizer | None:
    """The optimizer of a scheduler, or of the one that it wraps; None if there is none."""
    own = getattr(scheduler, "optimizer", None)
    if isinstance(own, torch.optim.Optimizer):
        return _wrapped(own)[-1]
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


class Partitions:
    """The optimizers that step, and the `ZeroRedundancyOptimizer`s that they are each a rank's part of."""

    def __init__(self) -> None:
        self._wholes: dict[int, torch.optim.Optimizer] = {}

    def stepping(self, given: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
        """Those within containers and partitions. A container is an optimizer that has a list of others.

        Raises:
            UsageError: a partition is not known yet.
        """
        for several in vars(given).values():
            if isinstance(several, list) and several and all(isinstance(o, torch.optim.Optimizer) for o in several):
                return [inner for optimizer in several for inner in self.stepping(optimizer)]
        *_, whole, part = given, *_wrapped(given)
        if not _is_partitioned(whole):
            return [given]
        self._wholes[id(part)] = whole
        return [part]

    def whole(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer that has all parameters, of which it has some; itself, if that has them."""
        return self._wholes.get(id(optimizer), optimizer)

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


def stepping(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The innermost of those that share its state."""
    return _wrapped(optimizer)[-1]


def kind(optimizer: torch.optim.Optimizer) -> str:
    """What it is saved as: class names of it and of what it wraps, without wrappers that show nothing else."""
    several = _wrapped(optimizer)
    while len(several) > 1 and same(several[0].state_dict(), several[1].state_dict()):
        del several[0]
    return _kinds(several)[-1]


def kinds(optimizer: torch.optim.Optimizer) -> list[str]:
    """What it loads: what it wraps may have been saved without it, or before it had a state of its own."""
    return _kinds(_wrapped(optimizer))


def _kinds(several: Sequence[torch.optim.Optimizer]) -> list[str]:
    names = [type(each).__qualname__ for each in several]
    return [" over ".join(names[place:]) for place in reversed(range(len(names)))]


def _wrapped(given: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizer, the one that it shares its state with, and so on.

    Raises:
        UsageError: a `ZeroRedundancyOptimizer` has not made its part yet.
    """
    if _is_partitioned(given):
        return [given, _part(given)]
    for inner in vars(given).values():
        if (
            isinstance(inner, torch.optim.Optimizer)
            and given.param_groups is inner.param_groups
            and (given.state is inner.state)
        ):
            return [given, *_wrapped(inner)]
    return [given]


def _part(partitioned: torch.optim.Optimizer) -> torch.optim.Optimizer:
    if not isinstance(part := getattr(partitioned, "optim", None), torch.optim.Optimizer):
        raise UsageError(
            "ZeroRedundancyOptimizer(overlap_with_ddp=True) steps by what is no optimizer with a state_dict: use "
            "overlap_with_ddp=False"
        )
    return part


def _schedulers_within(wrapper: Any) -> Iterator[Any]:
    """What steps like a scheduler among its attributes, and in lists of them."""
    for value in getattr(wrapper, "__dict__", {}).values():
        for inner in value if isinstance(value, (list, tuple)) else [value]:
            if inner is not wrapper and _can_step(inner):
                yield inner


def _can_step(value: object) -> bool:
    others = (torch.Tensor, torch.optim.Optimizer, nn.Module, type)
    return not isinstance(value, others) and all(callable(getattr(value, name, None)) for name in _METHODS)
