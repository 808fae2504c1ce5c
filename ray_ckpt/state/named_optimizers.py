"""Optimizer state and hyper-parameters, under the names of the parameters that they belong to.

    state.<parameter>.<key>                       the optimizer's state of a parameter
    param_groups.<parameter>.<hyper-parameter>    the values of the group that the parameter is in
    kinds.<parameter>                             class name of the optimizer, and the keys of that state
    shards.<parameter>.<box>.<key>                plain tensors of a shard: shard_state.py
    others.<n>. ...                               what an optimizer shows beside that: own_optimizers.py
    spans.<parameter>                             order of those whose state is kept together: spanning_state.py

Nothing here takes a step: an optimizer without state saves none, and a parameter that was saved without state loses
its own in the load. A fresh optimizer gets its state from the checkpoint: a tensor of the parameter's shape is sharded
as the parameter is, any other is whole on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from ray_ckpt.errors import StateMismatchError, UsageError
from ray_ckpt.state import hyperparameters, nesting, own_optimizers, sealing, wrappers
from ray_ckpt.state.flat_optimizers import check_elementwise, flat_states, load_flat
from ray_ckpt.state.load_plan import Claim, LoadPlan, SavedState
from ray_ckpt.state.named_model import NamedModel
from ray_ckpt.state.own_optimizers import OtherState, check_shows_all, pack_others, states_in
from ray_ckpt.state.saved_optimizers import KINDS, PARAM_GROUPS, STATE, SavedOptimizers, flatten, key_name
from ray_ckpt.state.shard_state import SHARDS, Owner, Places, pack_shard
from ray_ckpt.state.spanning_state import SPANS, Span, check_trained, pack_span
from ray_ckpt.state.trainable import starts
from ray_ckpt.state.wrappers import Partitions
from ray_ckpt.text import listed

T = TypeVar("T")

_FRESH_ADVICE = "Load into a fresh optimizer, whose groups are split to match, or give each set its own group"
_PARTITIONED_ADVICE = "ZeroRedundancyOptimizer keeps its groups: give each set its own"
_SCHEDULED_ADVICE = (
    "They would be split, but an LR scheduler counts them: name it in TrainState(schedulers=...), or make it after the "
    "load"
)


class NamedOptimizers:
    section = "optim"

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], model: NamedModel) -> None:
        self._partitions = Partitions()
        self.optimizers = tuple(inner for given in optimizers for inner in self._partitions.stepping(given))
        self._model = model
        self.scheduled: frozenset[int] = frozenset()
        """Ids of optimizers, without what wraps them, whose schedulers can follow when groups are split."""
        self.origins: dict[int, list[int]] = {}
        """Id of such an optimizer -> for each of its groups, which one it was before the last load."""

    def leaves(self) -> dict[str, Any]:
        """Live tensors, and sealed values of what is none.

        Raises:
            UsageError: a parameter of an optimizer is none of the model's, or two optimizers have it.
        """
        names = self.names()
        leaves: dict[str, Any] = {}
        for nth, optimizer in enumerate(self.optimizers):
            kind = wrappers.kind(optimizer)
            self._partitions.take_groups(optimizer)
            shown = optimizer.state_dict()
            check_shows_all(optimizer, shown)
            order = _order(optimizer, names)
            leaves |= pack_others(nth, optimizer, shown, order)
            keys: dict[str, tuple[str, ...]] = {}
            places = Places()
            owners = self._owners(optimizer, names)
            states = self._states(optimizer, names, shown)
            leaves |= (span := pack_span(optimizer, states, order))
            check_trained(optimizer, self._model.trainable().frozen, span)
            for parameter, state in states.items():
                flat = flatten(f"{STATE}.{parameter}", state)
                owner = owners.get(parameter)
                notes = list(flat)
                if owner is not None:
                    notes = [owner.note(k, leaf) + places.note(parameter, k, leaf) for k, leaf in flat.items()]
                keys[parameter] = (kind, *sorted(notes))
                if owner is not None:
                    of_shard = {key: leaf for key, leaf in flat.items() if owner.is_of_shard(key, leaf)}
                    leaves |= pack_shard(parameter, owner, of_shard)
                    flat = {key: leaf for key, leaf in flat.items() if key not in of_shard}
                leaves |= {key_name(f"{STATE}.{parameter}", key): value for key, value in flat.items()}
            for number, group in enumerate(optimizer.param_groups):
                values: dict[str, Any] = {}
                for key, value in hyperparameters.of_group(group).items():
                    place = f"{PARAM_GROUPS}[{number}]."
                    with nesting.named(place + key, value):
                        packed = sealing.pack_whole(place + key, hyperparameters.without_numpy(value))
                    values |= {name.removeprefix(place): leaf for name, leaf in packed.items()}
                for member in group["params"]:
                    for name in names[member]:
                        leaves |= {f"{PARAM_GROUPS}.{name}.{key}": value for key, value in values.items()}
                        # A rank without elements of a parameter may have no state of it, and says nothing about it.
                        if name not in owners or not owners[name].is_elsewhere:
                            leaves[f"{KINDS}.{name}"] = keys.get(name, (kind,))
        return self._without_frozen(leaves)

    def _without_frozen(self, entries: dict[str, T], prefix: str = "") -> dict[str, T]:
        """Entries of parameters that the state saves and loads; all but those of frozen ones, if these are left out."""
        frozen = self._model.trainable().frozen
        if not frozen:
            return entries
        places = tuple(f"{prefix}{part}." for part in (STATE, PARAM_GROUPS, KINDS, SHARDS, SPANS))

        def is_frozen(name: str) -> bool:
            below = name.removeprefix(prefix).partition(".")[2]
            return name.startswith(places) and any(start in frozen for start in starts(below))

        return {name: entry for name, entry in entries.items() if not is_frozen(name)}

    def _owners(
        self, optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, Sequence[str]]
    ) -> dict[str, Owner]:
        """Name -> parameter; nothing under FSDP1."""
        if self._model.flat is not None:
            return {}
        is_torchs = _is_torchs(optimizer)
        return {
            names[parameter][0]: Owner(parameter, is_torchs=is_torchs)
            for parameter in hyperparameters.members(optimizer)
        }

    def names(self) -> dict[nn.Parameter, tuple[str, ...]]:
        """The names of every parameter that an optimizer has; several if FSDP1 has flattened them into one.

        Raises:
            UsageError: a parameter is none of the model's, or two optimizers have it.
        """
        known = self._model.parameters()
        found: dict[nn.Parameter, tuple[str, ...]] = {}
        owner: dict[nn.Parameter, int] = {}
        for number, optimizer in enumerate(self.optimizers):
            for parameter in hyperparameters.members(self._partitions.whole(optimizer)):
                if parameter not in known:
                    raise UsageError(
                        f"optimizer {number} ({type(optimizer).__name__}) has a parameter of shape "
                        f"{list(parameter.shape)} that is not one of the model's: make it after the model is wrapped"
                    )
                if owner.setdefault(parameter, number) != number:
                    raise UsageError(
                        f"optimizers {owner[parameter]} and {number} both have {', '.join(known[parameter])}: the "
                        "state of a parameter is saved by its name, so it can have one optimizer only"
                    )
                found[parameter] = known[parameter]
        return found

    def plan(self, saved: SavedState) -> LoadPlan:
        if not self.optimizers or not saved.wants(self.section):
            return LoadPlan({}, lambda loaded: None)
        names = self.names()
        flat = self._model.flat is not None
        for optimizer in self.optimizers if flat else ():
            check_elementwise(optimizer)
        # Pieces of flattened parameters are saved and loaded as the model's state dict shows them.
        shown = self._model.tensors() if flat else {}
        index = SavedOptimizers(saved)
        twins = _twins(names)
        claims: dict[str, Claim] = {}
        problems: list[str] = []
        doubts: list[str] = []
        taken: list[str] = []
        owners: dict[str, Owner] = {}
        others: list[OtherState] = []
        for place, optimizer in enumerate(self.optimizers):
            self._partitions.take_groups(optimizer)
            live_states = {} if flat else _by_parameter(optimizer)
            own_order = _order(optimizer, names)
            order = tuple(saved.name_of(f"model.{n}").removeprefix("model.") for n in own_order)
            others.append(OtherState(place, optimizer, optimizer.state_dict(), order, saved))
            span = Span(optimizer, own_order, order, saved)
            claims |= others[-1].claims | span.claims
            misfits = self._check_groups(optimizer, names, index)
            problems += [*others[-1].problems, *span.problems, *misfits]
            doubts += span.doubts
            doubts += [] if misfits else _other_kinds(optimizer, names, index)
            expected = _expected_keys(optimizer, names, index)
            shared = index.hyperparameter_names(
                name for parameter in hyperparameters.members(optimizer) for name in names[parameter]
            )
            for group in optimizer.param_groups:
                shared_here = shared & group.keys()
                for parameter in group["params"]:
                    for name in names[parameter]:
                        live = {} if flat else flatten(name, live_states.get(parameter, {}))
                        tensor, is_torchs = shown.get(name, parameter), _is_torchs(optimizer)
                        owner = owners[name] = Owner(tensor, _steps_on_device(group), is_torchs)
                        if index.has_shards:
                            problems += index.misfit(name, owner)
                            taken += index.shards(name)
                        claims |= index.claim_values(name, shared_here)
                        claims |= index.claim_state(name, owner, live, expected.get(name, ()), twins[parameter])
        claims = self._without_frozen(claims, f"{self.section}.")
        return LoadPlan(claims, partial(self._apply, names, index, owners, others), problems, doubts, taken)

    def _check_groups(
        self, optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, Sequence[str]], index: SavedOptimizers
    ) -> list[str]:
        problems = []
        required = hyperparameters.required_names(optimizer.defaults)
        for group in optimizer.param_groups:
            saved = index.hyperparameters(name for parameter in group["params"] for name in names[parameter])
            kind = type(optimizer).__name__
            wrong = hyperparameters.find_problems(kind, group, required, saved)
            parts = hyperparameters.grouped_by_values(saved)
            if len(parts) > 1 and not wrong:
                if self._partitions.whole(optimizer) is not optimizer:
                    wrong = [hyperparameters.conflict(parts, _PARTITIONED_ADVICE)]
                elif _has_stepped(optimizer):
                    wrong = [hyperparameters.conflict(parts, _FRESH_ADVICE)]
                elif _is_scheduled(optimizer) and id(wrappers.stepping(optimizer)) not in self.scheduled:
                    wrong = [hyperparameters.conflict(parts, _SCHEDULED_ADVICE)]
                elif any(len({_part_of(name, parts) for name in names[p]}) > 1 for p in group["params"]):
                    wrong = [hyperparameters.conflict(parts, "FSDP1 has flattened them into one: use_orig_params=True")]
            problems += wrong
        return problems

    def _apply(
        self,
        names: Mapping[nn.Parameter, Sequence[str]],
        index: SavedOptimizers,
        owners: Mapping[str, Owner],
        others: Sequence[OtherState],
        loaded: Mapping[str, torch.Tensor],
    ) -> None:
        self._check_members(names)
        twins = _twins(names)
        for optimizer, other in zip(self.optimizers, others, strict=True):
            self._fit_groups(optimizer, names, index)
            groups = [hyperparameters.of_group(group) for group in optimizer.param_groups]
            beside = other.of(loaded)
            if (flat := self._model.flat) is not None:
                members = (name for parameter in hyperparameters.members(optimizer) for name in names[parameter])
                states = {name: index.state(name, owners[name], loaded) or {} for name in members}
                load_flat(flat, optimizer, names, states, beside)
                continue
            given = {}
            for number, parameter in enumerate(hyperparameters.members(optimizer)):
                [name] = names[parameter]
                state = index.state(name, owners[name], loaded, twins[parameter])
                if state is not None:
                    given[number] = state
            if own_optimizers.has_own_load(optimizer):
                own_optimizers.give(optimizer, given, beside)
            else:
                _set(optimizer, given, beside)
            own_optimizers.check_shown(optimizer, given, beside, groups)
            self._partitions.give_groups(optimizer)

    def _check_members(self, names: Mapping[nn.Parameter, Sequence[str]]) -> None:
        """Raises:
        StateMismatchError: the model's own load has put new parameters in the place of those that are stepped.
        """
        known = self._model.parameters()
        gone = [
            name
            for parameter in names
            if parameter not in known and parameter.requires_grad
            for name in names[parameter]
        ]
        if gone:
            raise StateMismatchError(
                f"the model's own load_state_dict has made new parameters {listed(gone, at_most=4)}, and the optimizer "
                "would step those before: load the model by only=('model',), make the optimizer, and load the rest by "
                "only=('optim', ...)"
            )

    def _fit_groups(
        self, optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, Sequence[str]], index: SavedOptimizers
    ) -> None:
        """Set each group to the saved values of its members; split it where those differ."""
        groups: list[dict[str, Any]] = []
        origins: list[int] = []
        for number, group in enumerate(optimizer.param_groups):
            members = [names[parameter][0] for parameter in group["params"]]
            parts = hyperparameters.grouped_by_values(index.hyperparameters(members))
            for part, values in _fitting(group, members, parts):
                hyperparameters.adopt(part, values)
                groups.append(part)
                origins.append(number)
        optimizer.param_groups[:] = groups
        self.origins[id(wrappers.stepping(optimizer))] = origins

    def _states(
        self,
        optimizer: torch.optim.Optimizer,
        names: Mapping[nn.Parameter, Sequence[str]],
        shown: Mapping[str, Any],
    ) -> dict[str, Mapping[str, Any]]:
        """Parameter name -> the optimizer's state of it."""
        if (flat := self._model.flat) is not None:
            return flat_states(flat, optimizer, names)
        # As the optimizer itself would save it: some keep less, or other things, than they work with.
        remembered = states_in(shown)
        states: dict[str, Mapping[str, Any]] = {}
        for number, parameter in enumerate(hyperparameters.members(optimizer)):
            [name] = names[parameter]
            state = remembered.get(number)
            if state and not hyperparameters.same(states.setdefault(name, state), state):
                raise UsageError(
                    f"two copies of the tied weight {name!r} have different optimizer state: one name cannot save both"
                )
        return states


