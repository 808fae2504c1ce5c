"""Optimizer state by the names of parameters -> by their numbers, as torch's own optimizers show and take it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ray_ckpt.errors import FormatError
from ray_ckpt.format.foreign_optimizers import Optimizer
from ray_ckpt.format.spelling import prefixes_of
from ray_ckpt.state import sealing
from ray_ckpt.state.hyperparameters import same
from ray_ckpt.state.saved_optimizers import KINDS, PARAM_GROUPS, STATE
from ray_ckpt.text import quoted

__all__ = ["indexed", "named_optimizer", "of_parameters"]

_NUMBER = re.compile(r"((?:.*?\.)?)(\d+)\.")
"""What stands before the first number in a name, and the number."""


def _members(leaves: Mapping[str, Any]) -> list[str]:
    """The parameters that our optimizers have, in the order in which they were saved."""
    kinds, groups = f"{KINDS}.", f"{PARAM_GROUPS}."
    names = [name[len(kinds) :] for name in leaves if name.startswith(kinds)]
    return names or list(
        dict.fromkeys(name[len(groups) :].rpartition(".")[0] for name in leaves if name.startswith(groups))
    )


def _in_order(names: Sequence[str], model: Mapping[str, int]) -> list[str]:
    """The members of a group as the optimizer of the whole model has them.

    Pipeline ranks are asked one after the other, and a rank may hold several stages: members that stand in the order of
    the saved model are put in that of the numbers in their names. Any other order is the optimizer's own.
    """
    places = [model.get(name, -1) for name in names]
    return _by_number(names) if -1 not in places and places == sorted(places) else list(names)


def _by_number(names: Sequence[str]) -> list[str]:
    lists: dict[str, dict[int, list[str]]] = {}
    places: list[str | tuple[str]] = []
    for name in names:
        match = _NUMBER.match(name)
        if match is None:
            places.append(name)
            continue
        if match[1] not in lists:
            places.append((match[1],))
        lists.setdefault(match[1], {}).setdefault(int(match[2]), []).append(name)
    ordered: list[str] = []
    for place in places:
        if isinstance(place, str):
            ordered.append(place)
            continue
        for number, below in sorted(lists[place[0]].items()):
            start = f"{place[0]}{number}."
            ordered += [start + rest for rest in _by_number([name[len(start) :] for name in below])]
    return ordered


def of_parameters(leaves: Mapping[str, Any], part: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parameter -> key -> leaf, of what lies below `part`. A name may begin as another does: the longest counts."""
    known, found = set(names), {name: dict[str, Any]() for name in names}
    for flat, leaf in leaves.items():
        if not flat.startswith(f"{part}."):
            continue
        rest = flat[len(part) + 1 :]
        name = next((prefix for prefix in prefixes_of(rest) if prefix in known), None)
        if name is not None:
            found[name][rest[len(name) + 1 :]] = leaf
    return found


def named_optimizer(
    leaves: Mapping[str, Any],
    model: Sequence[str],
    scheduled: Mapping[str, Any],
    plain: Mapping[str, str],
    groups: list[list[str]],
) -> dict[str, Any]:
    """`optimizer`, or `optimizers` by class where there are several classes; and what no parameter has.

    Args:
        leaves: of our section `optim`.
        model: names of the model, in the order in which they were saved.
        scheduled: of our section `schedulers`: parameters whose schedules differ are in groups of their own.
        plain: parameter -> its name in the model that is written.
        groups: filled in with the parameters of each group, of all optimizers.
    """
    order, place_of = _members(leaves), {name: place for place, name in enumerate(model)}
    kinds = {name: _kind(leaves.get(f"{KINDS}.{name}")) for name in order}
    hyperparameters = of_parameters(leaves, PARAM_GROUPS, order)
    states = of_parameters(leaves, STATE, order)
    schedules = _schedules(scheduled, order)
    made: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(kinds.values()):
        of_kind = [name for name in order if kinds[name] == kind]
        parts = [
            (_in_order(names, place_of), values) for names, values in _grouped(of_kind, hyperparameters, schedules)
        ]
        members = [name for names, _ in parts for name in names]
        numbers = {name: number for number, name in enumerate(members)}
        made[kind] = {
            "state": {
                numbers[name]: sealing.unpack(f"{STATE}.{name}", _under(f"{STATE}.{name}", states[name]))
                for name in members
                if states[name]
            },
            "param_groups": [
                {
                    **values,
                    "params": [numbers[name] for name in names],
                    "param_names": [plain.get(name, name) for name in names],
                }
                for names, values in parts
            ],
        }
        groups += [list(names) for names, _ in parts]
    others = {
        name: leaf
        for name, leaf in leaves.items()
        if not name.startswith((f"{STATE}.", f"{PARAM_GROUPS}.", f"{KINDS}."))
    }
    rest = {"optim": sealing.unpack("optim", _under("optim", others))} if others else {}
    if len(made) == 1:
        return {"optimizer": next(iter(made.values())), **rest}
    return {**({"optimizers": made} if made else {}), **rest}


