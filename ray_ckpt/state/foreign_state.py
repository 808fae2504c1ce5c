"""State of a scheduler or a data loader that another program saved, given back through the object's own load.

    names below `schedulers.0`, what the live scheduler shows ── rebuild ──> Rebuilt: a state dict of the same structure

Others save `state_dict()` as it is, flattened: neither the class nor what the lists in it belong to is recorded. So the
live object says what its state looks like, and what is saved has to fit it, key for key.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ray_ckpt.format.manifest import Path
from ray_ckpt.state.group_lists import PER_GROUP, GroupList, split
from ray_ckpt.state.hyperparameters import same
from ray_ckpt.state.load_plan import Claim, SavedState
from ray_ckpt.state.replicated_parts import claim_under
from ray_ckpt.state.sealing import dict_like
from ray_ckpt.text import listed

__all__ = ["Rebuilt", "fit_groups", "misplaced", "rebuild"]

_OF_VERSIONS = frozenset({"verbose", "_get_lr_called_within_step", "_is_initial", "_initial_step", "_init_lr"})
"""Keys of schedulers' state that some versions of torch have and others lack. Nothing depends on them after a step."""


@dataclass(frozen=True)
class _Wanted:
    """Where a tensor belongs that has still to be read."""

    name: str


@dataclass
class Rebuilt:
    """A state as its object would show it."""

    value: Any = None
    tensors: list[str] = field(default_factory=list)
    """Names of the tensors in it; `filled` puts them in."""
    missing: list[str] = field(default_factory=list)
    """Names that the live object has and the checkpoint lacks."""
    unknown: list[str] = field(default_factory=list)
    """Names that the checkpoint has and the live object does not know."""

    @property
    def is_whole(self) -> bool:
        return not self.missing and not self.unknown

    def claims(self, taken: Iterable[str], saved: SavedState) -> dict[str, Claim]:
        """What is wanted of the checkpoint: what was taken, and what is missing."""
        claims = {name: Claim(name) for name in (*taken, *self.missing)}
        for name in self.tensors:
            claims |= claim_under(saved, name)
        return claims

    def filled(self, loaded: Mapping[str, torch.Tensor]) -> Any:
        """The state with its tensors."""
        return _filled(self.value, loaded)


def rebuild(
    saved: SavedState, place: str, live: Any, *, may_grow: bool = False, may_have_tensors: bool = False
) -> Rebuilt:
    """
    Args:
        live: what the object shows now.
        may_grow: whether the saved state may have keys that a fresh object does not show.
        may_have_tensors: whether tensors in it are taken; else they are unknown.
    """
    rebuilt = Rebuilt()
    value = _fitted(saved, place, live, rebuilt, may_grow)
    if rebuilt.tensors and not may_have_tensors:
        rebuilt.unknown += rebuilt.tensors
        rebuilt.tensors.clear()
        value = live
    rebuilt.value = value
    return rebuilt


def _filled(value: Any, loaded: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, _Wanted):
        return loaded[value.name]
    if isinstance(value, Mapping):
        return dict_like(value, {key: _filled(item, loaded) for key, item in value.items()})
    if type(value) in (list, tuple):
        return type(value)(_filled(item, loaded) for item in value)
    return value


def _fitted(saved: SavedState, place: str, live: Any, rebuilt: Rebuilt, may_grow: bool) -> Any:
    if place in saved.values:
        return copy.deepcopy(saved.values[place])
    if place in saved.tensors:
        rebuilt.tensors.append(place)
        return _Wanted(place)
    parts = _parts(saved, place)
    if not parts:
        if not _is_leafless(live):
            rebuilt.missing.append(place)
        return copy.deepcopy(live)
    is_list = all(type(part) is int for part in parts.values())
    if isinstance(live, Mapping) and (live or not is_list):
        return _fitted_dict(saved, place, live, parts, rebuilt, may_grow)
    if isinstance(live, (list, tuple)) and all(part.isdecimal() for part in parts):
        items = [_fitted(saved, f"{place}.{n}", live[n] if n < len(live) else {}, rebuilt, True) for n in _up_to(parts)]
        return items if isinstance(live, list) else tuple(items)
    if may_grow and is_list:
        return [_fitted(saved, f"{place}.{n}", {}, rebuilt, True) for n in _up_to(parts)]
    if may_grow:
        return _fitted_dict(saved, place, {}, parts, rebuilt, may_grow)
    rebuilt.unknown.append(place)
    return live


def _fitted_dict(
    saved: SavedState,
    place: str,
    live: Mapping[Any, Any],
    parts: Mapping[str, str | int],
    rebuilt: Rebuilt,
    may_grow: bool,
) -> Any:
    known = {str(key): key for key in live}
    has_numbers = bool(live) and all(type(key) is int for key in live)
    # Flattened, the keys 5 and "5" are one text: of those that are there, nothing tells which it was.
    is_clear = bool(live) or not any(part.isdecimal() for part in parts)
    found = {}
    for part in dict.fromkeys((*known, *parts)):
        below, is_there = f"{place}.{part}", part in parts
        if part in _OF_VERSIONS and (part not in known or not is_there):
            continue
        if part not in known and not (has_numbers or (may_grow and is_clear)):
            rebuilt.unknown.append(below)
        elif is_there or not has_numbers:
            key = known.get(part, int(part) if has_numbers and part.isdecimal() else part)
            found[key] = _fitted(saved, below, live.get(key, {}), rebuilt, may_grow)
    return dict_like(live, found)


