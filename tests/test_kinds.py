"""Every kind of item and of tensor that DCP has, saved by ours or by stock, loaded by ours or by stock."""

from __future__ import annotations

import collections
import enum
import io
import math

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate as Whole
from torch.distributed.tensor import Shard as ShardOf

from ray_ckpt.dcp.reader import ArrowStorageReader
from ray_ckpt.dcp.writer import ArrowStorageWriter
from ray_ckpt.format.torch_container import parse_dtype
from tests.support import driver
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

WRITERS = {"ours": ArrowStorageWriter, "stock": dcp.FileSystemWriter}
READERS = {"ours": ArrowStorageReader, "stock": dcp.FileSystemReader}
WAYS = [("ours", "ours"), ("ours", "stock"), ("stock", "ours")]
DTYPES = [
    *("float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128"),
    *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
]


def _filled(dtype, *shape):
    """Bits that tell every element apart, as far as the dtype has bits."""
    count = math.prod(shape)
    if dtype == torch.bool:
        return (torch.arange(count) % 3 == 0).reshape(shape)
    if dtype.is_complex:
        return torch.complex(torch.arange(count).float(), -torch.arange(count).float()).to(dtype).reshape(shape)
    raw = torch.arange(count * dtype.itemsize, dtype=torch.int64) * 37 % 120
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def _bits(tensor):
    return tensor.detach().contiguous().resolve_conj().reshape(-1).view(torch.uint8)


def _same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _through(directory, state, target, way):
    writer, reader = way
    dcp.save(state, storage_writer=WRITERS[writer](directory))
    dcp.load(target, storage_reader=READERS[reader](directory))
    return target


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_dtypes(tmp_path, way):
    state = {name: _filled(parse_dtype(name), 7, 11) for name in DTYPES}
    target = {name: torch.zeros(7, 11, dtype=parse_dtype(name)) for name in DTYPES}
    assert not any(_same(target[name], state[name]) for name in DTYPES)
    _through(tmp_path, state, target, way)
    assert [name for name in DTYPES if not _same(target[name], state[name])] == []


def _shapes():
    base = torch.arange(60.0).reshape(3, 4, 5)
    tied = torch.arange(9.0)
    return {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0),
        "empty rows": torch.empty(4, 0, 2),
        "transposed": base.transpose(0, 2),
        "strided": base[:, ::2, 1::2],
        "slice of a larger storage": torch.arange(1000.0)[10:20],
        "expanded": torch.arange(4.0).reshape(4, 1).expand(4, 6),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "conjugate": torch.complex(torch.arange(4.0), torch.ones(4)).conj(),
        "negative": torch.complex(torch.arange(4.0), torch.ones(4)).conj().imag,
        "needs grad": torch.nn.Parameter(torch.arange(5.0)),
        "tied": tied,
        "tied too": tied,
        "large transposed": torch.arange(3_000_000, dtype=torch.float32).reshape(1500, 2000).t(),
    }


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_shapes_and_strides(tmp_path, way):
    state = _shapes()
    target = {name: torch.full_like(value, -1).contiguous() for name, value in state.items()}
    _through(tmp_path, state, target, way)
    assert [name for name in state if not _same(target[name], state[name])] == []


def test_strided_and_cast_targets(tmp_path):
    weight = torch.arange(3000.0 * 500).reshape(3000, 500)
    driver.save([{"strided": weight, "wider": weight, "narrower": weight}], [ArrowStorageWriter(tmp_path)])
    target = {
        "strided": torch.zeros(500, 3000).t(),
        "wider": torch.zeros(3000, 500, dtype=torch.float64),
        "narrower": torch.zeros(3000, 500, dtype=torch.bfloat16),
    }
    driver.load(target, ArrowStorageReader(tmp_path))
    assert torch.equal(target["strided"], weight)
    assert torch.equal(target["wider"], weight.double())
    assert torch.equal(target["narrower"], weight.bfloat16())


class Color(enum.IntEnum):
    RED = 1


PLAIN = {
    "none": None,
    "bool": True,
    "int": 1,
    "large int": 2**80,
    "float": 0.1,
    "whole float": 1.0,
    "negative zero": -0.0,
    "infinity": -math.inf,
    "text": "Ω\ud800 \0",
    "tuple": (0.9, (1, None)),
    "empty": [],
    "list": [1, "a", [2.5]],
    "odd keys": {"$tuple": [1]},
    "size": torch.Size([2, 3]),
    "dtype": torch.bfloat16,
    "ordered": (collections.OrderedDict(b=1, a=2),),
    "bytes": b"\x00\xff",
    "large": ["x" * 100] * 100,
}


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_non_tensors(tmp_path, way):
    target = _through(tmp_path, {"object": dict(PLAIN)}, {"object": _blank(PLAIN)}, way)
    for name, value in PLAIN.items():
        found = target["object"][name]
        assert found == value, name
        assert type(found) is type(value), name
    assert math.copysign(1, target["object"]["negative zero"]) == -1


def _blank(value):
    """The same nest of containers with other leaves."""
    return {key: _blank(item) for key, item in value.items()} if isinstance(value, dict) else "blank"


