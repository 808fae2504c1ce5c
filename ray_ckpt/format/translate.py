"""Others' names -> ours: `model.<name>`, `optim.state.<parameter>.<key>`, `optim.param_groups.<parameter>.<key>`.

    Manifest ── group_lists ──> names of the objects that say which parameters a group has; somebody reads them
    Manifest, their values, Names of the target ── translate ──> Translation: a Manifest with our names
        spelling.py             prefixes and wrappers in the names of the model
        foreign_optimizers.py   members of groups, by name or by index
        foreign_sections.py     schedulers, counters, and what else lies beside them

What others write, each below a prefix of their own choice (`optim`, `optimizer`, `optimizer_0`, ...) or none:

    by name, flat     state.<parameter>.<key>   param_groups.<parameter>.<key>      as ours: torchtitan
    by name           state.<parameter>.<key>   param_groups.<i>.<key>, .params     `get_state_dict`, accelerate
    by index          state.<number>.<key>      param_groups.<i>.<key>, .params     `optimizer.state_dict()`

The second and third lose hyper-parameters when pipeline stages are saved together: every stage writes
`param_groups.0.lr`, and one of them survives, key by key. That shows when parameters have state but are in no group.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ray_ckpt.errors import FormatError, StateMismatchError
from ray_ckpt.format.foreign_optimizers import (
    MEMBERS,
    SORTED_NAMES,
    Members,
    Optimizer,
    find_named_by_key,
    find_optimizers,
    group_lists,
    has_sorted_names,
)
from ray_ckpt.format.foreign_sections import section_of, wanted_objects, wanted_schedulers
from ray_ckpt.format.manifest import IMPORTED_FROM, Manifest, ObjectEntry, Path, TensorEntry
from ray_ckpt.format.nested_state import below, seal_lists
from ray_ckpt.format.spelling import Spelling, spell
from ray_ckpt.format.wanted_names import Names, is_below
from ray_ckpt.text import listed, quoted

__all__ = ["HYPERPARAMETERS", "Translation", "group_lists", "may_be_foreign", "origin_of", "translate"]

MODEL, OPTIM = "model", "optim"
"""Sections that our names begin with."""

HYPERPARAMETERS = f"{OPTIM}.param_groups."
"""Prefix of the names of hyper-parameters."""

_HYPERPARAMETER = re.compile(r"(.+?\.)??param_groups\.")
_FEW = 8

_NUMBER = re.compile(r"[0-9]{1,9}")

_PREFERRED = (f"{MODEL}.", "", "state_dict.")
"""Prefixes of the model that win over others which fit as well, such as those of averaged copies."""

E = TypeVar("E", TensorEntry, ObjectEntry)


@dataclass(frozen=True)
class Translation:
    """A checkpoint under our names."""

    manifest: Manifest
    lost: str = ""
    """Why the checkpoint lacks the optimizer's hyper-parameters; empty when it has them."""
    left_out: Sequence[str] = ()
    """What lies beside model and optimizer that the state does not want, or that has no name of ours."""


def origin_of(manifest: Manifest, kind: str) -> dict[str, str]:
    """What `Manifest.saved_by` says, beside versions, of a copy of this checkpoint: that its names are another
    program's, if they are.

    Args:
        kind: of the checkpoint, in words.
    """
    if manifest.has_own_names:
        return {}
    if manifest.attempt:
        return {IMPORTED_FROM: manifest.saved_by[IMPORTED_FROM]}
    return {IMPORTED_FROM: kind + (f", {SORTED_NAMES}" if has_sorted_names(manifest) else "")}


def may_be_foreign(manifest: Manifest) -> bool:
    """Whether names may need a translation: another program wrote the checkpoint, or its names are not all ours."""
    return (
        not manifest.has_own_names
        or bool(group_lists(manifest))
        or not any(name.startswith(f"{MODEL}.") for name in manifest.tensors)
        or any(not name.startswith(HYPERPARAMETERS) and _HYPERPARAMETER.match(name) for name in manifest.objects)
    )


