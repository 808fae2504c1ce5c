"""The parts of a plain state dict: each object with a `state_dict` of its own, and the tensors and values beside them.

    {"model": module, "trainer": object, "step": 3}   one plan for "model", one for "trainer", one for the rest

Names are those that DCP's flattening gives. What fits is read in place, as DCP does it. An object whose state has grown
since it was made, such as a history or an optimizer, gets all that was saved under its name: the paths in the record
tell dicts from lists, and an entry `$keys.<name>`, which a save writes where it is needed, the keys that are no texts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from ray_ckpt.errors import UsageError
from ray_ckpt.format.manifest import Path
from ray_ckpt.format.torch_internals import flatten_state_dict
from ray_ckpt.state import nesting, sealing
from ray_ckpt.state.handing_over import can_be_undone
from ray_ckpt.state.load_plan import Claim, Handover, LoadPlan, SavedState, Spec
from ray_ckpt.state.module_entries import with_targets
from ray_ckpt.state.replicated_parts import claim_under
from ray_ckpt.text import listed

KEYS = "$keys."
"""Prefix of the name under which the keys of an object's state are recorded."""

_TEXTS, _NUMBERS = "texts", "numbers"


def is_stateful(value: object) -> bool:
    """Whether it is a `Stateful`. Tensors are excluded first: asking the protocol takes a hundred times as long. A
    class has the methods too, but no state."""
    return not isinstance(value, (torch.Tensor, type)) and isinstance(value, Stateful)


def check_leaves(values: Mapping[str, Any]) -> None:
    """
    Args:
        values: flat name -> what lies there in a state dict, once it is flattened.

    Raises:
        UsageError: an object with a state of its own is among them. It would be pickled instead of asked for its state,
            and a load would put another object in its place. Or a value contains itself, or is nested too deep.
    """
    for name, value in values.items():
        for each in value if type(value) in (list, tuple) else (value,):
            if (kind := type(each)) in nesting.CONTAINERS:
                nesting.check(name, value)
            if kind not in _PLAIN and is_stateful(each):
                raise UsageError(
                    f"{name!r} is or holds a {type(each).__name__}, whose state_dict is asked for at the top of the "
                    f"dict only: give it a name there, as in {{{name!r}: ...}}"
                )


_PLAIN = frozenset({torch.Tensor, nn.Parameter, DTensor, int, float, bool, str, bytes, tuple, list, dict, type(None)})
"""Classes of nearly all values, which need not be asked."""


