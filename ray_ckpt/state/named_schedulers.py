"""LR schedulers, with what they keep per parameter group under parameter names, so that groups may be split by a load.

<scheduler>.kind                       class name, and the keys of its state dict
<scheduler>.<key>                      what is not per group
<scheduler>.groups.<parameter>.<key>   the item of the group that the parameter is in
<scheduler>._schedulers.<n>. ...       the schedulers within a SequentialLR or ChainedScheduler
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ray_ckpt.errors import UsageError
from ray_ckpt.state import sealing
from ray_ckpt.state.hyperparameters import same
from ray_ckpt.state.load_plan import Claim, LoadPlan, SavedState
from ray_ckpt.state.named_optimizers import NamedOptimizers
from ray_ckpt.state.replicated_parts import claim_under, gathered

PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")
"""Keys of schedulers' state dicts that hold one item per parameter group."""

_KIND, _GROUPS, _NESTED = "kind", "groups", "_schedulers"

Schedulers = LRScheduler | Sequence[LRScheduler] | Mapping[str, LRScheduler]
_Names = Mapping[nn.Parameter, Sequence[str]]


class NamedSchedulers:
    """Args:
    schedulers: by name, or in order: the n-th scheduler of each optimizer is called n.
    """

    section = "schedulers"

    def __init__(self, schedulers: Schedulers, optimizers: NamedOptimizers) -> None:
        self._optimizers = optimizers
        self._named = list(_named(schedulers))
        for name, scheduler in self._named:
            if all(scheduler.optimizer is not optimizer for optimizer in optimizers.optimizers):
                raise UsageError(f"scheduler {name!r} belongs to an optimizer that is not in the state: add that too")
        optimizers.scheduled = frozenset(id(scheduler.optimizer) for _, scheduler in self._named)

    def leaves(self) -> dict[str, Any]:
        """Raises:
        UsageError: schedulers that go by one name differ.
        """
        names = self._optimizers.names()
        leaves: dict[str, Any] = {}
        for name, scheduler in self._named:
            found = dict(_leaves(name, scheduler, scheduler.state_dict(), names))
            if differing := [key for key, value in found.items() if key in leaves and not same(leaves[key], value)]:
                raise UsageError(
                    f"the schedulers {name!r} of several optimizers differ in {', '.join(differing)}: give them names, "
                    "as in schedulers={'generator': ..., 'critic': ...}"
                )
            leaves |= found
        return leaves

    def plan(self, saved: SavedState) -> LoadPlan:
        if not saved.wants(self.section):
            return LoadPlan({}, lambda loaded: None)
        names = self._optimizers.names()
        claims: dict[str, Claim] = {}
        problems: list[str] = []
        for name, scheduler in self._named:
            wanted, misfits = _plan(f"{self.section}.{name}", scheduler, names, saved)
            claims |= wanted
            problems += misfits

        def apply(loaded: Mapping[str, torch.Tensor]) -> None:
            leaves = gathered(saved, claims, loaded)
            for name, scheduler in self._named:
                _spread(scheduler, self._optimizers.origins.get(id(scheduler.optimizer), []))
                _load(f"{self.section}.{name}", scheduler, names, saved, leaves)

        return LoadPlan(claims, apply, problems)


def _named(schedulers: Schedulers) -> Iterator[tuple[str, LRScheduler]]:
    if isinstance(schedulers, Mapping):
        yield from schedulers.items()
        return
    counts: dict[int, int] = {}
    for scheduler in schedulers if isinstance(schedulers, Sequence) else [schedulers]:
        count = counts.get(id(scheduler.optimizer), 0)
        counts[id(scheduler.optimizer)] = count + 1
        yield str(count), scheduler


def _leaves(name: str, scheduler: LRScheduler, state: Mapping[str, Any], names: _Names) -> Iterator[tuple[str, Any]]:
    groups = scheduler.optimizer.param_groups
    yield f"{name}.{_KIND}", (type(scheduler).__name__, *sorted(state))
    for key, value in state.items():
        if key == _NESTED:
            for number, (inner, inner_state) in enumerate(zip(_nested(scheduler), value, strict=True)):
                yield from _leaves(f"{name}.{_NESTED}.{number}", inner, inner_state, names)
        elif key in PER_GROUP and len(value) == len(groups):
            for group, item in zip(groups, value, strict=True):
                for parameter in _parameters(group, names):
                    yield from sealing.pack(f"{name}.{_GROUPS}.{parameter}.{key}", item).items()
        else:
            yield from sealing.pack(f"{name}.{key}", value).items()


