"""Checkpoints that mean harm: a list of known kinds, and as many made-up ones as wanted.

KNOWN                      name -> function that writes one into a directory and returns what to read
make(kind, number, path)   the number-th made-up one of a kind; the same whenever it is made
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import zstandard
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

import ray_ckpt

Writer = Callable[[Path], Path]

NESTED_40_TIMES = b"K\1\x85" + b"2\x86" * 40
"""A tuple of two times the same tuple, and so on: 2^40 numbers for whoever visits them all."""


def stock(entries: dict[str, Any], storage: dict[Any, Any], **more: Any) -> bytes:
    """A `.metadata` as stock DCP writes it."""
    return pickle.dumps(Metadata(entries, storage_data=storage, storage_meta=StorageMeta(), **more))


def _object(name: str, length: int, transforms: Sequence[str] | None = None) -> bytes:
    info = _StorageInfo("__0_0.distcp", 0, length, transforms)
    return stock({name: BytesStorageMetadata()}, {MetadataIndex(name): info})


def _tensor(
    chunks: Sequence[tuple[Sequence[int], Sequence[int]]], shape: Sequence[int], length: int = 1 << 10
) -> bytes:
    described = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks]
    entry = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(shape), described)
    storage = {MetadataIndex("x", chunk.offsets): _StorageInfo("__0_0.distcp", 0, length) for chunk in described}
    return stock({"x": entry}, storage)


def container(
    pickled: bytes, members: Sequence[tuple[str, bytes]] = (), compression: int = zipfile.ZIP_STORED
) -> bytes:
    """A zip archive around a pickle, as `torch.save` lays it out."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in [("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n"), *members]:
            archive.writestr(f"archive/{name}", data)
    return stream.getvalue()


def _metadata(data: bytes) -> Writer:
    def write(directory: Path) -> Path:
        (directory / ".metadata").write_bytes(data)
        (directory / "__0_0.distcp").write_bytes(b"x")
        return directory

    return write


def _metadata_and_data(metadata: bytes, data: bytes) -> Writer:
    def write(directory: Path) -> Path:
        (directory / ".metadata").write_bytes(metadata)
        (directory / "__0_0.distcp").write_bytes(data)
        return directory

    return write


def _value(pickled: bytes) -> Writer:
    """An object of a stock checkpoint."""
    data = container(pickled)
    return _metadata_and_data(_object("x", len(data)), data)


def _chunk(pickled: bytes) -> Writer:
    """A tensor of a stock checkpoint."""
    data = container(pickled)
    return _metadata_and_data(_tensor([((0,), (2,))], (2,), len(data)), data)


def _file(data: bytes, name: str = "x.pt") -> Writer:
    def write(directory: Path) -> Path:
        (directory / name).write_bytes(data)
        return directory / name

    return write


def _entry(pickled: bytes) -> Writer:
    """An entry of a file by `torch.save`."""
    return _file(container(b"\x80\2}X\1\0\0\0x" + pickled + b"s."))


def _safetensors(header: bytes, data: bytes = b"") -> Writer:
    return _file(struct.pack("<Q", len(header)) + header + data, "x.safetensors")


def rewritten(change: Callable[[dict[str, Any]], object]) -> Writer:
    """A checkpoint of ours, whose record somebody has rewritten as one of version 1, which has no digest."""

    def write(directory: Path) -> Path:
        ray_ckpt.save({"model": {"w": torch.arange(6.0).reshape(2, 3)}, "lr": 0.1}, directory / "c")
        path = directory / "c" / "manifest.json"
        record = json.loads(path.read_bytes())
        record["version"] = 1
        del record["digest"], record["metadata_digest"]
        changed = change(record)
        path.write_bytes(changed if isinstance(changed, bytes) else json.dumps(record).encode())
        return directory / "c"

    return write


