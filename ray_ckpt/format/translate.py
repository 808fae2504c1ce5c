"""Others' names -> ours: `model.<name>`, `optim.state.<parameter>.<key>`, `optim.param_groups.<parameter>.<key>`.

    Manifest ── group_lists ──> names of the objects that say which parameters a group has; somebody reads them
    Manifest, their values, Names of the target ── translate ──> Translation: a Manifest with our names

What others write, each below a prefix of their own choice (`optim`, `optimizer`, `optimizer_0`, ...):

    by name, flat     state.<parameter>.<key>   param_groups.<parameter>.<key>      as ours: torchtitan
    by name           state.<parameter>.<key>   param_groups.<i>.<key>, .params     `get_state_dict`, accelerate
    by index          state.<number>.<key>      param_groups.<i>.<key>, .params     `optimizer.state_dict()`

The second and third lose hyper-parameters when pipeline stages are saved together: every stage writes
`param_groups.0.lr`, and one of them survives, key by key. That shows when parameters have state but are in no group.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ray_ckpt.errors import FormatError, StateMismatchError
from ray_ckpt.format.manifest import Manifest, ObjectEntry, Path, TensorEntry
from ray_ckpt.text import listed, quoted

__all__ = ["HYPERPARAMETERS", "Names", "Translation", "group_lists", "join_names", "may_be_foreign", "translate"]

MODEL, OPTIM = "model", "optim"
"""Sections that our names begin with."""

HYPERPARAMETERS = f"{OPTIM}.param_groups."
"""Prefix of the names of hyper-parameters."""

_OPTIMIZER = re.compile(r"(.+?)\.param_groups\.")
_LIST = re.compile(r"(.+?)\.param_groups\.([0-9]{1,9})\.(params|param_names)")
_NUMBER = re.compile(r"[0-9]{1,9}")
_MEMBERS = (".params", ".param_names")

_LIKE_THE_PARAMETER = (
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"),
    *("sum", "square_avg", "grad_avg", "acc_delta"),
)
"""Optimizer state that has the shape of its parameter."""

_PREFERRED = (f"{MODEL}.", "", "state_dict.")
"""Prefixes of the model that win over others which fit as well, such as those of averaged copies."""

E = TypeVar("E", TensorEntry, ObjectEntry)


@dataclass(frozen=True)
class Names:
    """The names in the state that is loaded into, on one rank or on all together."""

    model: Collection[str]
    """Names of the model's tensors, as the model itself calls them."""
    groups: Sequence[Sequence[str]]
    """Parameters of each group of its optimizers; empty where no optimizer is wanted."""
    is_order_known: bool = True
    """Whether each group is in the order that one optimizer has. It matters to a checkpoint that keys by index."""

    @property
    def parameters(self) -> list[str]:
        return [name for group in self.groups for name in group]


@dataclass(frozen=True)
class Translation:
    """A checkpoint under our names."""

    manifest: Manifest
    lost: str = ""
    """Why the checkpoint lacks the optimizer's hyper-parameters; empty when it has them."""


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
    return Names(tuple(model), groups, is_order_known)


def may_be_foreign(manifest: Manifest) -> bool:
    """Whether names may need a translation: another program wrote the checkpoint, or its names are not all ours."""
    return (
        not manifest.attempt
        or bool(group_lists(manifest))
        or not any(name.startswith(f"{MODEL}.") for name in manifest.tensors)
        or any(not name.startswith(HYPERPARAMETERS) and _OPTIMIZER.match(name) for name in manifest.objects)
    )


def group_lists(manifest: Manifest) -> list[str]:
    """Names of the objects whose values `translate` needs."""
    return [name for name in manifest.objects if name.endswith(_MEMBERS) and _LIST.fullmatch(name)]


def translate(manifest: Manifest, lists: Mapping[str, Any], names: Names) -> Translation:
    """Rename everything to what a `TrainState` calls it. Names without a counterpart are kept.

    Args:
        lists: values of `group_lists`.

    Raises:
        StateMismatchError: the optimizer's state cannot be told apart by parameter, or lacks parameters.
        FormatError: the groups contradict each other.
    """
    if not lists and _is_ours(manifest, names):
        return Translation(manifest)
    optimizers = _optimizers(manifest, lists)
    model = _find_model(manifest, optimizers, names.model)
    renamed = _Renamed()
    lost: list[str] = []
    shapes = {
        name: manifest.tensors[model + name].shape for name in names.parameters if model + name in manifest.tensors
    }
    for optimizer in optimizers if names.groups else ():
        groups = _by_name(optimizer, manifest, _order(names, optimizer, manifest, model), shapes)
        reason = _what_is_lost(optimizer, groups, manifest)
        lost += [reason] if reason else []
        renamed.rename_optimizer(manifest, optimizer, groups, keep_hyperparameters=not reason)
    renamed.rename_model(manifest, model)
    return Translation(_without_aliases(renamed.manifest(manifest), names.model), "; ".join(lost))


# -------------------------------------------------------------------------------------------------- finding


