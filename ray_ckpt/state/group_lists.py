"""Lists with one item per parameter group, within the state of a scheduler: taken out, so that items follow the groups.

split(state, 2)  ->  the state with a `GroupList` in the place of each such list, and the lists
fit(lists, ...)  ->  a list for the groups that the optimizer has after a load

A list may have as many items as there are groups by chance (two milestones, two groups). What the same list of the
live scheduler looks like tells one from the other; where it cannot, `ambiguous` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ray_ckpt.state.hyperparameters import same

PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")
"""Keys of torch's schedulers that hold one item per parameter group, whatever else they look like."""

_WHOLE = frozenset({"_milestones", "_schedule_phases"})
"""Keys of torch's schedulers that hold a list of something else."""

_MAKERS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "dict": lambda items: dict(enumerate(items)),
    "tensor": torch.stack,
}


@dataclass(frozen=True)
class GroupList:
    """Stands in a state for a list with one item per parameter group."""

    kind: str
    """`list`, `tuple`, `tensor` of one dim, or `dict` with the groups' numbers as keys."""
    path: tuple[str | int, ...]
    """Keys and indices that lead to it."""

    @property
    def name(self) -> str:
        """Its path as one component of a name."""
        return "/".join(str(key).replace("%", "%25").replace(".", "%2E").replace("$", "%24") for key in self.path)

    @property
    def is_certain(self) -> bool:
        """Whether its name alone tells that it has one item per group."""
        return self.path[-1] in PER_GROUP

    def of(self, items: Sequence[Any]) -> Any:
        return _MAKERS[self.kind](list(items))

    def within(self, state: Any) -> Any:
        """What stands in its place in a state; None if there is none."""
        for key in self.path:
            try:
                state = state[key]
            except (KeyError, IndexError, TypeError):
                return None
        return state


@dataclass(frozen=True)
class Place:
    """Where an item comes from: the group's number among those that were saved, and how many these are."""

    group: int
    num_groups: int


def split(state: Any, num_groups: int, lists: dict[GroupList, Any], path: tuple[str | int, ...] = ()) -> Any:
    """A state with a `GroupList` in the place of each list that has as many items as there are groups.

    Args:
        lists: gets the lists.
    """
    if path and path[-1] not in _WHOLE and (kind := _kind(state)) and len(state) == num_groups:
        place = GroupList(kind, path)
        lists[place] = state
        return place
    if type(state) is dict:
        return {
            key: split(value, num_groups, lists, (*path, key)) if type(key) in (str, int) else value
            for key, value in state.items()
        }
    if type(state) in (list, tuple):
        return type(state)(split(value, num_groups, lists, (*path, number)) for number, value in enumerate(state))
    return state


def join(state: Any, replace: Callable[[GroupList], Any]) -> Any:
    """A state with lists in the places that `split` has left."""
    if isinstance(state, GroupList):
        return replace(state)
    if type(state) is dict:
        return {key: join(value, replace) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(join(value, replace) for value in state)
    return state


def ambiguous(live: Any, num_live: int, members: Sequence[Sequence[Place]]) -> bool:
    """Whether nothing tells if a list follows groups that are now others than those that were saved.

    Args:
        live: the list in the live scheduler.
        num_live: number of groups of the live optimizer.
        members: for each of these groups, the places of its members.
    """
    places = [place for group in members for place in group]
    if not places or all(place == Place(number, num_live) for number, group in enumerate(members) for place in group):
        return False
    return not _kind(live) or len(live) not in (num_live, places[0].num_groups)


def fit(
    place: GroupList,
    found: Sequence[tuple[Place, Sequence[Any]] | None],
    live: Any,
    origins: Sequence[int],
) -> Any:
    """A list for the groups that the optimizer has now.

    Args:
        found: for each group its place in what was saved, and the list that was saved; None for a group of which
            nothing was.
        live: the list in the live scheduler.
        origins: for each group, its number before the load.
    """
    known = [(at, _items(items)) for at, items in filter(None, found)]
    live_items = _items(live) if _kind(live) else []
    num_live = max(origins, default=-1) + 1
    if not known:
        return place.of([live_items[origin] for origin in origins]) if len(live_items) == num_live else live
    whole, num_saved = known[0][1], known[0][0].num_groups
    is_one = all(same(list(items), list(whole)) for _, items in known)
    if is_one and not place.is_certain and not _follows(found, whole, live_items, num_live, num_saved):
        return place.of(whole)
    spread = [live_items[origin] if len(live_items) == num_live else whole[0] for origin in origins]
    own = [None if at is None else _items(at[1])[at[0].group] for at in found]
    return place.of([item if at is None else mine for at, mine, item in zip(found, own, spread, strict=True)])


def _follows(
    found: Sequence[tuple[Place, Sequence[Any]] | None],
    whole: Sequence[Any],
    live: Sequence[Any],
    num_live: int,
    num_saved: int,
) -> bool:
    """Whether the items are the groups', and not a list that has as many items by chance."""
    if len(found) == num_saved and all(at is None or at[0].group == number for number, at in enumerate(found)):
        return False  # the groups are the same, so that it makes no difference
    if num_live != num_saved:
        return len(live) != num_saved
    # A list that was made by the same arguments, and in the same order although the groups are in another.
    return len(found) != num_saved or not same(list(live), list(whole))


def _kind(value: Any) -> str:
    if type(value) in (list, tuple):
        return "list" if type(value) is list else "tuple"
    if type(value) is dict and value and all(type(key) is int for key in value):
        return "dict" if list(value) == list(range(len(value))) else ""
    return "tensor" if isinstance(value, torch.Tensor) and value.dim() == 1 else ""


def _items(value: Any) -> Sequence[Any]:
    return list(value.values()) if isinstance(value, Mapping) else list(value)


def places_in(sealed: Any) -> Iterator[GroupList]:
    """The `GroupList`s in a value, as `sealing` keeps it."""
    if isinstance(sealed, tuple) and len(sealed) == 2 and sealed[0] == TAG:
        kind, path = sealed[1]
        yield GroupList(kind, tuple(path))
    elif isinstance(sealed, (list, tuple)):
        for item in sealed:
            yield from places_in(item)


TAG = "$groups"
"""How `sealing` marks a `GroupList`."""
