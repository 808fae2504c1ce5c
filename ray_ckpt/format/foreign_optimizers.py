"""Optimizers in another program's checkpoint: which parameters their groups list, and the names these stand for.

    find_optimizers ──> Optimizer ── Members.of ──> saved member (a name or a number) -> name of the parameter

An optimizer by index is matched by the order of the parameters in the optimizer that is loaded into. State may be
nested: `state.0.Q.1` is item 1 of the list `Q` of parameter 0.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_ckpt.errors import FormatError, StateMismatchError
from ray_ckpt.format.manifest import IMPORTED_FROM, Manifest
from ray_ckpt.format.safetensors import SUFFIX
from ray_ckpt.format.spelling import Spelling, prefixes_of, spell
from ray_ckpt.format.wanted_names import Names
from ray_ckpt.text import listed, quoted

__all__ = [
    "MEMBERS",
    "SORTED_NAMES",
    "Members",
    "Optimizer",
    "find_named_by_key",
    "find_optimizers",
    "group_lists",
    "has_sorted_names",
]

_OPTIMIZER = re.compile(r"(.+?\.)??param_groups\.")
_LIST = re.compile(r"(.+?\.)??param_groups\.([0-9]{1,9})\.(params|param_names)")
SORTED_NAMES = "names are sorted"
"""Part of `Manifest.saved_by[IMPORTED_FROM]` where the checkpoint that was imported has its names by the alphabet."""

MEMBERS = (".params", ".param_names")
"""Last components of the names of objects that say which parameters a group has."""

_LIKE_THE_PARAMETER = (
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"),
    *("sum", "square_avg", "grad_avg", "acc_delta"),
)
"""Optimizer state that has the shape of its parameter."""


_BY_KEY = re.compile(r"(.+\.)?(state\.(fp32_param|exp_avg|exp_avg_sq|momentum_buffer)\.(.+)|gbuf_idx_[0-9]+\..+)")
"""How Megatron-core names optimizer state: by the key first, then by the parameter; or as buckets of all of them."""


@dataclass(frozen=True)
class Optimizer:
    """One optimizer in the checkpoint."""

    prefix: str
    """What its names begin with: empty, or components and a dot."""
    groups: Mapping[int, Sequence[int | str]] | None
    """Members of each group, names or indices; None when it is flat, like ours."""
    member_names: Mapping[int, Sequence[str]]
    """Group -> names of its members, for the groups that have them."""

    @property
    def is_indexed(self) -> bool:
        return any(type(member) is int for members in (self.groups or {}).values() for member in members)

    @property
    def label(self) -> str:
        return quoted(self.prefix.rstrip(".") or "the top of the file")

    def part_of(self, name: str) -> tuple[str, str]:
        """`state` or `param_groups`, and the rest of the name; two empty texts for a name that is not of it."""
        part, _, rest = name.removeprefix(self.prefix).partition(".")
        return (part, rest) if name.startswith(self.prefix) and part in ("state", "param_groups") else ("", "")

    def below(self, part: str, manifest: Manifest) -> Iterable[str]:
        start = f"{self.prefix}{part}."
        return (name.removeprefix(start) for name in (*manifest.tensors, *manifest.objects) if name.startswith(start))


def has_sorted_names(manifest: Manifest) -> bool:
    """Whether a file of the checkpoint keeps names by the alphabet, so that their order tells nothing."""
    return any(chunk.file.endswith(SUFFIX) for entry in manifest.tensors.values() for chunk in entry.chunks)


def group_lists(manifest: Manifest) -> list[str]:
    """Names of the objects that say which parameters a group has."""
    return [name for name in manifest.objects if name.endswith(MEMBERS) and _LIST.fullmatch(name)]


def find_optimizers(manifest: Manifest, lists: Mapping[str, Any]) -> list[Optimizer]:
    """
    Args:
        lists: values of `group_lists`.

    Raises:
        FormatError: one of them is no list of names or of numbers.
    """
    prefixes = {
        match[1] or "": None for name in (*manifest.objects, *manifest.tensors) if (match := _OPTIMIZER.match(name))
    }
    found: dict[str, dict[str, dict[int, Any]]] = {prefix: {} for prefix in prefixes}
    for name, value in lists.items():
        if match := _LIST.fullmatch(name):
            found[match[1] or ""].setdefault(match[3], {})[int(match[2])] = _checked_members(name, value)
    return [
        Optimizer(prefix, _sorted(of_prefix.get("params")), of_prefix.get("param_names", {}))
        for prefix, of_prefix in found.items()
    ]


def find_named_by_key(manifest: Manifest, parameters: Collection[str]) -> tuple[str, ...]:
    """What names of optimizer state begin with that have the key first, as Megatron-core's have it.

    Args:
        parameters: names that a parameter may have.
    """
    prefixes: dict[str, None] = {}
    for name in manifest.tensors:
        match = _BY_KEY.fullmatch(name)
        if match and (match[3] in (None, "fp32_param") or match[4] in parameters):
            prefixes[(match[1] or "") + ("state." if match[3] else "")] = None
    return tuple(prefix for prefix in prefixes if prefix)


def _sorted(groups: Mapping[int, Any] | None) -> Mapping[int, Any] | None:
    return None if groups is None else dict(sorted(groups.items()))


def _checked_members(name: str, value: Any) -> Sequence[int | str]:
    if not isinstance(value, (list, tuple)) or len({type(member) for member in value} - {int, str}) > 0:
        raise FormatError(f"{quoted(name)} is {quoted(value)}, not a list of parameters")
    if len({type(member) for member in value}) > 1:
        raise FormatError(f"{quoted(name)} mixes names and numbers: {quoted(value)}")
    return value


@dataclass(frozen=True)
class Members:
    """The parameters that a saved optimizer has."""

    names: Mapping[str, str]
    """Name or number, as it was saved -> name of the parameter."""
    groups: Mapping[int, Sequence[str]]
    """Group -> names of its parameters; empty for an optimizer that is flat."""
    unlisted: Mapping[str, str]
    """As `names`, for those that have state, but are in no group."""

    @classmethod
    def of(cls, optimizer: Optimizer, manifest: Manifest, wanted: Names, model: Spelling) -> Members:
        """
        Args:
            model: how the model's names are spelled in the checkpoint.

        Raises:
            StateMismatchError: members are numbers, and nothing tells which parameters they stand for.
            FormatError: a parameter is in two groups.
        """
        groups = optimizer.groups or {}
        listed_members = [member for group in groups.values() for member in group]
        if len(set(listed_members)) < len(listed_members):
            raise FormatError(f"{optimizer.prefix}param_groups lists a parameter twice among {listed(listed_members)}")
        if optimizer.is_indexed:
            names = _names_of_numbers(optimizer, manifest, wanted, model)
            with_state = {rest.partition(".")[0] for rest in optimizer.below("state", manifest)}
            unlisted = {number: number for number in with_state - names.keys() if number.isdecimal()}
        else:
            names, unlisted = _spelled_members(optimizer, manifest, wanted, listed_members)
        of_group = {number: [names[str(member)] for member in group] for number, group in groups.items()}
        return cls(names, of_group, unlisted)

    def split(self, rest: str) -> tuple[str, str]:
        """The member that a name below `state` or `param_groups` begins with, and the key; the member is empty when it
        begins with none."""
        for prefix in prefixes_of(rest):
            if prefix in self.names or prefix in self.unlisted:
                return prefix, rest[len(prefix) + 1 :]
        return "", rest


def _spelled_members(
    optimizer: Optimizer, manifest: Manifest, wanted: Names, members: Collection[int | str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Saved name -> name of the parameter, of those that groups list (or of all, when it is flat), and of others."""
    listed_names = {str(member) for member in members}
    parts = ("state", "param_groups") if optimizer.groups is None else ("state",)
    candidates = {prefix for part in parts for rest in optimizer.below(part, manifest) for prefix in prefixes_of(rest)}
    spelling = spell(sorted(listed_names | candidates), [*wanted.parameters, *wanted.aliases])
    found = {saved: wanted.aliases.get(name, name) for saved, name in spelling.wanted.items()}
    if optimizer.groups is None:
        return found, {}
    names = {name: found.get(name, name) for name in listed_names}
    return names, {saved: name for saved, name in found.items() if saved not in names}


