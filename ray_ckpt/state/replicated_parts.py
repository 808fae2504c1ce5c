"""Parts of a training state of which every rank holds the same: scaler, counters. The extra ones: extra_part.py."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from functools import partial
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.stateful import Stateful

from ray_ckpt.errors import FormatError
from ray_ckpt.format.torch_container import parse_dtype
from ray_ckpt.state import nesting, sealing
from ray_ckpt.state.load_plan import Claim, Handover, LoadPlan, SavedState, Spec
from ray_ckpt.text import quoted

NUM_RANKS = "num_ranks"
"""Name of the number of ranks that saved, so that a rank whose state is lost is missed."""

_RECORDS = (f".{sealing.RECORD}", f"rng.{NUM_RANKS}", f"dataloader.{NUM_RANKS}")


class Countable(Protocol):
    """An object that counts steps."""

    step: int | None


def claim_under(saved: SavedState, name: str, *, is_recorded: bool = False) -> dict[str, Claim]:
    """Claim everything that was saved under a name, tensors into new CPU memory; the name itself if nothing was.

    Args:
        is_recorded: whether `sealing.pack_state` has packed it for sure, so that its record has to be there.

    Raises:
        FormatError: the record of the names is none.
    """
    claims = {}
    for flat in [*saved.under(name), *_lost(saved, name, is_recorded=is_recorded)] or [name]:
        spec = saved.tensors.get(flat)
        claims[flat] = Claim(flat) if spec is None else Claim(flat, spec, partial(_on_host, spec))
    return claims


def _lost(saved: SavedState, name: str, *, is_recorded: bool) -> list[str]:
    """Names that are recorded but not there, and the name of the record where that is not there."""
    record = f"{name}.{sealing.RECORD}"
    if record not in saved:
        return [record] if is_recorded and saved.under(name) and has_records(saved) else []
    recorded = saved.values.get(record)
    if not isinstance(recorded, tuple) or not recorded or not all(type(below) is str for below in recorded):
        raise FormatError(f"{record!r} is {quoted(recorded)}, not names of what was saved: the checkpoint is damaged")
    names = (f"{name}.{below}" if below else name for below in recorded)
    return [flat for flat in names if flat not in saved]


def has_records(saved: SavedState) -> bool:
    """Whether whoever saved the checkpoint recorded what is in it, as first versions of `TrainState` did not, nor do
    others: then each record has to be there."""
    return any(name.endswith(_RECORDS) for name in saved.names)


def is_whole(saved: SavedState, claims: Mapping[str, Claim]) -> bool:
    """Whether everything that is claimed is there. An object is not given a state of which a part is lost."""
    return all(claim.saved in saved for claim in claims.values())


def gathered(saved: SavedState, claims: Mapping[str, Claim], loaded: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Wanted name -> tensor or value that was loaded for it, as `sealing.unpack` takes them."""
    return {
        name: loaded[name] if name in loaded else saved.values[claim.saved]
        for name, claim in claims.items()
        if name in loaded or claim.saved in saved.values
    }


def handed_over(
    saved: SavedState, name: str, owner: Stateful, claims: Mapping[str, Claim], *, may_be_asked: bool = True
) -> list[Handover]:
    """The handover of what was saved under a name to the object that takes it; none if some of it is lost."""
    if not is_whole(saved, claims):
        return []

    def state_of(loaded: Mapping[str, torch.Tensor]) -> Any:
        return sealing.unpack(name, gathered(saved, claims, loaded))

    return [Handover(name, owner, claims, state_of, may_be_asked)]


def _nothing_more(loaded: Mapping[str, torch.Tensor]) -> None:
    """All of it is handed over."""


class StatefulPart:
    """One object with `state_dict` and `load_state_dict`, such as a gradient scaler."""

    def __init__(self, section: str, owner: Stateful) -> None:
        self.section = section
        self._owner = owner
        self._name = f"{section}.state"

    def leaves(self) -> dict[str, Any]:
        return sealing.pack_state("state", nesting.asked(self.section, self._owner))

    def plan(self, saved: SavedState) -> LoadPlan:
        if not saved.wants(self.section):
            return LoadPlan({}, lambda loaded: None)
        claims = claim_under(saved, self._name, is_recorded=True)
        return LoadPlan(claims, _nothing_more, handovers=handed_over(saved, self._name, self._owner, claims))


class CounterPart:
    """The number of steps, and the counters."""

    section = "counters"

    def __init__(self, owner: Countable, counters: MutableMapping[str, Any]) -> None:
        self._owner = owner
        self._counters = counters

    def leaves(self) -> dict[str, Any]:
        counted = dict(self._counters) if self._owner.step is None else {**self._counters, "step": self._owner.step}
        return {name: sealing.seal(name, value) for name, value in counted.items()}

    def plan(self, saved: SavedState) -> LoadPlan:
        if not saved.wants(self.section):
            return LoadPlan({}, lambda loaded: None)
        wanted = [f"{self.section}.{name}" for name in self.leaves()]
        names = list(dict.fromkeys([*wanted, *saved.under(self.section)]))

        def apply(loaded: Mapping[str, torch.Tensor]) -> None:
            for name in saved.under(self.section):
                value = sealing.unseal(name, saved.values[name])
                if name == f"{self.section}.step":
                    self._owner.step = value
                else:
                    self._counters[name.removeprefix(f"{self.section}.")] = value

        return LoadPlan({name: Claim(name) for name in names}, apply)


def _on_host(spec: Spec) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=parse_dtype(spec.dtype))
