"""Which of a checkpoint's entries go into a target, and what they are called there.

The model is what lies below a key that says so in the nested state dict (`model`, `state_dict`, ...). Where there is
none, as in a file of weights, it is every tensor that belongs neither to an optimizer nor to what lies beside one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_ckpt.errors import FormatError, UsageError
from ray_ckpt.format.foreign_optimizers import Optimizer, find_optimizers
from ray_ckpt.format.foreign_sections import section_of
from ray_ckpt.format.manifest import Chunk, Manifest, ObjectEntry, Path, TensorEntry, itemsize
from ray_ckpt.format.torch_container import parse_dtype
from ray_ckpt.text import listed, quoted

__all__ = ["Rename", "chosen", "is_cast", "model_of", "optimizer_parts", "parse_dtype_name", "renamed", "renamed_path"]

Rename = tuple[str, str]
"""A regular expression, and what replaces what it matches in a name."""

_MODELS = ("model", "state_dict", "model_state_dict", "module")
"""Keys below which programs keep the model: ours and most, Lightning, scripts by hand, DeepSpeed."""

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module"})
"""Parts of names that only wrappers have."""

_LEADING_WRAPPERS = frozenset({"module", "_module"})
"""Parts of names that wrappers put in front of all, and that a model may have itself."""

_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}


@dataclass(frozen=True)
class Model:
    """The model in a checkpoint."""

    key: str
    """The key below which it lies; empty where it lies below none."""
    plain: Mapping[str, str]
    """Name in the checkpoint -> name without key and wrappers."""
    aliases: Mapping[str, str]
    """Name in the checkpoint of a tied weight -> the first name of it there."""

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """As `plain`; of tied weights, the first alone."""
        return {name: plain for name, plain in self.plain.items() if name not in self.aliases}


def model_of(manifest: Manifest, lists: Mapping[str, Any]) -> Model:
    """
    Args:
        lists: values of `foreign_optimizers.group_lists`.

    Raises:
        FormatError: two names are one without their wrappers.
    """
    keys = {_key(name, entry) for name, entry in manifest.tensors.items()}
    key = next((key for key in _MODELS if key in keys), "")
    if key:
        saved = [name for name, entry in manifest.tensors.items() if _key(name, entry) == key]
    else:
        prefixes = tuple(start for start, _ in optimizer_parts(find_optimizers(manifest, lists)))
        everything = manifest.tensors.keys() | manifest.objects.keys()
        saved = [
            name
            for name in manifest.tensors
            if not name.startswith(prefixes) and section_of(name, (), everything) is None
        ]
    bare = {name: name[len(key) + 1 :] if key else name for name in saved}
    plain = _without_wrappers(bare)
    aliases: dict[str, str] = {}
    places: dict[tuple[Chunk, ...], str] = {}
    for name in plain:
        entry = manifest.tensors[name]
        first = places.setdefault(entry.chunks, name) if entry.num_bytes else name
        if first != name and manifest.tensors[first].shape == entry.shape:
            aliases[name] = first
    return Model(key, plain, aliases)


def optimizer_parts(optimizers: Iterable[Optimizer]) -> list[tuple[str, str]]:
    """What the names of their state and groups start with, and the optimizer's prefix of it."""
    return [
        (optimizer.prefix + part, optimizer.prefix) for optimizer in optimizers for part in ("state.", "param_groups.")
    ]


def _key(name: str, entry: TensorEntry | ObjectEntry) -> str:
    """The first key on the way to an entry; empty when the dict is flat."""
    path = entry.path or ()
    return str(path[0]) if len(path) > 1 and name.startswith(f"{path[0]}.") else ""


def _without_wrappers(names: Mapping[str, str]) -> dict[str, str]:
    split = {name: [part for part in bare.split(".") if part not in _WRAPPERS] for name, bare in names.items()}
    while split and all(len(parts) > 1 and parts[0] in _LEADING_WRAPPERS for parts in split.values()):
        split = {name: parts[1:] for name, parts in split.items()}
    plain = {name: ".".join(parts) for name, parts in split.items()}
    check_distinct(plain)
    return plain


def check_distinct(names: Mapping[str, str]) -> None:
    """Raises FormatError when two entries would have one name.

    Args:
        names: name in the source -> name in the target.
    """
    seen: dict[str, str] = {}
    for name, wanted in names.items():
        if (other := seen.setdefault(wanted, name)) != name:
            raise FormatError(f"{quoted(other)} and {quoted(name)} would both be called {quoted(wanted)}: rename them")


def chosen(manifest: Manifest, model: Model, only: Collection[str], where: str) -> list[str]:
    """The names that belong to these sections, or all where none is given. `model` is the model, wherever it lies.

    Raises:
        UsageError: there is nothing of a section.
    """
    everything = [*manifest.tensors, *manifest.objects]
    if not only:
        return everything
    sections = {name: "model" if name in model.plain else name.partition(".")[0] for name in everything}
    wanted = {"model" if section == model.key else section for section in only}
    if lacking := sorted(wanted - set(sections.values())):
        known = listed(sorted(set(sections.values())), at_most=8)
        raise UsageError(f"{where} has nothing below {listed(lacking)}; it has {known}")
    return [name for name, section in sections.items() if section in wanted]


def renamed(names: Mapping[str, str], rules: Sequence[Rename]) -> dict[str, str]:
    """Names of the source -> names in the target, by these rules one after the other.

    Raises:
        UsageError: a rule is no regular expression, matches nothing, or makes two names one.
    """
    found = dict(names)
    for pattern, replacement in rules:
        try:
            replaced = {name: re.sub(pattern, replacement, wanted) for name, wanted in found.items()}
        except re.error as error:
            raise UsageError(f"--rename {pattern}={replacement} is no regular expression: {error}") from error
        if replaced == found:
            raise UsageError(
                f"--rename {pattern}={replacement} changes no name, such as {listed(list(found.values())[:1])}"
            )
        found = replaced
    try:
        check_distinct(found)
    except FormatError as error:
        raise UsageError(str(error)) from error
    return found


def renamed_path(path: Path | None, name: str) -> Path | None:
    """Where an entry stands that is called `name` now: below the same first key, if the name says so."""
    if path is None or ".".join(map(str, path)) == name:
        return path
    first = str(path[0])
    return (first, name[len(first) + 1 :]) if name.startswith(f"{first}.") else None


def parse_dtype_name(text: str) -> str:
    """
    Raises:
        UsageError: it is no dtype of real floating-point numbers of at least 16 bits.
    """
    name = _SHORT_DTYPES.get(text, text)
    try:
        dtype = parse_dtype(name)
    except FormatError as error:
        raise UsageError(f"--dtype {text} is no dtype: give bf16, fp16, fp32 or fp64") from error
    if not is_cast(name) or not dtype.is_floating_point:
        raise UsageError(f"--dtype {text}: only to bf16, fp16, fp32 or fp64 can be cast")
    return name


def is_cast(dtype: str) -> bool:
    """Whether elements of this dtype are cast: those of 8 bits have scales elsewhere, integers are no weights."""
    return parse_dtype(dtype).is_floating_point and itemsize(dtype) > 1