def _plan(name: str, scheduler: LRScheduler, names: _Names, saved: SavedState) -> tuple[dict[str, Claim], list[str]]:
    """What one scheduler and those within it want of the checkpoint, and why that does not fit."""
    kind = f"{name}.{_KIND}"
    claims = {kind: Claim(kind)}
    problems: list[str] = []
    found = saved.values.get(kind)
    if found is None:
        return claims, problems
    found, *recorded = found if isinstance(found, (list, tuple)) else [found]
    nested = _nested(scheduler)
    keys = _keys(saved, name)
    if found != type(scheduler).__name__ or (_NESTED in keys) != bool(nested):
        return claims, [f"{name} was saved by a {found}, wanted by a {type(scheduler).__name__}"]
    for key in keys - {_KIND, _GROUPS, _NESTED}:
        claims |= claim_under(saved, f"{name}.{key}")
    parameters = [
        f"{name}.{_GROUPS}.{parameter}"
        for group in scheduler.optimizer.param_groups
        for parameter in _parameters(group, names, saved)
    ]
    of_groups = {key for parameter in parameters for key in _keys(saved, parameter)}
    for parameter in parameters:
        claims |= claim_under(saved, parameter)
        lost = of_groups - _keys(saved, parameter)
        claims |= {f"{parameter}.{key}": Claim(f"{parameter}.{key}") for key in lost}
    for key in set(recorded) - keys - of_groups:
        claims[f"{name}.{key}"] = Claim(f"{name}.{key}")
    for number, inner in enumerate(nested):
        wanted, misfits = _plan(f"{name}.{_NESTED}.{number}", inner, names, saved)
        claims |= wanted
        problems += misfits
    return claims, problems


def _load(name: str, scheduler: LRScheduler, names: _Names, saved: SavedState, leaves: Mapping[str, Any]) -> None:
    if f"{name}.{_KIND}" in leaves:
        scheduler.load_state_dict(_state(name, scheduler, names, saved, leaves))


def _state(
    name: str, scheduler: LRScheduler, names: _Names, saved: SavedState, leaves: Mapping[str, Any]
) -> dict[str, Any]:
    """A state dict for `load_state_dict`, its lists fitted to the groups that the optimizer has now."""
    keys = _keys(saved, name) - {_KIND, _GROUPS, _NESTED}
    state = {key: sealing.unpack(f"{name}.{key}", leaves) for key in keys}
    if nested := _nested(scheduler):
        state[_NESTED] = [
            _state(f"{name}.{_NESTED}.{number}", inner, names, saved, leaves) for number, inner in enumerate(nested)
        ]
    live = scheduler.state_dict()
    for key in PER_GROUP:
        if key not in live or key in keys:
            continue
        state[key] = list(live[key])
        for number, group in enumerate(scheduler.optimizer.param_groups):
            for parameter in _parameters(group, names, saved)[:1]:
                place = f"{name}.{_GROUPS}.{parameter}.{key}"
                if any(flat == place or flat.startswith(f"{place}.") for flat in saved.under(place)):
                    state[key][number] = sealing.unpack(place, leaves)
    return state


def _spread(scheduler: LRScheduler, origins: Sequence[int]) -> None:
    """Give each group that was split off a copy of the items of the group that it comes from.

    Args:
        origins: for each group of the optimizer, its group before the load.
    """
    for inner in _nested(scheduler):
        _spread(inner, origins)
    for key in PER_GROUP:
        items = getattr(scheduler, key, None)
        if isinstance(items, list) and origins and len(items) == max(origins) + 1 != len(origins):
            setattr(scheduler, key, [items[origin] for origin in origins])


def _nested(scheduler: LRScheduler) -> list[LRScheduler]:
    return list(getattr(scheduler, _NESTED, ()))


def _keys(saved: SavedState, name: str) -> set[str]:
    start = len(name) + 1
    return {flat[start:].partition(".")[0] for flat in saved.under(name)}


def _parameters(group: Mapping[str, Any], names: _Names, saved: SavedState | None = None) -> list[str]:
    """Names of a group's members; those that the checkpoint has for them, if one is given."""
    members = [name for parameter in group["params"] for name in names[parameter]]
    if saved is None:
        return members
    return [saved.name_of(f"model.{name}").removeprefix("model.") for name in members]
