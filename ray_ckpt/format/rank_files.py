"""Files that each rank wrote of what it held, put together: a manifest for which the layout no longer matters.

    what each file holds ── join ──> Joined     tensors of their shards, every element once

Sharded tensors say themselves which boxes a rank holds. What is not sharded has to be the same on all ranks that hold
it: of a model and an optimizer, anything else is refused, since it means files of two saves or state whose place nobody
wrote down. BatchNorm's statistics are an exception, as each rank has seen other batches: the first rank's are taken, as
`DistributedDataParallel` goes on with them. Of other things (random generators, data loaders) each rank may have its
own: all of it is named `<item>.rank<n>` then, not only what differs, as one object takes it. Which file is whose,
`rank_names.py` tells.

Shards alone do not show that one of them is of another save in the same layout; what all ranks hold, such as an
optimizer's `step`, does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ray_ckpt.errors import FormatError
from ray_ckpt.format.boxes import Box, check_cover
from ray_ckpt.format.manifest import Chunk, Manifest, ObjectEntry, TensorEntry
from ray_ckpt.format.rank_names import RankFile
from ray_ckpt.format.torch_container import dtype_name
from ray_ckpt.format.torch_file import Content
from ray_ckpt.format.torch_pickle import Sharded
from ray_ckpt.text import listed, quoted

__all__ = ["Joined", "Part", "join"]

_MEAN, _VARIANCE = "running_mean", "running_var"
_STATISTICS = frozenset({_MEAN, _VARIANCE, "num_batches_tracked"})
"""Buffers of torch's BatchNorm modules, by the last component of their names."""

_SEVERAL = "extra_state"
"""verl's file of everything beside model and optimizer."""


class Part(NamedTuple):
    """What one rank's file holds."""

    file: RankFile
    content: Content
    manifest: Manifest
    """The boxes that the file holds, and everything else in it."""


class Joined(NamedTuple):
    """All files as one checkpoint."""

    manifest: Manifest
    notes: tuple[str, ...]
    """What of it is not the same on all ranks."""


def join(parts: Sequence[Part]) -> Joined:
    """One manifest of all files.

    Raises:
        FormatError: shards overlap or leave something out, or the ranks' files contradict each other.
    """
    tensors: dict[str, TensorEntry] = {}
    objects: dict[str, ObjectEntry] = {}
    differing: list[str] = []
    for item in dict.fromkeys(part.file.item for part in parts):
        of_item = [part for part in parts if part.file.item == item]
        if not _is_state(of_item):
            tensors |= _own("tensors", of_item)
            objects |= _own("objects", of_item)
            continue
        joiner = _Joiner(of_item)
        tensors |= joiner.tensors()
        objects |= joiner.objects()
        differing += joiner.differing
    files = {file: size for part in parts for file, size in part.manifest.files.items()}
    manifest = Manifest(tensors, objects, files)
    manifest.check()
    notes = f"{listed(sorted(differing), at_most=4)}: ranks have seen other batches, and the first one's are taken"
    return Joined(manifest, (notes,) if differing else ())


def _is_state(parts: Sequence[Part]) -> bool:
    """Whether it is a model or an optimizer, of which ranks hold parts or the same."""
    return any(isinstance(tensor, Sharded) for part in parts for tensor in part.content.tensors.values()) or any(
        "param_groups" in path for part in parts for path in part.content.paths.values()
    )


def _own(kind: str, parts: Sequence[Part]) -> dict[str, Any]:
    """Entries of one kind, of what each rank may have of its own: of the first rank's if all have the same."""
    differing = _differing_objects(parts)
    joined = {}
    for part in parts:
        item, number = part.file.item, part.file.rank
        for name, entry in getattr(part.manifest, kind).items():
            if _object_of(item, name) in differing:
                joined[f"{item}.rank{number}{name.removeprefix(item)}"] = entry._replace(path=None)
            else:
                joined[name] = joined.get(name, entry)
    return joined


def _object_of(item: str, name: str) -> str:
    """What one object takes: a whole item, but that verl's holds several objects."""
    return ".".join(name.split(".")[:2]) if item == _SEVERAL else item


def _differing_objects(parts: Sequence[Part]) -> set[str]:
    """Objects of which ranks have something of their own."""
    told: dict[str, list[set[Any]]] = defaultdict(lambda: [set() for _ in parts])
    for number, part in enumerate(parts):
        for name, entry in part.manifest.objects.items():
            told[_object_of(part.file.item, name)][number].add((name, _told(entry)))
        for name, tensor in part.manifest.tensors.items():
            # What cannot be told by its bytes is taken for the rank's own.
            same = [(chunk.crc or number + 1, chunk.strides) for chunk in tensor.chunks if chunk.box.num_elements]
            told[_object_of(part.file.item, name)][number].add((name, tensor.dtype, tensor.shape, tuple(same)))
    return {name for name, of_parts in told.items() if any(of_part != of_parts[0] for of_part in of_parts)}