def test_loaded_values_are_not_shared(tmp_path):
    driver.save([{"a": [1], "b": [1]}], [ArrowStorageWriter(tmp_path)])
    reader = ArrowStorageReader(tmp_path)
    first = driver.load({"a": None, "b": None}, reader)
    first["a"].append(2)
    assert first["b"] == [1]
    assert driver.load({"a": None, "b": None}, reader)["a"] == [1]


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_bytes_io(tmp_path, way):
    target = _through(tmp_path, {"stream": io.BytesIO(b"abc" * 5000)}, {"stream": io.BytesIO()}, way)
    assert target["stream"].getvalue() == b"abc" * 5000


class _Counter:
    """A Stateful."""

    def __init__(self, count):
        self.count = count
        self.history = torch.full((3,), float(count))

    def state_dict(self):
        return {"count": self.count, "history": self.history}

    def load_state_dict(self, state):
        self.count = state["count"]


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_stateful_and_nested(tmp_path, way):
    state = {"counter": _Counter(7), "nested": {"list": [torch.ones(2), {"deep": torch.arange(3.0)}], "n": 1}}
    target = {"counter": _Counter(0), "nested": {"list": [torch.zeros(2), {"deep": torch.zeros(3)}], "n": 0}}
    _through(tmp_path, state, target, way)
    assert target["counter"].count == 7
    assert torch.equal(target["counter"].history, torch.full((3,), 7.0))
    assert torch.equal(target["nested"]["list"][1]["deep"], torch.arange(3.0))
    assert target["nested"]["n"] == 1


def test_whole_state_without_knowing_it(tmp_path):
    """The manifest rebuilds the nest, so a checkpoint loads into an empty dict."""
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    state = {"model": {"a": torch.arange(4.0)}, "optim": {"lr": 0.5}, "steps": [torch.ones(1), 3]}
    driver.save([state], [ArrowStorageWriter(tmp_path)])
    loaded = _load_state_dict_from_keys(storage_reader=ArrowStorageReader(tmp_path))
    assert torch.equal(loaded["model"]["a"], torch.arange(4.0))
    assert loaded["optim"] == {"lr": 0.5}
    assert loaded["steps"][1] == 3


def test_unflattened_state(tmp_path):
    from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner

    writer, reader = ArrowStorageWriter(tmp_path), ArrowStorageReader(tmp_path)
    dcp.save({"a": torch.ones(2), "b": {"c": 1}}, storage_writer=writer, planner=DefaultSavePlanner(False))
    target = {"a": torch.zeros(2), "b": None}
    dcp.load(target, storage_reader=reader, planner=DefaultLoadPlanner(False, False))
    assert torch.equal(target["a"], torch.ones(2))
    assert target["b"] == {"c": 1}


def _save_sharded(rank, directory, writer):
    """DTensors in several layouts, uneven and empty shards among them, and a ShardedTensor, on four ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    dcp.save(_sharded(rank, mesh, fill=True), storage_writer=WRITERS[writer](directory))


def _sharded(rank, mesh, fill):
    from torch.distributed.tensor import distribute_tensor

    def tensor(*shape):
        return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) if fill else torch.zeros(shape)

    line = mesh["shard"]
    rows = tensor(8, 3)[2 * rank : 2 * rank + 2]
    return {
        "rows and replicas": distribute_tensor(tensor(7, 5), mesh, [Whole(), ShardOf(0)]),
        "columns": distribute_tensor(tensor(6, 9), mesh, [Whole(), ShardOf(1)]),
        "both": distribute_tensor(tensor(9, 7), mesh, [ShardOf(0), ShardOf(1)]),
        "empty shards": distribute_tensor(tensor(1, 5), mesh, [ShardOf(0), ShardOf(0)]),
        "submesh": distribute_tensor(tensor(5), line, [ShardOf(0)]),
        "sharded tensor": init_from_local_shards(
            [Shard.from_tensor_and_offsets(rows.clone(), [2 * rank, 0], rank)], 8, 3
        ),
    }


def _load_sharded(rank, directory, reader):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    target = _sharded(rank, mesh, fill=False)
    expected = _sharded(rank, mesh, fill=True)
    locals_of = {name: _local(value) for name, value in target.items()}
    differed = {name for name, value in expected.items() if not torch.equal(locals_of[name], _local(value))}
    dcp.load(target, storage_reader=READERS[reader](directory))
    return differed, [name for name, value in expected.items() if not torch.equal(_local(target[name]), _local(value))]


def _local(value):
    return value.to_local() if isinstance(value, DTensor) else value.local_shards()[0].tensor


@pytest.mark.filterwarnings("ignore")  # ShardedTensor is deprecated, and says so in several ways
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_sharded_tensors(tmp_path, way):
    directory = str(tmp_path / "checkpoint")
    run_ranks(_save_sharded, 4, tmp_path, directory, way[0])
    for rank, (differed, wrong) in enumerate(run_ranks(_load_sharded, 4, tmp_path, directory, way[1])):
        assert wrong == []
        assert len(differed) >= 4, rank
