"""The safetensors format: a JSON header that says where each tensor's bytes lie.

    8 bytes    length of the header, little-endian
    header     {"name": {"dtype": "F32", "shape": [...], "data_offsets": [start, end]}, "__metadata__": {...}}
    data       every tensor's elements in row-major order; offsets count from here, without holes or overlaps

A checkpoint of several files has an index beside them, `{"weight_map": {name: file}}`.

    one file    header_length, parse_header ──> Header
    Headers     combine ──> Manifest, as exact as our own, though without checksums

Source of the format: https://huggingface.co/docs/safetensors, and `safetensors/src/tensor.rs` for what it refuses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_ckpt.errors import FormatError
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.manifest import Chunk, Manifest, TensorEntry, check_file_name, itemsize

__all__ = [
    "INDEX_SUFFIX",
    "LENGTH_BYTES",
    "SUFFIX",
    "Header",
    "combine",
    "header_length",
    "parse_header",
    "parse_index",
]

SUFFIX = ".safetensors"

INDEX_SUFFIX = ".safetensors.index.json"
"""Ends the name of the index of a checkpoint of several files."""

LENGTH_BYTES = 8
"""Of the length that a file begins with."""

_MAX_HEADER_BYTES = 100_000_000
"""What the reference reader admits as well."""

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


@dataclass(frozen=True)
class Header:
    """What one file holds."""

    tensors: Mapping[str, TensorEntry]
    file_bytes: int


def header_length(start: bytes, file: str, file_bytes: int) -> int:
    """Bytes of the header that follows the first `LENGTH_BYTES` bytes of a file.

    Raises:
        FormatError: a file of that size cannot hold it.
    """
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if len(start) < LENGTH_BYTES or not 2 <= length <= min(_MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES):
        raise FormatError(
            f"{file} is no safetensors file: it has {file_bytes} bytes, of which its header would take {length}"
        )
    return length


def parse_header(header: bytes, file: str, file_bytes: int) -> Header:
    """What the header says, once it has been checked against the size of the file.

    Raises:
        FormatError: the header is damaged, a dtype is not known, or tensors overlap or lie outside the file.
    """
    data = _parse_json(header, file)
    data.pop("__metadata__", None)
    data_start = LENGTH_BYTES + len(header)
    tensors = {name: _parse_tensor(name, entry, file, data_start) for name, entry in data.items()}
    end = data_start
    for name, chunk in sorted(
        ((name, tensor.chunks[0]) for name, tensor in tensors.items()), key=lambda pair: (pair[1].start, pair[1].length)
    ):
        if chunk.start != end:
            raise FormatError(
                f"{file}: {name!r} begins at byte {chunk.start}, but what comes before it ends at {end}; the header is "
                "damaged"
            )
        end += chunk.length
    if end != file_bytes:
        raise FormatError(
            f"{file} has {file_bytes} bytes, its header speaks of {end}; the file is truncated or damaged"
        )
    return Header(tensors, file_bytes)


def parse_index(text: bytes, name: str) -> dict[str, str]:
    """Tensor name -> name of the file that holds it, relative to the index.

    Raises:
        FormatError: the index is damaged.
        UnsafeCheckpointError: a file name leaves the directory.
    """
    files = _parse_json(text, name).get("weight_map")
    if not isinstance(files, dict) or not all(type(file) is str for file in files.values()):
        raise FormatError(f"{name} has no `weight_map` from tensor names to file names")
    return {tensor: check_file_name(file) for tensor, file in files.items()}


def combine(headers: Mapping[str, Header], index: Mapping[str, str] | None = None) -> Manifest:
    """The manifest of these files.

    Args:
        headers: by file name.
        index: says which file holds each tensor; without it the files hold what they hold.

    Raises:
        FormatError: a file lacks a tensor that the index promises, or two files hold one name.
    """
    tensors: dict[str, TensorEntry] = {}
    if index is None:
        for file, header in headers.items():
            if twice := sorted(tensors.keys() & header.tensors.keys()):
                raise FormatError(f"{file} holds {twice[0]!r}, which another file holds too")
            tensors |= header.tensors
    else:
        for name, file in index.items():
            if name not in headers[file].tensors:
                raise FormatError(f"the index says that {name!r} lies in {file}, which does not hold it")
            tensors[name] = headers[file].tensors[name]
    manifest = Manifest(tensors, {}, {file: header.file_bytes for file, header in headers.items()})
    manifest.check()
    return manifest


def _parse_tensor(name: str, entry: Any, file: str, data_start: int) -> TensorEntry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{file}: the header's entry {name!r} is no tensor: {str(entry)[:80]}")
    dtype = _DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise FormatError(f"{file}: {name!r} has the dtype {str(entry['dtype'])[:40]!r}, which torch has no name for")
    shape, offsets = _sizes(entry["shape"], name, file), _sizes(entry["data_offsets"], name, file)
    tensor = TensorEntry(dtype, shape, ())
    if len(offsets) != 2 or offsets[1] - offsets[0] != tensor.num_bytes:
        raise FormatError(
            f"{file}: {name!r} is {dtype}{list(shape)}, which is {tensor.num_bytes} bytes of {itemsize(dtype)} per "
            f"element, but lies at {list(offsets)}"
        )
    start = data_start + offsets[0]
    chunk = Chunk(Box.whole(shape), file, start, tensor.num_bytes, data_start=start)
    return TensorEntry(dtype, shape, (chunk,))


def _sizes(data: Any, name: str, file: str) -> tuple[int, ...]:
    if not isinstance(data, list) or any(type(size) is not int or not 0 <= size < 1 << 63 for size in data):
        raise FormatError(f"{file}: {name!r} has {str(data)[:80]} where sizes are expected")
    return tuple(data)


def _parse_json(text: bytes, file: str) -> dict[str, Any]:
    try:
        data = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file} holds no JSON where a header is expected: {error}") from error
    if not isinstance(data, dict):
        raise FormatError(f"{file} holds a JSON {type(data).__name__} where an object is expected")
    return data


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError("a key appears twice")
    return data
