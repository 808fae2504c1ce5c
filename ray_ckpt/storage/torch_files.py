"""Files that `torch.save` wrote, as manifests: directory, pickle and local headers are read, no tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch

from ray_ckpt.errors import FormatError
from ray_ckpt.format import limits, safetensors, torch_file, zip_directory
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.manifest import Manifest
from ray_ckpt.storage.files import InputFile, Storage
from ray_ckpt.storage.foreign_parts import join, read_range
from ray_ckpt.storage.ranged_reads import Piece, Source, Tuning, fetch, tuning_for
from ray_ckpt.text import quoted

__all__ = ["LEGACY_MAGIC", "open_file", "open_indexed", "read_file", "refuse_legacy"]

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""A file of torch before 1.6 begins with this."""

_HEADER_GAP_BYTES = 16 << 10
"""Local headers of a zip archive that are nearer than this are read together."""


class Opened(NamedTuple):
    """A file whose pickle has been read."""

    content: torch_file.Content
    places: dict[str, torch_file.Place]
    """Storage's key -> where its bytes lie."""


def open_file(storage: Storage, name: str, num_bytes: int) -> Manifest:
    """
    Raises:
        FormatError: `torch.save` did not write it, it is damaged, exceeds a limit, or is one rank's of several.
        UnsafeCheckpointError: it is not safe to read.
    """
    content, places = read_file(storage, name, num_bytes)
    return torch_file.to_manifest(content, places, name, num_bytes)


def open_indexed(storage: Storage, index_name: str) -> Manifest:
    """Files of one model with their index, as transformers wrote them before safetensors.

    Raises:
        FormatError: one of them is missing or damaged, or does not hold what the index says.
        UnsafeCheckpointError: one of them is not safe to read.
    """
    index = safetensors.parse_index(storage.read_bytes(index_name), index_name)
    parts: dict[str, Manifest] = {}
    for name in sorted(set(index.values())):
        num_bytes = storage.size(name)
        if num_bytes is None:
            raise FormatError(f"{index_name} names {name}, which is not there; the checkpoint is incomplete")
        parts[name] = open_file(storage, name, num_bytes)
    for name, file in index.items():
        if name not in parts[file].tensors:
            raise FormatError(f"the index says that {quoted(name)} lies in {quoted(file)}, which does not hold it")
    return join(parts.values(), storage)


def read_file(storage: Storage, name: str, num_bytes: int, below: str = "") -> Opened:
    """
    Args:
        below: a name to put everything below.

    Raises:
        FormatError, UnsafeCheckpointError: as `open_file`.
    """
    with storage.open_input(name) as file:
        refuse_legacy(name, read_range(file, 0, min(num_bytes, len(LEGACY_MAGIC))))
        members = zip_directory.read_members(lambda offset, length: read_range(file, offset, length), num_bytes, name)
        pickle_name = next((member for member in members if member.endswith("/data.pkl")), None)
        if pickle_name is None:
            raise FormatError(f"{name} is a zip archive without a data.pkl: torch.save did not write it")
        prefix = pickle_name.removesuffix("data.pkl")
        small = {key: members[prefix + key] for key in ("data.pkl", "byteorder") if prefix + key in members}
        for key, member in small.items():
            limits.RECORD_BYTES.check(member.num_bytes, f"{key} in {name}")
        contents = {key: _member(file, member) for key, member in small.items()}
    if contents.get("byteorder", b"little").strip() != b"little":
        raise FormatError(f"{name} was saved on a big-endian machine: load it with torch.load and save it again here")
    content = torch_file.parse(contents["data.pkl"], name, below)
    storages = {key: members[f"{prefix}data/{key}"] for key in content.storages if f"{prefix}data/{key}" in members}
    return Opened(content, _places(storage, name, storages))


def refuse_legacy(name: str, start: bytes) -> None:
    """Raises FormatError when a file begins as those of torch before 1.6."""
    if start == LEGACY_MAGIC:
        raise FormatError(
            f"{name} was saved in the format of torch before 1.6: rewrite it once, by "
            "torch.save(torch.load(file, weights_only=True), file)"
        )


def _member(file: InputFile, member: zip_directory.Member) -> bytes:
    header = read_range(file, member.header_start, zip_directory.LOCAL_HEADER_BYTES)
    data = read_range(file, zip_directory.data_start(header, member.header_start, file.name), member.num_bytes)
    zip_directory.check_crc(data, member, file.name)
    return data


def _places(storage: Storage, file: str, members: Mapping[str, zip_directory.Member]) -> dict[str, torch_file.Place]:
    """Where the bytes of these members lie. Their local headers are read, many at a time."""
    size = zip_directory.LOCAL_HEADER_BYTES
    headers = {key: torch.empty(size, dtype=torch.uint8) for key in members}
    pieces = [
        Piece(Source(key, file, member.header_start, (1,), torch.uint8, size, None), Box((0,), (size,)), headers[key])
        for key, member in members.items()
    ]
    fetch(storage, pieces, _header_tuning(storage))
    return {
        key: torch_file.Place(
            zip_directory.data_start(headers[key].numpy().tobytes(), member.header_start, file),
            member.num_bytes,
            member.crc,
        )
        for key, member in members.items()
    }


def _header_tuning(storage: Storage) -> Tuning:
    return dataclasses.replace(tuning_for(storage), max_gap_bytes=_HEADER_GAP_BYTES)