def translate(manifest: Manifest, lists: Mapping[str, Any], names: Names) -> Translation:
    """Rename everything to what a `TrainState` calls it. Names without a counterpart are kept.

    Args:
        lists: values of `group_lists`.

    Raises:
        StateMismatchError: the optimizer's state cannot be told apart by parameter, or lacks parameters.
        FormatError: the groups contradict each other.
    """
    if manifest.has_own_names and not lists and _is_ours(manifest, names):
        return Translation(manifest)
    by_key = () if manifest.has_own_names else find_named_by_key(manifest, {*names.model, *names.aliases})
    if by_key and names.groups:
        raise StateMismatchError(
            f"the optimizer state below {listed(sorted(by_key))} is Megatron-core's, whose groups do not say which "
            "parameters they have: it is not translated. Load the model alone, by only=('model',), and the tensors "
            "that you need into a plain dict by their names"
        )
    optimizers = find_optimizers(manifest, lists)
    of_optimizers = (*by_key, *(optimizer.prefix for optimizer in optimizers if optimizer.prefix))
    is_optimizer_alone = any(not optimizer.prefix for optimizer in optimizers)
    saved = () if is_optimizer_alone else (name for name in manifest.tensors if not name.startswith(of_optimizers))
    model = spell(saved, [*names.model, *names.aliases], _PREFERRED)
    renamed = _Renamed()
    lost: list[str] = []
    shapes = {name: manifest.tensors[old].shape for old, name in model.wanted.items()}
    wanted = dataclasses.replace(names, shapes={**shapes, **names.shapes})
    for optimizer in optimizers if names.groups else ():
        members = Members.of(optimizer, manifest, wanted, model)
        reason = _what_is_lost(optimizer, members)
        lost += [reason] if reason else []
        renamed.rename_optimizer(manifest, optimizer, members, keep_hyperparameters=not reason)
    if not is_optimizer_alone:
        renamed.rename_model(manifest, model, names.aliases, of_optimizers)
    left_out = [] if manifest.has_own_names else renamed.rename_sides(manifest, names.others)
    if renamed.twice:
        left_out.append(f"tied weights are taken from their other name, not from {listed(renamed.twice)}")
    return Translation(_without_aliases(renamed.manifest(manifest), names.model), "; ".join(lost), left_out)


def _is_ours(manifest: Manifest, names: Names) -> bool:
    """Whether everything has our names already, at the cost of a look-up each."""
    return all(f"{MODEL}.{name}" in manifest.tensors for name in names.model) and (
        not names.parameters or any(name.startswith(HYPERPARAMETERS) for name in manifest.objects)
    )


def _without_aliases(manifest: Manifest, wanted: Collection[str]) -> Manifest:
    """Without tied weights under the names that the target does not use: those that lie where a wanted one does."""
    ours = {f"{MODEL}.{name}" for name in wanted}
    places = {entry.chunks for name, entry in manifest.tensors.items() if name in ours}
    tensors = {
        name: entry
        for name, entry in manifest.tensors.items()
        if name in ours or not name.startswith(f"{MODEL}.") or entry.chunks not in places or not _has_place(entry)
    }
    return dataclasses.replace(manifest, tensors=tensors)


def _has_place(entry: TensorEntry) -> bool:
    return any(chunk.box.num_elements for chunk in entry.chunks)


def _what_is_lost(optimizer: Optimizer, members: Members) -> str:
    """Why the groups' hyper-parameters are not those of all parameters; empty when they are."""
    if not members.unlisted:
        return ""
    return (
        f"the parameter groups at {optimizer.label} do not list {listed(sorted(members.unlisted.values()))}, though "
        "their state was saved: several ranks (pipeline stages) saved groups of their own under the same names, of "
        "which one survived, key by key; the hyper-parameters of the others are lost, and those that are left may be a "
        "mixture"
    )


# -------------------------------------------------------------------------------------------------- renaming


