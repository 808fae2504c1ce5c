"""A key map that joins and splits tensors, applied to a checkpoint: its entries under the wanted names.

    Manifest, key map ── rearrange ──> Rearranged     entries that are made of others, and the rest as it was

Of a parameter (`model.<name>`) the optimizer's state follows: what has the shape of its parameter is joined and split
as that is; everything else, such as `step` and hyper-parameters, has to be the same for all that it is made of.

Every element has one place: two different expressions may not use the same one, and a tensor of which some are used by
none stays in the checkpoint under its own name, so that a strict load refuses it.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch

from ray_ckpt.errors import StateMismatchError
from ray_ckpt.format.boxes import Box, check_cover
from ray_ckpt.format.manifest import Manifest, ObjectEntry, TensorEntry
from ray_ckpt.format.saved import Saved
from ray_ckpt.format.torch_container import parse_dtype
from ray_ckpt.format.translate import MODEL, OPTIM
from ray_ckpt.format.views import View, evaluate, used_boxes
from ray_ckpt.text import listed, quoted

__all__ = ["Rearranged", "rearrange"]

_AS_SAVED = " (as saved)"
"""Behind the name of a saved tensor that the key map makes something else for, and does not use as a whole."""

Read = Callable[[dict[str, torch.Tensor]], None]
"""Fills tensors by their names in the checkpoint."""


@dataclass
class Rearranged:
    """A checkpoint as a key map rearranges it."""

    manifest: Manifest
    """What is made of others has entries without chunks."""
    views: dict[str, View] = field(default_factory=dict)
    """Name -> what it is made of."""
    rests: dict[str, str] = field(default_factory=dict)
    """Name in `manifest` of a saved tensor of which not every element is used -> how many are not."""


def rearrange(manifest: Manifest, key_map: Mapping[str, Saved], read: Read, *, with_optimizer: bool) -> Rearranged:
    """Apply a key map. What it makes of tensors that are not there is left out.

    Args:
        key_map: wanted name -> what it is made of.
        read: reads the few small tensors that have to be compared.
        with_optimizer: the optimizer's state follows its parameter. Otherwise it stays as it is.

    Raises:
        StateMismatchError: shapes do not allow it, an element would have two places, or what is joined differs in its
            optimizer's state or hyper-parameters.
    """
    made = {
        wanted: saved for wanted, saved in key_map.items() if all(name in manifest.tensors for name in saved.names())
    }
    everything = dict(made)
    same: dict[str, list[str]] = {}
    sections = _Sections(manifest)
    for wanted, saved in made.items() if with_optimizer else ():
        if wanted.startswith(f"{MODEL}.") and all(name.startswith(f"{MODEL}.") for name in saved.names()):
            _follow(wanted, saved, manifest, sections, everything, same)
    views = {
        wanted: evaluate(saved, lambda name: View.of(manifest.tensors[name])) for wanted, saved in everything.items()
    }
    _check_same(manifest, same, read)
    rests = _rests(manifest, everything)
    used = {name for saved in everything.values() for name in saved.names()} - rests.keys()
    used |= {name for names in same.values() for name in names if _parameter_is_used(name, used)}
    tensors = {name: entry for name, entry in manifest.tensors.items() if name not in used}
    objects = {name: entry for name, entry in manifest.objects.items() if name not in used}
    for wanted, names in same.items():
        if names[0] in manifest.tensors:
            tensors[wanted] = manifest.tensors[names[0]]
        else:
            objects[wanted] = manifest.objects[names[0]]
    if others := sorted(views.keys() & tensors.keys()):
        tensors |= {f"{name}{_AS_SAVED}": tensors.pop(name) for name in others}
        rests |= {f"{name}{_AS_SAVED}": rests.pop(name) for name in others if name in rests}
    tensors |= {wanted: TensorEntry(view.dtype, view.shape, ()) for wanted, view in views.items()}
    return Rearranged(dataclasses.replace(manifest, tensors=tensors, objects=objects, fingerprints={}), views, rests)


class _Sections:
    """The optimizer's entries, by parameter."""

    def __init__(self, manifest: Manifest) -> None:
        self._names = sorted(name for name in (*manifest.tensors, *manifest.objects) if name.startswith(f"{OPTIM}."))

    def below(self, kind: str, parameter: str) -> dict[str, str]:
        """Key -> name of the entry; the key is empty for the entry of the parameter itself."""
        prefix = f"{OPTIM}.{kind}.{parameter}"
        start = bisect.bisect_left(self._names, f"{prefix}.")
        end = bisect.bisect_left(self._names, f"{prefix}/")  # the character after the dot
        at = bisect.bisect_left(self._names, prefix)
        own = self._names[at : at + 1] if self._names[at : at + 1] == [prefix] else []
        return {name[len(prefix) + 1 :]: name for name in (*own, *self._names[start:end])}