class _Joiner:
    """Joins the files of a model or an optimizer."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self.differing: list[str] = []
        """Statistics of which the first rank's are taken."""

    def tensors(self) -> dict[str, TensorEntry]:
        joined: dict[str, TensorEntry] = {}
        for name, of_name in self._by_name("tensors"):
            if isinstance(of_name[0].content.tensors[name], Sharded):
                joined[name] = _join_shards(name, of_name)
            elif (differing := _differing_tensors(name, of_name)) and self._is_statistic(name):
                self.differing.append(name)
                joined[name] = of_name[0].manifest.tensors[name]
            elif differing:
                raise _difference(name, differing)
            else:
                joined[name] = of_name[0].manifest.tensors[name]
        return joined

    def _is_statistic(self, name: str) -> bool:
        """Whether it is a whole tensor of one shape on all ranks, of a BatchNorm in a model or an average of it."""
        owner, _, last = name.rpartition(".")
        siblings = [f"{owner}.{other}" for other in (_MEAN, _VARIANCE, last)]
        shapes = [
            {part.manifest.tensors[each].shape for part in self._parts if each in part.manifest.tensors}
            for each in siblings
        ]
        return last in _STATISTICS and all(len(of_one) == 1 for of_one in shapes)

    def objects(self) -> dict[str, ObjectEntry]:
        joined: dict[str, ObjectEntry] = {}
        for name, of_name in self._by_name("objects"):
            entries = [part.manifest.objects[name] for part in of_name]
            if len({_told(entry) for entry in entries}) > 1:
                other = next(part for part in of_name if _told(part.manifest.objects[name]) != _told(entries[0]))
                raise _difference(name, (of_name[0], other))
            joined[name] = entries[0]
        return joined

    def _by_name(self, kind: str) -> Iterator[tuple[str, list[Part]]]:
        """Names, each with the files that hold it.

        Raises:
            FormatError: a name stands for a tensor in one file, and for something else in another.
        """
        found: dict[str, list[Part]] = defaultdict(list)
        for part in self._parts:
            for name in getattr(part.manifest, kind):
                found[name].append(part)
        for name, of_name in found.items():
            kinds = {type(part.content.tensors.get(name)) for part in self._parts if name in part.content.paths}
            if len(kinds) > 1:
                raise FormatError(
                    f"{quoted(name)} is a shard, a whole tensor or a value, depending on the rank: the files "
                    f"{listed([part.file.name for part in of_name])} are not of one save"
                )
            yield name, of_name


def _difference(name: str, parts: tuple[Part, Part]) -> FormatError:
    first, second = (part.file.name for part in parts)
    return FormatError(
        f"{quoted(name)} is not sharded, and differs between {first} and {second}: they are of two saves, or each rank "
        "had state of its own without saying where it belongs (such as FSDP1's flat parameters and optimizers of them),"
        " which only as many ranks with the same wrapping can load; save it there with full state dicts, or sharded by "
        "FSDP2"
    )


def _told(entry: ObjectEntry) -> str:
    """What is compared of a value."""
    if entry.inline is None:
        return entry.refusal.replace(entry.file, "the file")
    return f"{type(entry.inline.value).__name__} {entry.inline.value!r}"


def _differing_tensors(name: str, parts: Sequence[Part]) -> tuple[Part, Part] | None:
    """Two files that hold different tensors, as far as dtypes, shapes and the CRC-32 of their bytes tell."""
    first = parts[0]
    for other in parts[1:]:
        mine, its = first.manifest.tensors[name], other.manifest.tensors[name]
        if (mine.dtype, mine.shape) != (its.dtype, its.shape) or _differ(mine.chunks[0], its.chunks[0]):
            return first, other
    return None


def _differ(first: Chunk, second: Chunk) -> bool:
    """Whether two chunks of one shape have different bytes; of those without a CRC-32 of their own nothing is told."""
    return bool(first.crc and second.crc) and (first.crc, first.strides) != (second.crc, second.strides)


def _join_shards(name: str, parts: Sequence[Part]) -> TensorEntry:
    first = parts[0]
    described = _described(name, first)
    for other in parts[1:]:
        if _described(name, other) != described:
            raise FormatError(
                f"{quoted(name)} is {described} in {first.file.name}, and {_described(name, other)} in "
                f"{other.file.name}: they are of two saves, or of different numbers of ranks"
            )
    held: dict[Box, tuple[Chunk, Part]] = {}
    for part in parts:
        for chunk in part.manifest.tensors[name].chunks:
            known = held.setdefault(chunk.box, (chunk, part))
            if _differ(known[0], chunk):
                raise FormatError(
                    f"{quoted(name)} at {chunk.box.offsets} is not the same in {known[1].file.name} and in "
                    f"{part.file.name}, which should be replicas: they are of two saves"
                )
    entry = first.manifest.tensors[name]
    chunks = tuple(chunk for chunk, _ in held.values())
    if problem := check_cover(entry.shape, [chunk.box for chunk in chunks]):
        raise FormatError(
            f"{quoted(name)}, {described}, cannot be put together of {listed([part.file.name for part in parts])}: "
            f"{problem}{_absent(name, parts)}"
        )
    return entry._replace(chunks=chunks)


def _described(name: str, part: Part) -> str:
    sharded = part.content.tensors[name]
    assert isinstance(sharded, Sharded), "asked for sharded tensors only"
    return f"{dtype_name(sharded.dtype)}{list(sharded.shape)} placed as {sharded.layout}"


def _absent(name: str, parts: Sequence[Part]) -> str:
    sharded = [part.content.tensors[name] for part in parts]
    ranks = {rank for tensor in sharded if isinstance(tensor, Sharded) for rank in tensor.ranks}
    missing = sorted(ranks - {part.file.rank for part in parts})
    return f"; no file of rank {listed(missing)} holds a part of it" if missing else ""