def _names_of_numbers(optimizer: Optimizer, manifest: Manifest, wanted: Names, model: Spelling) -> dict[str, str]:
    groups = optimizer.groups or {}
    members = [member for group in groups.values() for member in group]
    if all(len(optimizer.member_names.get(number, ())) == len(group) for number, group in groups.items()):
        saved = {
            str(member): str(name)
            for number, group in groups.items()
            for member, name in zip(group, optimizer.member_names[number], strict=True)
        }
        spelled = spell(saved.values(), [*wanted.parameters, *wanted.aliases]).wanted
        order = {
            member: wanted.aliases.get(spelled.get(name, name), spelled.get(name, name))
            for member, name in saved.items()
        }
    else:
        names = _order(wanted, groups, manifest, model)
        if not members or members != list(range(len(names))):
            raise StateMismatchError(
                f"the optimizer at {optimizer.label} was saved by index, in groups of "
                f"{[len(group) for group in groups.values()]} parameters, which are not those of the optimizers that "
                f"it is loaded into ({[len(group) for group in wanted.groups]}, on ranks that "
                f"{'know' if wanted.is_order_known else 'hold parts and do not know'} their order): which is which "
                "cannot be told. Give them the groups that were saved; or, if several pipeline stages saved under the "
                "same indices, so that the state of all but one is lost, load the model alone, by only=('model',)"
            )
        order = {str(number): name for number, name in enumerate(names)}
    _check_shapes(optimizer, manifest, order, wanted.shapes)
    return order


