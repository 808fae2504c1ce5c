"""The manifest: everything there is to know about a checkpoint, as JSON that needs neither torch nor pyarrow.

    {"format": "ray_ckpt", "version": 1, "attempt": ..., "layout": ..., "saved_by": {...},
     "fingerprints": {name: digest},
     "files":   {file: bytes},
     "tensors": {name: {"dtype", "shape", "path", "chunks": [{"offsets", "sizes", "file", "start", "length",
                                                              "data_start", "block_bytes", "checksums"}]}},
     "objects": {name: {"path", "file", "start", "length", "value" | "blob" | "checksum"}}}

A tensor is stored as disjoint chunks that cover it. A chunk is a box of the tensor in row-major order; its elements are
the bytes `[data_start, data_start + data_bytes)` of `file`, inside the container `[start, start + length)` that stock
DCP reads. `checksums` is base64 of one little-endian XXH3-64 per block of `block_bytes` data bytes, the last of which
may be short. An object is a non-tensor: its value inline when JSON holds it exactly (`values.py`), else the container's
bytes in base64 when they are few, else only in the file.

`path` is where the entry stood in the nested state dict; it is left out when it is the name itself.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from json.encoder import encode_basestring_ascii as _quoted
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeVar

from ray_ckpt.errors import CommitError, FormatError, UnsafeCheckpointError
from ray_ckpt.format import values
from ray_ckpt.format.block_sums import BlockSums
from ray_ckpt.format.boxes import Box, check_cover, shared_box
from ray_ckpt.format.ranges import span
from ray_ckpt.rounding import ceil_div

__all__ = ["MANIFEST_NAME", "VERSION", "Chunk", "Manifest", "ObjectEntry", "TensorEntry"]

MANIFEST_NAME = "manifest.json"
"""A directory that holds a file of this name holds a committed checkpoint; any other does not."""

VERSION = 1
"""Raised when an older reader would misread what is written; readers accept every version up to their own."""

Path = tuple[str | int, ...]
T = TypeVar("T")


class Chunk(NamedTuple):
    """A saved box of a tensor and where its bytes lie."""

    box: Box
    file: str
    start: int
    """Byte offset of the container in `file`."""
    length: int
    """Size of the container in bytes."""
    data_start: int | None
    """Byte offset of the first element in `file`; None when only the container tells, as in stock DCP's files."""
    checksums: BlockSums | None = None
    """Checksums of the elements; None in a checkpoint that another program wrote."""
    transforms: tuple[str, ...] = ()
    """Descriptors of the DCP stream extensions that encoded the container, outermost first."""
    strides: tuple[int, ...] | None = None
    """Strides of the elements at `data_start`, in elements; None for row-major order, which ours always have."""


@dataclass(frozen=True)
class TensorColumns:
    """The tensors in one written file, one column per fact: thousands of tensors travel as six values."""

    file: str
    starts: Sequence[int]
    """Byte offset of each tensor's container in `file`."""
    lengths: Sequence[int]
    """Size of each container in bytes."""
    data_starts: Sequence[int]
    """Byte offset of each tensor's first element in `file`."""
    block_bytes: Sequence[int]
    """Size of each tensor's checksum blocks in bytes."""
    sums: bytes
    """All block sums, one tensor's after the other's."""

    def chunks(self, parts: Iterable[tuple[Box, int]]) -> Iterator[Chunk]:
        """As the manifest has them.

        Args:
            parts: box and bytes of each tensor, in the order of the columns.

        Raises:
            CommitError: there are more or fewer checksums than blocks.
        """
        end = 0
        columns = zip(parts, self.starts, self.lengths, self.data_starts, self.block_bytes, strict=True)
        for (box, num_bytes), start, length, data_start, block_bytes in columns:
            begin, end = end, end + 8 * ceil_div(num_bytes, block_bytes)
            yield Chunk(box, self.file, start, length, data_start, BlockSums(block_bytes, self.sums[begin:end]))
        if end != len(self.sums):
            raise CommitError(f"refusing to commit: {self.file} has checksums of {len(self.sums)} bytes, not of {end}")