_KINDS = ("state", "param_groups", "kinds")


def _follow(
    wanted: str,
    saved: Saved,
    manifest: Manifest,
    sections: _Sections,
    made: dict[str, Saved],
    same: dict[str, list[str]],
) -> None:
    """The optimizer's entries of a parameter that is made of others."""
    parameter = wanted.removeprefix(f"{MODEL}.")
    sources = list(dict.fromkeys(name.removeprefix(f"{MODEL}.") for name in saved.names()))
    for kind in _KINDS:
        of_sources = {source: sections.below(kind, source) for source in sources}
        keys = {frozenset(entries) for entries in of_sources.values()}
        if len(keys) > 1:
            raise StateMismatchError(
                f"{wanted} is made of parameters whose optimizers keep different things: "
                + listed(
                    [f"{source}: {', '.join(sorted(entries)) or 'none'}" for source, entries in of_sources.items()]
                )
                + ". Load the model alone, by only=('model',)"
            )
        for key in sorted(*keys):
            name = f"{OPTIM}.{kind}.{parameter}" + (f".{key}" if key else "")
            names = {source: entries[key] for source, entries in of_sources.items()}
            if kind == "state" and all(_has_shape_of(manifest, old, source) for source, old in names.items()):
                made[name] = saved.renamed({f"{MODEL}.{source}": old for source, old in names.items()}.__getitem__)
            else:
                same[name] = list(names.values())


def _has_shape_of(manifest: Manifest, name: str, parameter: str) -> bool:
    entry = manifest.tensors.get(name)
    return entry is not None and entry.shape == manifest.tensors[f"{MODEL}.{parameter}"].shape


def _check_same(manifest: Manifest, same: Mapping[str, list[str]], read: Read) -> None:
    """What follows as it is must be the same everywhere, and not belong to elements of its own."""
    loaded: dict[str, torch.Tensor] = {}
    for wanted, names in same.items():
        for name in names:
            if (entry := manifest.tensors.get(name)) is None:
                continue
            if len(entry.shape) and wanted.startswith(f"{OPTIM}.state."):
                raise StateMismatchError(
                    f"{quoted(name)} of shape {list(entry.shape)} has not the shape of its parameter, which the key "
                    "map joins or splits, so that nothing tells what becomes of it. Load the model alone, by "
                    "only=('model',)"
                )
            if len(names) > 1:
                loaded[name] = torch.empty(entry.shape, dtype=parse_dtype(entry.dtype))
    read(loaded)
    for wanted, names in same.items():
        if len(names) == 1:
            continue
        told = {name: _told(manifest.objects.get(name), loaded.get(name)) for name in names}
        if len(set(told.values())) > 1:
            texts = [f"{name}: {text[:200]}" for name, text in told.items()]
            raise StateMismatchError(f"{wanted} is made of several, which differ: {listed(texts)}")


def _told(entry: ObjectEntry | None, tensor: torch.Tensor | None) -> str:
    """What is compared, and shown where it differs."""
    if tensor is not None:
        return f"{tensor.tolist()} ({tensor.dtype})"
    assert entry is not None, "an entry is a tensor or an object"
    if entry.inline is not None:
        return f"{entry.inline.value!r}"
    return f"an object of {entry.length} bytes, {entry.checksum if entry.blob is None else entry.blob.hex()}"


def _rests(manifest: Manifest, made: Mapping[str, Saved]) -> dict[str, str]:
    """Saved tensors of which not every element is used.

    Raises:
        StateMismatchError: an element is used twice.
    """
    used: dict[str, list[Box]] = defaultdict(list)

    def shape_of(name: str) -> tuple[str, tuple[int, ...]]:
        entry = manifest.tensors[name]
        return entry.dtype, entry.shape

    for saved in dict.fromkeys(made.values()):
        for name, box in used_boxes(saved, shape_of):
            used[name].append(box)
    rests = {}
    for name, boxes in used.items():
        problem = check_cover(manifest.tensors[name].shape, boxes)
        if problem and "overlap" in problem:
            raise StateMismatchError(f"the key map uses elements of {quoted(name)} more than once: {problem}")
        if problem:
            rests[name] = problem
    return rests


def _parameter_is_used(name: str, used: Collection[str]) -> bool:
    """Whether the parameter that an optimizer's entry belongs to is used as a whole."""
    parts = name.split(".")
    return any(f"{MODEL}.{'.'.join(parts[2:end])}" in used for end in range(3, len(parts) + 1))