def _order(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, Sequence[str]]) -> tuple[str, ...]:
    return tuple(name for parameter in hyperparameters.members(optimizer) for name in names[parameter])


def _by_parameter(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, Mapping[str, Any]]:
    """The state that it shows of each of its parameters."""
    shown = states_in(optimizer.state_dict())
    return {p: shown[n] for n, p in enumerate(hyperparameters.members(optimizer)) if n in shown}


def _set(optimizer: torch.optim.Optimizer, states: Mapping[int, dict[str, Any]], others: Mapping[str, Any]) -> None:
    """Set the state of parameters as it is: torch's own `load_state_dict` would cast it to their dtype."""
    for number, parameter in enumerate(hyperparameters.members(optimizer)):
        if state := states.get(number):
            optimizer.state[parameter] = state
        elif state is not None:
            # It was saved without state.
            optimizer.state.pop(parameter, None)
    optimizer.state.update(others.get("state", {}))
    # Each kind of optimizer completes here what another version of torch may not have saved.
    optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})


def _other_kinds(
    optimizer: torch.optim.Optimizer,
    names: Mapping[nn.Parameter, Sequence[str]],
    index: SavedOptimizers,
) -> list[str]:
    """What was saved by optimizers of another class."""
    own, *_ = kinds = wrappers.kinds(optimizer)
    found: dict[str, list[str]] = {}
    for parameter in hyperparameters.members(optimizer):
        for name in names[parameter]:
            if (kind := index.kind(name)) and kind not in kinds:
                found.setdefault(kind, []).append(name)
    doubts = [
        f"another kind of optimizer than {own} was saved: {kind} for {listed(members, at_most=4)}"
        for kind, members in found.items()
    ]
    if not index.has_kinds:
        for group in optimizer.param_groups:
            saved = index.hyperparameters(name for parameter in group["params"] for name in names[parameter])
            doubts += hyperparameters.find_doubts(own, group, saved)
    return doubts


