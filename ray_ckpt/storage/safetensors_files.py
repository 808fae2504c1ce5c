"""Safetensors files, alone, several in a directory, or with their index, as manifests: headers are read, no tensor."""

from __future__ import annotations

from collections.abc import Iterable

from ray_ckpt.errors import FormatError
from ray_ckpt.format import safetensors
from ray_ckpt.format.manifest import Manifest
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.foreign_names import Listing
from ray_ckpt.storage.foreign_parts import Found, check_parts, read_range
from ray_ckpt.text import listed

__all__ = ["open_directory", "open_files", "open_indexed"]


def open_directory(storage: Storage, listing: Listing, *, trusted: bool) -> Found:
    """
    Raises:
        FormatError: there are several checkpoints, a part is missing or damaged, or two parts hold one name.
    """
    indexes = listing.ending(safetensors.INDEX_SUFFIX)
    if len(indexes) > 1:
        raise FormatError(f"{storage.address} holds {len(indexes)} checkpoints: name one of {listed(indexes)}")
    if indexes:
        return Found("a sharded safetensors checkpoint", storage, open_indexed(storage, indexes[0]))
    files = listing.ending(safetensors.SUFFIX)
    check_parts(storage.address, files)
    return Found("a safetensors directory", storage, open_files(storage, files))


def open_indexed(storage: Storage, index_name: str) -> Manifest:
    index = safetensors.parse_index(storage.read_bytes(index_name), index_name)
    headers = {}
    for name in sorted(set(index.values())):
        num_bytes = storage.size(name)
        if num_bytes is None:
            raise FormatError(f"{index_name} names {name}, which is not there; the checkpoint is incomplete")
        headers[name] = _header(storage, name, num_bytes)
    return safetensors.combine(headers, index)


def open_files(storage: Storage, names: Iterable[str]) -> Manifest:
    sizes = storage.sizes(names)
    return safetensors.combine({name: _header(storage, name, size) for name, size in sizes.items()})


def _header(storage: Storage, name: str, num_bytes: int) -> safetensors.Header:
    with storage.open_input(name) as file:
        start = read_range(file, 0, min(num_bytes, safetensors.LENGTH_BYTES))
        length = safetensors.header_length(start, name, num_bytes)
        return safetensors.parse_header(read_range(file, safetensors.LENGTH_BYTES, length), name, num_bytes)
