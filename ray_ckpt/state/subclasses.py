"""Tensor subclasses at the edge of a state: what lies behind it sees plain tensors, what lies before it whole ones.

saving    leaves ── apart ──> the inner tensors of each subclass, and its recipe, under names of their own
loading   SavedState ── whole ──> the parts of a state plan as if subclasses had been saved as they are
          LoadPlan ── expand ──> claims of the inner tensors; `apply` gets the whole ones
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ray_ckpt.errors import FormatError, UsageError
from ray_ckpt.format.inner_tensors import RECORD, Recipe, misfits, rebuild, subclass_of, take_apart
from ray_ckpt.format.wrappers import is_made_of_others
from ray_ckpt.state.load_plan import Claim, Handover, LoadPlan, SavedState, Spec


def apart(leaves: Mapping[str, Any], section: str) -> dict[str, Any]:
    """The leaves, with every tensor that is made of others replaced by those, and by its recipe.

    Args:
        section: that the names are below, for messages.

    Raises:
        UsageError: as `inner_of`.
    """
    inner = inner_of(leaves, f"{section}.")
    found: dict[str, Any] = {}
    for name, value in leaves.items():
        found |= {f"{name}.{below}": entry for below, entry in inner[name].items()} if name in inner else {name: value}
    return found


def inner_of(leaves: Mapping[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    """Name of each tensor that is made of others -> name below it -> inner tensor, or recipe.

    A shard without elements has nothing to be named.

    Args:
        prefix: of the names, for messages.

    Raises:
        UsageError: a subclass cannot be taken apart, or a name that its inner tensors get is taken.
    """
    inner: dict[str, dict[str, Any]] = {}
    for name, value in leaves.items():
        if type(value) is torch.Tensor or not isinstance(value, torch.Tensor) or not is_made_of_others(value):
            continue
        parts = take_apart(prefix + name, value)
        inner[name] = {**parts.tensors, RECORD: parts.recipe.plain()} if parts.tensors else {}
        if taken := [below for below in inner[name] if f"{name}.{below}" in leaves]:
            raise UsageError(
                f"{prefix + name!r} is made of a tensor {taken[0]!r}, whose name {prefix + name}.{taken[0]} another "
                "entry has already: rename one of them"
            )
    return inner


def whole(saved: SavedState) -> SavedState:
    """The checkpoint as if subclasses had been saved as they are. One that has lost something counts as not saved."""
    recipes = {
        name.removesuffix(f".{RECORD}"): Recipe.parse(value, name)
        for name, value in saved.values.items()
        if name.endswith(f".{RECORD}")
    }
    recipes = {name: recipe for name, recipe in recipes.items() if _is_whole(name, recipe, saved)}
    if not recipes:
        return saved
    inner = {entry for name, recipe in recipes.items() for entry in _entries(name, recipe)}
    tensors = {name: spec for name, spec in saved.tensors.items() if name not in inner}
    tensors |= {name: Spec(recipe.dtype, recipe.shape, recipe) for name, recipe in recipes.items()}
    return saved.holding(tensors, {name: value for name, value in saved.values.items() if name not in inner})


def _is_whole(name: str, recipe: Recipe, saved: SavedState) -> bool:
    """Whether all of it is there, as it is described: then every name and shape below is one of the checkpoint's."""
    leaves = {f"{name}.{below}": leaf for below, leaf in recipe.leaves.items()}
    return name not in saved and all(
        saved.tensors.get(flat) == Spec(leaf.dtype, leaf.shape or ()) for flat, leaf in leaves.items()
    )


def _entries(name: str, recipe: Recipe) -> list[str]:
    return [f"{name}.{leaf}" for leaf in (*recipe.leaves, RECORD)]