def _is_ours(manifest: Manifest, names: Names) -> bool:
    """Whether everything has our names already, at the cost of a look-up each."""
    return all(f"{MODEL}.{name}" in manifest.tensors for name in names.model) and (
        not names.parameters or any(name.startswith(HYPERPARAMETERS) for name in manifest.objects)
    )


@dataclass(frozen=True)
class _Optimizer:
    """One optimizer in the checkpoint."""

    prefix: str
    groups: Mapping[int, Sequence[int | str]] | None
    """Members of each group, names or indices; None when it is flat, like ours."""
    member_names: Mapping[int, Sequence[str]]
    """Group -> names of its members, for the groups that have them."""

    @property
    def is_indexed(self) -> bool:
        return any(type(member) is int for members in (self.groups or {}).values() for member in members)


def _optimizers(manifest: Manifest, lists: Mapping[str, Any]) -> list[_Optimizer]:
    prefixes = {match[1]: None for name in (*manifest.objects, *manifest.tensors) if (match := _OPTIMIZER.match(name))}
    found: dict[str, dict[str, dict[int, Any]]] = {prefix: {} for prefix in prefixes}
    for name, value in lists.items():
        if match := _LIST.fullmatch(name):
            found[match[1]].setdefault(match[3], {})[int(match[2])] = _members(name, value)
    return [
        _Optimizer(prefix, _sorted(of_prefix.get("params")), of_prefix.get("param_names", {}))
        for prefix, of_prefix in found.items()
    ]


def _sorted(groups: Mapping[int, Any] | None) -> Mapping[int, Any] | None:
    return None if groups is None else dict(sorted(groups.items()))


def _members(name: str, value: Any) -> Sequence[int | str]:
    if not isinstance(value, (list, tuple)) or len({type(member) for member in value} - {int, str}) > 0:
        raise FormatError(f"{quoted(name)} is {quoted(value)}, not a list of parameters")
    if len({type(member) for member in value}) > 1:
        raise FormatError(f"{quoted(name)} mixes names and numbers: {quoted(value)}")
    return value


def _find_model(manifest: Manifest, optimizers: Sequence[_Optimizer], wanted: Collection[str]) -> str:
    """The prefix under which most of the model's tensors are saved.

    Raises:
        StateMismatchError: several prefixes fit equally well.
    """
    of_optimizers = tuple(f"{optimizer.prefix}." for optimizer in optimizers)
    saved = {name for name in manifest.tensors if not name.startswith(of_optimizers)}
    for first in wanted:
        prefixes = {name[: -len(first)] for name in saved if name == first or name.endswith(f".{first}")}
        if prefixes:
            break
    else:
        return f"{MODEL}."
    fits = {prefix: sum(prefix + name in saved for name in wanted) for prefix in prefixes}
    best = [prefix for prefix, count in fits.items() if count == max(fits.values())]
    for preferred in _PREFERRED:
        if preferred in best:
            return preferred
    if len(best) > 1:
        raise StateMismatchError(
            f"the checkpoint holds several models that fit: below {listed(sorted(best))}; say which by a key map"
        )
    return best[0]


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


# -------------------------------------------------------------------------------------------------- members


