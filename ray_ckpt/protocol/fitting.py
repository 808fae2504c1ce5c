"""How a checkpoint fits what it is loaded into: what this rank can tell of it by itself, in words."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ray_ckpt.format.wanted_names import is_below
from ray_ckpt.state.load_plan import Claim, SavedState
from ray_ckpt.state.train_state import OPTIONAL

__all__ = ["compare", "lacking", "saved_and_wanted", "unknown_names", "unused_keys"]


def unknown_names(only: Sequence[str] | None, saved: SavedState, claims: Mapping[str, Claim]) -> list[str]:
    """What was chosen although it is nowhere: a misspelt name would otherwise be left out in silence."""
    unknown = [
        name
        for name in only or ()
        if not saved.under(name) and not any(is_below(name, wanted) or is_below(wanted, name) for wanted in claims)
    ]
    if only is not None and not only:
        return ["only=() chooses nothing"]
    return [f"only={name!r} names nothing that is saved or wanted" for name in unknown]


def unused_keys(key_map: object, saved: SavedState, wanted: Collection[str]) -> tuple[str, ...]:
    """Keys of a key map that are no names of what this rank wants: misspelt ones would change nothing, in silence.

    Args:
        wanted: names of what is loaded into.
    """
    if not isinstance(key_map, Mapping):
        return ()
    left = [key for key in key_map if key not in wanted and saved.wants(key)]
    above = {name[:at] for name in wanted for at, character in enumerate(name) if character == "."} if left else ()
    return tuple(key for key in left if key not in above)


def lacking(missing: Sequence[str], saved: SavedState) -> list[str]:
    """Arguments of the state of whose kind nothing was saved."""
    sections = dict.fromkeys(name.partition(".")[0] for name in missing)
    return [OPTIONAL[section] for section in sections if section in OPTIONAL and not saved.under(section)]


def compare(claims: Mapping[str, Claim], saved: SavedState) -> tuple[list[str], list[str]]:
    """Messages for what differs in shape or kind, and names that differ in dtype only."""
    differing, cast = [], []
    for wanted, claim in claims.items():
        found = saved.tensors.get(claim.saved)
        if claim.spec is found or claim.spec == found or claim.saved not in saved:
            continue
        if claim.spec is not None and found is not None and claim.spec.shape == found.shape:
            cast.append(wanted)
        else:
            differing.append(f"{wanted}: {saved_and_wanted(claim, saved)}")
    return differing, sorted(cast)


def saved_and_wanted(claim: Claim, saved: SavedState) -> str:
    return f"saved {saved.tensors.get(claim.saved, 'a value')}, wanted {claim.spec or 'a value'}"