class TensorEntry(NamedTuple):
    """A tensor: its element type, its global shape and the chunks that cover it."""

    dtype: str
    """As `str(torch.dtype)` without the `torch.` prefix."""
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    path: Path | None = None
    """Keys that lead to it in the nested state dict; None when nothing was flattened."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True)
class Inline:
    """A value that the manifest holds itself. A class of its own, because None is a value too."""

    value: Any


@dataclass(frozen=True)
class ObjectEntry:
    """A non-tensor: a number, a text, a list, or an object that only `torch.save` can write."""

    file: str
    start: int
    length: int
    inline: Inline | None = None
    blob: bytes | None = None
    """The container's bytes, when they are few and the value is not inline."""
    checksum: int | None = None
    """XXH3-64 of the container, when the bytes must be read from the file; None in a foreign checkpoint."""
    transforms: tuple[str, ...] = ()
    path: Path | None = None


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds: its tensors, its other values, its files, and the layout that saved it.

    Example:
        >>> import torch
        >>> from ray_ckpt import CheckpointStore, save
        >>> store = CheckpointStore("run")
        >>> report = save({"model": {"weight": torch.ones(2, 3)}, "lr": 0.1}, store, step=1, layout="single")
        >>> manifest = store.manifest(1)
        >>> manifest.tensors["model.weight"].shape, manifest.values(), manifest.layout
        ((2, 3), {'lr': 0.1}, 'single')
    """

    tensors: Mapping[str, TensorEntry]
    objects: Mapping[str, ObjectEntry]
    files: Mapping[str, int]
    """Name -> bytes of every data file. In a foreign checkpoint: the bytes up to the end of the last container."""
    attempt: str = ""
    """Id of the attempt that wrote it; empty in a foreign checkpoint."""
    layout: str | None = None
    """How the model lay across ranks when it was saved, in the words of whoever saved it."""
    saved_by: Mapping[str, str] = field(default_factory=dict)
    """Name -> version of the software that wrote it; empty in a foreign checkpoint."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Tensor -> `Fingerprint.digest` of what the ranks held; it does not depend on the layout."""

    @property
    def total_bytes(self) -> int:
        """Size of the checkpoint: the sum of its data files."""
        return sum(self.files.values())

    def values(self) -> dict[str, Any]:
        """Every non-tensor whose value the manifest holds itself, by name: no file is read for it."""
        return {name: entry.inline.value for name, entry in self.objects.items() if entry.inline is not None}

    def to_json(self) -> str:
        """The text of `manifest.json`; `from_json` reads it."""
        objects = {name: _object_to_json(name, entry) for name, entry in self.objects.items()}
        head = {
            "format": "ray_ckpt",
            "version": VERSION,
            "attempt": self.attempt,
            "layout": self.layout,
            "saved_by": dict(self.saved_by),
            "fingerprints": dict(self.fingerprints),
            "files": dict(self.files),
        }
        tensors = ",".join([_tensor_to_json(name, entry) for name, entry in self.tensors.items()])
        return f'{_dumps(head)[:-1]},"tensors":{{{tensors}}},"objects":{_dumps(objects)}}}'

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Parse and check a manifest: what this returns points only inside its own files and covers every tensor.

        Raises:
            FormatError: it is not a manifest, of a later version, or does not hold together.
            UnsafeCheckpointError: a file name leaves the checkpoint's directory.
        """
        try:
            data = json.loads(text)
            _expect(data.get("format") == "ray_ckpt", f"format is {data.get('format')!r}, not 'ray_ckpt'")
            _expect(
                type(data.get("version")) is int and 1 <= data["version"] <= VERSION,
                f"version is {data.get('version')!r}, this reader knows 1 to {VERSION}; upgrade ray-ckpt",
            )
            manifest = cls(
                tensors=_parse_each(data["tensors"], _tensor_from_json),
                objects=_parse_each(data["objects"], _object_from_json),
                files={name: _size(size) for name, size in data["files"].items()},
                attempt=_text(data["attempt"]),
                layout=None if data["layout"] is None else _text(data["layout"]),
                saved_by={name: _text(version) for name, version in data["saved_by"].items()},
                fingerprints={name: _text(digest) for name, digest in data["fingerprints"].items()},
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise FormatError(f"not a manifest of ray_ckpt: {type(error).__name__}: {error}") from error
        manifest.check()
        return manifest

    def check(self) -> None:
        """Whether the parts fit each other.

        Raises:
            FormatError: a chunk points outside its file or container, or a tensor is not covered exactly once.
            UnsafeCheckpointError: a file name leaves the checkpoint's directory.
        """
        for file in self.files:
            check_file_name(file)
        for name, tensor in self.tensors.items():
            width = itemsize(tensor.dtype)
            for chunk in tensor.chunks:
                self._check_extent(name, chunk.file, chunk.start, chunk.length)
                _check_strides(name, chunk)
                _check_chunk(name, chunk, _num_elements(chunk) * width)
            if problem := check_cover(tensor.shape, [chunk.box for chunk in tensor.chunks]):
                raise FormatError(f"tensor {name!r} does not hold together: {problem}")
        for name, entry in self.objects.items():
            self._check_extent(name, entry.file, entry.start, entry.length)

    def _check_extent(self, name: str, file: str, start: int, length: int) -> None:
        size = self.files.get(file)
        if size is None:
            raise FormatError(f"{name!r} lies in {file!r}, which is not among the checkpoint's files")
        if start + length > size:
            raise FormatError(
                f"{name!r} is said to lie at [{start}, {start + length}) of {file!r}, which has {size} bytes"
            )


@lru_cache
def itemsize(dtype: str) -> int:
    """Bytes of an element, from the dtype's name: the first number in it counts bits. `bool` has one byte."""
    digits = re.search(r"\d+", dtype)
    if dtype != "bool" and not digits:
        raise FormatError(f"{dtype!r} is not the name of a dtype")
    return 1 if digits is None else max(8, int(digits.group())) // 8