def _by_name(
    optimizer: _Optimizer, manifest: Manifest, parameters: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[int, dict[int | str, str]]:
    """Members of each group -> their names.

    Raises:
        StateMismatchError: members are numbers, and nothing tells which parameters they stand for.
        FormatError: a parameter is in two groups.
    """
    groups = optimizer.groups or {}
    members = [member for group in groups.values() for member in group]
    if len(set(members)) < len(members):
        raise FormatError(f"{optimizer.prefix}.param_groups lists a parameter twice among {listed(members)}")
    if not optimizer.is_indexed:
        return {number: {member: str(member) for member in group} for number, group in groups.items()}
    if all(len(optimizer.member_names.get(number, ())) == len(group) for number, group in groups.items()):
        order = {
            member: str(name)
            for number, group in groups.items()
            for member, name in zip(group, optimizer.member_names[number], strict=True)
        }
    elif members and members == list(range(len(parameters))):
        order = dict(enumerate(parameters))
    else:
        raise StateMismatchError(
            f"the optimizer at {quoted(optimizer.prefix)} was saved by index, in groups of "
            f"{[len(group) for group in groups.values()]} parameters, which are not those of the optimizers that it is "
            "loaded into: which is which cannot be told. Give them the groups that were saved; or, if several pipeline "
            "stages saved under the same indices, so that the state of all but one is lost, load the model alone, by "
            "only=('model',)"
        )
    _check_shapes(optimizer, manifest, order, shapes)
    return {number: {member: order[member] for member in group} for number, group in groups.items()}


def _order(names: Names, optimizer: _Optimizer, manifest: Manifest, model: str) -> Sequence[str]:
    """The parameters by index: group after group, each in the order of the target's optimizer, or where its ranks hold
    parts of it only, in the order of the saved model.

    Returns:
        Nothing when the groups are not those of the target.
    """
    saved = optimizer.groups or {}
    if [len(saved[number]) for number in sorted(saved)] != [len(group) for group in names.groups]:
        return ()
    if names.is_order_known:
        return names.parameters
    place = {name.removeprefix(model): number for number, name in enumerate(manifest.tensors)}
    return [name for group in names.groups for name in sorted(group, key=lambda name: place.get(name, len(place)))]


def _check_shapes(
    optimizer: _Optimizer,
    manifest: Manifest,
    order: Mapping[int | str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Whether the state fits the parameters it is taken for."""
    for member, name in order.items():
        for key in _LIKE_THE_PARAMETER:
            entry = manifest.tensors.get(f"{optimizer.prefix}.state.{member}.{key}")
            if entry is not None and name in shapes and entry.shape != shapes[name]:
                raise StateMismatchError(
                    f"the optimizer at {quoted(optimizer.prefix)} was saved by index: number {member} would be "
                    f"{quoted(name)} of shape {list(shapes[name])}, but its {key} has {list(entry.shape)}. Give "
                    "the optimizer its parameters in the order that the saved one had, or load the model alone, "
                    "by only=('model',)"
                )


def _what_is_lost(optimizer: _Optimizer, groups: Mapping[int, Mapping[int | str, str]], manifest: Manifest) -> str:
    """Why the groups' hyper-parameters are not those of all parameters; empty when they are."""
    if optimizer.groups is None:
        return ""
    members = {str(member) for group in groups.values() for member in group}
    unlisted = sorted(set(_with_state(optimizer, manifest)) - members)
    if not unlisted:
        return ""
    return (
        f"the parameter groups at {quoted(optimizer.prefix)} do not list {listed(unlisted)}, though their state was "
        "saved: several ranks (pipeline stages) saved groups of their own under the same names, of which one survived, "
        "key by key; the hyper-parameters of the others are lost, and those that are left may be a mixture"
    )


def _with_state(optimizer: _Optimizer, manifest: Manifest) -> Iterator[str]:
    """Parameters that have state, by name or index."""
    prefix = f"{optimizer.prefix}.state."
    for name in (*manifest.tensors, *manifest.objects):
        if name.startswith(prefix):
            yield name.removeprefix(prefix).rpartition(".")[0]


# -------------------------------------------------------------------------------------------------- renaming


class _Renamed:
    """Collects entries under their new names."""

    def __init__(self) -> None:
        self._new: dict[str, list[str]] = {}

    def _put(self, old: str, *new: str) -> None:
        self._new.setdefault(old, []).extend(new)

    def rename_optimizer(
        self,
        manifest: Manifest,
        optimizer: _Optimizer,
        groups: Mapping[int, Mapping[int | str, str]],
        *,
        keep_hyperparameters: bool,
    ) -> None:
        names = {str(member): name for group in groups.values() for member, name in group.items()}
        for old in (*manifest.tensors, *manifest.objects):
            part, _, rest = old.removeprefix(f"{optimizer.prefix}.").partition(".")
            if not old.startswith(f"{optimizer.prefix}.") or part not in ("state", "param_groups"):
                continue
            if optimizer.groups is None:
                self._put(old, f"{OPTIM}.{part}.{rest}")
            elif part == "state":
                member, _, key = rest.rpartition(".")
                self._put(old, f"{OPTIM}.state.{names.get(member, member)}.{key}")
            else:
                number, _, key = rest.partition(".")
                kept = keep_hyperparameters and f".{key}" not in _MEMBERS
                members = groups.get(int(number), {}).values() if kept and _NUMBER.fullmatch(number) else ()
                self._put(old, *(f"{OPTIM}.param_groups.{name}.{key}" for name in members))

    def rename_model(self, manifest: Manifest, prefix: str) -> None:
        """Everything below the model's prefix; when it has none, every tensor that is no optimizer's."""
        if prefix == f"{MODEL}.":
            return
        for old in (*manifest.tensors, *manifest.objects):
            name = old.removeprefix(prefix)
            if old not in self._new and old.startswith(prefix) and (prefix or old in manifest.tensors):
                self._put(old, f"{MODEL}.{name}")

    def manifest(self, manifest: Manifest) -> Manifest:
        """The manifest with all entries under their new names.

        Raises:
            FormatError: two of them get one name.
        """
        tensors = self._apply(
            manifest.tensors, lambda entry, path: TensorEntry(entry.dtype, entry.shape, entry.chunks, path)
        )
        objects = self._apply(manifest.objects, lambda entry, path: entry._replace(path=path))
        return dataclasses.replace(manifest, tensors=tensors, objects=objects, fingerprints={})

    def _apply(self, entries: Mapping[str, E], moved: Callable[[E, Path], E]) -> dict[str, E]:
        applied: dict[str, E] = {}
        for old, entry in entries.items():
            names = self._new.get(old)
            new = {old: entry} if names is None else {name: moved(entry, _path(name)) for name in names}
            if twice := sorted(applied.keys() & new.keys()):
                raise FormatError(f"the checkpoint holds {quoted(twice[0])} twice, the second time as {quoted(old)}")
            applied |= new
        return applied


def _path(name: str) -> tuple[str, str]:
    """Where our own flat state has it: below its first part."""
    first, _, rest = name.partition(".")
    return first, rest