def _diagonal(number: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Long boxes, of which any two are side by side in one dim and far apart in the other."""
    return [((place, number - place), (number, 1)) for place in range(number)]


def _diagonal_manifest(record: dict[str, Any]) -> None:
    [tensor] = record["tensors"].values()
    [chunk] = tensor["chunks"]
    tensor["shape"] = [8000, 8000]
    tensor["chunks"] = [
        {**chunk, "offsets": list(offsets), "sizes": list(sizes), "block_bytes": 4 << 20, "checksums": "AAAAAAAAAAA="}
        for offsets, sizes in _diagonal(4000)
    ]


def _zstd_bomb(directory: Path) -> Path:
    compressor = zstandard.ZstdCompressor().compressobj()
    block = bytes(1 << 24)
    data = b"".join(compressor.compress(block) for _ in range(64)) + compressor.flush()
    return _metadata_and_data(_object("x", len(data), ["stream.zstd/1"]), data)(directory)


def _in_place_of(name: str, make: Callable[[Path], object]) -> Writer:
    def write(directory: Path) -> Path:
        dcp.save({"x": torch.arange(5.0)}, checkpoint_id=directory, no_dist=True)
        (directory / name).unlink()
        make(directory / name)
        return directory

    return write


def _link_out(path: Path) -> None:
    outside = path.parent.parent / "outside.distcp"
    outside.write_bytes(b"secret" * 1000)
    path.symlink_to(outside)


def _link_out_by_directory(directory: Path) -> Path:
    _metadata(stock({"x": BytesStorageMetadata()}, {MetadataIndex("x"): _StorageInfo("up/secret", 0, 6)}))(directory)
    (directory.parent / "secret").write_bytes(b"secret")
    (directory / "up").symlink_to("..")
    return directory


def _over_one_place(directory: Path) -> Path:
    """Twenty thousand objects of a megabyte each, in a file of one."""
    names = [str(number) for number in range(20_000)]
    infos = {MetadataIndex(n): _StorageInfo("__0_0.distcp", k % 500, 1 << 20) for k, n in enumerate(names)}
    return _metadata_and_data(stock({n: BytesStorageMetadata() for n in names}, infos), bytes((1 << 20) + 500))(
        directory
    )


def _sparse(directory: Path) -> Path:
    with open(directory / ".metadata", "wb") as file:
        file.truncate(1 << 40)
    return directory


def _twice(path: Path) -> Path:
    data = bytearray(container(b"\x80\2}.", [("data/0", b"one"), ("data/1", b"two")]))
    return _file(bytes(data).replace(b"archive/data/1", b"archive/data/0"))(path)


def _over_each_other(path: Path) -> Path:
    data = container(b"\x80\2}.", [("data/0", bytes(100)), ("data/1", bytes(100))])
    second = data.rindex(b"archive/data/1") - 46
    first_start = struct.unpack_from("<I", data, data.rindex(b"archive/data/0") - 46 + 42)[0]
    return _file(data[: second + 42] + struct.pack("<I", first_start + 1) + data[second + 46 :])(path)


_BUILD_ON_CLASS = b"(N}X\6\0\0\0parentX\6\0\0\0hackedstb"
_END = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, 0xFFFFFFF0, 0, 0)

KNOWN: dict[str, Writer] = {
    "memo index": _metadata(b"\x80\2Nr\xff\xff\xff\x17."),
    "memo index in a chunk": _chunk(b"\x80\2Nr\xff\xff\xff\x17."),
    "memo index in an object": _value(b"\x80\2Nr\xff\xff\xff\x17."),
    "deep tuple": _metadata(b"\x80\4)" + b"\x85" * 1_000_000 + b"."),
    "deep key": _metadata(b"\x80\4})" + b"\x85" * 1_000_000 + b"Ns."),
    "deep list": _metadata(b"\x80\4" + b"]" * 300_000 + b"a" * 299_999 + b"."),
    "ten million lists": _metadata(b"\x80\2" + b"]" * 10_000_000 + b"."),
    "ten million tuples": _metadata(b"\x80\2)" + b"\x85" * 10_000_000 + b"."),
    "a million sets of nothing": _value(b"\x80\4" + b"\x8f" * 2_000_000 + b"."),
    "deep entry": _entry(b"]" * 100_000 + b"a" * 99_999),
    "deep object": _value(b"\x80\2" + b"]" * 100_000 + b"a" * 99_999 + b"."),
    "wide key": _metadata(b"\x80\4}" + NESTED_40_TIMES + b"Ns."),
    "wide key in an object": _value(b"\x80\2}" + NESTED_40_TIMES + b"Ns."),
    "wide key in a file": _entry(b"}" + NESTED_40_TIMES + b"Ns"),
    "wide member of a set": _entry(b"c__builtin__\nset\n(]" + NESTED_40_TIMES + b"atR"),
    "wide value": _entry(NESTED_40_TIMES),
    "wide root": _metadata(b"\x80\4" + NESTED_40_TIMES + b"."),
    "colliding keys": _entry(
        b"}("
        + b"".join(b"\x8a\x0a" + (number * ((1 << 61) - 1)).to_bytes(10, "little") + b"N" for number in range(40_000))
        + b"u"
    ),
    "attribute of a class": _metadata(b"\x80\2cpathlib\nPurePosixPath\n" + _BUILD_ON_CLASS + b"."),
    "attribute of a class in a file": _entry(b"ccollections\nOrderedDict\n" + _BUILD_ON_CLASS),
    "attribute of a class in a chunk": _chunk(b"\x80\2ccollections\nOrderedDict\n" + _BUILD_ON_CLASS + b"."),
    "items of a shared dict": _metadata(b"\x80\2ccopyreg\ndispatch_table\nX\1\0\0\0xNs."),
    "items of a shared list": _metadata(b"\x80\2csys\npath\nX\1\0\0\0xa."),
    "items of the environment": _metadata(b"\x80\2cos\nenviron\nX\1\0\0\0xX\1\0\0\0ys."),
    "a call of the library": _metadata(b"\x80\2cos\nputenv\n(X\1\0\0\0xX\1\0\0\0ytR."),
    "extension code": _metadata(b"\x80\2\x82\1."),
    "long integer": _metadata(b"\x80\2\x8b" + struct.pack("<I", 1 << 20) + b"\1" * (1 << 20) + b"."),
    "bytes that are not there": _metadata(b"\x80\4\x8e" + struct.pack("<Q", 1 << 62) + b"x."),
    "array of 4 GiB": _value(b"\x80\2c__builtin__\nbytearray\n\x8a\5\0\0\0\0\1\x85R."),
    "tensor of 4 GiB": _value(b"\x80\2ctorch\nFloatTensor\nJ\0\0\0\x40\x85R."),
    "storage of 4 GiB": _value(b"\x80\2ctorch.storage\nUntypedStorage\n\x8a\5\0\0\0\0\1\x85R."),
    "container of 4 GiB": _metadata(_object("x", 1 << 32)),
    "chunk of 4 GiB": _metadata(_tensor([((0,), (1 << 30,))], (1 << 30,), 1 << 33)),
    "objects over each other": _over_one_place,
    "compressed": _metadata_and_data(
        _object("x", len(deflated := container(b"\x80\2N.", [("data/0", bytes(1 << 26))], zipfile.ZIP_DEFLATED))),
        deflated,
    ),
    "zstd": _zstd_bomb,
    "diagonal chunks": _metadata(_tensor(_diagonal(3000), (6000, 6000))),
    "diagonal chunks of ours": rewritten(_diagonal_manifest),
    "many dims": _metadata(_tensor([((0,) * 5000, (1 << 62,) * 5000)], (1 << 62,) * 5000)),
    "many elements": _metadata(_tensor([((0, 0), (1 << 40, 1 << 40))], (1 << 40, 1 << 40))),
    "many dims of ours": rewritten(lambda record: record["tensors"]["model.w"].update(shape=[1 << 62] * 100_000)),
    "deep record": rewritten(lambda record: b'{"x":' + b"[" * 1_000_000),
    "deep value of ours": rewritten(
        lambda record: record["objects"]["lr"].update(value=json.loads("[" * 900 + "]" * 900))
    ),
    "long number": rewritten(lambda record: b'{"version":' + b"9" * 1_000_000 + b"}"),
    "late duplicate": rewritten(
        lambda record: b"{" + b",".join(b'"%d":1' % n for n in range(200_000)) + b',"199999":2}'
    ),
    "long dtype": rewritten(lambda record: record["tensors"]["model.w"].update(dtype="float" + "9" * 100_000)),
    "odd name": rewritten(lambda record: record["tensors"].update({"\x1b[2J\n" + "n" * 100_000: {}})),
    "odd file": rewritten(lambda record: record["files"].update({"\x1b[2J\n/../" + "n" * 100_000: 1})),
    "sparse record": _sparse,
    "directory of 4 GiB": _file(b"PK\3\4" + bytes(300) + _END),
    "members of one name": _twice,
    "members over each other": _over_each_other,
    "deep header": _safetensors(b'{"x":' + b"[" * 100_000),
    "header of many dims": _safetensors(
        json.dumps({"x": {"dtype": "F32", "shape": [1 << 62] * 100_000, "data_offsets": [0, 4]}}).encode(), b"four"
    ),
    "header of a long number": _safetensors(b'{"x":' + b"1" * 100_000 + b"}"),
    "header of an odd dtype": _safetensors(b'{"x":{"dtype":[[]],"shape":[1],"data_offsets":[0,4]}}', b"four"),
    "FIFO": _in_place_of("__0_0.distcp", os.mkfifo),
    "FIFO as a record": _in_place_of(".metadata", os.mkfifo),
    "directory": _in_place_of("__0_0.distcp", os.mkdir),
    "device": _in_place_of("__0_0.distcp", lambda path: path.symlink_to("/dev/zero")),
    "link to outside": _in_place_of("__0_0.distcp", _link_out),
    "link to a directory outside": _link_out_by_directory,
}
"""Each ends in an error of ours, but for those below."""

HARMLESS = {"memo index in an object"}
"""What loads, as nothing of it is wrong or wanted."""


# ---------------------------------------------------------------------------------------------------- made up


def make(kind: str, number: int, directory: Path) -> Path:
    """Write the number-th made-up checkpoint of a kind; it may be a good one."""
    directory.mkdir()
    rng = random.Random(f"{kind} {number}")
    return KINDS[kind](rng, directory)


_NAMES = [
    *(b"os\nsystem", b"builtins\nexec", b"pathlib\nPurePosixPath", b"collections\nOrderedDict", b"torch\nSize"),
    *(
        b"torch\nfloat32",
        b"builtins\ngetattr",
        b"collections\ndefaultdict",
        b"collections\nCounter",
        b"_codecs\nencode",
    ),
    *(b"torch._utils\n_rebuild_tensor_v2", b"torch\nFloatStorage", b"argparse\nNamespace", b"builtins\nbytearray"),
    *(b"torch.distributed.checkpoint.metadata\n" + name for name in (b"Metadata", b"StorageMeta", b"MetadataIndex")),
    *(b"torch.distributed.checkpoint.metadata\n" + name for name in (b"ChunkStorageMetadata", b"TensorProperties")),
]


def _operation(rng: random.Random) -> bytes:
    """One operation of a pickle with its argument."""
    simple = b"(}])N\x88\x89\x85\x86\x87RbtusaeQ0\x81\x90\x91\x94d2o1"
    choice = rng.randrange(10)
    if choice < 5:
        return bytes([rng.choice(simple)])
    if choice == 5:
        return b"c" + rng.choice(_NAMES) + b"\n"
    if choice == 6:
        text = rng.choice(
            ["x", "parent", "offsets", "state_dict_metadata", "storage", "a" * rng.randrange(300)]
        ).encode()
        return b"X" + struct.pack("<I", len(text)) + text
    if choice == 7:
        return rng.choice([b"q", b"h"]) + bytes([rng.randrange(6)])
    if choice == 8:
        return rng.choice([b"r", b"j"]) + struct.pack("<I", rng.choice([0, 1, 1 << 31]))
    return rng.choice([b"K" + bytes([rng.randrange(256)]), b"J" + rng.randbytes(4), b"\x8a\x08" + rng.randbytes(8)])


def _made_value(rng: random.Random, depth: int) -> bytes:
    """Operations that leave one value: of a call, an object with state, or a container, and of values within."""
    choice = rng.randrange(9) if depth else rng.randrange(3)
    inner = [_made_value(rng, depth - 1) for _ in range(rng.randrange(4))] if depth else []
    pairs = b"".join(_made_value(rng, 0) + item for item in inner)
    name = b"c" + rng.choice(_NAMES) + b"\n"
    return [
        lambda: _operation(rng) if depth else b"K" + bytes([rng.randrange(256)]),
        lambda: b"X" + struct.pack("<I", len(text := rng.choice(_TEXTS))) + text,
        lambda: name,
        lambda: b"(" + b"".join(inner) + b"t",
        lambda: b"](" + b"".join(inner) + b"e",
        lambda: b"}(" + pairs + b"u",
        lambda: name + b"(" + b"".join(inner) + b"t" + rng.choice([b"R", b"\x81"]),
        lambda: name + b")" + rng.choice([b"R", b"\x81"]) + b"}(" + pairs + b"ub",
        lambda: name + rng.choice([b"", b")R"]) + b"(N}(" + pairs + b"utb",
    ][choice]()


_TEXTS = [b"x", b"parent", b"offsets", b"state_dict_metadata", b"storage_data", b"storage", b"fqn", b"cpu", b"a" * 300]


def _pickle(rng: random.Random) -> bytes:
    """Half of them at random, half of them well formed."""
    if rng.random() < 0.5:
        return b"\x80\2" + b"".join(_operation(rng) for _ in range(rng.randrange(3, 60))) + b"."
    return b"\x80\2}(X\1\0\0\0x" + _made_value(rng, 4) + b"u."


def _damaged(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed, removed or put in."""
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(data) + 1)
        if rng.random() < 0.1:
            data = data[:at]
        else:
            data = data[:at] + rng.randbytes(rng.randrange(3)) + data[at + rng.randrange(3) :]
    return data