class _Renamed:
    """Collects entries under their new names."""

    def __init__(self) -> None:
        self._new: dict[str, list[str]] = {}
        self._paths: dict[str, Path] = {}
        self._further: dict[str, ObjectEntry] = {}
        self.twice: list[str] = []
        """Saved names of tied weights that were saved under another name too, which is taken."""

    def _put(self, old: str, *new: str) -> None:
        self._new.setdefault(old, []).extend(new)

    def rename_optimizer(
        self, manifest: Manifest, optimizer: Optimizer, members: Members, *, keep_hyperparameters: bool
    ) -> None:
        known = {**members.names, **members.unlisted}
        lists: dict[str, dict[str, str]] = {}
        for old in (*manifest.tensors, *manifest.objects):
            part, rest = optimizer.part_of(old)
            if not part:
                continue
            if part == "state" or optimizer.groups is None:
                member, key = members.split(rest)
                if not member:
                    self._put(old, f"{OPTIM}.{part}.{rest}")
                elif part == "state":
                    lists.setdefault(f"{OPTIM}.state.{known[member]}", {})[old] = key
                else:
                    self._put(old, f"{OPTIM}.{part}.{known[member]}.{key}".rstrip("."))
            else:
                number, _, key = rest.partition(".")
                kept = keep_hyperparameters and f".{key}" not in MEMBERS
                of_group = members.groups.get(int(number), ()) if kept and _NUMBER.fullmatch(number) else ()
                self._put(old, *(f"{OPTIM}.param_groups.{name}.{key}" for name in of_group))
        for place, keys in lists.items():
            new, further = seal_lists(manifest, place, keys)
            for old, name in new.items():
                self._put(old, *([name] if name else []))
            self._further |= further

    def rename_model(
        self, manifest: Manifest, model: Spelling, aliases: Mapping[str, str], of_optimizers: tuple[str, ...]
    ) -> None:
        """Everything below the model's prefix; when it has none, every tensor that is no optimizer's."""
        found = set(model.wanted.values())
        for old in (*manifest.tensors, *manifest.objects):
            if old in self._new or (of_optimizers and old.startswith(of_optimizers)):
                continue
            if old in model.wanted:
                name = model.wanted[old]
                if name not in aliases:
                    self._put(old, f"{MODEL}.{name}")
                elif aliases[name] not in found:
                    found.add(aliases[name])
                    self._put(old, f"{MODEL}.{aliases[name]}")
                else:
                    # A tied weight that was saved twice is taken from where the target has it.
                    self._put(old)
                    self.twice.append(old)
            elif (rest := model.rest(old)) and (model.prefix or _may_be_model(old, manifest, model)):
                self._put(old, f"{MODEL}.{rest}")

    def rename_sides(self, manifest: Manifest, wanted: Collection[str]) -> list[str]:
        """What lies beside model and optimizer.

        Returns:
            What is left out, in words.
        """
        schedulers = wanted_schedulers(wanted)
        places = {name.partition(".")[0] for name in wanted if not name.startswith(("counters.", "extra."))}
        places |= wanted_objects(wanted)
        left: dict[str, list[str]] = {}
        taken: set[str] = set()
        saved = manifest.tensors.keys() | manifest.objects.keys()
        for old in (*manifest.tensors, *manifest.objects):
            side = None if old in self._new else section_of(old, schedulers, saved)
            if side is None:
                continue
            is_wanted = side.ours in wanted or any(is_below(side.ours, place) for place in places)
            if side.ours and is_wanted and side.ours not in taken:
                taken.add(side.ours)
                self._put(old, side.ours)
                self._paths[side.ours] = below(manifest, old, side.ours)
            else:
                self._put(old)
                left.setdefault(side.what, []).append(old)
        return [f"{what} left out: {_summed_up(names)}" for what, names in left.items()]

    def manifest(self, manifest: Manifest) -> Manifest:
        """The manifest with all entries under their new names.

        Raises:
            FormatError: two of them get one name.
        """
        tensors = self._apply(manifest.tensors, lambda entry, path: entry._replace(path=path))
        objects = self._apply(manifest.objects, lambda entry, path: entry._replace(path=path))
        objects |= self._further
        return dataclasses.replace(manifest, tensors=tensors, objects=objects, fingerprints={})

    def _apply(self, entries: Mapping[str, E], moved: Callable[[E, Path], E]) -> dict[str, E]:
        applied: dict[str, E] = {}
        for old, entry in entries.items():
            names = self._new.get(old)
            new = (
                {old: entry}
                if names is None
                else {name: moved(entry, self._paths.get(name) or _path(name)) for name in names}
            )
            if twice := sorted(applied.keys() & new.keys()):
                raise FormatError(f"the checkpoint holds {quoted(twice[0])} twice, the second time as {quoted(old)}")
            applied |= new
        return applied


def _may_be_model(name: str, manifest: Manifest, model: Spelling) -> bool:
    """Whether a name that is not wanted may be the model's, when that has no prefix."""
    return name in manifest.tensors and bool(model.wanted) and section_of(name, (), ()) is None


def _summed_up(names: Collection[str]) -> str:
    """A few names as they are, many by what they begin with."""
    if len(names) > _FEW:
        names = {name.partition(".")[0] for name in names}
    return listed(sorted(names), at_most=_FEW)


def _path(name: str) -> tuple[str, str]:
    """Where our own flat state has it: below its first part."""
    first, _, rest = name.partition(".")
    return first, rest