def check_file_name(name: str) -> str:
    """The name itself, when it is a relative path of plain parts.

    Raises:
        UnsafeCheckpointError: it is absolute, climbs with `..`, or is a URI or a path of another system.
    """
    plain = all(part not in ("", ".", "..") for part in name.split("/"))
    if not plain or re.search(r"[\\\0]|^[A-Za-z][A-Za-z0-9+.-]*:", name):
        raise UnsafeCheckpointError(f"file name {name!r} leaves the checkpoint's directory; nothing was read from it")
    return str(PurePosixPath(name))


def _check_strides(name: str, chunk: Chunk) -> None:
    if chunk.strides is not None and (chunk.data_start is None or len(chunk.strides) != len(chunk.box.sizes)):
        raise FormatError(f"chunk of {name!r} has strides {chunk.strides}, which do not fit its size {chunk.box.sizes}")


def _num_elements(chunk: Chunk) -> int:
    """As many as lie between the first and the last, both included."""
    num_elements = chunk.box.num_elements
    return num_elements if chunk.strides is None or not num_elements else span(chunk.box.sizes, chunk.strides)


def _check_chunk(name: str, chunk: Chunk, data_bytes: int) -> None:
    data_start, sums = chunk.data_start, chunk.checksums
    if data_start is not None and not (
        chunk.start <= data_start and data_start + data_bytes <= chunk.start + chunk.length
    ):
        raise FormatError(f"{_where(name, chunk)} has {data_bytes} bytes at {data_start}, outside its container")
    if sums is not None and len(sums.sums) // 8 != ceil_div(data_bytes, sums.block_bytes):
        raise FormatError(f"{_where(name, chunk)} has {len(sums)} checksums, which is not one per block")


def _where(name: str, chunk: Chunk) -> str:
    return f"chunk of {name!r} at {chunk.box.offsets}"


# ----------------------------------------------------------------------------------------------------- JSON


def _dumps(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), allow_nan=False)


def _tensor_to_json(name: str, entry: TensorEntry) -> str:
    """The text itself: `json.dumps` of nested dicts takes four times as long, and there are thousands of these."""
    path = "" if entry.path == (name,) else f'"path":{_path_to_json(entry.path)},'
    chunks = ",".join([_chunk_to_json(chunk) for chunk in entry.chunks])
    dtype, shape = _quoted(entry.dtype), _numbers_to_json(entry.shape)
    return f'{_quoted(name)}:{{"dtype":{dtype},"shape":{shape},{path}"chunks":[{chunks}]}}'