_VALUES = [
    0,
    -1,
    1 << 31,
    1 << 62,
    1 << 64,
    10**400,
    0.5,
    "",
    "x",
    "../x",
    "\x1b\n",
    None,
    True,
    [],
    {},
    [[[]]],
    {"$tuple": 1},
]


def _mutated(rng: random.Random, node: Any) -> None:
    """One value somewhere below replaced, removed or doubled."""
    places = [(node, key) for key in (node if isinstance(node, dict) else range(len(node)))]
    container_, key = rng.choice(places) if places else (None, None)
    if container_ is None:
        return
    child = container_[key]
    if isinstance(child, (dict, list)) and child and rng.random() < 0.8:
        _mutated(rng, child)
    elif isinstance(container_, list) and rng.random() < 0.3:
        container_ += [child] * rng.choice([1, 70])
    else:
        container_[key] = rng.choice(_VALUES)


def _state() -> dict[str, Any]:
    return {
        "w": torch.arange(12.0).reshape(3, 4),
        "n": {"b": torch.ones(5, dtype=torch.bfloat16)},
        "o": torch.Size([1, 2]),
    }


def _made_metadata(rng: random.Random, directory: Path) -> Path:
    return _metadata(_pickle(rng))(directory)


def _made_object(rng: random.Random, directory: Path) -> Path:
    return rng.choice([_value, _chunk])(_pickle(rng))(directory)


