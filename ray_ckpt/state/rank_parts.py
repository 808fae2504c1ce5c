"""Parts of a training state that every rank has of its own: random generators and data loaders.

    <section>.rank<n>. ...
    dataloader.positions.<n>     of a data loader that goes by a DistributedSampler: sampler_positions.py

Loaded by as many ranks in a layout of the same name, each rank takes its own again. Otherwise random generators are
seeded from the saved seed, the step and the rank, so that every such load gives the same numbers. A data loader goes on
where all of the saved ones were, if its sampler can be set there, and else is left as it is. The plan's notes say which
happened, and which samples come again. (Ranks that have to draw the same numbers, such as those of one
tensor-parallel group, must be seeded by the user after such a load: the names do not say who belongs together.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.stateful import Stateful

from ray_ckpt.errors import FormatError
from ray_ckpt.format import lost_ranks
from ray_ckpt.format.foreign_sections import OF_RANK
from ray_ckpt.state import nesting, sealing
from ray_ckpt.state.foreign_state import rebuild
from ray_ckpt.state.load_plan import Claim, LoadPlan, SavedState
from ray_ckpt.state.random_generators import ForeignGenerators, Rng
from ray_ckpt.state.replicated_parts import NUM_RANKS, claim_under, gathered, handed_over, has_records, is_whole
from ray_ckpt.state.sampler_positions import Position, mover, position_of, replica_of
from ray_ckpt.text import listed, quoted

RESTORED, RESEEDED, LEFT = "restored", "reseeded", "left as it was"

_POSITIONS = "positions"


class RankPart:
    """An object that each rank has of its own.

    Args:
        section: `rng` or `dataloader`.
        owner: the object whose state is saved.
        layout: name of the layout in which this rank runs now.
    """

    def __init__(self, section: str, owner: Stateful, layout: str | None) -> None:
        self.section = section
        self._owner = owner
        self._layout = layout

    def leaves(self) -> dict[str, Any]:
        rank, num_ranks = _place()
        state = nesting.asked(self.section, self._owner)
        leaves = {NUM_RANKS: num_ranks} | sealing.pack_state(f"rank{rank}", state)
        if position := position_of(self._owner, state):
            leaves[f"{_POSITIONS}.{rank}"] = astuple(position)
        return leaves

    def plan(self, saved: SavedState) -> LoadPlan:
        if not saved.wants(self.section):
            return LoadPlan({}, lambda loaded: None)
        rank, num_ranks = _place()
        known = saved.under(self.section)
        saved_ranks = {match[1] for name in known if (match := re.match(rf"{self.section}\.rank(\d+)", name))}
        if not saved_ranks:
            if not known:
                return LoadPlan({self.section: Claim(self.section)}, _nothing)
            return self._plan_generators(saved) if isinstance(self._owner, Rng) else self._plan_foreign(saved)
        counted = f"{self.section}.{NUM_RANKS}"
        if counted not in saved and has_records(saved):
            return LoadPlan({counted: Claim(counted)}, _nothing, taken=known, notes={self.section: LEFT})
        num_saved = saved.values.get(counted, len(saved_ranks))
        if type(num_saved) is not int or not all(int(number) < num_saved for number in saved_ranks):
            raise FormatError(
                f"{counted!r} is {quoted(num_saved)}, and there is state of rank {max(map(int, saved_ranks))}: the "
                "checkpoint is damaged"
            )
        if num_saved == num_ranks and saved.layout == self._layout:
            return self._plan_restored(saved, f"{self.section}.rank{rank}")
        if not isinstance(self._owner, Rng):
            return self._plan_elsewhere(saved, num_saved)
        # That of a rank that was lost in the save is not there.
        first = min(set(range(num_saved)) - lost_ranks.in_layout(saved.layout), default=0)
        seed = f"{self.section}.rank{first}.seed"
        seeds = (saved.values.get(seed), saved.values.get("counters.step"), rank)
        owner = self._owner
        return LoadPlan(
            {seed: Claim(seed)}, lambda loaded: owner.reseed(*seeds), taken=known, notes={self.section: RESEEDED}
        )

    def _plan_restored(self, saved: SavedState, name: str) -> LoadPlan:
        """Of the state that one rank saved under this name."""
        known = saved.under(self.section)
        claims = claim_under(saved, name, is_recorded=True)
        if not is_whole(saved, claims):
            return LoadPlan(claims, _nothing, taken=known, notes={self.section: LEFT})
        if not isinstance(self._owner, Rng):
            handovers = handed_over(saved, name, self._owner, claims, may_be_asked=False)
            return LoadPlan(claims, _nothing, taken=known, notes={self.section: RESTORED}, handovers=handovers)

        def restore(loaded: Mapping[str, torch.Tensor]) -> None:
            self._owner.load_state_dict(sealing.unpack(name, gathered(saved, claims, loaded)))

        return LoadPlan(claims, restore, taken=known, notes={self.section: RESTORED})

    def _plan_elsewhere(self, saved: SavedState, num_saved: int) -> LoadPlan:
        """Of what a data loader's ranks saved in another layout."""
        known = saved.under(self.section)
        below = f"{self.section}.{_POSITIONS}"
        positions = {int(name[len(below) + 1 :]): Position(*saved.values[name]) for name in saved.under(below)}
        own = replica_of(self._owner)
        # When a rank was lost in the save, all go on in the same way.
        for number, position in positions.items() if not lost_ranks.in_layout(saved.layout) else ():
            if (position.replica, position.num_replicas) == own:
                return self._plan_restored(saved, f"{self.section}.rank{number}")
        if found := mover(self._owner, list(positions.values())):
            move, again = found
            note = (
                f"{RESTORED}; {again} samples come again, as that many is less than one per replica"
                if again
                else RESTORED
            )
            return LoadPlan({}, lambda loaded: move(), taken=known, notes={self.section: note})
        return LoadPlan({}, _nothing, taken=known, notes={self.section: _left(num_saved)})

    def _plan_generators(self, saved: SavedState) -> LoadPlan:
        """Of what another program saved of its processes: each takes its own again if there are as many."""
        rank, num_ranks = _place()
        known, owner = saved.under(self.section), self._owner
        assert isinstance(owner, Rng), "asked for random generators only"
        foreign = ForeignGenerators(saved, rank, num_ranks)
        if not foreign.claims or foreign.doubts:
            return LoadPlan({}, _nothing, doubts=foreign.doubts, taken=known, notes={self.section: LEFT})
        if not foreign.is_as_many:
            step = saved.values.get("counters.step")
            return LoadPlan(
                foreign.claims,
                lambda loaded: owner.reseed(foreign.seed(loaded), step, rank),
                taken=known,
                notes={self.section: RESEEDED},
            )
        note = RESTORED + (f"; {listed(foreign.lacking)} {LEFT}, as nothing of it was saved" if foreign.lacking else "")
        return LoadPlan(
            foreign.claims,
            lambda loaded: owner.load_state_dict(foreign.state(loaded)),
            taken=known,
            notes={self.section: note},
        )

    def _plan_foreign(self, saved: SavedState) -> LoadPlan:
        """Of what another program saved: all of it goes to the object, or its rank's part where ranks differ."""
        place, (rank, num_ranks) = self.section, _place()
        known = saved.under(place)
        found = (re.match(rf"{re.escape(place)}\.{re.escape(OF_RANK)}(\d+)\.", name) for name in known)
        if numbers := {int(match[1]) for match in found if match}:
            if numbers != set(range(num_ranks)) or self._layout is not None:
                return LoadPlan({}, _nothing, taken=known, notes={place: _left(len(numbers))})
            place = f"{place}.{OF_RANK}{rank}"
        rebuilt = rebuild(saved, place, self._owner.state_dict(), may_grow=True, may_have_tensors=True)
        claims = rebuilt.claims(saved.under(place), saved)
        if not rebuilt.is_whole:
            doubts = [
                f"nothing tells how {listed(rebuilt.unknown, at_most=4)} was nested, as the data loader has none yet"
            ]
            return LoadPlan(
                claims,
                _nothing,
                doubts=doubts if rebuilt.unknown else (),
                taken=known if numbers else (),
                notes={self.section: LEFT},
            )

        def give(loaded: Mapping[str, torch.Tensor]) -> None:
            self._owner.load_state_dict(rebuilt.filled(loaded))

        return LoadPlan(claims, give, taken=known if numbers else (), notes={self.section: RESTORED})


def _left(num_saved: int) -> str:
    return (
        f"{LEFT}: nothing tells what the {num_saved} ranks that saved it had taken together, so a new loader gives the "
        "samples of the running epoch again"
    )


def _nothing(loaded: Mapping[str, torch.Tensor]) -> None:
    """What a plan does that takes nothing."""


def _place() -> tuple[int, int]:
    """This rank, and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
