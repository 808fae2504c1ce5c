"""One name, spelled differently: below a prefix of somebody's choice, with the names of wrappers in it.

    saved names, wanted names ── spell ──> Spelling: saved name -> wanted name

`model._orig_mod.layers.0._checkpoint_wrapped_module.weight` is `layers.0.weight` below `model`. Wrappers hold one
module each, so their names mean nothing and are taken out wherever they stand, on both sides: a model may have a
component `module` of its own. peft leaves the names of adapters out of the files that it writes, so they are left out
of what is wanted where it is not found otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ray_ckpt.errors import StateMismatchError
from ray_ckpt.text import listed

__all__ = ["Spelling", "plain", "prefixes_of", "spell"]

_WRAPPERS = frozenset(
    {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module", "module", "_module"}
)
"""Names that torch.compile, activation checkpointing, FSDP1, Lightning Fabric, DDP and its kind, and Opacus put in."""

_MAGNITUDES = re.compile(r"(\.lora_magnitude_vector)\.\w+\.weight$")

_ADAPTER = re.compile(r"(\.(?:lora|ia3|vera|hada|lokr|oft|boft|hra|randlora|shira|fourierft)_\w+)\.\w+(?=\.|$)")

_OTHER_MODULES = re.compile(r"\.modules_to_save\.\w+(?=\.)")
"""Modules that are trained whole; the frozen one that each stands for is beside it."""


@dataclass(frozen=True)
class Spelling:
    """How names that are wanted were saved."""

    prefix: str = ""
    """What most of the saved names begin with, without wrappers: empty, or components and a dot."""
    wanted: Mapping[str, str] = field(default_factory=dict)
    """Saved name -> wanted name."""

    def rest(self, saved: str) -> str | None:
        """The name below the prefix, without wrappers; None for a name that is not below it."""
        name = plain(saved)
        return name[len(self.prefix) :] if name.startswith(self.prefix) else None


def plain(name: str) -> str:
    """The name without wrappers."""
    if not any(wrapper in name for wrapper in _WRAPPERS):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def prefixes_of(name: str) -> Iterable[str]:
    """The name and what it lies in: `a.b.c`, `a.b`, `a`."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def spell(saved: Iterable[str], wanted: Collection[str], preferred: Iterable[str] = ("",)) -> Spelling:
    """Find the prefix below which most of the wanted names were saved, and which saved name is which.

    Args:
        preferred: prefixes that win over others which fit as well.

    Raises:
        StateMismatchError: several prefixes fit equally well, or several saved names stand for one.
    """
    known: dict[str, list[str]] = {}
    for name in saved:
        known.setdefault(plain(name), []).append(name)
    spelling = _spell(known, {name: plain(name) for name in wanted}, preferred)
    found = set(spelling.wanted.values())
    adapters = {name: short for name in wanted if name not in found and (short := _without_adapter(plain(name)))}
    if not adapters:
        return spelling
    left = {core: [name for name in names if name not in spelling.wanted] for core, names in known.items()}
    further = _spell({core: names for core, names in left.items() if names}, adapters, preferred)
    if found and further.prefix != spelling.prefix:
        return spelling
    return Spelling(further.prefix, {**spelling.wanted, **further.wanted})


def _without_adapter(name: str) -> str:
    """The name as peft writes it; empty for what is no adapter's."""
    short = _OTHER_MODULES.sub("", _ADAPTER.sub(r"\1", _MAGNITUDES.sub(r"\1", name)))
    return short if short != name else ""


def _spell(known: Mapping[str, list[str]], wanted: Mapping[str, str], preferred: Iterable[str]) -> Spelling:
    """
    Args:
        known: name without wrappers -> saved names.
        wanted: wanted name -> what it is called without wrappers.
    """
    spelled: dict[str, list[str]] = {}
    for name, core in wanted.items():
        spelled.setdefault(core, []).append(name)
    prefix = _prefix(known.keys(), spelled, preferred)
    if prefix is None:
        return Spelling()
    found: dict[str, str] = {}
    for core, names in spelled.items():
        found |= _matched(known.get(prefix + core, []), names)
    return Spelling(prefix, found)


def _prefix(known: Collection[str], spelled: Collection[str], preferred: Iterable[str]) -> str | None:
    for first in spelled:
        prefixes = {name[: -len(first)] for name in known if name == first or name.endswith(f".{first}")}
        if prefixes:
            break
    else:
        return None
    fits = {prefix: sum(prefix + name in known for name in spelled) for prefix in prefixes}
    best = [prefix for prefix, count in fits.items() if count == max(fits.values())]
    if len(best) == 1:
        return best[0]
    chosen = next((prefix for prefix in preferred if prefix in best), None)
    if chosen is None:
        raise StateMismatchError(
            f"the checkpoint holds several models that fit: below {listed(sorted(best))}; say which by a key map"
        )
    return chosen


def _matched(saved: list[str], wanted: list[str]) -> dict[str, str]:
    """Names that are the same without wrappers: each wanted one and what is its own by the wrappers in it."""
    if len(saved) <= 1 and len(wanted) <= 1:
        return dict(zip(saved, wanted, strict=False))
    found: dict[str, str] = {}
    for place, name in enumerate(sorted(wanted, key=len, reverse=True), start=1):
        ending = [one for one in saved if one not in found and (one == name or one.endswith(f".{name}"))]
        if ending:
            found[min(ending, key=len) if place == len(wanted) else max(ending, key=len)] = name
    if not found and saved:
        raise StateMismatchError(f"{listed(saved)} are saved, each of which may be {listed(wanted)}")
    return found
