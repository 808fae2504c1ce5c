"""Names: what the state that is loaded into calls its parts, on one rank or, by `join_names`, on all together."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ray_ckpt.errors import UsageError

__all__ = ["Names", "chosen", "is_below", "join_names"]


@dataclass(frozen=True)
class Names:
    """The names in the state that is loaded into, on one rank or on all together."""

    model: Collection[str]
    """Names of the model's tensors, as the model itself calls them."""
    groups: Sequence[Sequence[str]]
    """Parameters of each group of its optimizers; empty where no optimizer is wanted."""
    is_order_known: bool = True
    """Whether each group is in the order that one optimizer has. It matters to a checkpoint that keys by index."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the model's tensors."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of tied weights -> their names in `model`."""
    others: Collection[str] = ()
    """What else is wanted, such as `counters.step`."""

    @property
    def parameters(self) -> list[str]:
        return [name for group in self.groups for name in group]


def chosen(only: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names that were given as `only=`; None for all.

    Raises:
        UsageError: they are one text.
    """
    if isinstance(only, str):
        raise UsageError(f"only={only!r} is one text: give a sequence of them, as in only=({only!r},)")
    return None if only is None else tuple(only)


def is_below(name: str, prefix: str) -> bool:
    """Whether a name is this one, or lies below it."""
    return name == prefix or name.startswith(f"{prefix}.")


def join_names(offers: Sequence[Names | None]) -> Names | None:
    """What all ranks together hold. Ranks of a pipeline know the order of their own parameters only.

    Returns:
        None when no rank has names of ours.
    """
    names_of_ranks = [names for names in offers if names is not None]
    if not names_of_ranks:
        return None
    model = dict.fromkeys(name for names in names_of_ranks for name in names.model)
    groups = [
        list(dict.fromkeys(name for group in of_ranks for name in group))
        for of_ranks in itertools.zip_longest(*(names.groups for names in names_of_ranks), fillvalue=())
    ]
    is_order_known = all([list(group) for group in names.groups] == groups for names in names_of_ranks)
    shapes: dict[str, tuple[int, ...]] = {}
    aliases: dict[str, str] = {}
    for names in names_of_ranks:
        shapes |= names.shapes
        aliases |= names.aliases
    others = dict.fromkeys(name for names in names_of_ranks for name in names.others)
    return Names(tuple(model), groups, is_order_known, shapes, aliases, tuple(others))