def _chunk_to_json(chunk: Chunk) -> str:
    offsets, sizes = _numbers_to_json(chunk.box.offsets), _numbers_to_json(chunk.box.sizes)
    place = f'"file":{_quoted(chunk.file)},"start":{chunk.start},"length":{chunk.length}'
    if chunk.data_start is not None:
        place += f',"data_start":{chunk.data_start}'
    if (sums := chunk.checksums) is not None:
        place += f',"block_bytes":{sums.block_bytes},"checksums":"{base64.b64encode(sums.sums).decode()}"'
    if chunk.transforms:
        place += f',"transforms":{_dumps(chunk.transforms)}'
    if chunk.strides is not None:
        place += f',"strides":{_numbers_to_json(chunk.strides)}'
    return f'{{"offsets":{offsets},"sizes":{sizes},{place}}}'


def _path_to_json(path: Path | None) -> str:
    if path is None:
        return "null"
    return f"[{','.join([_quoted(part) if isinstance(part, str) else str(part) for part in path])}]"


@lru_cache(maxsize=4096)
def _numbers_to_json(numbers: tuple[int, ...]) -> str:
    return str(list(numbers)).replace(" ", "")


def _object_to_json(name: str, entry: ObjectEntry) -> dict[str, Any]:
    data: dict[str, Any] = {}
    _put_path(data, name, entry.path)
    if entry.inline is not None:
        data["value"] = values.encode(entry.inline.value)
    if entry.blob is not None:
        data["blob"] = base64.b64encode(entry.blob).decode()
    data |= {"file": entry.file, "start": entry.start, "length": entry.length}
    if entry.checksum is not None:
        data["checksum"] = f"{entry.checksum:016x}"
    if entry.transforms:
        data["transforms"] = entry.transforms
    return data


def _put_path(data: dict[str, Any], name: str, path: Path | None) -> None:
    """`path` is absent when it is the name alone, null when nothing was flattened."""
    if path != (name,):
        data["path"] = path


def _parse_each(data: Mapping[str, Any], parse: Callable[[str, Any], T]) -> dict[str, T]:
    parsed = {}
    for name, entry in data.items():
        try:
            parsed[name] = parse(name, entry)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FormatError(f"the manifest's entry {name!r} is damaged: {type(error).__name__}: {error}") from error
    return parsed


def _tensor_from_json(name: str, data: Any) -> TensorEntry:
    chunks = tuple([_chunk_from_json(chunk) for chunk in data["chunks"]])
    return TensorEntry(_text(data["dtype"]), _sizes(data["shape"]), chunks, _get_path(name, data))


def _chunk_from_json(data: Any) -> Chunk:
    checksums = None
    if "checksums" in data:
        block_bytes = _size(data["block_bytes"])
        _expect(block_bytes > 0, "block_bytes is 0")
        checksums = BlockSums(block_bytes, base64.b64decode(data["checksums"], validate=True))
    return Chunk(
        box=shared_box(_sizes(data["offsets"]), _sizes(data["sizes"])),
        file=_text(data["file"]),
        start=_size(data["start"]),
        length=_size(data["length"]),
        data_start=_size(data["data_start"]) if "data_start" in data else None,
        checksums=checksums,
        transforms=tuple([_text(item) for item in data["transforms"]]) if "transforms" in data else (),
        strides=_sizes(data["strides"]) if "strides" in data else None,
    )


def _object_from_json(name: str, data: Any) -> ObjectEntry:
    return ObjectEntry(
        file=_text(data["file"]),
        start=_size(data["start"]),
        length=_size(data["length"]),
        inline=Inline(values.decode(data["value"])) if "value" in data else None,
        blob=base64.b64decode(data["blob"], validate=True) if "blob" in data else None,
        checksum=int(data["checksum"], 16) if "checksum" in data else None,
        transforms=tuple(_text(item) for item in data.get("transforms", ())),
        path=_get_path(name, data),
    )


def _get_path(name: str, data: Any) -> Path | None:
    if "path" not in data:
        return (name,)
    path = data["path"]
    if path is None:
        return None
    _expect(all(type(part) in (str, int) for part in path), f"path is {path!r}")
    return tuple(path)


def _sizes(data: Any) -> tuple[int, ...]:
    return tuple([_size(item) for item in data])


def _size(data: Any) -> int:
    """A count or offset: an int (not a bool) that fits a file offset."""
    if type(data) is not int or not 0 <= data < 1 << 63:
        raise FormatError(f"{str(data)[:50]!r} is not a size or an offset")
    return data


def _text(data: Any) -> str:
    if type(data) is not str:
        raise FormatError(f"{str(data)[:50]!r} is not text")
    return data


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise FormatError(f"not a manifest that this reader can use: {otherwise}")