def _under(name: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name}.{key}" if key else name: leaf for key, leaf in leaves.items()}


def _kind(recorded: Any) -> str:
    return str(recorded[0]) if isinstance(recorded, (list, tuple)) and recorded else ""


def _schedules(scheduled: Mapping[str, Any], order: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parameter -> what schedulers keep of its group."""
    found: dict[str, dict[str, Any]] = {name: {} for name in order}
    for flat, leaf in scheduled.items():
        start, middle, rest = flat.partition(".groups.")
        name = next((prefix for prefix in prefixes_of(rest) if prefix in found), None) if middle else None
        if name is not None:
            found[name][f"{start}.{rest[len(name) + 1 :]}"] = leaf
    return found


def _grouped(
    names: Sequence[str], hyperparameters: Mapping[str, Mapping[str, Any]], schedules: Mapping[str, Mapping[str, Any]]
) -> list[tuple[list[str], dict[str, Any]]]:
    """Parameters with equal values, and these values, in order of first appearance."""
    parts: list[tuple[list[str], Mapping[str, Any], Mapping[str, Any]]] = []
    for name in names:
        leaves = hyperparameters[name]
        for members, common, schedule in parts:
            if same(common, leaves) and same(schedule, schedules[name]):
                members.append(name)
                break
        else:
            parts.append(([name], leaves, schedules[name]))
    opened = []
    for members, leaves, _ in parts:
        place = f"{PARAM_GROUPS}.{members[0]}"
        keys = [key for key in leaves if ".$" not in key]
        flat = _under(place, leaves)
        opened.append((members, {key: sealing.unpack(f"{place}.{key}", flat) for key in keys}))
    return opened


def indexed(optimizer: Optimizer, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Another program's optimizer, whose parameters may have names.

    Args:
        leaves: below its prefix, in the order in which they were saved.

    Raises:
        FormatError: its names do not tell which parameters they are of.
    """
    if optimizer.groups is None:
        return _indexed_flat(leaves)
    members = [str(member) for number in sorted(optimizer.groups) for member in optimizer.groups[number]]
    states = of_parameters(leaves, "state", members)
    number_of = (
        {member: int(member) for member in members}
        if optimizer.is_indexed
        else {member: number for number, member in enumerate(members)}
    )
    lost = {flat for flat in leaves if flat.startswith("state.")} - {
        f"state.{name}.{key}" if key else f"state.{name}" for name in states for key in states[name]
    }
    if lost:
        raise FormatError(
            f"the optimizer at {optimizer.label} has state of parameters that are in none of its groups, such as "
            f"{quoted(sorted(lost)[0])}: several stages have overwritten each other's groups. Leave it out, by only="
        )
    groups = []
    for number, group in optimizer.groups.items():
        start = f"param_groups.{number}."
        values = {flat[len(start) :]: leaf for flat, leaf in leaves.items() if flat.startswith(start)}
        names = {} if optimizer.is_indexed else {"param_names": [str(member) for member in group]}
        values["params"] = [number_of[str(member)] for member in group]
        groups.append({**values, **names})
    return {
        "state": {number_of[member]: _nested(states[member]) for member in members if states[member]},
        "param_groups": groups,
    }


def _indexed_flat(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """One by name, whose hyper-parameters are by name too, as ours: torchtitan's."""
    return dict(named_optimizer(leaves, _members(leaves), {}, {}, []).get("optimizer", {}))


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for key, leaf in leaves.items():
        *parts, last = key.split(".")
        place = root
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = leaf
    return root
