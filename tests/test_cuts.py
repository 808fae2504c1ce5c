"""Of blocks that lie on another node only what is wanted is sent, and a damaged one is found as if it had been read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import flight

import ray_ckpt
from ray_ckpt.cluster.ram.sending import Door, receive_cuts
from ray_ckpt.errors import IntegrityError
from ray_ckpt.format.block_sums import BlockSums, sums_of
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.torch_internals import narrow
from ray_ckpt.storage.checkpoint_reader import CheckpointReader, Wanted
from ray_ckpt.storage.chunk_sources import SavedChunk
from ray_ckpt.storage.cuts import Cut, cut_out
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.registered import REGISTERED
from tests.support import far_files

ROWS, COLUMNS = 1500, 2048


class Far(NamedTuple):
    """A checkpoint of which two other nodes have a copy each."""

    uri: str
    copies: dict[str, Path]
    state: dict[str, torch.Tensor]

    def read(self, wanted: dict[str, Box]) -> tuple[dict[str, torch.Tensor], Storage]:
        """Boxes of tensors, into memory that held something else."""
        storage = Storage(self.uri)
        reader = CheckpointReader(storage)
        manifest = reader.read_manifest()
        targets, parts = {}, []
        for name, box in wanted.items():
            targets[name] = torch.full(box.sizes, 77).to(self.state[name].dtype)
            [chunk] = manifest.tensors[name].chunks
            parts.append(Wanted(SavedChunk(name, targets[name].dtype, chunk), box, targets[name]))
        far_files.MOVED.clear()
        reader.read_tensors(parts)
        return targets, storage

    def assert_read(self, wanted: dict[str, Box]) -> Storage:
        """All of the boxes are as saved, bit for bit."""
        found, storage = self.read(wanted)
        for name, box in wanted.items():
            saved = narrow(self.state[name], box.offsets, box.sizes)
            assert torch.equal(found[name].view(torch.uint8), saved.contiguous().view(torch.uint8)), name
        return storage

    def place_of(self, name: str, row: int, column: int) -> tuple[str, int]:
        """File and byte of an element."""
        [chunk] = CheckpointReader(Storage(self.uri)).read_manifest().tensors[name].chunks
        assert chunk.data_start is not None
        return chunk.file, chunk.data_start + (row * COLUMNS + column) * self.state[name].itemsize


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    chance = torch.Generator().manual_seed(3)
    state = {
        "wide": torch.randn(ROWS, COLUMNS, generator=chance).bfloat16(),
        "exact": torch.randn(ROWS, COLUMNS, generator=chance),
        "turned": torch.randn(COLUMNS, ROWS, generator=chance).t(),
        "deep": torch.randint(-99, 99, (7, 33, 500), generator=chance),
        "bias": torch.randn(9, generator=chance),
    }
    directory = tmp_path_factory.mktemp("saved")
    ray_ckpt.save(state, directory)
    return directory, state


@pytest.fixture
def far(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Far:
    directory, state = saved
    copies = {node: tmp_path / node for node in ("one", "two")}
    for copy in copies.values():
        shutil.copytree(directory, copy)
    monkeypatch.setitem(REGISTERED, "far", "tests.support.far_files:open_files")
    monkeypatch.setitem(far_files.COPIES, tmp_path.name, copies)
    return Far(f"far://{tmp_path.name}", copies, state)


def halves(name: str, shape: tuple[int, ...], dim: int) -> list[dict[str, Box]]:
    half = shape[dim] // 2
    return [
        {name: Box(tuple(start if d == dim else 0 for d in range(len(shape))), sizes)}
        for start, sizes in [
            (0, tuple(half if d == dim else size for d, size in enumerate(shape))),
            (half, tuple(shape[dim] - half if d == dim else size for d, size in enumerate(shape))),
        ]
    ]


@pytest.mark.parametrize("name", ["wide", "exact"])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_shard_moves_what_it_holds(far: Far, name: str, dim: int) -> None:
    for wanted in halves(name, (ROWS, COLUMNS), dim):
        far.assert_read(wanted)
        num_bytes = wanted[name].num_elements * far.state[name].itemsize
        assert num_bytes <= sum(far_files.MOVED) <= 1.05 * num_bytes


def test_what_is_nearly_all_wanted_or_in_short_runs_is_read_in_blocks(far: Far) -> None:
    far.assert_read({"wide": Box((0, 1), (ROWS, COLUMNS - 1))})
    assert sum(far_files.MOVED) >= far.state["wide"].nbytes
    far.assert_read({"wide": Box((0, 0), (ROWS, 8))})
    assert sum(far_files.MOVED) >= 0.9 * far.state["wide"].nbytes


BOXES = {
    "wide": (ROWS, COLUMNS),
    "exact": (ROWS, COLUMNS),
    "turned": (ROWS, COLUMNS),
    "deep": (7, 33, 500),
    "bias": (9,),
}


@pytest.mark.parametrize("seed", range(12))
def test_any_boxes_arrive_bit_for_bit(far: Far, seed: int) -> None:
    """Of all tensors at once: edges of runs, rows, inner dims, other strides, and small ones between."""
    chance = torch.Generator().manual_seed(seed)

    def box_of(shape: tuple[int, ...]) -> Box:
        starts = [int(torch.randint(0, size, (), generator=chance)) for size in shape]
        lengths = [
            1 + int(torch.randint(0, size - start, (), generator=chance))
            for size, start in zip(shape, starts, strict=True)
        ]
        return Box(tuple(starts), tuple(lengths))

    far.assert_read({name: box_of(shape) for name, shape in BOXES.items()})


@pytest.mark.parametrize("column", [3, COLUMNS - 3], ids=["wanted", "beside what is wanted"])
def test_a_flipped_bit_is_found_told_and_read_from_another_copy(far: Far, column: int) -> None:
    wanted = halves("wide", (ROWS, COLUMNS), 1)[0]
    file, at = far.place_of("wide", 700, column)
    flip(far.copies["one"] / file, at)
    storage = far.assert_read(wanted)
    [told] = storage.rereads
    assert (told.place, "wide" in told.problem) == ("node two", True)
    flip(far.copies["two"] / file, at)
    with pytest.raises(IntegrityError) as caught:
        far.read(wanted)
    assert caught.value.tensor == "wide"
    assert caught.value.file == file
    assert caught.value.start <= at < caught.value.end


def test_of_a_copy_that_has_been_cut_off_another_is_read(far: Far) -> None:
    file, at = far.place_of("exact", 700, 0)
    with (far.copies["one"] / file).open("r+b") as opened:
        opened.truncate(at)
    far.assert_read({"exact": Box((0, 0), (ROWS, COLUMNS // 2))})


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 4]))


# ------------------------------------------------------------------------------------------------------ one cut

DATA = bytes(range(256)) * 64


@given(
    first=st.integers(0, 50),
    dims=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 90)), min_size=1, max_size=4),
    start=st.integers(0, 100),
)
@settings(deadline=None)
def test_a_cut_is_what_a_strided_array_holds(first: int, dims: list[tuple[int, int]], start: int) -> None:
    sizes, strides = zip(*dims, strict=True)
    num_bytes = len(DATA) - start
    cut = Cut(start, num_bytes, BlockSums(512, sums_of(memoryview(DATA)[start:], 512)), first, sizes, strides)
    into = bytearray(cut.num_wanted)
    assert cut_out(memoryview(DATA), cut, memoryview(into))
    whole = torch.frombuffer(bytearray(DATA), dtype=torch.uint8)
    assert into == bytes(whole.as_strided(sizes, strides, start + first).flatten().tolist())


@pytest.mark.parametrize("at", [0, 511, 512, 1535])
def test_a_block_that_differs_gives_nothing(at: int) -> None:
    cut = Cut(0, 1536, BlockSums(512, sums_of(memoryview(DATA)[:1536], 512)), 600, (10,), (1,))
    data = bytearray(DATA)
    assert cut_out(memoryview(data), cut, memoryview(bytearray(10)))
    data[at] ^= 1
    into = bytearray(10)
    assert not cut_out(memoryview(data), cut, memoryview(into))
    assert into == bytes(10)


@pytest.mark.parametrize(
    "wrong",
    [{"first": 507}, {"first": -1}, {"sizes": (513,)}, {"strides": (-1,)}, {"sizes": (0,)}, {"start": -1}],
)
def test_bytes_outside_of_the_blocks_are_refused(wrong: dict[str, Any]) -> None:
    cut = Cut(0, 512, BlockSums(512, sums_of(memoryview(DATA)[:512], 512)), 0, (6,), (1,))._replace(**wrong)
    with pytest.raises(ValueError, match="are wanted of blocks of 512 bytes"):
        cut_out(memoryview(DATA), cut, memoryview(bytearray(600)))


class _Liar(flight.FlightServerBase):  # type: ignore[misc]
    """Sends one byte of what it has summed as another."""

    def __init__(self, wrong: int) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self._wrong = wrong

    def do_get(self, context: Any, ticket: Any) -> Any:
        sent = bytearray(DATA[:100])
        digest = xxhash.xxh3_64_digest(sent)
        sent[50] ^= self._wrong
        schema = pa.schema([("bytes", pa.uint8())])
        column = pa.Array.from_buffers(pa.uint8(), len(sent), [None, pa.py_buffer(sent)])
        return flight.GeneratorStream(schema, iter([(pa.RecordBatch.from_arrays([column], schema=schema), digest)]))


@pytest.mark.parametrize("wrong", [0, 1])
def test_what_arrives_is_compared_with_what_was_sent(wrong: int) -> None:
    with _Liar(wrong) as server:
        memory = bytearray(100)
        cut = Cut(0, 512, BlockSums(512, sums_of(memoryview(DATA)[:512], 512)), 0, (100,), (1,))
        door = Door(f"grpc://127.0.0.1:{server.port}", "")
        assert receive_cuts(door, "key", [cut], memoryview(memory), timeout_s=20) == (wrong == 0)
        assert (memory == DATA[:100]) == (wrong == 0)
