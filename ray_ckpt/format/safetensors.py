"""The safetensors format: a JSON header that says where each tensor's bytes lie.

    8 bytes    length of the header, little-endian
    header     {"name": {"dtype": "F32", "shape": [...], "data_offsets": [start, end]}, "__metadata__": {...}}
    data       every tensor's elements in row-major order; offsets count from here, without holes or overlaps

A checkpoint of several files has an index beside them, `{"weight_map": {name: file}}`. One that DCP's
`HuggingFaceStorageWriter(save_distributed=True)` wrote has files of shards instead: the header's `__metadata__` says
where each lies, by `{"DCP_SHARDING_INFO": '{"name": {"saved_offsets": [...]}}'}`. The tensor's shape is told nowhere,
and taken to end where the last shard does.

    one file    header_length, parse_header ──> Header
    Headers     combine ──> Manifest, as exact as our own, though without checksums

Source of the format: https://huggingface.co/docs/safetensors, and `safetensors/src/tensor.rs` for what it refuses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ray_ckpt.errors import FormatError, UsageError
from ray_ckpt.format import limits
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.foreign_json import parse_object
from ray_ckpt.format.manifest import Chunk, Manifest, TensorEntry, check_file_name, itemsize
from ray_ckpt.text import is_unicode, quoted

__all__ = [
    "INDEX_SUFFIX",
    "LENGTH_BYTES",
    "SUFFIX",
    "Header",
    "combine",
    "header",
    "header_length",
    "index",
    "parse_header",
    "parse_index",
]

SUFFIX = ".safetensors"

INDEX_SUFFIX = ".safetensors.index.json"
"""Suffix of the name of the index of a checkpoint of several files."""

_METADATA = "__metadata__"

_SHARDING_INFO = "DCP_SHARDING_INFO"

LENGTH_BYTES = 8
"""Size of the number that a file begins with: the length of its header."""

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}


_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_ALIGNMENT = 8
"""Headers are padded with spaces, so that the data begin at a multiple of this."""


@dataclass(frozen=True)
class Header:
    """What one file holds."""

    tensors: Mapping[str, TensorEntry]
    file_bytes: int
    has_shards: bool = False
    """Whether the tensors are shards, each in a box of its own that ends where the shape does."""


def header_length(start: bytes, file: str, file_bytes: int) -> int:
    """Bytes of the header that follows the first `LENGTH_BYTES` bytes of a file.

    Raises:
        FormatError: a file of that size cannot hold it.
    """
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if len(start) < LENGTH_BYTES or not 2 <= length <= file_bytes - LENGTH_BYTES:
        raise FormatError(
            f"{file} is no safetensors file: it has {file_bytes} bytes, of which its header would take {length}"
        )
    limits.HEADER_BYTES.check(length, file)
    return length


def parse_header(header: bytes, file: str, file_bytes: int) -> Header:
    """What the header says, once it has been checked against the size of the file.

    Raises:
        FormatError: the header is damaged, a dtype is not known, or tensors overlap or lie outside the file.
    """
    data = parse_object(header, file)
    offsets = _shard_offsets(data.pop(_METADATA, None), file)
    data_start = LENGTH_BYTES + len(header)
    tensors = {name: _parse_tensor(name, entry, file, data_start) for name, entry in data.items()}
    if offsets is not None:
        tensors = {name: _placed(name, entry, offsets.get(name), file) for name, entry in tensors.items()}
    end = data_start
    for name, chunk in sorted(
        ((name, tensor.chunks[0]) for name, tensor in tensors.items()), key=lambda pair: (pair[1].start, pair[1].length)
    ):
        if chunk.start != end:
            raise FormatError(
                f"{file}: {quoted(name)} begins at byte {chunk.start}, but what comes before it ends at {end}; the "
                "header is damaged"
            )
        end += chunk.length
    if end != file_bytes:
        raise FormatError(
            f"{file} has {file_bytes} bytes, its header describes {end}; the file is truncated or damaged"
        )
    return Header(tensors, file_bytes, offsets is not None)


def header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The beginning of a file that holds these tensors one after the other, as programs that use torch write it.

    Args:
        tensors: name, dtype and shape of each, in the order of their bytes.

    Raises:
        UsageError: the format has no such dtype or name.
    """
    entries: dict[str, Any] = {_METADATA: {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        if dtype not in _NAMES:
            raise UsageError(f"{quoted(name)} is {dtype}, which safetensors files cannot hold: choose another dtype")
        if name == _METADATA or not is_unicode(name):
            raise UsageError(f"a tensor in a safetensors file cannot be called {quoted(name)}: rename it")
        start, end = end, end + math.prod(shape) * itemsize(dtype)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def index(files: Mapping[str, str], total_bytes: int) -> bytes:
    """The index of several files.

    Args:
        files: tensor -> name of the file that holds it.
        total_bytes: size of all tensors.
    """
    data = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(files.items()))}
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def parse_index(text: bytes, name: str) -> dict[str, str]:
    """Tensor name -> name of the file that holds it, relative to the index.

    Raises:
        FormatError: the index is damaged.
        UnsafeCheckpointError: a file name leaves the directory.
    """
    files = parse_object(text, name).get("weight_map")
    if not isinstance(files, dict) or not files or not all(type(file) is str for file in files.values()):
        raise FormatError(f"{name} has no `weight_map` from tensor names to file names")
    return {tensor: check_file_name(file) for tensor, file in files.items()}


