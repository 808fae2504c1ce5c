"""What the user gives a training state beside all else: tensors, plain values, and objects with a `state_dict`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful

from ray_ckpt.errors import UsageError
from ray_ckpt.format.foreign_sections import OF_OTHERS
from ray_ckpt.state import nesting, sealing
from ray_ckpt.state.foreign_state import rebuild
from ray_ckpt.state.load_plan import Claim, Handover, LoadPlan, SavedState, Spec
from ray_ckpt.state.replicated_parts import claim_under, gathered, handed_over, is_whole
from ray_ckpt.text import listed


class ExtraPart:
    """A mapping of the user's: tensors are loaded in place, objects by `load_state_dict`, other values are replaced."""

    def __init__(self, extra: MutableMapping[str, Any], section: str = "extra") -> None:
        self.section = section
        self._extra = extra

    def leaves(self) -> dict[str, Any]:
        leaves: dict[str, Any] = {}
        for name in self._extra:
            if outer := next((name[:at] for at in _dots(name) if name[:at] in self._extra), None):
                raise UsageError(f"{self.section}[{name!r}] lies within {self.section}[{outer!r}]: rename one of them")
        for name, value in self._extra.items():
            if _is_object(value):
                leaves |= sealing.pack_state(name, nesting.asked(f"{self.section}.{name}", value))
            else:
                leaves |= sealing.pack(name, value)
        return leaves

    def plan(self, saved: SavedState) -> LoadPlan:
        claims: dict[str, Claim] = {}
        states: dict[str, Mapping[str, Claim]] = {}
        handovers: list[Handover] = []
        problems: list[str] = []
        for name, value in self._extra.items():
            wanted, foreign = f"{self.section}.{name}", f"{self.section}.{OF_OTHERS}.{name}"
            if not saved.wants(wanted):
                continue
            if isinstance(value, torch.Tensor):
                source = saved.name_of(wanted)
                claims[wanted] = Claim(source, Spec.of_target(value, wanted), partial(torch.Tensor.detach, value))
            elif _is_object(value) and saved.under(foreign):
                rebuilt = rebuild(saved, foreign, value.state_dict(), may_grow=True, may_have_tensors=True)
                below = rebuilt.claims(saved.under(foreign), saved)
                claims |= below
                if rebuilt.is_whole:
                    handovers.append(Handover(wanted, value, below, rebuilt.filled))
                elif rebuilt.unknown:
                    unknown = listed(rebuilt.unknown, at_most=4)
                    problems.append(f"{wanted}: nothing tells how {unknown} was nested, as the object has none of it")
            else:
                below = claim_under(saved, wanted)
                claims |= below
                if _is_object(value):
                    handovers += handed_over(saved, wanted, value, below)
                else:
                    states[name] = below

        def apply(loaded: Mapping[str, torch.Tensor]) -> None:
            for name, below in states.items():
                if is_whole(saved, below):
                    self._extra[name] = sealing.unpack(f"{self.section}.{name}", gathered(saved, below, loaded))

        return LoadPlan(claims, apply, problems, handovers=handovers)


def _is_object(value: object) -> bool:
    return not isinstance(value, torch.Tensor) and isinstance(value, Stateful)


def _dots(name: str) -> Iterator[int]:
    return (at for at, character in enumerate(name) if character == ".")
