"""Files that torch.save and safetensors wrote: recognized, read exactly, into any sharding, and safe when hostile."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import uuid
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ray_ckpt.dcp.reader import ArrowStorageReader
from ray_ckpt.errors import CheckpointNotFoundError, FormatError, RayCkptError, UnsafeCheckpointError
from ray_ckpt.storage.files import RetryPolicy, Storage
from tests.support import driver
from tests.support.foreign import PLACEMENTS, blank, differing, load_shards, weights
from tests.support.ranks import run_ranks
from tests.support.s3 import run_s3

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def _write_torch(directory):
    torch.save(weights(), directory / "model.pt")
    return directory / "model.pt"


def _write_safetensors(directory):
    save_file(weights(), directory / "model.safetensors", metadata={"format": "pt"})
    return directory / "model.safetensors"


def _write_sharded_safetensors(directory):
    save_torch_state_dict(weights(), directory, max_shard_size=20_000)
    assert (directory / "model.safetensors.index.json").exists()
    return directory


WRITERS = {"torch": _write_torch, "safetensors": _write_safetensors, "sharded": _write_sharded_safetensors}


@pytest.fixture(params=WRITERS)
def written(request, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    return WRITERS[request.param](tmp_path / "checkpoint")


def test_files_load_by_dcp_and_by_their_names(written):
    found = blank()
    assert differing(found) == set(weights())
    dcp.load(found, storage_reader=ArrowStorageReader(written))
    assert differing(found) == set()


@pytest.mark.parametrize("num_ranks", [4, 3])
def test_files_load_into_shards(tmp_path, num_ranks):
    paths = []
    for name, write in WRITERS.items():
        (tmp_path / name).mkdir()
        paths.append(str(write(tmp_path / name)))
    layouts = [name for name, (shape, _) in PLACEMENTS.items() if torch.Size(shape).numel() == num_ranks]
    for outcomes in run_ranks(load_shards, num_ranks, tmp_path, paths, layouts):
        assert len(outcomes) == len(layouts) * len(paths) + 1
        for before, after in outcomes.values():
            assert before >= 3
            assert after == 0


# ------------------------------------------------------------------------------------------- odd things in files


def test_a_torch_file_may_hold_views_and_nested_values(tmp_path):
    base = torch.arange(37.0 * 61).reshape(37, 61)
    state = {
        "plain": base,
        "transposed": base.t(),
        "corner": base[5:9, 7:],
        "expanded": torch.tensor([2.5]).expand(6),
        "empty": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(base + 1),
        "unsigned": torch.tensor([1, 2, 3], dtype=torch.uint16),
        "nested": {"list": [1, {"x": torch.ones(2)}], "betas": (0.9, 0.99), "data": b"ab", "size": torch.Size([2])},
        "lr": 0.5,
    }
    torch.save(state, tmp_path / "all.pt")
    blank = {
        name: torch.full_like(value, 7).contiguous() for name, value in state.items() if isinstance(value, torch.Tensor)
    }
    blank |= {"lr": None, "nested": {"list": [None, {"x": torch.zeros(2)}], "betas": None, "data": None, "size": None}}
    found = driver.load(blank, ArrowStorageReader(tmp_path / "all.pt"))
    reference = torch.load(tmp_path / "all.pt", weights_only=True)
    assert found["nested"].pop("list")[1]["x"].tolist() == [1, 1]
    assert found["nested"] == {"betas": (0.9, 0.99), "data": b"ab", "size": torch.Size([2])}
    assert found["lr"] == 0.5
    for name in ("plain", "transposed", "corner", "expanded", "empty", "parameter", "unsigned"):
        assert torch.equal(found[name], reference[name]), name


def test_the_directory_of_one_safetensors_file_is_a_checkpoint(tmp_path):
    found = driver.load(blank(), ArrowStorageReader(_write_safetensors(tmp_path).parent))
    assert differing(found) == set()


def test_an_index_may_be_named_itself(tmp_path):
    index = _write_sharded_safetensors(tmp_path) / "model.safetensors.index.json"
    assert differing(driver.load(blank(), ArrowStorageReader(index))) == set()


def test_dtypes_of_safetensors(tmp_path):
    dtypes = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.uint8, torch.int8, torch.int16, torch.uint32]
    dtypes += [torch.int64, torch.uint64, torch.complex64, torch.bool]
    state = {str(dtype): torch.tensor([0, 1, 1, 0]).to(dtype) for dtype in dtypes}
    save_file(state, tmp_path / "x.safetensors")
    blank = {name: torch.zeros_like(value) for name, value in state.items()}
    found = driver.load(blank, ArrowStorageReader(tmp_path / "x.safetensors"))
    assert all(torch.equal(found[name].view(torch.uint8), state[name].view(torch.uint8)) for name in state)


# ------------------------------------------------------------------------------------------- what a load costs


class CountingStorage(Storage):
    """Counts the bytes read by this storage and those made from it."""

    def __init__(self, target):
        super().__init__(target)
        self.counted = [0]

    def open_input(self, name):
        manager = super().open_input(name)
        counted = self.counted

        class Counted:
            name = None
            makes_cuts = False

            def __enter__(self):
                self.file = manager.__enter__()
                self.name = self.file.name
                return self

            def __exit__(self, *error):
                return manager.__exit__(*error)

            def read_into(self, offset, memory):
                counted[0] += len(memory)
                self.file.read_into(offset, memory)

        return Counted()


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_quarter_of_the_rows_costs_a_quarter_of_the_bytes(tmp_path, name):
    weight = torch.arange(4_000_000.0).reshape(4000, 1000)
    state = {"weight": weight, "other": torch.zeros(2_000_000)}
    torch.save(state, tmp_path / name) if name.endswith("pt") else save_file(state, tmp_path / name)
    storage = CountingStorage(tmp_path / name)
    mesh_rows = weight[1001:2001]
    target = torch.zeros(1000, 1000)

    class Planner(dcp.DefaultLoadPlanner):
        def lookup_tensor(self, index):
            return target

    reader = ArrowStorageReader(storage)
    metadata = reader.read_metadata()
    headers = storage.counted[0]
    reader.set_up_storage_reader(metadata, True)
    wanted = dcp.metadata.ChunkStorageMetadata(torch.Size([1001, 0]), torch.Size([1000, 1000]))
    items = dcp.planner_helpers.create_read_items_for_chunk_list(
        "weight", metadata.state_dict_metadata["weight"], [wanted]
    )
    reader.read_data(dcp.planner.LoadPlan(items), Planner()).wait()
    assert torch.equal(target, mesh_rows)
    assert headers <= 70_000  # zipfile looks for the archive's end in the last 64 KiB
    assert storage.counted[0] - headers <= target.nbytes * 1.01


def test_files_load_from_s3_exactly(tmp_path):
    big = {"weight": torch.arange(1_000_000.0).reshape(1000, 1000), "rest": torch.zeros(1_500_000)}
    torch.save(big, tmp_path / "model.pt")
    (tmp_path / "hf").mkdir()
    save_torch_state_dict(big, tmp_path / "hf", max_shard_size=5_000_000)
    with run_s3() as server:
        prefix = uuid.uuid4().hex
        bucket = Storage(server.uri(prefix), retry=RetryPolicy(attempts=3, first_wait_s=0.001, max_wait_s=0.002))
        for path in (tmp_path / "model.pt", *(tmp_path / "hf").iterdir()):
            bucket.write_atomic(f"{'hf/' if path.parent.name == 'hf' else ''}{path.name}", path.read_bytes())
        for name in ("model.pt", "hf"):
            server.reset()
            target = {"weight": torch.zeros(1000, 1000)}
            dcp.load(target, storage_reader=ArrowStorageReader(server.uri(f"{prefix}/{name}")))
            assert torch.equal(target["weight"], big["weight"])
            assert server.sent_bytes <= target["weight"].nbytes * 1.05, name


@pytest.mark.parametrize(
    ("target", "parent", "name"),
    [
        ("/a/b.pt", "/a", "b.pt"),
        ("/b.pt", "/", "b.pt"),
        ("file:///a/b.pt", "/a", "b.pt"),
        ("file:///b.pt", "/", "b.pt"),
        ("s3://key:secret@bucket/a/b.pt?region=x", "s3://key:secret@bucket/a?region=x", "b.pt"),
        ("s3://bucket/b.pt/", "s3://bucket", "b.pt"),
    ],
)
def test_the_parent_of_a_file_is_its_directory(target, parent, name):
    directory, found = Storage(target).parent()
    assert (directory.uri, found) == (parent, name)


def test_a_bucket_and_the_root_have_no_parent():
    assert Storage("s3://bucket?region=x").parent() is None
    assert Storage("/").parent() is None


# ------------------------------------------------------------------------------------------- what is refused


def _refused(path, error=FormatError):
    with pytest.raises(error) as raised:
        driver.load({"weight": torch.zeros(6)}, ArrowStorageReader(path))
    return str(raised.value)


def test_errors_say_what_was_found_and_what_to_do(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    torch.save({}, tmp_path / "late.pt")
    assert "neither a checkpoint's directory, nor a file by torch.save" in _refused(tmp_path / "notes.txt")
    assert "it holds late.pt: files that torch.save may have written" in _refused(tmp_path, CheckpointNotFoundError)
    assert "and is no file" in _refused(tmp_path / "nowhere.pt", CheckpointNotFoundError)
    torch.save({"weight": torch.zeros(6)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "before 1.6" in _refused(tmp_path / "old.pt")
    torch.save([torch.zeros(6)], tmp_path / "list.pt")
    assert "holds a list, not a dict" in _refused(tmp_path / "list.pt")
    for number in (1, 2):
        (tmp_path / f"{number}.safetensors.index.json").write_text("{}")
    assert "name one of 1.safetensors.index.json, 2.safetensors.index.json" in _refused(tmp_path)


@pytest.mark.filterwarnings("ignore:.*TorchScript:DeprecationWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_is_named(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    assert "TorchScript" in _refused(tmp_path / "script.pt")


class Attack:
    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


def test_no_code_runs_from_a_torch_file(tmp_path):
    pickle.loads(pickle.dumps(Attack(tmp_path / "control")))
    assert (tmp_path / "control").exists()
    torch.save({"weight": torch.zeros(6), "x": Attack(tmp_path / "flag")}, tmp_path / "bad.pt")
    message = _refused(tmp_path / "bad.pt", UnsafeCheckpointError)
    assert "posix.system" in message
    assert "weights_only=False" in message
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    assert "torch.nn.modules.linear.Linear" in _refused(tmp_path / "module.pt", UnsafeCheckpointError)
    assert not (tmp_path / "flag").exists()


def _archive(path, pickled, members=()):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        for name, data in members:
            archive.writestr(f"a/{name}", data)


def _pickle_of(shape, strides, offset=0, num_elements=6, key="0"):
    """What torch.save would write for a tensor of this description."""

    class Stub:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Handle(), offset, shape, strides, False, {})

    class Handle:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, key, "cpu", num_elements) if isinstance(value, Handle) else None

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump({"weight": Stub()})
    return stream.getvalue()


def test_hostile_archives(tmp_path):
    path, data = tmp_path / "x.pt", [("data/0", bytes(24))]
    _archive(path, _pickle_of((6,), (1,)), data)
    driver.load({"weight": torch.ones(6)}, ArrowStorageReader(path))  # the forgery works when it is honest
    for shape, strides, offset in [((7,), (1,), 0), ((6,), (1,), 1), ((3, 2), (5, 1), 0), ((1 << 40,), (1,), 0)]:
        _archive(path, _pickle_of(shape, strides, offset), data)
        assert "outside its storage" in _refused(path)
    for shape, strides, offset in [
        ((-1,), (1,), 0),
        ((6,), (-1,), 0),
        ((6,), (1, 1), 0),
        ((2.5,), (1,), 0),
        (("6",), (1,), 0),
    ]:
        _archive(path, _pickle_of(shape, strides, offset), data)
        assert "no tensor has the shape" in _refused(path)
    _archive(path, _pickle_of((6,), (1,), key="../../etc/passwd"), data)
    assert "lacks the storage" in _refused(path)
    _archive(path, _pickle_of((6,), (1,)), [*data, ("byteorder", b"big")])
    assert "big-endian" in _refused(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1000))
    assert "compressed" in _refused(path)
    path.write_bytes(b"PK\3\4" + bytes(100))
    assert "damaged zip" in _refused(path)


def test_a_small_pickle_that_stands_for_endless_dicts_is_refused(tmp_path):
    bomb = [torch.zeros(1)]
    for _ in range(60):
        bomb = [bomb, bomb]
    torch.save({"bomb": bomb}, tmp_path / "bomb.pt")
    assert "which no model has" in _refused(tmp_path / "bomb.pt")
    circle = []
    circle.append(circle)
    torch.save({"circle": circle}, tmp_path / "circle.pt")
    assert "contains itself" in _refused(tmp_path / "circle.pt")
    # A list in a list in a list, in a dict: 100 000 deep.
    _archive(tmp_path / "deep.pt", b"\x80\x02}X\1\0\0\0d" + b"]" * 100_000 + b"a" * 99_999 + b"s.")
    assert "nested too deep" in _refused(tmp_path / "deep.pt")


def _safetensors(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def test_hostile_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"

    def entry(start, end, shape=(6,), dtype="F32"):
        return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}

    _safetensors(path, {"weight": entry(0, 24)}, bytes(24))
    driver.load({"weight": torch.ones(6)}, ArrowStorageReader(path))
    for header, data, message in [
        ({"weight": entry(0, 24), "b": entry(20, 44)}, bytes(44), "begins at byte"),
        ({"weight": entry(4, 28)}, bytes(28), "begins at byte"),
        ({"weight": entry(0, 24)}, bytes(20), "truncated or damaged"),
        ({"weight": entry(0, 24)}, bytes(28), "truncated or damaged"),
        ({"weight": entry(0, 24, (7,))}, bytes(24), "which is 28 bytes"),
        ({"weight": entry(0, 24, (-6,))}, bytes(24), "where sizes are expected"),
        ({"weight": entry(24, 0)}, bytes(24), "but lies at"),
        ({"weight": entry(0, 24, (1 << 62, 1 << 62))}, bytes(24), "but lies at"),
        ({"weight": entry(0, 24, dtype="F4")}, bytes(24), "torch has no name for"),
        ({"weight": [1]}, bytes(24), "is no tensor"),
        ([1, 2], b"", "JSON list"),
        (b"{" * 5000, b"", "no JSON"),
        (b'{"weight": {}, "weight": {}}', b"", "appears twice"),
        (b"\xff\xfe\x00", b"", "no JSON"),
    ]:
        _safetensors(path, header, data)
        assert message in _refused(path), header
    for length in (1 << 62, 1 << 20, 0):
        _safetensors(path, {"weight": entry(0, 24)}, bytes(24), length=length)
        assert "no safetensors file" in _refused(path)
    path.write_bytes(b"\1")
    assert "no safetensors file" in _refused(path)


def test_hostile_index(tmp_path):
    save_file({"weight": torch.zeros(6)}, tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for files, error, message in [
        ({"weight": "../a.safetensors"}, UnsafeCheckpointError, "leaves the checkpoint's directory"),
        ({"weight": "/etc/passwd"}, UnsafeCheckpointError, "leaves the checkpoint's directory"),
        ({"weight": "b.safetensors"}, FormatError, "which is not there"),
        ({"other": "a.safetensors"}, FormatError, "does not hold it"),
        ({"weight": 3}, FormatError, "no `weight_map`"),
        (None, FormatError, "no `weight_map`"),
        ({}, FormatError, "no `weight_map`"),
    ]:
        index.write_text(json.dumps({"weight_map": files}))
        assert message in _refused(tmp_path, error)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_damage_never_ends_in_anything_but_our_errors(tmp_path_factory, data):
    """Random bytes changed in a file: it has a manifest that holds together, or it is refused by an error of ours."""
    directory = tmp_path_factory.mktemp("damaged")
    path = WRITERS[data.draw(st.sampled_from(["torch", "safetensors"]))](directory)
    content = bytearray(path.read_bytes())
    headers = [*range(600), *range(len(content) - 3000, len(content))]
    for position in data.draw(st.lists(st.sampled_from(headers), min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) - 1, len(content) // 2]))])
    with contextlib.suppress(RayCkptError):
        ArrowStorageReader(path).read_manifest()
