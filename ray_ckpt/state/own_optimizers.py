"""What an optimizer shows of itself by `state_dict`, and takes by `load_state_dict`, where these are its own.

    {"state": {number: ...}, "param_groups": [...]}    torch's form: saved by the names of the parameters
    everything else in it, and state under texts       others.<n>.state. ...

A state dict in another form, such as that of a wrapper with state of its own, is all of the second kind. The tensors in
it belong to the parameters in their order, so that it fits only an optimizer with the same ones in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ray_ckpt.errors import StateMismatchError, UsageError
from ray_ckpt.state import hyperparameters, nesting, sealing
from ray_ckpt.state.load_plan import Claim, SavedState
from ray_ckpt.state.replicated_parts import claim_under, gathered
from ray_ckpt.text import listed

OTHERS = "others"

_HOOKS = ("state_dict_pre", "state_dict_post")

States = Mapping[int, Mapping[str, Any]]
"""Number of a parameter in its optimizer -> the optimizer's state of it."""


def has_own_load(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its class, or a hook, makes something of a state dict that torch's own optimizers do not."""
    method = getattr(optimizer.load_state_dict, "__func__", None)
    return (
        has_own_state_dict(optimizer)
        or method is not torch.optim.Optimizer.load_state_dict
        or any(getattr(optimizer, f"_optimizer_load_{hook}_hooks", None) for hook in _HOOKS)
    )


def has_own_state_dict(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its class, or a hook, shows something else than torch's own optimizers do."""
    method = getattr(optimizer.state_dict, "__func__", None)
    hooks = any(getattr(optimizer, f"_optimizer_{hook}_hooks", None) for hook in _HOOKS)
    return hooks or method is not torch.optim.Optimizer.state_dict


def states_in(shown: Mapping[str, Any]) -> Mapping[Any, Any]:
    """State by parameter, of a state dict in torch's form; nothing of one in another."""
    return shown["state"] if _is_torchs_form(shown) else {}


def check_shows_all(optimizer: torch.optim.Optimizer, shown: Mapping[str, Any]) -> None:
    """Raises:
    UsageError: it steps by another optimizer whose state it does not show, or keeps state under what is no text.
    """
    kind = type(optimizer).__name__
    for name, inner in vars(optimizer).items():
        if not isinstance(inner, torch.optim.Optimizer) or has_own_state_dict(optimizer):
            continue
        if inner.state and inner.state is not optimizer.state:
            raise UsageError(
                f"{kind} steps by the {type(inner).__name__} in its attribute {name!r}, whose state is not in its "
                "state_dict: give that optimizer, or a state_dict and load_state_dict to the class"
            )
    own = (
        () if has_own_load(optimizer) else (key for key in optimizer.state if not isinstance(key, (str, torch.Tensor)))
    )
    keys = dict.fromkeys((*own, *(key for key in states_in(shown) if type(key) not in (int, str))))
    if keys:
        raise UsageError(
            f"{kind} keeps state under {listed(list(map(repr, keys)), at_most=4)}, which is not one of its parameters "
            "and has no name in another layout: keep it per parameter, or in TrainState(extra=...)"
        )


def pack_others(number: int, optimizer: torch.optim.Optimizer, shown: Mapping[str, Any], order: tuple[str, ...]) -> Any:
    """Name in the section -> tensor or sealed value, of what an optimizer shows beside its state and groups.

    Args:
        order: names of its parameters.

    Raises:
        UsageError: it holds shards of tensors, or what has no place in a checkpoint.
    """
    others = _others(shown)
    if not others:
        return {}
    name = f"{OTHERS}.{number}"
    with nesting.named(name, others):
        packed = sealing.pack_state(f"{name}.state", hyperparameters.without_numpy(others))
    if shards := [flat for flat, leaf in packed.items() if isinstance(leaf, DTensor)]:
        raise UsageError(
            f"{type(optimizer).__name__} keeps shards of tensors in a state_dict that is not of torch's form "
            f"({listed(shards, at_most=2)}): nothing tells which parameters they belong to. Give the optimizer that it "
            "wraps"
        )
    has_tensors = any(isinstance(leaf, torch.Tensor) for leaf in packed.values())
    return packed | {f"{name}.order": order if has_tensors or not _is_torchs_form(shown) else ()}


class OtherState:
    """What was saved of an optimizer beside its state and groups.

    Args:
        number: of the optimizer.
        order: names of its parameters in the checkpoint.
    """

    def __init__(
        self,
        number: int,
        optimizer: torch.optim.Optimizer,
        shown: Mapping[str, Any],
        order: tuple[str, ...],
        saved: SavedState,
    ) -> None:
        self._saved = saved
        self._name = f"optim.{OTHERS}.{number}"
        self._order = saved.values.get(f"{self._name}.order")
        is_there = bool(saved.under(self._name))
        self.claims: dict[str, Claim] = {}
        if is_there or _others(shown).keys() - {"state"}:
            self.claims = claim_under(saved, f"{self._name}.state", is_recorded=True)
            self.claims[f"{self._name}.order"] = Claim(f"{self._name}.order")
        self.problems: list[str] = []
        if self._order and tuple(self._order) != order:
            self.problems = [
                f"the {type(optimizer).__name__} at {self._name} was saved with other parameters, or in another order "
                f"({listed(list(self._order), at_most=4)}), and only their order tells what belongs to which"
            ]

    def of(self, loaded: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """What was read; empty if there is nothing, or a part of it is lost."""
        if not self.claims or any(claim.saved not in self._saved for claim in self.claims.values()):
            return {}
        found: dict[str, Any] = sealing.unpack(f"{self._name}.state", gathered(self._saved, self.claims, loaded))
        return found


def give(optimizer: torch.optim.Optimizer, states: States, others: Mapping[str, Any]) -> None:
    """Let an optimizer load its state by its own `load_state_dict`.

    Args:
        states: of the parameters that were saved; empty for one that was saved without state.

    Raises:
        StateMismatchError: it does not take it.
    """
    shown = optimizer.state_dict()
    state_dict = {**shown, **others}
    if _is_torchs_form(shown):
        chosen = {**shown["state"], **states}
        chosen = {number: dict(state) for number, state in chosen.items() if state and type(number) is int}
        state_dict["state"] = {**chosen, **others.get("state", {})}
    try:
        optimizer.load_state_dict(state_dict)
    except Exception as error:  # whatever the optimizer's own code raises
        raise StateMismatchError(
            f"{type(optimizer).__name__}.load_state_dict does not take what was read: {type(error).__name__}: {error}"
        ) from error
    if _is_torchs_form(shown):
        _undo_casts(optimizer, states)


def _undo_casts(optimizer: torch.optim.Optimizer, states: States) -> None:
    """Put back what torch's `load_state_dict` has cast to the dtype of the parameter."""
    for number, parameter in enumerate(hyperparameters.members(optimizer)):
        live = optimizer.state.get(parameter, {})
        for key, value in states.get(number, {}).items():
            cast = live.get(key)
            if isinstance(value, torch.Tensor) and isinstance(cast, torch.Tensor) and cast.dtype != value.dtype:
                live[key] = value


def check_shown(
    optimizer: torch.optim.Optimizer, states: States, others: Mapping[str, Any], groups: list[dict[str, Any]]
) -> None:
    """Ask an optimizer for its state again.

    Args:
        groups: the hyper-parameters that it was given.

    Raises:
        StateMismatchError: it shows something else than what was read.
    """
    shown = optimizer.state_dict()
    found = states_in(shown)
    wrong = [f"state.{n}.{key}" for n, state in states.items() for key in _differing(state, found.get(n, {}))]
    wrong += _differing(others, _others(shown))
    if _is_torchs_form(shown):
        for number, (given, group) in enumerate(zip(groups, shown["param_groups"], strict=False)):
            of_group = {key: group.get(key) for key in given}
            wrong += [
                f"param_groups.{number}.{key}" for key in given if not hyperparameters.same(given[key], of_group[key])
            ]
    if wrong:
        raise StateMismatchError(
            f"after the load {type(optimizer).__name__} does not show what was read as {listed(wrong, at_most=4)}: its "
            "own load_state_dict makes something else of it"
        )


def _differing(read: Mapping[str, Any], shown: Mapping[str, Any]) -> list[str]:
    if read is shown:
        return []
    plain = {key: hyperparameters.without_numpy(shown[key]) for key in read if key in shown}
    return [str(key) for key in read if key not in plain or not sealing.is_same(read[key], plain[key])]


def _others(shown: Mapping[str, Any]) -> dict[Any, Any]:
    if not _is_torchs_form(shown):
        return dict(shown)
    others = {key: value for key, value in shown.items() if key not in ("state", "param_groups")}
    of_all = {key: value for key, value in shown["state"].items() if isinstance(key, str)}
    return others | ({"state": of_all} if of_all else {})


def _is_torchs_form(shown: Mapping[str, Any]) -> bool:
    return isinstance(shown.get("state"), Mapping) and isinstance(shown.get("param_groups"), list)