def _expected_keys(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, Sequence[str]], index: SavedOptimizers
) -> dict[str, Sequence[str]]:
    """Parameter name -> keys of state that the checkpoint should have: what its record says.

    Without a record: torch's own optimizers keep the same keys for all parameters of equal hyper-parameters that they
    have stepped; Adafactor also goes by the number of dims.
    """
    members = [name for parameter in hyperparameters.members(optimizer) for name in names[parameter]]
    if index.has_kinds or not _is_torchs(optimizer):
        return {name: list(index.recorded_keys(name)) for name in members}
    expected: dict[str, Sequence[str]] = {}
    for alike, _ in hyperparameters.grouped_by_values(index.hyperparameters(members)):
        keys: dict[int, set[str]] = {}
        by_dims = isinstance(wrappers.stepping(optimizer), torch.optim.Adafactor)
        num_dims = {name: len(index.shape(name) or ()) if by_dims else 0 for name in alike}
        for name in alike:
            # Items of a list are as many as a parameter has dims, or as the optimizer likes.
            keys.setdefault(num_dims[name], set()).update(key for key in index.keys(name) if ".$" not in key)
        expected |= {name: sorted(keys[num_dims[name]]) for name in alike if index.keys(name)}
    return expected


def _is_torchs(optimizer: torch.optim.Optimizer) -> bool:
    return f"{type(wrappers.stepping(optimizer)).__module__}.".startswith("torch.optim.")


