"""LR schedulers, with what they keep per parameter group under parameter names, so that groups may be split by a load.

<scheduler>.kind                       class name, and the keys of its state dict
<scheduler>.<key>                      what is not per group
<scheduler>.others                     entries whose keys cannot be part of a name
<scheduler>.groups.<parameter>.<key>   the item of the group that the parameter is in
<scheduler>.groups.<parameter>.of/...  another list with an item per group, as it is
<scheduler>.groups.<parameter>.place   number of the group that the parameter is in, and number of groups
<scheduler>.<key>. ...                 a scheduler within it
<scheduler>.<key>.<n>. ...             one of several, such as those of a SequentialLR
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from ray_ckpt.errors import StateMismatchError, UsageError
from ray_ckpt.state import foreign_state, group_lists, nesting, sealing
from ray_ckpt.state.group_lists import PER_GROUP, GroupList, Place
from ray_ckpt.state.hyperparameters import same, without_numpy
from ray_ckpt.state.load_plan import Claim, LoadPlan, SavedState
from ray_ckpt.state.named_optimizers import NamedOptimizers
from ray_ckpt.state.replicated_parts import claim_under, gathered
from ray_ckpt.state.wrappers import is_scheduler, optimizer_of, stepping, stepping_schedulers
from ray_ckpt.text import listed

_KIND, _GROUPS, _OTHERS, _PLACE = "kind", "groups", "others", "place"
_RESERVED = frozenset({_KIND, _GROUPS, _OTHERS})

Schedulers = LRScheduler | Sequence[LRScheduler] | Mapping[str, LRScheduler]
_Names = Mapping[nn.Parameter, Sequence[str]]


class NamedSchedulers:
    """Args:
    schedulers: by name, or in order: the n-th scheduler of each optimizer is called n.
    """

    section = "schedulers"

    def __init__(self, schedulers: Schedulers, optimizers: NamedOptimizers) -> None:
        self._optimizers = optimizers
        self._named = [_Scheduler(name, scheduler, optimizers) for name, scheduler in _named(schedulers)]
        optimizers.scheduled = frozenset(id(each.optimizer) for each in self._named)

    def leaves(self) -> dict[str, Any]:
        """Raises:
        UsageError: schedulers that go by one name differ.
        """
        names = self._optimizers.names()
        leaves: dict[str, Any] = {}
        for each in self._named:
            found = dict(each.leaves(names))
            if differing := [key for key, value in found.items() if key in leaves and not same(leaves[key], value)]:
                raise UsageError(
                    f"the schedulers {each.name!r} of several optimizers differ in {', '.join(differing)}: give them "
                    "names, as in schedulers={'generator': ..., 'critic': ...}"
                )
            leaves |= found
        return leaves

    def plan(self, saved: SavedState) -> LoadPlan:
        if not saved.wants(self.section):
            return LoadPlan({}, lambda loaded: None)
        names = self._optimizers.names()
        claims: dict[str, Claim] = {}
        problems: list[str] = []
        for each in self._named:
            wanted, misfits = each.plan(saved, names)
            claims |= wanted
            problems += misfits

        def apply(loaded: Mapping[str, torch.Tensor]) -> None:
            leaves = gathered(saved, claims, loaded)
            for each in self._named:
                each.load(saved, names, leaves)

        return LoadPlan(claims, apply, problems)


def _named(schedulers: Schedulers) -> Iterator[tuple[str, Any]]:
    if isinstance(schedulers, Mapping):
        for name, given in schedulers.items():
            inner, *others = stepping_schedulers(given)
            if others:
                raise UsageError(f"schedulers[{name!r}] is several schedulers: give each a name of its own")
            yield name, inner
        return
    counts: dict[int, int] = {}
    for given in schedulers if isinstance(schedulers, Sequence) else [schedulers]:
        for scheduler in stepping_schedulers(given):
            owner = id(optimizer_of(scheduler))
            count = counts.get(owner, 0)
            counts[owner] = count + 1
            yield str(count), scheduler


@dataclass(frozen=True)
class _Inner:
    """A scheduler within another one's state."""

    key: str
    """Key in the state of the outer one."""
    label: str
    """The key, and the place below it where there are several."""
    scheduler: _Scheduler


