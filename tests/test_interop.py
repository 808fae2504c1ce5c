"""Other people's checkpoints read by ours, and ours read by other people's tools."""

from __future__ import annotations

import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension, ZStandard
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from ray_ckpt.dcp.reader import ArrowStorageReader
from ray_ckpt.dcp.writer import ArrowStorageWriter
from ray_ckpt.errors import UsageError
from ray_ckpt.storage.files import Storage
from tests.support import driver
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def _state():
    return {
        "large": torch.arange(300_000.0).reshape(600, 500),
        "transposed": torch.arange(1200.0).reshape(40, 30).t(),
        "half": torch.arange(500).to(torch.bfloat16),
        "scalar": torch.tensor(2),
        **{f"small.{number}": torch.full((5,), float(number)) for number in range(30)},
        "lr": 0.25,
        "betas": (0.9, 0.99),
        "size": torch.Size([3]),
    }


def _blank():
    return {
        name: torch.full_like(value, 99).contiguous() if isinstance(value, torch.Tensor) else None
        for name, value in _state().items()
    }


def _differing(found):
    return [
        name
        for name, value in _state().items()
        if not (torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value)
    ]


def test_the_comparison_sees_differences():
    assert set(_differing(_blank())) == set(_state())


STOCK = {
    "single thread": lambda path: FileSystemWriter(path),
    "threads": lambda path: FileSystemWriter(path, thread_count=4),
    "file per item": lambda path: FileSystemWriter(path, single_file_per_rank=False),
    "fsspec": lambda path: FsspecWriter(f"file://{path}"),
}


@pytest.mark.parametrize("writer", STOCK.values(), ids=STOCK)
def test_ours_reads_stock(tmp_path, writer):
    dcp.save(_state(), storage_writer=writer(tmp_path))
    found = _blank()
    dcp.load(found, storage_reader=ArrowStorageReader(tmp_path))
    assert _differing(found) == []


@pytest.mark.parametrize("reader", [FileSystemReader, lambda path: FsspecReader(f"file://{path}")])
def test_stock_reads_ours(tmp_path, reader):
    dcp.save(_state(), storage_writer=ArrowStorageWriter(tmp_path, threads=2))
    found = _blank()
    dcp.load(found, storage_reader=reader(tmp_path))
    assert _differing(found) == []