def expand(plan: LoadPlan, seen: SavedState, saved: SavedState) -> LoadPlan:
    """The plan with claims of inner tensors in place of those of subclasses.

    Args:
        seen: what the plan was made from.
        saved: the checkpoint as it is.
    """
    recipes = {
        wanted: (spec.recipe if spec else None, claim.spec.recipe if claim.spec else None)
        for wanted, claim in plan.claims.items()
        for spec in (seen.tensors.get(claim.saved),)
    }
    if seen is saved and not any(live for _, live in recipes.values()):
        return plan
    claims: dict[str, Claim] = {}
    origins: dict[str, str] = {}
    made: dict[str, _Whole] = {}
    problems = list(plan.problems)
    for wanted, claim in plan.claims.items():
        found, live = recipes[wanted]
        misfit = _misfit(claim, found, live) if claim.saved in seen else ""
        if misfit:
            problems.append(f"{wanted}: {misfit}")
        elif found is not None:
            made[wanted] = _Whole(claim, found)
            is_empty = any(leaf.shape is None for leaf in live.leaves.values()) if live else False
            inner = made[wanted].claims(is_empty=is_empty)
            claims |= {f"{wanted}.{below}": of_inner for below, of_inner in inner.items()}
            origins |= {f"{wanted}.{below}": wanted for below in inner}
        else:
            claims[wanted] = claim

    def joined(loaded: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return {**loaded, **{wanted: it.tensor for wanted, it in made.items()}}

    def apply(loaded: Mapping[str, torch.Tensor]) -> None:
        plan.apply(joined(loaded))

    def expanded(handover: Handover) -> Handover:
        own = {name: claim for name, claim in claims.items() if origins.get(name, name) in handover.claims}
        return replace(handover, claims=own, state_of=lambda loaded: handover.state_of(joined(loaded)))

    handovers = [expanded(handover) for handover in plan.handovers]

    taken = [*_taken(plan.taken, seen), *_read_as_plain(seen, {claim.saved for claim in claims.values()})]
    return replace(plan, claims=claims, apply=apply, problems=problems, taken=taken, handovers=handovers)


def _misfit(claim: Claim, found: Recipe | None, live: Recipe | None) -> str:
    """Why what was saved cannot be read into what is there."""
    if found is None and live is None:
        return ""
    if found is None or live is None:
        return f"saved {found or 'as a plain tensor'}, wanted {live or claim.spec or 'a value'}"
    try:
        return "; ".join(misfits(found, live)) if live is not found else _unknown(found)
    except FormatError as error:
        return str(error)


def _unknown(recipe: Recipe) -> str:
    subclass_of(recipe)
    return ""


def _taken(names: Iterable[str], seen: SavedState) -> list[str]:
    taken = []
    for name in names:
        spec = seen.tensors.get(name)
        taken += [name] if spec is None or spec.recipe is None else _entries(name, spec.recipe)
    return taken


def _read_as_plain(seen: SavedState, claimed: set[str]) -> list[str]:
    """Recipes of subclasses whose inner tensors are wanted by their own names."""
    recipes = ((name, spec.recipe) for name, spec in seen.tensors.items() if spec.recipe is not None)
    return [
        f"{name}.{RECORD}" for name, recipe in recipes if any(f"{name}.{leaf}" in claimed for leaf in recipe.leaves)
    ]


class _Whole:
    """A tensor that is made of others, while it is loaded: the live one, or one that is made by its recipe."""

    def __init__(self, claim: Claim, recipe: Recipe) -> None:
        self._claim = claim
        self._recipe = recipe
        self._tensor: torch.Tensor | None = None
        self._parts: Mapping[str, torch.Tensor] = {}

    def claims(self, *, is_empty: bool) -> dict[str, Claim]:
        """Name below the tensor's -> claim."""
        name = self._claim.saved
        claims = {RECORD: Claim(f"{name}.{RECORD}")}
        for below, leaf in self._recipe.leaves.items() if not is_empty else ():
            claims[below] = Claim(f"{name}.{below}", Spec(leaf.dtype, leaf.shape or ()), partial(self._part, below))
        return claims

    @property
    def tensor(self) -> torch.Tensor:
        """Only now it is given memory, if it has none."""
        if self._tensor is None:
            assert self._claim.target is not None, "only tensors are made of tensors"
            tensor = self._claim.target()
            assert tensor is not None, "whole tensors are always somewhere"
            self._tensor = tensor if is_made_of_others(tensor) else rebuild(self._recipe, tensor)
            if is_made_of_others(self._tensor):
                self._parts = take_apart(self._claim.saved, self._tensor).tensors
        return self._tensor

    def _part(self, below: str) -> torch.Tensor | None:
        return self._parts.get(below) if is_made_of_others(self.tensor) else None
