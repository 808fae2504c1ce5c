"""The state of LR schedulers as `scheduler.load_state_dict` takes it: lists with an item per parameter group again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_ckpt.conversion.optimizers import of_parameters
from ray_ckpt.state import sealing
from ray_ckpt.state.group_lists import places_in

__all__ = ["scheduler_states"]

_KIND, _GROUPS, _OTHERS = "kind", "groups", "others"


def scheduler_states(
    leaves: Mapping[str, Any], groups: Sequence[Sequence[str]]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Name -> state, and what cannot be told, with the reason.

    Args:
        leaves: of our section `schedulers`.
        groups: parameters of each group of the optimizer.
    """
    states: dict[str, dict[str, Any]] = {}
    lacking: list[str] = []
    for name in dict.fromkeys(flat.partition(".")[0] for flat in leaves):
        below = {flat[len(name) + 1 :]: leaf for flat, leaf in leaves.items() if flat.startswith(f"{name}.")}
        if any(".of/" in key or any(places_in(leaf)) for key, leaf in below.items()):
            lacking.append(f"the scheduler {name}: it keeps lists by group that have no place in torch's form")
        else:
            states[name] = _state(below, groups)
    return states, lacking


def _state(leaves: Mapping[str, Any], groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        key, dot, rest = name.partition(".")
        if dot:
            below.setdefault(key, {})[rest] = leaf
        elif key == _OTHERS:
            state |= sealing.unpack(_OTHERS, leaves)
        elif key != _KIND:
            state[key] = sealing.unpack(key, leaves)
    for key, inner in below.items():
        if key == _GROUPS:
            state |= _per_group(inner, groups)
        elif _KIND in inner:
            state[key] = _state(inner, groups)
        elif key not in state and any(name.partition(".")[2] == _KIND for name in inner):
            numbers = sorted({int(name.partition(".")[0]) for name in inner})
            state[key] = [
                _state(
                    {name[len(str(n)) + 1 :]: leaf for name, leaf in inner.items() if name.startswith(f"{n}.")}, groups
                )
                for n in numbers
            ]
        elif key not in state and key != _OTHERS:
            state[key] = sealing.unpack(key, leaves)
    return state


def _per_group(leaves: Mapping[str, Any], groups: Sequence[Sequence[str]]) -> dict[str, list[Any]]:
    """Key -> one item per group, of the groups that the scheduler knows."""
    names = [name for group in groups for name in group]
    found = of_parameters({f"{_GROUPS}.{name}": leaf for name, leaf in leaves.items()}, _GROUPS, names)
    lists: dict[str, list[Any]] = {}
    for group in groups:
        of_group = found[group[0]]
        for key in of_group:
            if key != "place" and ".$" not in key:
                lists.setdefault(key, []).append(sealing.unpack(key, of_group))
    return lists