def _parts(saved: SavedState, place: str) -> dict[str, str | int]:
    """What the names below a place go on with, as text -> as the path has it: a number is the place in a list."""
    below = [(name, saved.path_of(name)) for name in saved.under(place) if name != place]
    found = [part for _, path in below if (part := _part_after(path, place)) is not None]
    if not found:  # the paths are not known
        found = [name[len(place) + 1 :].partition(".")[0] for name, _ in below]
    return {str(part): part for part in found}


def _part_after(path: Path, place: str) -> str | int | None:
    """The component of a path that follows a place; None if the place is none that the path goes through."""
    start = 0
    for part in path:
        if start == len(place) + 1:
            return part
        start += len(str(part)) + 1
    return None


def _up_to(parts: Iterable[str]) -> range:
    return range(1 + max(map(int, parts)))


def _is_leafless(value: Any) -> bool:
    """Whether nothing is left of it when it is flattened."""
    if isinstance(value, Mapping):
        return all(_is_leafless(item) for item in value.values())
    return isinstance(value, (list, tuple)) and all(isinstance(item, Mapping) and _is_leafless(item) for item in value)


def fit_groups(name: str, state: Any, num_groups: int, origins: Sequence[int]) -> tuple[Any, list[str]]:
    """A scheduler's state with its lists fitted to the groups of the live optimizer, and what does not fit.

    Args:
        num_groups: groups of the optimizer before the load.
        origins: for each of its groups, which one it was before.
    """
    problems: list[str] = []
    fitted = dict(state)
    for key, value in state.items():
        if (
            isinstance(value, list)
            and value
            and all(isinstance(item, Mapping) and "last_epoch" in item for item in value)
        ):
            within = [fit_groups(f"{name}.{key}.{n}", item, num_groups, origins) for n, item in enumerate(value)]
            fitted[key] = [inner for inner, _ in within]
            problems += [problem for _, misfits in within for problem in misfits]
        elif key in PER_GROUP and isinstance(value, (list, tuple)):
            if len(value) == num_groups:
                fitted[key] = [value[origin] for origin in origins]
            elif value and all(item == value[0] for item in value):
                fitted[key] = [value[0]] * len(origins)
            else:
                problems.append(
                    f"{name}.{key} was saved for {len(value)} parameter groups ({listed(list(value), at_most=4)}), "
                    f"the optimizer has {num_groups}: give it the groups that were saved"
                )
    return fitted, problems


def misplaced(
    name: str, state: Any, groups: Sequence[Sequence[str]], saved: SavedState, is_whole: Container[Any] = ()
) -> list[str]:
    """Lists with an item per group, where the optimizer's groups are in another order than those that were saved.

    Args:
        groups: saved names of the members of each group of the live optimizer.
        is_whole: keys of the state whose lists have other items.
    """
    if not isinstance(state, Mapping):
        return []
    of_groups: dict[GroupList, Any] = {}
    split({key: value for key, value in state.items() if key not in is_whole}, len(groups), of_groups)
    varied = {place: items for place, items in of_groups.items() if any(not same(item, items[0]) for item in items)}
    problems = [
        f"{name}.{place.name} has an item for each parameter group ({listed(list(items), at_most=4)}), and the groups "
        "were saved in another order: give the optimizer the order that was saved"
        for place, items in varied.items()
        if not _is_in_order(groups, saved)
    ]
    for key, hyperparameter in (("base_lrs", "initial_lr"), ("_last_lr", "lr")):
        items = state.get(key)
        if problems or not isinstance(items, list) or len(items) != len(groups):
            continue
        for item, members in zip(items, groups, strict=True):
            places = [f"optim.param_groups.{member}.{hyperparameter}" for member in members]
            if wrong := [saved.values[place] for place in places if saved.values.get(place, item) != item]:
                problems.append(
                    f"{name}.{key} has {item} where the parameter group was saved with {hyperparameter} {wrong[0]}: "
                    "the groups are in another order; give the optimizer the order that was saved"
                )
                break
    return problems


def _is_in_order(groups: Sequence[Sequence[str]], saved: SavedState) -> bool:
    """Whether groups stand in the order in which hyper-parameters of their members were saved."""
    start = "optim.param_groups."
    names = (flat.removeprefix(start).rpartition(".")[0] for flat in saved.values if flat.startswith(start))
    order = {member: place for place, member in enumerate(dict.fromkeys(names))}
    places = [min(known) for members in groups if (known := [order[name] for name in members if name in order])]
    return places == sorted(places)