class _Scheduler:
    """One scheduler, and those within it.

    Args:
        name: the name that its entries begin with, within the section.

    Raises:
        UsageError: its optimizer is not in the state.
    """

    def __init__(self, name: str, scheduler: Any, optimizers: NamedOptimizers) -> None:
        self.name = name
        self._scheduler = scheduler
        self._optimizers = optimizers
        self.optimizer: torch.optim.Optimizer = optimizer_of(scheduler)  # type: ignore[assignment]
        if all(self.optimizer is not stepping(optimizer) for optimizer in optimizers.optimizers):
            raise UsageError(f"scheduler {name!r} belongs to an optimizer that is not in the state: add that too")
        self._foreign: tuple[Any, int] | None = None
        """Another program's state that is to be loaded, and the number of groups that it was fitted to."""

    @property
    def _place(self) -> str:
        """Its name in a checkpoint."""
        return f"{NamedSchedulers.section}.{self.name}"

    @property
    def _kind(self) -> str:
        return type(self._scheduler).__name__

    @property
    def _is_torchs(self) -> bool:
        return type(self._scheduler).__module__ == lr_scheduler.__name__

    def leaves(self, names: _Names) -> Iterator[tuple[str, Any]]:
        shown = nesting.asked(self._place, self._scheduler)
        with nesting.named(self._place, shown):
            state = without_numpy(shown)
        inner = self._inner(state)
        yield f"{self.name}.{_KIND}", (self._kind, *sorted(map(str, state)))
        for each in inner:
            yield from each.scheduler.leaves(names)
        nested = {each.key for each in inner}
        lists: dict[GroupList, Any] = {}
        rest = {key: self._split(key, value, lists) for key, value in state.items() if key not in nested}
        others = {key: rest.pop(key) for key in list(rest) if not sealing.is_component(key) or key in _RESERVED}
        for key, value in (*rest.items(), *({_OTHERS: others} if others else {}).items()):
            if not _is_plain_list(value):
                packed = sealing.pack_whole if key == _OTHERS else sealing.pack
                yield from packed(f"{self.name}.{key}", value).items()
        yield from self._of_groups(lists, names)

    def _split(self, key: Any, value: Any, lists: dict[GroupList, Any]) -> Any:
        """A value without lists of one item per group. torch's own schedulers have them under known keys only."""
        if self._is_torchs and key not in PER_GROUP:
            return value
        return group_lists.split(value, len(self.optimizer.param_groups), lists, (key,))

    def _of_groups(self, lists: Mapping[GroupList, Any], names: _Names) -> Iterator[tuple[str, Any]]:
        groups = self.optimizer.param_groups
        sealed = {place: sealing.pack_whole("", value) for place, value in lists.items() if not _is_plain_list(place)}
        for number, group in enumerate(groups):
            for parameter in _members(group, names):
                below = f"{self.name}.{_GROUPS}.{parameter}"
                for place, items in lists.items():
                    if place not in sealed:
                        yield from sealing.pack(f"{below}.{place.path[0]}", items[number]).items()
                for place, packed in sealed.items():
                    yield from ((f"{below}.of/{place.name}{leaf}", value) for leaf, value in packed.items())
                if sealed:
                    yield f"{below}.{_PLACE}", (number, len(groups))

    def plan(self, saved: SavedState, names: _Names) -> tuple[dict[str, Claim], list[str]]:
        """What it and those within it want of the checkpoint, and why that does not fit."""
        name = self._place
        kind = f"{name}.{_KIND}"
        claims = {kind: Claim(kind)}
        found = saved.values.get(kind)
        if found is None:
            # Only we record what belongs to parameters: then the class is lost.
            is_foreign = saved.under(name) and not saved.under(f"{name}.{_GROUPS}")
            return self._plan_foreign(saved) if is_foreign else (claims, [])
        found, *recorded = found if isinstance(found, (list, tuple)) else [found]
        live = self._scheduler.state_dict()
        inner = self._inner(live)
        keys = _keys(saved, name)
        nested = {key for key in keys - _RESERVED if _is_nested(saved, f"{name}.{key}")}
        if found != self._kind or nested != {each.key for each in inner}:
            within = f" over {listed(sorted(nested))}" if found == self._kind and nested else ""
            return claims, [f"{name} was saved by a {found}{within}, wanted by a {self._kind}"]
        for key in keys - {_KIND, _GROUPS} - nested:
            claims |= claim_under(saved, f"{name}.{key}")
        problems = self._unclear(saved, names, claims, live)
        of_groups, wanted = self._claim_groups(saved, names)
        claims |= wanted
        unknown = {key for key in recorded if not sealing.is_component(key) or key in _RESERVED}
        for key in set(recorded) - keys - of_groups - unknown:
            claims[f"{name}.{key}"] = Claim(f"{name}.{key}")
        if unknown and _OTHERS not in keys:
            claims[f"{name}.{_OTHERS}"] = Claim(f"{name}.{_OTHERS}")
        for each in inner:
            more, misfits = each.scheduler.plan(saved, names)
            claims |= more
            problems += misfits
        return claims, problems

    def _plan_foreign(self, saved: SavedState) -> tuple[dict[str, Claim], list[str]]:
        """Of what another program saved, without the class and without names of parameters."""
        live = without_numpy(self._scheduler.state_dict())
        rebuilt = foreign_state.rebuild(saved, self._place, live)
        num_groups = len(self.optimizer.param_groups)
        problems = foreign_state.fit_groups(self._place, rebuilt.value, num_groups, range(num_groups))[1]
        groups = [_members(group, self._optimizers.names(), saved) for group in self.optimizer.param_groups]
        whole = {key for key in live if self._is_torchs and key not in PER_GROUP}
        problems += foreign_state.misplaced(self._place, rebuilt.value, groups, saved, whole)
        if rebuilt.unknown:
            problems.append(
                f"another kind of scheduler than a {self._kind} was saved as {self._place}: it has "
                f"{listed(rebuilt.unknown, at_most=4)}"
            )
        self._foreign = (rebuilt.value, num_groups) if rebuilt.is_whole and not problems else None
        return rebuilt.claims(saved.under(self._place), saved), problems

    def _claim_groups(self, saved: SavedState, names: _Names) -> tuple[set[str], dict[str, Claim]]:
        """The keys of what is kept per group, and the claims."""
        below = f"{self._place}.{_GROUPS}"
        claims: dict[str, Claim] = {}
        parameters = [
            f"{below}.{parameter}"
            for group in self.optimizer.param_groups
            for parameter in _members(group, names, saved)
        ]
        of_groups = {key for parameter in parameters for key in _keys(saved, parameter)}
        for parameter in parameters:
            claims |= claim_under(saved, parameter)
            lost = of_groups - _keys(saved, parameter)
            claims |= {f"{parameter}.{key}": Claim(f"{parameter}.{key}") for key in lost}
        return of_groups, claims

    def _unclear(
        self, saved: SavedState, names: _Names, claims: Mapping[str, Claim], live: Mapping[str, Any]
    ) -> list[str]:
        """Lists of which nothing tells whether they follow the groups."""
        groups = self.optimizer.param_groups
        places = [
            [place for name in _members(group, names, saved) if (place := self._saved_place(name, saved.values))]
            for group in groups
        ]
        return [
            f"{self._place}: nothing tells whether the items of {'.'.join(map(str, each.path))} follow the parameter "
            f"groups, which are others now than when it was saved: give the optimizer the groups that it had"
            for flat in claims
            for each in group_lists.places_in(saved.values.get(flat))
            if not each.is_certain and group_lists.ambiguous(each.within(live), len(groups), places)
        ]

    def _saved_place(self, parameter: str, values: Mapping[str, Any]) -> Place | None:
        found = values.get(f"{self._place}.{_GROUPS}.{parameter}.{_PLACE}")
        return None if found is None else Place(*found)

    def load(self, saved: SavedState, names: _Names, leaves: Mapping[str, Any]) -> None:
        """Raises:
        StateMismatchError: afterwards it shows something else than what was read.
        """
        live = self._scheduler.state_dict()
        inner = self._inner(live)
        origins = self._optimizers.origins.get(id(self.optimizer), list(range(len(self.optimizer.param_groups))))
        _spread(self._scheduler, origins, live)
        for each in inner:
            each.scheduler.load(saved, names, leaves)
        if self._foreign is not None:
            value, num_groups = self._foreign
            self._foreign = None
            state, _ = foreign_state.fit_groups(self._place, value, num_groups, origins)
            self._scheduler.load_state_dict(state)
            self._check_shown(state)
            return
        if f"{self._place}.{_KIND}" not in leaves:
            return
        state = self._state(saved, names, leaves, live, origins)
        shown = {each.key: live[each.key] for each in inner}
        shown |= {key: self._states_within(key, inner) for key, value in shown.items() if _holds_states(value)}
        self._scheduler.load_state_dict(state | shown)
        self._check_shown(state)

    def _state(
        self,
        saved: SavedState,
        names: _Names,
        leaves: Mapping[str, Any],
        live: Mapping[str, Any],
        origins: Sequence[int],
    ) -> dict[str, Any]:
        """Its state dict, without those within it, the lists in it fitted to the groups that the optimizer has now."""
        name = self._place
        groups = [_members(group, names, saved)[:1] for group in self.optimizer.param_groups]
        keys = {key for key in _keys(saved, name) - {_KIND, _GROUPS} if not _is_nested(saved, f"{name}.{key}")}
        state = {key: sealing.unpack(f"{name}.{key}", leaves) for key in keys}
        state |= state.pop(_OTHERS) if _OTHERS in keys else {}

        def fitted(place: GroupList) -> Any:
            found: list[tuple[Place, Any] | None] = []
            for parameter in (next(iter(members), "") for members in groups):
                at = self._saved_place(parameter, leaves)
                items = f"{name}.{_GROUPS}.{parameter}.of/{place.name}"
                found.append((at, sealing.unpack(items, leaves)) if at and items in leaves else None)
            return group_lists.fit(place, found, place.within(live), origins)

        state = {key: group_lists.join(value, fitted) for key, value in state.items()}
        now = self._scheduler.state_dict()
        for key in PER_GROUP:
            if key not in now or key in keys or type(now[key]) is not list:
                continue
            state[key] = list(now[key])
            for number, members in enumerate(groups):
                for parameter in members:
                    place = f"{name}.{_GROUPS}.{parameter}.{key}"
                    if saved.under(place) and any(flat in leaves for flat in saved.under(place)):
                        state[key][number] = sealing.unpack(place, leaves)
        return state

    def _inner(self, state: Mapping[Any, Any]) -> list[_Inner]:
        """The schedulers in its state, and those whose states it shows as torch's SequentialLR does."""
        found = []
        for key, value in state.items():
            objects = getattr(self._scheduler, key, None) if _holds_states(value) else value
            several = objects if isinstance(objects, (list, tuple)) else [objects]
            if not sealing.is_component(key) or not several or not all(map(is_scheduler, several)):
                continue
            for number, given in enumerate(several):
                label = key if several is not objects else f"{key}.{number}"
                [inner] = stepping_schedulers(given)
                found.append(_Inner(key, label, _Scheduler(f"{self.name}.{label}", inner, self._optimizers)))
        return found

    def _states_within(self, key: str, inner: Sequence[_Inner]) -> list[Any]:
        return [each.scheduler._scheduler.state_dict() for each in inner if each.key == key]

    def _check_shown(self, loaded: Mapping[Any, Any]) -> None:
        shown = self._scheduler.state_dict()
        wrong = [
            str(key) for key, value in loaded.items() if key not in shown or not sealing.is_same(value, shown[key])
        ]
        if wrong:
            raise StateMismatchError(
                f"after the load {self._place} ({self._kind}) does not show what was read as "
                f"{listed(wrong, at_most=4)}: its own load_state_dict makes something else of it"
            )


