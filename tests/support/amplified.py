"""Small checkpoints that ask for much work: parts that appear many times, keys whose hashes collide, dense pickles.

KNOWN    name -> function that writes one into a directory and returns what to read; each ends in an error of ours
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import zstandard
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import ray_ckpt
from tests.support.hostile import Writer, stock
from tests.support.records import edit_record

_INFO = _StorageInfo("__0_0.distcp", 0, 1024)
_POINT = torch.Size((0,)), torch.Size((2,))


def colliding(number: int) -> list[tuple[int, int]]:
    """Pairs of sizes that all have one hash: CPython's hash of tuples is xxHash, whose steps can be taken backwards."""
    mask, first, second, start = (1 << 64) - 1, 11400714785074694791, 14029467366897019727, 2870177450012600261
    undo_first, undo_second = pow(first, -1, 1 << 64), pow(second, -1, 1 << 64)
    target = 0x123456789ABCDEF * undo_first & mask
    wanted = (target >> 31 | target << 33) & mask
    pairs: list[tuple[int, int]] = []
    one = 0
    while len(pairs) < number:
        one += 1
        mixed = (start + one * second) & mask
        other = (wanted - ((mixed << 31 | mixed >> 33) & mask) * first) * undo_second & mask
        if other < (1 << 61) - 1:  # below this an integer is its own hash
            pairs.append((one, other))
    assert len(set(map(hash, pairs))) == 1
    return pairs


def _metadata(make: Callable[[], bytes]) -> Writer:
    def write(directory: Path) -> Path:
        (directory / ".metadata").write_bytes(make())
        (directory / "__0_0.distcp").write_bytes(b"x")
        return directory

    return write


def _tensor(shape: Sequence[int], chunks: list[ChunkStorageMetadata]) -> TensorStorageMetadata:
    return TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(shape), chunks)


def _half_of_the_chunks_collide() -> bytes:
    offsets = [*colliding(30_000), *((number, 0) for number in range(30_002))]
    places = {MetadataIndex("x", torch.Size((number,))): _INFO for number in range(len(offsets))}
    for key, offset in zip(places, offsets, strict=True):
        object.__setattr__(key, "offset", torch.Size(offset))  # a dict of them would take a minute to make
    return stock({"x": _tensor((4,), [ChunkStorageMetadata(*_POINT)])}, places)


def _one_list_of_chunks() -> bytes:
    shared = _tensor((2,), [ChunkStorageMetadata(*_POINT)] * 10_000)
    names = [str(number) for number in range(10_000)]
    return stock(dict.fromkeys(names, shared), {MetadataIndex(name, _POINT[0]): _INFO for name in names})


def _one_long_shape() -> bytes:
    shared = _tensor((1,) * 100_000, [])
    return stock({str(number): shared for number in range(10_000)}, {})


def _objects(info: _StorageInfo, path: Any = None) -> bytes:
    names = [str(number) for number in range(10_000)]
    paths = None if path is None else dict.fromkeys(names, path)
    entries = {name: BytesStorageMetadata() for name in names}
    return stock(entries, {MetadataIndex(name): info for name in names}, planner_data=paths)


def _extensions(descriptors: Any) -> _StorageInfo:
    return _StorageInfo("__0_0.distcp", 0, 64, descriptors)


def _nested(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = (value, value)
    return value


def _colliding_boxes(*, as_saved: bool) -> Writer:
    def change(record: dict[str, Any]) -> None:
        [tensor] = record["tensors"].values()
        [chunk] = tensor["chunks"]
        tensor["chunks"] = [{**chunk, "offsets": list(pair), "sizes": [1, 1]} for pair in colliding(40_000)]

    def write(directory: Path) -> Path:
        ray_ckpt.save({"w": torch.arange(6.0).reshape(2, 3)}, directory / "c")
        edit_record(directory / "c", change, as_saved=as_saved)
        return directory / "c"

    return write


def _many_frames(directory: Path) -> Path:
    data = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 24)) * 40
    info = _StorageInfo("__0_0.distcp", 0, len(data), ["stream.zstd/1"])
    _metadata(lambda: stock({"x": BytesStorageMetadata()}, {MetadataIndex("x"): info}))(directory)
    (directory / "__0_0.distcp").write_bytes(data)
    return directory


def _many_members(directory: Path) -> Path:
    """All of them at one place."""
    number = 50_000
    entry = struct.Struct("<4s6H3L5H2L").pack(b"PK\1\2", *(0,) * 9, 9, *(0,) * 6)
    listed = b"".join(entry + b"x/%07d" % position for position in range(number))
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, number, number, len(listed), 30, 0)
    (directory / "x.pt").write_bytes(b"PK\3\4" + bytes(26) + listed + end)
    return directory / "x.pt"


def _over_one_place(directory: Path) -> Path:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({str(number): entry for number in range(50_000)}).encode()
    (directory / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"four")
    return directory / "x.safetensors"


def _header_of_nothing(directory: Path) -> Path:
    header = b'{"x":[' + b"[]," * 3_000_000 + b"[]]}"
    (directory / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return directory / "x.safetensors"


def _counters_of_nothing(directory: Path) -> Path:
    """A directory of transformers' Trainer."""
    save_file({"w": torch.ones(3)}, directory / "model.safetensors")
    (directory / "trainer_state.json").write_bytes(b'{"log_history":[' + b'{"":0},' * 1_600_000 + b"{}]}")
    return directory


KNOWN: dict[str, Writer] = {
    "a header of nothing": _header_of_nothing,
    "counters of nothing": _counters_of_nothing,
    "nothing but memo entries": _metadata(lambda: b"\x80\4N" + b"\x94" * 8_000_000 + b"."),
    "half of it lists": _metadata(lambda: b"\x80\4" + b"]N" * 8_000_000 + b"."),
    "half of the chunks collide": _metadata(_half_of_the_chunks_collide),
    "one list of chunks for all": _metadata(_one_list_of_chunks),
    "one long shape for all": _metadata(_one_long_shape),
    "one long path for all": _metadata(lambda: _objects(_INFO, ("a",) * 100_000)),
    "one chain of extensions for all": _metadata(lambda: _objects(_extensions(["x"] * 100_000))),
    "an extension without end": _metadata(lambda: _objects(_extensions([_nested(40)]))),
    "colliding boxes": _colliding_boxes(as_saved=False),
    "colliding boxes, as we write them": _colliding_boxes(as_saved=True),
    "many zstd frames": _many_frames,
    "many members at one place": _many_members,
    "many tensors at one place": _over_one_place,
}