def _made_file(rng: random.Random, directory: Path) -> Path:
    return _file(container(_pickle(rng), [("data/0", bytes(64))]))(directory)


def _damaged_metadata(rng: random.Random, directory: Path) -> Path:
    dcp.save(_state(), checkpoint_id=directory, no_dist=True)
    path = directory / rng.choice([".metadata", ".metadata", "__0_0.distcp"])
    path.write_bytes(_damaged(rng, path.read_bytes()))
    return directory


def _damaged_file(rng: random.Random, directory: Path) -> Path:
    torch.save(_state(), directory / "x.pt")
    data = (directory / "x.pt").read_bytes()
    at = data.index(b"PK\1\2")
    start, end = (data[:at], data[at:])
    damaged = start + _damaged(rng, end) if rng.random() < 0.5 else _damaged(rng, start) + end
    return _file(damaged)(directory)


def _mutated_manifest(rng: random.Random, directory: Path) -> Path:
    return rewritten(lambda record: _mutated(rng, record))(directory)


def _mutated_header(rng: random.Random, directory: Path) -> Path:
    save_file({"w": torch.arange(12.0), "b": torch.ones(2, 3)}, directory / "x.safetensors")
    data = (directory / "x.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    _mutated(rng, header)
    return _safetensors(json.dumps(header).encode(), data[8 + length :])(directory)


KINDS: dict[str, Callable[[random.Random, Path], Path]] = {
    "pickle as .metadata": _made_metadata,
    "pickle in a container": _made_object,
    "pickle in a file by torch.save": _made_file,
    "bytes of a stock checkpoint": _damaged_metadata,
    "bytes of a file by torch.save": _damaged_file,
    "values of a manifest": _mutated_manifest,
    "values of a safetensors header": _mutated_header,
}
