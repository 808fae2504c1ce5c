"""Hostile and damaged checkpoints: one of our errors each, no code run, nothing outside the directory touched."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from ray_ckpt.dcp.reader import ArrowStorageReader
from ray_ckpt.dcp.writer import ArrowStorageWriter
from ray_ckpt.errors import CheckpointError, FormatError, RayCkptError, UnsafeCheckpointError
from ray_ckpt.format import dcp_metadata
from ray_ckpt.format.manifest import MANIFEST_NAME, VERSION, Manifest
from tests.support import driver
from tests.support.records import VERSION_1, edit_record, sealed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


class Attack:
    """Unpickling it creates a file."""

    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


def _state():
    return {"weight": torch.arange(12.0), "object": torch.Size([1, 2])}


def _target():
    return {"weight": torch.zeros(12), "object": None}


@pytest.fixture
def ours(tmp_path):
    driver.save([_state()], [ArrowStorageWriter(tmp_path / "checkpoint")])
    return tmp_path / "checkpoint"


@pytest.fixture
def foreign(tmp_path):
    dcp.save(_state(), checkpoint_id=tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_the_attack_works(tmp_path):
    pickle.loads(pickle.dumps(Attack(tmp_path / "flag")))
    assert (tmp_path / "flag").exists()


def test_metadata_that_runs_a_command(foreign, tmp_path):
    (foreign / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "flag")))
    with pytest.raises(UnsafeCheckpointError, match=r"system.*trusted=True"):
        driver.load(_target(), ArrowStorageReader(foreign))
    assert not (tmp_path / "flag").exists()


def test_metadata_with_a_command_inside(foreign, tmp_path):
    metadata = pickle.loads((foreign / ".metadata").read_bytes())
    metadata.planner_data["object"] = Attack(tmp_path / "flag")
    (foreign / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsafeCheckpointError, match="system"):
        driver.load(_target(), ArrowStorageReader(foreign))
    assert not (tmp_path / "flag").exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_object_that_runs_a_command(tmp_path, trusted):
    directory, flag = tmp_path / "checkpoint", tmp_path / "flag"
    dcp.save({"object": Attack(flag)}, checkpoint_id=directory)
    reader = ArrowStorageReader(directory, trusted=trusted)
    if trusted:
        driver.load({"object": None}, reader)
    else:
        with pytest.raises(UnsafeCheckpointError, match=r"'object' would run .*system.*trusted=True"):
            driver.load({"object": None}, reader)
    assert flag.exists() == trusted


def test_our_inlined_object_that_runs_a_command(ours, tmp_path):
    stream = io.BytesIO()
    torch.save(Attack(tmp_path / "flag"), stream)
    edit_record(ours, lambda m: m["objects"]["object"].update(blob=_base64(stream.getvalue())))
    with pytest.raises(UnsafeCheckpointError, match="system"):
        driver.load(_target(), ArrowStorageReader(ours))
    assert not (tmp_path / "flag").exists()


def test_tensor_container_that_runs_a_command(tmp_path):
    """The elements are read without the pickle; a container that needs it is unpickled under guard."""
    directory, flag = tmp_path / "checkpoint", tmp_path / "flag"
    dcp.save({"weight": torch.arange(12.0)}, checkpoint_id=directory)
    stream = io.BytesIO()
    torch.save(Attack(flag), stream)
    (directory / "__0_0.distcp").write_bytes(stream.getvalue())
    _edit_metadata(directory, lambda info: setattr(info, "length", len(stream.getvalue())))
    with pytest.raises(UnsafeCheckpointError, match="system"):
        driver.load({"weight": torch.zeros(12)}, ArrowStorageReader(directory))
    assert not flag.exists()


ESCAPES = [
    "../secret",
    "/etc/passwd",
    "a/../../secret",
    "s3://bucket/key",
    "file:secret",
    "C:\\x",
    "a\\..\\b",
    "",
    ".",
    "a//b",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_file_names_that_leave_the_directory(ours, name):
    (ours.parent / "secret").write_bytes(b"x" * 5000)

    def escape(manifest):
        [(_file, size)] = manifest["files"].items()
        manifest["files"] = {name: size}
        for entry in (*manifest["tensors"]["weight"]["chunks"], manifest["objects"]["object"]):
            entry["file"] = name

    edit_record(ours, escape)
    with pytest.raises(UnsafeCheckpointError, match="leaves the checkpoint's directory"):
        driver.load(_target(), ArrowStorageReader(ours))


@pytest.mark.parametrize("name", ESCAPES)
def test_foreign_file_names_that_leave_the_directory(foreign, name):
    (foreign.parent / "secret").write_bytes(b"x" * 5000)
    _edit_metadata(foreign, lambda info: setattr(info, "relative_path", name))
    with pytest.raises(UnsafeCheckpointError, match="leaves the checkpoint's directory"):
        driver.load(_target(), ArrowStorageReader(foreign))


def _chunk(manifest):
    return manifest["tensors"]["weight"]["chunks"][0]


DAMAGES = {
    "start past the end": lambda m: _chunk(m).update(start=10**6),
    "length past the end": lambda m: _chunk(m).update(length=10**6),
    "start overflows": lambda m: _chunk(m).update(start=2**63),
    "negative start": lambda m: _chunk(m).update(start=-1),
    "data before its container": lambda m: _chunk(m).update(start=128),
    "data past its container": lambda m: _chunk(m).update(length=700),
    "size is a text": lambda m: _chunk(m).update(length="700"),
    "size is a bool": lambda m: _chunk(m).update(start=False),
    "overlapping chunks": lambda m: m["tensors"]["weight"]["chunks"].append(_chunk(m)),
    "hole": lambda m: m["tensors"]["weight"].update(shape=[13]),
    "huge": lambda m: m["tensors"]["weight"].update(shape=[2**62]),
    "wrong rank": lambda m: _chunk(m).update(offsets=[0, 0], sizes=[3, 4]),
    "unknown dtype": lambda m: m["tensors"]["weight"].update(dtype="float33"),
    "no dtype": lambda m: m["tensors"]["weight"].update(dtype="nonsense"),
    "too few checksums": lambda m: _chunk(m).update(checksums=""),
    "checksums of nothing": lambda m: _chunk(m).update(block_bytes=0),
    "checksums are not base64": lambda m: _chunk(m).update(checksums="!"),
    "unknown file": lambda m: m.update(files={}),
    "later version": lambda m: m.update(version=VERSION + 1),
    "another format": lambda m: m.update(format="other"),
    "missing key": lambda m: m.pop("objects"),
    "wrong type": lambda m: m.update(tensors=[1]),
    "odd value": lambda m: m["objects"]["object"].update(value={"$code": "x"}),
    "object past the end": lambda m: m["objects"]["object"].update(start=10**6),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_manifests_that_do_not_hold_together(ours, damage):
    edit_record(ours, damage)
    with pytest.raises(FormatError):
        driver.load(_target(), ArrowStorageReader(ours))


FOREIGN_DAMAGES = {
    "offset past the end": ("offset", 10**9),
    "negative offset": ("offset", -1),
    "offset overflows": ("offset", 2**64),
    "offset is a text": ("offset", "0"),
    "length past the end": ("length", 10**9),
    "zero length": ("length", 0),
    "name is a number": ("relative_path", 5),
}


@pytest.mark.parametrize("damage", FOREIGN_DAMAGES.values(), ids=FOREIGN_DAMAGES)
def test_metadata_that_does_not_hold_together(foreign, damage):
    _edit_metadata(foreign, lambda info: setattr(info, *damage))
    with pytest.raises(FormatError):
        driver.load(_target(), ArrowStorageReader(foreign))


def test_items_that_stock_lost_are_named(foreign):
    """What stock DCP's threaded writer leaves when a thread fails."""
    metadata = pickle.loads((foreign / ".metadata").read_bytes())
    del metadata.storage_data[MetadataIndex("weight", [0])]
    (foreign / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(FormatError, match=r"'weight'.*incomplete"):
        driver.load(_target(), ArrowStorageReader(foreign))


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"garbage" * 50, b"{}", b"[", b"\x80\x04N.", b"PK\x03\x04"])
@pytest.mark.parametrize("file", [MANIFEST_NAME, ".metadata", "data"])
def test_garbage_in_each_kind_of_file(request, file, content):
    directory = request.getfixturevalue("foreign" if file == ".metadata" else "ours")
    if file == "data":
        file = next(path.name for path in directory.glob("*.distcp"))
    (directory / file).write_bytes(content)
    with pytest.raises(CheckpointError):
        driver.load(_target(), ArrowStorageReader(directory))


