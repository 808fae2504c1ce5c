"""A file that `torch.save` wrote: a zip archive with one pickle, and every tensor's storage uncompressed beside it.

    <name>/data.pkl        dicts and lists; a tensor is a call of `_rebuild_tensor_v2(storage, offset, sizes, ...)`
    <name>/byteorder       "little"
    <name>/data/<key>      one storage's bytes, stored as they are
    central directory      name, size and local header's place of every member (`zip_directory.py`)

    data.pkl          ── parse ──> Content     tensors as places in storages, everything else as it is
    Content, places of the storages ── to_manifest ──> Manifest
                                    ── describe ──> the same of a file that may hold a rank's part of each tensor only

Nothing runs from the file, and a tensor costs no byte before it is wanted, and then only those that are. What is no
tensor and no plain value (the arguments of a script, a path, an enumeration) has an entry that says so, and is refused
when somebody wants it.

Source of the format: PyTorch's `torch/serialization.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ray_ckpt.errors import FormatError, UnsafeCheckpointError
from ray_ckpt.format import limits, torch_pickle
from ray_ckpt.format.boxes import Box, check_cover
from ray_ckpt.format.foreign_generators import numpy_state
from ray_ckpt.format.manifest import Chunk, Inline, Manifest, ObjectEntry, Path, TensorEntry
from ray_ckpt.format.ranges import span
from ray_ckpt.format.stand_ins import Instance, Name
from ray_ckpt.format.torch_container import dtype_name
from ray_ckpt.format.torch_pickle import Sharded, Tensor
from ray_ckpt.text import quoted

__all__ = ["Content", "Place", "describe", "parse", "to_manifest"]

_ADVICE = (
    "save the state dicts alone (tensors, numbers, texts, lists, dicts), or convert the file with torch.load(..., "
    "weights_only=False) if you trust its author"
)

_LEAVES = (Tensor, Sharded)

_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.dtype, torch.device)


@dataclass
class Content:
    """What the pickle holds, flattened as DCP flattens a state dict."""

    tensors: dict[str, Tensor | Sharded] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    """Name -> plain value."""
    unknown: dict[str, str] = field(default_factory=dict)
    """Name of a value that is not plain -> name of the class in it."""
    paths: dict[str, Path] = field(default_factory=dict)
    """Name -> keys that lead to it in the nested state dict."""

    @property
    def storages(self) -> set[str]:
        return {part.key for tensor in self.tensors.values() for _, part in parts(tensor)}


def parts(tensor: Tensor | Sharded) -> Sequence[tuple[Box, Tensor]]:
    """The boxes of a tensor that a file holds."""
    return tensor.local if isinstance(tensor, Sharded) else [(Box.whole(tensor.shape), tensor)]


def parse(data: bytes, file: str, below: str = "") -> Content:
    """Read the pickle of a file.

    Args:
        below: a name to put everything below. Then the file may hold something else than a dict.

    Raises:
        UnsafeCheckpointError: it calls an unknown function, or is an object of an unknown class as a whole.
        FormatError: it is damaged, holds no dict, or exceeds a limit.
    """
    root = torch_pickle.read(data, file, trust_advice=_ADVICE).root
    if below:
        root = {below: root}
    if isinstance(root, (Instance, Name)):
        raise UnsafeCheckpointError(f"{file} holds {quoted(root)}, which could run code; {_ADVICE}")
    if not isinstance(root, Mapping):
        raise FormatError(
            f"{file} holds a {type(root).__name__}, not a dict of tensors: save a state dict rather than the object"
        )
    return _Flattener(file).flatten(root)


class Place(NamedTuple):
    """Where the bytes of a storage lie."""

    start: int
    """Byte offset in the file."""
    num_bytes: int
    crc: int
    """CRC-32 of the bytes; 0 where whoever wrote the file left it out."""


def to_manifest(content: Content, places: Mapping[str, Place], file: str, file_bytes: int) -> Manifest:
    """The manifest of the file: where everything in it lies.

    Args:
        places: storage's key -> where its bytes lie.

    Raises:
        FormatError: a tensor reaches outside its storage, or the file holds a part of it only.
    """
    manifest = describe(content, places, file, file_bytes)
    if any(isinstance(tensor, Sharded) for tensor in content.tensors.values()):
        for name, entry in manifest.tensors.items():
            if problem := check_cover(entry.shape, [chunk.box for chunk in entry.chunks]):
                raise FormatError(
                    f"{file} holds one rank's part of {quoted(name)} ({problem}): name the directory that the files of "
                    "all ranks are in, under the names that they were saved by"
                )
    manifest.check()
    return manifest


def describe(content: Content, places: Mapping[str, Place], file: str, file_bytes: int) -> Manifest:
    """As `to_manifest`, of a file that may hold parts of its tensors only: nobody has checked that they are all there.

    Raises:
        FormatError: a tensor reaches outside its storage.
    """
    tensors = {}
    for name, tensor in content.tensors.items():
        chunks = tuple(_chunk(name, box, part, places, file) for box, part in parts(tensor))
        tensors[name] = TensorEntry(dtype_name(tensor.dtype), tensor.shape, chunks, content.paths[name])
    objects = {
        name: ObjectEntry(file, 0, 0, inline=Inline(value), path=content.paths[name])
        for name, value in content.values.items()
    }
    for name, unknown in content.unknown.items():
        reason = f"{file} asks for {unknown[:200]} there, which is no plain value and could run code; {_ADVICE}"
        objects[name] = ObjectEntry(file, 0, 0, refusal=reason, path=content.paths[name])
    return Manifest(tensors, objects, {file: file_bytes})


def _chunk(name: str, box: Box, part: Tensor, places: Mapping[str, Place], file: str) -> Chunk:
    if part.key not in places:
        raise FormatError(f"{file} lacks the storage {quoted(part.key)}, which {quoted(name)} lies in")
    if part.is_converted:
        raise FormatError(
            f"{file}: {quoted(name)} is a conjugate or negated view, whose elements are not what its bytes say; "
            "save tensor.resolve_conj().resolve_neg()"
        )
    start, num_bytes, crc = places[part.key]
    num_elements = span(part.shape, part.strides) if 0 not in part.shape else 0
    first = part.offset * part.dtype.itemsize
    if first + num_elements * part.dtype.itemsize > num_bytes:
        raise FormatError(
            f"{file}: {quoted(name)} of {list(part.shape)} with strides {list(part.strides)} from element "
            f"{part.offset} reaches outside its storage, which has {num_bytes} bytes"
        )
    chunk = Chunk(box, file, start, num_bytes, data_start=start + first, strides=part.strides)
    return chunk._replace(crc=crc) if num_elements * part.dtype.itemsize == num_bytes else chunk


# ------------------------------------------------------------------------------------------------ flattening


class _Measure(NamedTuple):
    """What a value would cost, and what is in it, before it is flattened."""

    num_entries: int
    """Number of entries after flattening."""
    num_items: int
    """Number of values in it, counted wherever they appear."""
    name_chars: int
    """Length of the names of its entries below its own, all together."""
    height: int
    """Number of levels of containers in it."""
    is_branch: bool
    """Whether tensors or dicts are in it, so that it is flattened."""
    unknown: str
    """Name of a class in it that is not plain; empty when there is none."""


class _Flattener:
    """Dicts are flattened, and so are lists and tuples that hold tensors or dicts, as DCP does."""

    def __init__(self, file: str) -> None:
        self.content = Content()
        self._file = file
        self._max_depth = limits.NESTING.value
        self._measured: dict[int, _Measure | None] = {}

    def flatten(self, root: Mapping[Any, Any]) -> Content:
        """
        Raises:
            FormatError: it contains itself, holds two entries of one name, or exceeds a limit.
        """
        measure = self._measure(root, 0)
        limits.ENTRIES.check(measure.num_entries, self._file)
        limits.ITEMS.check(measure.num_items, self._file)
        limits.NAME_CHARS.check(measure.name_chars, self._file)
        self._add(root, ())
        return self.content

    def _measure(self, value: Any, depth: int) -> _Measure:
        """What is shared counts where it appears, but is looked through once: a pickle of a few bytes can stand for
        more than any memory holds."""
        if isinstance(value, _LEAVES) or not isinstance(value, (Mapping, list, tuple, set, frozenset)):
            unknown = "" if isinstance(value, (*_LEAVES, *_PLAIN)) else _class_of(value)
            return _Measure(1, 1, 0, 0, isinstance(value, _LEAVES), unknown)
        if depth > self._max_depth:
            raise self._nested_too_deep()
        if id(value) not in self._measured:
            self._measured[id(value)] = None
            self._measured[id(value)] = self._measure_items(value, depth)
        measure = self._measured[id(value)]
        if measure is None:
            raise FormatError(f"{self._file} holds a {type(value).__name__} that contains itself")
        if depth + measure.height > self._max_depth:
            raise self._nested_too_deep()
        return measure

    def _measure_items(self, value: Any, depth: int) -> _Measure:
        is_dict = isinstance(value, Mapping)
        parts = [self._measure(item, depth + 1) for item in (value.values() if is_dict else value)]
        num_items = 1 + sum(part.num_items for part in parts)
        height = 1 + max((part.height for part in parts), default=0)
        has_branches = any(part.is_branch for part in parts)
        unknown = next((part.unknown for part in parts if part.unknown), "")
        if is_dict:
            keys = [_part_of_name(key) for key in value]
            unknown_key = next((_class_of(key) for key in value if isinstance(key, (Instance, Name))), "")
        else:
            keys = [str(number) for number in range(len(parts))] if has_branches else []
            unknown_key = type(value).__name__ if has_branches and not isinstance(value, (list, tuple)) else ""
        if unknown_key or not (is_dict or has_branches):
            return _Measure(1, num_items, 0, height, False, unknown_key or unknown)
        name_chars = sum(
            (1 + len(key)) * part.num_entries + part.name_chars for key, part in zip(keys, parts, strict=True)
        )
        return _Measure(sum(part.num_entries for part in parts), num_items, name_chars, height, True, unknown)

    def _nested_too_deep(self) -> FormatError:
        return limits.NESTING.error("dicts or lists that are nested too deep", self._file)

    def _add(self, value: Any, path: Path) -> None:
        measure = self._measure(value, 0)
        if measure.is_branch and not isinstance(value, _LEAVES):
            parts = _named_items(value) if isinstance(value, Mapping) else enumerate(value)
            for part, item in parts:
                self._add(item, (*path, part))
            return
        name = ".".join(map(str, path))
        if name in self.content.paths:
            raise FormatError(f"{self._file} holds two entries called {quoted(name)} once its dicts are flattened")
        self.content.paths[name] = path
        if isinstance(value, _LEAVES):
            self.content.tensors[name] = value
        elif measure.unknown:
            generator = numpy_state(value)
            if generator is None:
                self.content.unknown[name] = measure.unknown
            else:
                self.content.values[name] = generator
        else:
            self.content.values[name] = value


def _named_items(value: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    return ((_part_of_name(key), item) for key, item in value.items())


def _part_of_name(key: Any) -> str:
    """A dict's key in the name of what lies there, as DCP has it."""
    return key if type(key) is str else str(key) if type(key) in (int, float, bool, type(None)) else quoted(key)


def _class_of(value: Any) -> str:
    return (
        value.text if isinstance(value, Name) else value.name if isinstance(value, Instance) else type(value).__name__
    )
