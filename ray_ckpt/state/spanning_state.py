"""Optimizers that keep the state of all their parameters, one after the other, under the first of them, as LBFGS does.

    spans.<first parameter>     names of the parameters, in their order

The parameters and their order are all that tells what belongs to which, so such state fits only the same ones in the
same order: not the stages of a pipeline that were saved as a whole model, nor the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ray_ckpt.errors import FormatError, UsageError
from ray_ckpt.state import hyperparameters, nesting, wrappers
from ray_ckpt.state.load_plan import Claim, SavedState
from ray_ckpt.text import listed, quoted

SPANS = "spans"


def pack_span(
    optimizer: torch.optim.Optimizer, states: Mapping[str, Mapping[str, Any]], order: tuple[str, ...]
) -> dict[str, Any]:
    """Name in the optimizer's section -> names of its parameters; nothing if its state is theirs each.

    Args:
        states: parameter name -> the optimizer's state of it.
        order: names of its parameters.
    """
    if not order or not _spans(optimizer, states, order[0]):
        return {}
    return {f"{SPANS}.{order[0]}": order}


def check_trained(optimizer: torch.optim.Optimizer, frozen: frozenset[str], span: Mapping[str, Any]) -> None:
    """Raises:
    UsageError: what is kept under the first parameter would be left out with it, or covers others that are.
    """
    for order in span.values():
        if left_out := [name for name in order if name in frozen]:
            raise UsageError(
                f"{type(optimizer).__name__} keeps one state of all its parameters, and trainable_only leaves out "
                f"{listed(left_out, at_most=4)}: give it only those that are trained"
            )


class Span:
    """What was saved of the order of an optimizer's parameters.

    Args:
        order: live names of its parameters.
        saved_order: their names in the checkpoint.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, order: Sequence[str], saved_order: Sequence[str], saved: SavedState
    ) -> None:
        self.claims: dict[str, Claim] = {}
        self.problems: list[str] = []
        self.doubts: list[str] = []
        kind = type(optimizer).__name__
        own = list(saved_order)
        live_names = dict(zip(own, order, strict=True))
        for flat in saved.under(f"optim.{SPANS}"):
            found, first = _names(flat, saved.values.get(flat)), flat.removeprefix(f"optim.{SPANS}.")
            if first in live_names:
                self.claims[f"optim.{SPANS}.{live_names[first]}"] = Claim(flat)
            if found != own and not live_names.keys().isdisjoint(found):
                self.problems.append(
                    f"{kind} keeps one state of all its parameters in their order, and was saved with others or in "
                    f"another order ({listed(found, at_most=4)}) than it has now ({listed(own, at_most=4)}): give it "
                    "those, or leave the optimizer out by only=('model',)"
                )
        if not saved.under(f"optim.{SPANS}") and isinstance(wrappers.stepping(optimizer), torch.optim.LBFGS):
            self._compare_unrecorded(kind, own, saved)

    def _compare_unrecorded(self, kind: str, own: Sequence[str], saved: SavedState) -> None:
        """What other programs save has no record: the order of the hyper-parameters is that of the parameters."""
        start = "optim.param_groups."
        names = (flat.removeprefix(start).rpartition(".")[0] for flat in saved.values if flat.startswith(start))
        found = list(dict.fromkeys(names))
        has_state = any(saved.under(f"optim.state.{name}") for name in found)
        if has_state and found != list(own):
            self.doubts.append(
                f"{kind} keeps one state of all its parameters in their order, and the checkpoint has "
                f"{listed(found, at_most=4)}, the optimizer {listed(list(own), at_most=4)}"
            )


def _names(flat: str, value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)) or not all(type(name) is str for name in value):
        raise FormatError(f"{flat!r} is {quoted(value)}, not names of parameters: the checkpoint is damaged")
    return list(value)


def _spans(optimizer: torch.optim.Optimizer, states: Mapping[str, Mapping[str, Any]], first: str) -> bool:
    members = list(hyperparameters.members(optimizer))
    if any(state for name, state in states.items() if name != first) or not states.get(first):
        return False
    if isinstance(wrappers.stepping(optimizer), torch.optim.LBFGS):
        return True
    total, own = _num_elements(members), members[0].numel()
    with nesting.named(f"state.{first}", states[first]):
        return any(tensor.numel() == total != own for tensor in _tensors_in(states[first]))


def _num_elements(parameters: Sequence[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        yield from _tensors_in(inner)