def key_records(states: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be saved beside the states of objects so that their keys come back; nothing for most.

    Args:
        states: name -> what the object's `state_dict` returned.
    """
    records = {}
    for name, state in states.items():
        found: list[Any] = []
        with nesting.named(name, state):
            _record(state, (), found)
        if found:
            records[KEYS + name] = tuple(found)
    return records


def _record(value: Any, path: Path, found: list[Any]) -> None:
    """List (path, tag of the class, keys) of each dict that its flat names alone do not give back."""
    if isinstance(value, Mapping):
        kinds = {type(key) for key in value}
        tag = sealing.dict_tag(value) or "$dict"
        if kinds != {str} or tag != "$dict":
            # An ordered dict is not equal to one in another order, and names come back sorted.
            is_ordered = tag == "$ordered" and bool(path)
            try:
                by_kind = _TEXTS if kinds == {str} else _NUMBERS if kinds == {int} else ""
                keys = by_kind if by_kind and not is_ordered else sealing.seal("", tuple(value))
            except UsageError:
                return
            found.append((path, tag, keys))
        for key, item in value.items():
            if not isinstance(item, torch.Tensor):
                _record(item, (*path, str(key)), found)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            if not isinstance(item, torch.Tensor):
                _record(item, (*path, number), found)


def flattened(nested: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Path]]:
    """Flat name -> what lies there in nested dicts and lists, and flat name -> the keys that lead to it.

    Raises:
        UsageError: a dict or list contains itself.
        ValueError: two entries have the same flat name.
    """
    with nesting.named("", nested):
        return flatten_state_dict(nested)


def roots(state: Stateful | Mapping[str, Any]) -> list[str]:
    """Names of the objects in a state, and of the tensors and values beside them."""
    nested = state.state_dict() if isinstance(state, Stateful) else state
    owners = [name for name, value in nested.items() if is_stateful(value)]
    flat, _ = flattened({name: value for name, value in nested.items() if name not in owners})
    return [*owners, *flat]


def places(name: str) -> tuple[str, str]:
    """Below which names everything lies that was saved of something."""
    return name, KEYS + name


def plans(state: Stateful | Mapping[str, Any], saved: SavedState) -> list[LoadPlan]:
    """One plan for each object, and one for everything else. Nothing is changed or allocated yet."""
    if isinstance(state, Stateful):
        nested = _state_of("the state", state)
        plan, fill = _in_place(nested, saved)
        handover = Handover("the state", state, plan.claims, lambda loaded: fill(loaded) or nested)
        return [LoadPlan(plan.claims, lambda loaded: None, plan.problems, handovers=[handover])]
    owners = {name: value for name, value in state.items() if is_stateful(value)}
    rest = {name: value for name, value in state.items() if name not in owners}
    plan, fill = _in_place(rest, saved)

    def apply(loaded: Mapping[str, torch.Tensor]) -> None:
        fill(loaded)
        if isinstance(state, MutableMapping):
            state.update(rest)  # values at the top were replaced in the copy

    return [
        LoadPlan(plan.claims, apply, plan.problems, section="everything else" if owners else ""),
        *(_plan_of_object(name, owner, saved) for name, owner in owners.items() if saved.wants(name)),
    ]


def _plan_of_object(name: str, owner: Stateful, saved: SavedState) -> LoadPlan:
    state = _state_of(name, owner)
    source = saved.name_of(name)
    flat, _ = flattened({name: state})
    if _has_grown(name, owner, state, flat, saved, source):
        claims = claim_under(saved, source) if saved.under(source) else {}  # all of it may be empty dicts
        lost = [own for own in flat if own not in claims and _must_be_there(own, name, flat, claims)]
        claims |= {own: Claim(own) for own in lost}
        handover = Handover(name, owner, claims, lambda loaded: _rebuilt(saved, source, loaded, state))
        return LoadPlan(claims, lambda loaded: None, handovers=[handover], section=name, taken=[KEYS + source])
    nested = {name: state}
    plan, fill = _in_place(nested, saved)

    def state_of(loaded: Mapping[str, torch.Tensor]) -> Any:
        fill(loaded)
        return nested[name]

    handover = Handover(name, owner, plan.claims, state_of)
    return LoadPlan(plan.claims, lambda loaded: None, plan.problems, handovers=[handover], section=name)


def _state_of(name: str, owner: Stateful) -> dict[str, Any]:
    """Its state, to read into."""
    return with_targets(owner) if isinstance(owner, nn.Module) else nesting.asked(name, owner)


def _has_grown(name: str, owner: Stateful, state: Any, flat: Mapping[str, Any], saved: SavedState, source: str) -> bool:
    """Whether more was saved than the object shows now, or other shapes, in a state that is not laid out over ranks."""
    below = saved.under(source)
    sharded = any(isinstance(value, DTensor) for value in flat.values())
    if isinstance(owner, torch.optim.Optimizer):
        sharded |= any(isinstance(p, DTensor) for group in owner.param_groups for p in group["params"])
    if isinstance(owner, nn.Module) or sharded or any(saved.path_of(flat)[0] != source for flat in below):
        return False
    wanted = {source + own[len(name) :]: own for own in flat}
    if not wanted.keys() >= set(below) or _shows_other_dicts(state, saved, source):
        return True
    light = can_be_undone(Handover(name, owner, claim_under(saved, source), lambda loaded: None))
    return light and any(
        isinstance(value := flat[wanted[found]], torch.Tensor) != (found in saved.tensors)
        or (isinstance(value, torch.Tensor) and tuple(value.shape) != saved.tensors[found].shape)
        for found in below
    )


def _shows_other_dicts(state: Any, saved: SavedState, source: str) -> bool:
    """Whether an object lacks a dict that was saved, which may be empty, or has an ordered one in another order."""
    for path, tag, keys in saved.values.get(KEYS + source, ()):
        shown = functools.reduce(_at, path, state)
        if not isinstance(shown, Mapping):
            return True
        is_in_order = tag != "$ordered" or keys in (_TEXTS, _NUMBERS) or list(shown) == [*sealing.unseal(KEYS, keys)]
        if not is_in_order:
            return True
    return False


def _must_be_there(own: str, name: str, flat: Mapping[str, Any], claims: Mapping[str, Claim]) -> bool:
    """Whether an entry of the object that was not saved is missed: not if the dict or list that it is in may shrink."""
    if any(claim.startswith(f"{own}.") or own.startswith(f"{claim}.") for claim in claims):
        return False
    return not any(part.isdigit() for part in own[len(name) + 1 :].split("."))


def _rebuilt(saved: SavedState, source: str, loaded: Mapping[str, torch.Tensor], shown: Any) -> Any:
    """The state that was saved under a name.

    Args:
        shown: what the object shows now, whose dicts may be of classes that a checkpoint does not name.
    """
    leaves = {
        saved.path_of(flat)[1:]: loaded[flat] if flat in loaded else sealing.fresh(saved.values[flat])
        for flat in saved.under(source)
    }
    records = {tuple(path): (tag, keys) for path, tag, keys in saved.values.get(KEYS + source, ())}
    tree: dict[Any, Any] = {}
    for path in (*records, *leaves):
        node = tree
        for part in path:
            node = node.setdefault(part, {})
    return _built((), tree, leaves, records, shown)


def _built(
    path: Path,
    tree: Mapping[Any, Any],
    leaves: Mapping[Path, Any],
    records: Mapping[Path, tuple[str, Any]],
    shown: Any = None,
) -> Any:
    if path in leaves:
        return leaves[path]
    items = {part: _built((*path, part), below, leaves, records, _at(shown, part)) for part, below in tree.items()}
    if path not in records:
        is_list = bool(items) and all(type(part) is int for part in items)
        if is_list:
            return [items[number] for number in sorted(items)]
        return _as_shown(shown, items)
    tag, keys = records[path]
    if keys == _TEXTS:
        named = items
    elif keys == _NUMBERS:
        named = {number: items[str(number)] for number in sorted(map(int, items))}
    else:
        named = {key: items[str(key)] for key in sealing.unseal(KEYS, keys)}
    return _as_shown(shown, named) if tag == "$dict" else sealing.MAKERS[tag](named)


def _as_shown(shown: Any, items: dict[Any, Any]) -> Any:
    """A dict of which no class was recorded: of a class that has no tag, if the object shows such a one there."""
    has_no_tag = isinstance(shown, Mapping) and not sealing.dict_tag(shown)
    return sealing.dict_like(shown, items) if has_no_tag else items


def _at(shown: Any, part: Any) -> Any:
    """What lies under a part of a path in a shown state; None where there is nothing."""
    if isinstance(shown, Mapping):
        return shown.get(part) if part in shown else next((shown[key] for key in shown if str(key) == part), None)
    return shown[part] if isinstance(shown, (list, tuple)) and type(part) is int and part < len(shown) else None


def _in_place(
    nested: dict[str, Any], saved: SavedState
) -> tuple[LoadPlan, Callable[[Mapping[str, torch.Tensor]], None]]:
    """The plan to fill the tensors that are there, and the function that replaces the values."""
    flat, paths = flattened(nested)
    flat = {name: value for name, value in flat.items() if saved.wants(name)}
    claims: dict[str, Claim] = {}
    grown: dict[str, str] = {}
    check_leaves(flat)
    for name, value in flat.items():
        source = saved.name_of(name)
        if isinstance(value, torch.Tensor):
            claims[name] = Claim(source, Spec.of_target(value, name), partial(torch.Tensor.detach, value))
        elif source not in saved and (below := saved.under(source)) and _lie_below(below, paths[name], saved):
            grown[name] = source
            claims |= claim_under(saved, source)
        else:
            claims[name] = Claim(source)
    meta = [name for name, value in flat.items() if isinstance(value, torch.Tensor) and value.is_meta]
    problems = (
        [f"{listed(meta, at_most=8, separator='; ')} on the meta device, where nothing can be read to"] if meta else []
    )

    def fill(loaded: Mapping[str, torch.Tensor]) -> None:
        for name in flat:
            if name in grown:
                _set(nested, paths[name], _below(saved, grown[name], len(paths[name]), loaded))
            elif (claim := claims[name]).spec is None and claim.saved in saved.values:
                _set(nested, paths[name], sealing.fresh(saved.values[claim.saved]))

    return LoadPlan(claims, lambda loaded: None, problems), fill


def _lie_below(names: list[str], path: Path, saved: SavedState) -> bool:
    return all(saved.path_of(name)[: len(path)] == path for name in names)


def _below(saved: SavedState, source: str, depth: int, loaded: Mapping[str, torch.Tensor]) -> Any:
    """What was saved below a name, as dicts and lists."""
    leaves = {
        saved.path_of(flat)[depth:]: loaded[flat] if flat in loaded else sealing.fresh(saved.values[flat])
        for flat in saved.under(source)
    }
    tree: dict[Any, Any] = {}
    for path in leaves:
        node = tree
        for part in path:
            node = node.setdefault(part, {})
    return _built((), tree, leaves, {})


def _set(nested: Any, path: Path, value: object) -> None:
    """Replace a value that is there, whatever the kind of the keys that lead to it."""
    *before, last = path
    for part in before:
        nested = nested[_key(nested, part)]
    nested[_key(nested, last)] = value


def _key(container: Any, part: str | int) -> Any:
    if isinstance(container, Mapping) and part not in container:
        return next(key for key in container if str(key) == part)
    return part