def test_no_tensor_of_a_stock_checkpoint_goes_through_torch_load(tmp_path, monkeypatch):
    dcp.save({"t": torch.arange(10_000.0)}, checkpoint_id=tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", refuse)
    found = driver.load({"t": torch.zeros(10_000)}, ArrowStorageReader(tmp_path))
    assert torch.equal(found["t"], torch.arange(10_000.0))


class CountingStorage(Storage):
    """Counts the bytes that are read from data files."""

    num_bytes = 0

    def open_input(self, name):
        manager = super().open_input(name)
        counter = self

        class Counted:
            makes_cuts = False

            def __enter__(self):
                self.file = manager.__enter__()
                return self

            def __exit__(self, *error):
                return manager.__exit__(*error)

            def read_into(self, offset, memory):
                counter.num_bytes += len(memory)
                self.file.read_into(offset, memory)

        return Counted()


@pytest.mark.parametrize("writer", [FileSystemWriter, ArrowStorageWriter])
def test_reads_are_exact(tmp_path, writer):
    """A quarter of the rows costs a quarter of the bytes, give or take the blocks at its edges."""
    weight = torch.arange(4_000_000.0).reshape(4000, 1000)
    dcp.save({"weight": weight}, storage_writer=writer(tmp_path))
    storage = CountingStorage(tmp_path)
    reader = ArrowStorageReader(storage)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    wanted = ChunkStorageMetadata(torch.Size([1001, 0]), torch.Size([1000, 1000]))
    items = create_read_items_for_chunk_list("weight", metadata.state_dict_metadata["weight"], [wanted])
    target = torch.zeros(1000, 1000)
    planner = dcp.DefaultLoadPlanner()
    planner.lookup_tensor = lambda index: target
    reader.read_data(LoadPlan(items), planner).wait()
    assert torch.equal(target, weight[1001:2001])
    assert storage.num_bytes <= target.nbytes * 1.05


def test_dcp_to_torch_reads_ours(tmp_path):
    dcp.save({"model": {"w": torch.arange(6.0)}, "lr": 0.5}, storage_writer=ArrowStorageWriter(tmp_path / "dcp"))
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt")
    assert torch.equal(found["model"]["w"], torch.arange(6.0))
    assert found["lr"] == 0.5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_accelerate_merges_ours(tmp_path):
    from accelerate.utils import merge_fsdp_weights
    from safetensors.torch import load_file

    state = {"model": {"a.weight": torch.arange(600.0).reshape(20, 30), "b.bias": torch.ones(7)}}
    dcp.save(state, storage_writer=ArrowStorageWriter(tmp_path / "pytorch_model_fsdp_0"))
    merge_fsdp_weights(str(tmp_path / "pytorch_model_fsdp_0"), str(tmp_path / "merged"))
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(found) == set(state["model"])
    assert all(torch.equal(found[name], value) for name, value in state["model"].items())


class Rot13(StreamTransformExtension):
    """The extension of DCP's own test suite, by bytes."""

    @staticmethod
    def registry_name():
        return "stream.rot13"

    @staticmethod
    def from_descriptor(version):
        assert version == "1"
        return Rot13()

    def get_descriptor(self):
        return "stream.rot13/1"

    def transform_to(self, output):
        class Writer(io.RawIOBase):
            def write(self, data):
                output.write(bytes((byte + 13) % 256 for byte in bytes(data)))
                return len(data)

            def flush(self):
                output.flush()

        return Writer()

    def transform_from(self, source):
        class Reader(io.RawIOBase):
            def readable(self):
                return True

            def seekable(self):
                return False

            def readinto(self, memory):
                data = source.read(len(memory))
                memory[: len(data)] = bytes((byte - 13) % 256 for byte in data)
                return len(data)

        return Reader()


def test_stream_extensions_are_honoured(tmp_path):
    state = {"weight": torch.arange(600.0).reshape(20, 30), "object": torch.Size([4])}
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path, _extensions=[Rot13()]))
    blank = {"weight": torch.zeros(20, 30), "object": None}
    with pytest.raises(UsageError, match=r"stream\.rot13.*extensions="):
        driver.load(dict(blank), ArrowStorageReader(tmp_path))
    registry = ExtensionRegistry()
    registry.register(Rot13)
    found = driver.load(blank, ArrowStorageReader(tmp_path, extensions=registry))
    assert torch.equal(found["weight"], state["weight"])
    assert found["object"] == torch.Size([4])


def test_zstandard(tmp_path):
    state = {"weight": torch.zeros(50_000), "object": torch.Size([4])}
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path, _extensions=[ZStandard()]))
    found = driver.load({"weight": torch.ones(50_000), "object": None}, ArrowStorageReader(tmp_path))
    assert torch.equal(found["weight"], state["weight"])
    assert found["object"] == torch.Size([4])


def _async_save_in_process(rank, directory):
    response = dcp.async_save(
        _state(),
        storage_writer=ArrowStorageWriter(directory),
        async_checkpointer_type=AsyncCheckpointerType.PROCESS,
    )
    done = response.upload_completion if isinstance(response, AsyncSaveResponse) else response
    done.result(timeout=80)


@pytest.mark.parametrize("kind", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_async_save(tmp_path, kind):
    """A process-based save takes a process group; a thread-based one does without."""
    if kind == "process":
        run_ranks(_async_save_in_process, 2, tmp_path, str(tmp_path / "checkpoint"), timeout_s=100)
    else:
        response = dcp.async_save(
            _state(),
            storage_writer=ArrowStorageWriter(tmp_path / "checkpoint"),
            async_checkpointer_type=AsyncCheckpointerType.THREAD,
        )
        done = response.upload_completion if isinstance(response, AsyncSaveResponse) else response
        done.result(timeout=60)
    assert _differing(driver.load(_blank(), ArrowStorageReader(tmp_path / "checkpoint"))) == []