def _twins(names: Mapping[nn.Parameter, Sequence[str]]) -> dict[nn.Parameter, int]:
    """How many parameters of the same name come before each: tied weights may be several in memory."""
    counts: dict[str, int] = {}
    twins = {}
    for parameter, (name, *_) in names.items():
        twins[parameter] = counts.get(name, 0)
        counts[name] = twins[parameter] + 1
    return twins


def _steps_on_device(group: Mapping[str, Any]) -> bool:
    """Whether torch keeps `step` on the parameter's device; otherwise it lies on the host."""
    return bool(group.get("capturable") or group.get("fused"))


def _has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it has state of at least one step. Some optimizers have state from the beginning, of 0 steps."""
    return any(state and float(state.get("step", 1)) > 0 for state in optimizer.state.values())


def _is_scheduled(optimizer: torch.optim.Optimizer) -> bool:
    several = (optimizer, wrappers.stepping(optimizer))
    return any(hasattr(each.step, "_wrapped_by_lr_sched") for each in several)


def _part_of(name: str, parts: Sequence[tuple[Sequence[str], Any]]) -> int | None:
    return next((number for number, (members, _) in enumerate(parts) if name in members), None)


def _fitting(
    group: dict[str, Any], members: Sequence[str], parts: Sequence[tuple[list[str], hyperparameters.Values]]
) -> list[tuple[dict[str, Any], hyperparameters.Values]]:
    """Split a group by saved values: new groups, each with its values. A member that was not saved joins the first."""
    if len(parts) <= 1:
        return [(group, parts[0][1] if parts else {})]
    part_of = {name: number for number, (names, _) in enumerate(parts) for name in names}
    fitting = []
    for number, (_, values) in enumerate(parts):
        chosen = [place for place, name in enumerate(members) if part_of.get(name, 0) == number]
        own = {
            key: value.clone() if isinstance(value, torch.Tensor) else sealing.fresh(value)
            for key, value in hyperparameters.of_group(group).items()
        }
        own |= {key: [group[key][place] for place in chosen] for key in hyperparameters.MEMBERS if key in group}
        fitting.append((own, values))
    return fitting