def combine(headers: Mapping[str, Header], index: Mapping[str, str] | None = None) -> Manifest:
    """The manifest of these files.

    Args:
        headers: by file name.
        index: says which file holds each tensor; without it the files hold what they hold.

    Raises:
        FormatError: a file lacks a tensor that the index lists, two files hold one name, or shards do not fit.
    """
    tensors: dict[str, TensorEntry] = {}
    if any(header.has_shards for header in headers.values()):
        tensors = _join_shards(headers)
    elif index is None:
        for file, header in headers.items():
            if twice := sorted(tensors.keys() & header.tensors.keys()):
                raise FormatError(f"{quoted(file)} holds {quoted(twice[0])}, which another file holds too")
            tensors |= header.tensors
    else:
        for name, file in index.items():
            if name not in headers[file].tensors:
                raise FormatError(f"the index says that {quoted(name)} lies in {quoted(file)}, which does not hold it")
            tensors[name] = headers[file].tensors[name]
    manifest = Manifest(tensors, {}, {file: header.file_bytes for file, header in headers.items()})
    manifest.check()
    return manifest


def _shard_offsets(metadata: Any, file: str) -> dict[str, Any] | None:
    """Tensor name -> place of its shard; None where the file holds whole tensors."""
    text = metadata.get(_SHARDING_INFO) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        return None
    return {
        name: entry.get("saved_offsets") if isinstance(entry, dict) else None
        for name, entry in parse_object(text.encode("utf-8", "replace"), f"{_SHARDING_INFO} of {file}").items()
    }


def _placed(name: str, entry: TensorEntry, offsets: Any, file: str) -> TensorEntry:
    """The entry of a shard, whose shape ends where it does."""
    places = (0,) * len(entry.shape) if offsets is None else _sizes(offsets, name, file)
    if len(places) != len(entry.shape):
        raise FormatError(f"{file}: the shard of {quoted(name)} has {len(entry.shape)} dims, its place {list(places)}")
    end = tuple(place + size for place, size in zip(places, entry.shape, strict=True))
    chunk = entry.chunks[0]._replace(box=Box(places, entry.shape))
    return TensorEntry(entry.dtype, end, (chunk,))


def _join_shards(headers: Mapping[str, Header]) -> dict[str, TensorEntry]:
    joined: dict[str, TensorEntry] = {}
    for file, header in headers.items():
        for name, entry in header.tensors.items():
            known = joined.setdefault(name, entry)
            if known is entry:
                continue
            if known.dtype != entry.dtype or len(known.shape) != len(entry.shape):
                raise FormatError(
                    f"{quoted(name)} is {entry.dtype} of {len(entry.shape)} dims in {file}, and {known.dtype} of "
                    f"{len(known.shape)} in {known.chunks[0].file}: they are shards of two tensors"
                )
            shape = tuple(map(max, known.shape, entry.shape))
            joined[name] = TensorEntry(known.dtype, shape, known.chunks + entry.chunks)
    return joined


def _parse_tensor(name: str, entry: Any, file: str, data_start: int) -> TensorEntry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{file}: the header's entry {quoted(name)} is no tensor: {quoted(entry)}")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise FormatError(f"{file}: {quoted(name)} has the dtype {quoted(entry['dtype'])}, which torch has no name for")
    shape, offsets = _sizes(entry["shape"], name, file), _sizes(entry["data_offsets"], name, file)
    limits.check_dims(shape, name)
    tensor = TensorEntry(dtype, shape, ())
    if len(offsets) != 2 or offsets[1] - offsets[0] != tensor.num_bytes:
        raise FormatError(
            f"{file}: {quoted(name)} is {dtype}{list(shape)}, which is {tensor.num_bytes} bytes of {itemsize(dtype)} "
            f"per element, but lies at {quoted(list(offsets))}"
        )
    start = data_start + offsets[0]
    chunk = Chunk(Box.whole(shape), file, start, tensor.num_bytes, data_start=start)
    return TensorEntry(dtype, shape, (chunk,))


def _sizes(data: Any, name: str, file: str) -> tuple[int, ...]:
    if not isinstance(data, list) or any(type(size) is not int or not 0 <= size < 1 << 63 for size in data):
        raise FormatError(f"{file}: {quoted(name)} has {quoted(data)} where sizes are expected")
    return tuple(data)
