"""What the other ranks can save when some are lost. Needs no torch.

A lost rank sends no plan. What it held is its plan of the last try, as long as the plans of all others are the same as
then; or else, by the layout, what a rank holds that is its replica. The others can commit when they hold all of that,
except what every rank has of its own: that is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray_ckpt.errors import CommitError, UsageError
from ray_ckpt.format import lost_ranks
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.protocol.merging import GlobalPlan
from ray_ckpt.protocol.messages import Item, LocalPlan
from ray_ckpt.text import listed

__all__ = ["left_out", "plans_of_lost"]


def plans_of_lost(
    plans: Sequence[LocalPlan | None], before: Sequence[LocalPlan], layout: str | None
) -> dict[int, LocalPlan]:
    """What each rank held, as far as others may hold it too, that sends no plan.

    Args:
        plans: by rank; None of a lost one.
        before: the plans of the last try; empty where there was none.
        layout: how the state lies across the ranks, as the state itself says.

    Raises:
        CommitError: nothing tells what a rank held.
    """
    lost = [rank for rank, plan in enumerate(plans) if plan is None]
    if len(before) == len(plans) and all(
        plan is None or plan.token == known.token for plan, known in zip(plans, before, strict=True)
    ):
        return {rank: before[rank] for rank in lost}
    held = {rank: _plan_of_replica(rank, plans, layout) for rank in lost}
    # What it held the last time it has to hold still, as far as is known.
    known_of = {rank: _items(before[rank]) for rank in lost if rank < len(before)}
    return {rank: LocalPlan("", (*_items(plan), *known_of.get(rank, ()))) for rank, plan in held.items()}


def left_out(lost: Mapping[int, LocalPlan], merged: GlobalPlan) -> tuple[str, ...]:
    """The names that cannot be saved without these ranks, and that a load can do without.

    Raises:
        CommitError: they alone held something else.
    """
    alone = {rank: [item.name for item in _items(plan) if item.name not in merged.names] for rank, plan in lost.items()}
    for rank, names in alone.items():
        if missed := sorted({name for name in names if not lost_ranks.is_own(name, rank)}):
            raise CommitError(f"refusing to save: no other rank holds what rank {rank} held of {listed(missed)}")
    return tuple(sorted({name for names in alone.values() for name in names}))


def _items(plan: LocalPlan) -> Sequence[Item]:
    assert plan.items is not None, "a plan that was kept has its items"
    return plan.items


def _plan_of_replica(rank: int, plans: Sequence[LocalPlan | None], layout: str | None) -> LocalPlan:
    unknown = f"refusing to save: nothing tells what rank {rank} held, as it was lost before it could say so"
    try:
        known = Layout.parse(layout or "")
        known.check_world(len(plans))
    except UsageError:
        raise CommitError(f"{unknown}, and its state names no layout of {len(plans)} ranks") from None
    place = known.coordinate(rank)
    for replica in range(known.dp_replicate):
        other = known.rank({**place, "dp_replicate": replica})
        plan = plans[other]
        if plan is not None:
            items = tuple(item for item in _items(plan) if not lost_ranks.is_own(item.name, other))
            return LocalPlan("", items)
    raise CommitError(f"{unknown}, and no rank that is left is its replica in the layout {known}")
