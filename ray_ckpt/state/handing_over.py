"""Objects that take their state by their own `load_state_dict`, and may refuse it: asked before anything else changes.

take(handovers, loaded) -> Taken      each object has what was saved; if one refuses, all have what they had
Taken.undo()                          another rank's object has refused
finish(plan, loaded)                  after the reading: everything else
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ray_ckpt.errors import CheckpointError, RayCkptError, StateMismatchError
from ray_ckpt.format.manifest import itemsize
from ray_ckpt.state import nesting
from ray_ckpt.state.load_plan import Handover, LoadPlan
from ray_ckpt.state.module_entries import Shown, may_show_else

MAX_KEPT_BYTES = 256 << 20
"""Objects with more tensors than that take their state after the reading, as a copy of what they had is too large."""


def can_be_undone(handover: Handover) -> bool:
    """Whether an object can be given back what it had, at the cost of a copy of that in memory."""
    if isinstance(handover.owner, (nn.Module, torch.optim.Optimizer)):
        return False
    specs = [claim.spec for claim in handover.claims.values() if claim.spec is not None]
    return sum(math.prod(spec.shape) * itemsize(spec.dtype) for spec in specs) <= MAX_KEPT_BYTES


class Taken:
    """What was handed over in one load, and how to take it back."""

    def __init__(self) -> None:
        self._undo: list[tuple[str, Callable[[], None]]] = []

    def take(self, handovers: Sequence[Handover], read: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Give each object its state.

        Args:
            read: reads their tensors, some of which may be the objects' own memory; wanted name -> tensor.

        Raises:
            StateMismatchError: an object refuses what was saved; all of them have again what they had.
        """
        for handover in handovers:
            self._undo.append((handover.name, _way_back(handover)))
        loaded = read()
        for handover in handovers:
            try:
                hand_over(handover, loaded)
            except Exception as error:
                raise StateMismatchError(f"{error}; {self.undo() or 'nothing was changed'}") from error

    def undo(self) -> str:
        """Give all objects what they had. What is returned names those that do not take it; empty when all do."""
        failed = []
        for name, undo in reversed(self._undo):
            try:
                undo()
            except Exception as error:
                failed.append(f"{name} does not take back what it had either ({type(error).__name__}: {error})")
        self._undo.clear()
        return "; ".join(failed)


def hand_over(handover: Handover, loaded: Mapping[str, torch.Tensor]) -> None:
    """Raises:
    CheckpointError: the object refuses it.
    """
    owner, state = handover.owner, handover.state_of(loaded)
    with refusal_named(f"{handover.name} ({type(owner).__name__})"):
        read = Shown(owner, state) if isinstance(owner, nn.Module) and may_show_else(owner, state) else None
        owner.load_state_dict(state)
        if read is not None:
            read.check()


def early(plans: Sequence[LoadPlan]) -> list[Handover]:
    """What is handed over before the reading."""
    return [handover for plan in plans for handover in plan.handovers if can_be_undone(handover)]


def finish(plan: LoadPlan, loaded: Mapping[str, torch.Tensor]) -> None:
    """Apply a part's plan.

    Args:
        loaded: wanted name -> tensor that was read, of all parts.

    Raises:
        CheckpointError: an object refuses what was saved.
    """
    with refusal_named(plan.section or "the state"):
        plan.apply({wanted: loaded[wanted] for wanted in plan.claims if wanted in loaded})
    for handover in plan.handovers:
        if not can_be_undone(handover):
            hand_over(handover, loaded)


@contextlib.contextmanager
def refusal_named(name: str) -> Iterator[None]:
    """Whatever somebody's `load_state_dict` raises becomes an error of ours that says whose it was."""
    try:
        yield
    except RayCkptError:
        raise
    except Exception as error:
        raise CheckpointError(f"{name} refuses what was saved: {type(error).__name__}: {error}") from error


def _way_back(handover: Handover) -> Callable[[], None]:
    owner = handover.owner
    if not handover.may_be_asked:
        attributes = dict(getattr(owner, "__dict__", {}))

        def put_back() -> None:
            vars(owner).clear()
            vars(owner).update(attributes)

        return put_back if attributes else lambda: None
    live = nesting.asked(handover.name, owner)
    tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
    with nesting.named(handover.name, live):
        kept = _copied(live, tensors)

    def give_back() -> None:
        with torch.no_grad():
            for tensor, copied in tensors:
                tensor.copy_(copied)
        owner.load_state_dict(kept)

    return give_back


def _copied(value: Any, tensors: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """A copy of a state; its tensors are listed with their copies."""
    if isinstance(value, torch.Tensor):
        copied = value.detach().clone()
        tensors.append((value.detach(), copied))
        return copied
    if type(value) is dict:
        return {key: _copied(item, tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item, tensors) for item in value)
    return copy.deepcopy(value)
