"""Every byte that a load takes is checked, and a wrong one is named."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ray_ckpt.dcp.reader import ArrowStorageReader
from ray_ckpt.dcp.writer import ArrowStorageWriter
from ray_ckpt.errors import FormatError, IntegrityError, RayCkptError
from tests.support import driver

ROWS, COLUMNS = 700, 1000  # 2.8 MB: blocks of 12 KiB that no row boundary meets


@pytest.fixture(scope="module")
def weight():
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def checkpoint(tmp_path, weight):
    driver.save([{"weight": weight, "small": torch.ones(3)}], [ArrowStorageWriter(tmp_path)])
    return tmp_path


def _chunk(directory, name="weight"):
    return ArrowStorageReader(directory).read_manifest().tensors[name].chunks[0]


def _flip(directory, file, offset):
    path = directory / file
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


class _BoxPlanner(DefaultLoadPlanner):
    """Wants a box of `weight`, as a rank that holds only that would."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.target = target
        self.num_committed = 0

    def lookup_tensor(self, index):
        return self.target

    def commit_tensor(self, read_item, tensor):
        self.num_committed += 1


def _load_box(directory, box, **options):
    (row, rows), (column, columns) = box
    planner = _BoxPlanner(torch.full((rows, columns), torch.nan))
    reader = ArrowStorageReader(directory, **options)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    wanted = ChunkStorageMetadata(torch.Size([row, column]), torch.Size([rows, columns]))
    items = create_read_items_for_chunk_list("weight", metadata.state_dict_metadata["weight"], [wanted])
    reader.read_data(LoadPlan(items), planner).wait()
    assert planner.num_committed == 1
    return planner.target


BOXES = {
    "all": ((0, ROWS), (0, COLUMNS)),
    "rows": ((101, 333), (0, COLUMNS)),
    "one row": ((699, 1), (0, COLUMNS)),
    "columns": ((0, ROWS), (17, 250)),
    "block": ((300, 200), (900, 100)),
    "element": ((350, 1), (500, 1)),
}


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("verify", [True, False])
def test_boxes_are_loaded_exactly(checkpoint, weight, box, verify):
    (row, rows), (column, columns) = box
    target = _load_box(checkpoint, box, verify_checksums=verify)
    assert torch.equal(target, weight[row : row + rows, column : column + columns])


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("position", ["first", "middle", "last"])
def test_wrong_byte_is_named(checkpoint, weight, box, position):
    (row, rows), (column, columns) = box
    at = {
        "first": (row, column),
        "middle": (row + rows // 2, column + columns // 2),
        "last": (row + rows - 1, column + columns - 1),
    }[position]
    chunk = _chunk(checkpoint)
    offset = chunk.data_start + 4 * (at[0] * COLUMNS + at[1]) + 3
    _flip(checkpoint, chunk.file, offset)
    with pytest.raises(IntegrityError) as raised:
        _load_box(checkpoint, box)
    error = raised.value
    assert (error.file, error.tensor) == (chunk.file, "weight")
    assert error.start <= offset < error.end
    assert error.end - error.start <= chunk.checksums.block_bytes
    assert error.expected != error.found
    target = _load_box(checkpoint, box, verify_checksums=False)
    assert int((target != weight[row : row + rows, column : column + columns]).sum()) == 1


def test_damage_elsewhere_does_not_matter(checkpoint, weight):
    chunk = _chunk(checkpoint)
    _flip(checkpoint, chunk.file, chunk.data_start)
    assert torch.equal(_load_box(checkpoint, BOXES["one row"]), weight[699:])


def test_nothing_is_handed_on_after_damage(checkpoint):
    chunk = _chunk(checkpoint, "small")
    _flip(checkpoint, chunk.file, chunk.data_start + 1)

    state = {"weight": torch.zeros(ROWS, COLUMNS), "small": torch.zeros(3)}
    with pytest.raises(IntegrityError, match="'small'"):
        driver.load(state, ArrowStorageReader(checkpoint))
    assert torch.equal(state["small"], torch.zeros(3))


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_truncated_data_file(checkpoint, keep):
    path = checkpoint / _chunk(checkpoint).file
    data = path.read_bytes()
    length = int(len(data) * keep) if isinstance(keep, float) else keep
    path.write_bytes(data[:length])
    with pytest.raises(RayCkptError) as raised:
        driver.load({"weight": torch.zeros(ROWS, COLUMNS), "small": torch.zeros(3)}, ArrowStorageReader(checkpoint))
    assert isinstance(raised.value, (FormatError, IntegrityError))