def _holds_states(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_plain_list(value: Any) -> bool:
    """Whether it is a list that goes item by item, which its name alone tells to have one per group."""
    return isinstance(value, GroupList) and value.kind == "list" and value.is_certain and len(value.path) == 1


def _is_nested(saved: SavedState, place: str) -> bool:
    return f"{place}.{_KIND}" in saved or f"{place}.0.{_KIND}" in saved


def _spread(scheduler: Any, origins: Sequence[int], state: Mapping[Any, Any]) -> None:
    """Give each group that was split off a copy of the items of the group that it comes from.

    Args:
        origins: for each group of the optimizer, its group before the load.
        state: of the scheduler. What is in it is loaded, but for what its name tells to have one item per group.
    """
    num_live = max(origins, default=-1) + 1
    if num_live == len(origins):
        return
    is_own = type(scheduler).__module__ != lr_scheduler.__name__
    for key, items in list(getattr(scheduler, "__dict__", {}).items()):
        follows = key in PER_GROUP or (is_own and key not in state)
        if follows and type(items) in (list, tuple) and len(items) == num_live and not any(map(is_scheduler, items)):
            setattr(scheduler, key, type(items)(items[origin] for origin in origins))


def _keys(saved: SavedState, name: str) -> set[str]:
    start = len(name) + 1
    return {flat[start:].partition(".")[0] for flat in saved.under(name)}


def _members(group: Mapping[str, Any], names: _Names, saved: SavedState | None = None) -> list[str]:
    """Names of a group's members; those that the checkpoint has for them, if one is given."""
    members = [name for parameter in group["params"] for name in names[parameter]]
    if saved is None:
        return members
    return [saved.name_of(f"model.{name}").removeprefix("model.") for name in members]