def test_foreign_data_file_is_garbage(foreign):
    path = foreign / "__0_0.distcp"
    path.write_bytes(b"\xa5" * path.stat().st_size)
    with pytest.raises(FormatError):
        driver.load(_target(), ArrowStorageReader(foreign))


@pytest.fixture(scope="module")
def valid_files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz")
    driver.save([_state()], [ArrowStorageWriter(directory)])
    dcp.save(_state(), checkpoint_id=directory / "stock")
    record = (directory / MANIFEST_NAME).read_bytes()
    unsealed = (VERSION_1 / MANIFEST_NAME).read_bytes()
    return record, unsealed, (directory / "stock" / ".metadata").read_bytes()


_edits = st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 30), st.binary(max_size=12)), min_size=1, max_size=4)


def _apply(data, edits):
    for position, removed, inserted in edits:
        position %= len(data) + 1
        data = data[:position] + inserted + data[position + removed :]
    return data


@settings(max_examples=400, deadline=None)
@given(edits=_edits)
def test_fuzzed_manifest(valid_files, edits):
    with contextlib.suppress(CheckpointError):
        Manifest.from_json(_apply(valid_files[0], edits))
    with contextlib.suppress(CheckpointError):
        Manifest.from_json(_apply(valid_files[1], edits))


@settings(max_examples=400, deadline=None)
@given(edits=_edits)
def test_fuzzed_metadata(valid_files, edits):
    with contextlib.suppress(CheckpointError):
        dcp_metadata.to_manifest(dcp_metadata.loads(_apply(valid_files[2], edits)))


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_manifest_with_one_value_replaced(valid_files, data):
    manifest = json.loads(valid_files[0])
    places = list(_places(manifest))
    container, key = data.draw(st.sampled_from(places))
    container[key] = data.draw(_json)
    with contextlib.suppress(RayCkptError):
        Manifest.from_json(sealed(manifest))


def _places(node):
    for key, child in node.items() if isinstance(node, dict) else enumerate(node):
        yield node, key
        if isinstance(child, (dict, list)):
            yield from _places(child)


def _edit_metadata(directory, change):
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        assert isinstance(info, _StorageInfo)
        change(info)
    path.write_bytes(pickle.dumps(metadata))


def _base64(data):
    import base64

    return base64.b64encode(data).decode()