def _order(
    wanted: Names, saved: Mapping[int, Sequence[int | str]], manifest: Manifest, model: Spelling
) -> Sequence[str]:
    """The parameters by index: group after group, each in the order of the target's optimizer, or where its ranks hold
    parts of it only, in the order of the saved model.

    Returns:
        Nothing when the groups are not those of the target, or no order is known. (Safetensors files sort their names.)
    """
    if [len(saved[number]) for number in sorted(saved)] != [len(group) for group in wanted.groups]:
        return ()
    if wanted.is_order_known:
        return wanted.parameters
    is_sorted = SORTED_NAMES in manifest.saved_by.get(IMPORTED_FROM, "")
    place: dict[str, int] = {}
    for number, (name, entry) in enumerate(manifest.tensors.items()):
        if name in model.wanted and not is_sorted and not any(chunk.file.endswith(SUFFIX) for chunk in entry.chunks):
            place.setdefault(wanted.aliases.get(model.wanted[name], model.wanted[name]), number)
    if not place.keys() >= set(wanted.parameters):
        return ()
    return [name for group in wanted.groups for name in sorted(group, key=place.__getitem__)]


def _check_shapes(
    optimizer: Optimizer, manifest: Manifest, order: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Whether the state fits the parameters it is taken for."""
    for member, name in order.items():
        for key in _LIKE_THE_PARAMETER:
            entry = manifest.tensors.get(f"{optimizer.prefix}state.{member}.{key}")
            if entry is not None and name in shapes and entry.shape != shapes[name]:
                raise StateMismatchError(
                    f"the optimizer at {optimizer.label} was saved by index: number {member} would be "
                    f"{quoted(name)} of shape {list(shapes[name])}, but its {key} has {list(entry.shape)}. Give "
                    "the optimizer its parameters in the order that the saved one had, or load the model alone, "
                    "by only=('model',)"
                )
