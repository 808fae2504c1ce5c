"""Flipped bits are found or mean nothing: none is loaded as something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import ray_ckpt
from benchmarks.damage import SAVED, Subject, blank, damage, is_saved, subjects
from ray_ckpt.errors import FormatError, IntegrityError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

KINDS = ["our manifest.json", "our .metadata", "our data files", "stock DCP's data files", "torch.save's files"]
NUM_OURS = 3


SLOW = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=SLOW)], ids=["few", "3000"])
@pytest.mark.parametrize("number", range(len(KINDS)), ids=KINDS)
def test_no_flipped_bit_is_loaded_as_something_else(tmp_path: Path, number: int, many: bool) -> None:
    count = 3000 if many else 300 if number < NUM_OURS else 150
    subject = subjects(tmp_path)[number]
    assert subject.kind == KINDS[number]
    before = subject.file.read_bytes()
    tally = damage(subject, count, seed=number)
    assert tally.is_clean, (tally.row(), tally.examples)
    assert (tally.tried, tally.refused + tally.right) == (count, count)
    assert tally.refused >= count // 4
    assert subject.file.read_bytes() == before
    assert subject.read()


def test_the_tally_sees_what_is_silently_wrong(tmp_path: Path) -> None:
    """Stock DCP looks at no checksum of a tensor."""
    ray_ckpt.save(SAVED, tmp_path)
    [file] = tmp_path.glob("*.distcp")

    def by_stock() -> bool:
        state = blank()
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
        return is_saved(state)

    tally = damage(Subject("stock", file, by_stock), 100, seed=0)
    assert tally.wrong > 5
    assert not tally.is_clean


def test_a_member_that_is_read_whole_is_compared_with_its_crc(tmp_path: Path) -> None:
    """Tensors of a file by torch.save, large and small, its pickle, and a tensor within an object."""
    saved = {"large": torch.arange(100_000.0), "small": torch.arange(7)}
    torch.save(saved, tmp_path / "file.pt")
    data = (tmp_path / "file.pt").read_bytes()
    places = {
        "large": data.index(saved["large"].numpy().tobytes()) + 399_999,
        "small": data.index(saved["small"].numpy().tobytes()),
        "pickle": data.index(b"large"),
    }
    for name, place in places.items():
        (tmp_path / "file.pt").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        state = {"large": torch.zeros(100_000), "small": torch.zeros(7, dtype=torch.int64)}
        with pytest.raises((IntegrityError, FormatError), match=r"CRC-32|checksum") as raised:
            ray_ckpt.load(state, tmp_path / "file.pt")
        if name != "pickle":
            assert isinstance(raised.value, IntegrityError)
            assert raised.value.tensor == name


def test_so_is_one_that_is_transposed_or_converted(tmp_path: Path) -> None:
    weight = torch.arange(20_000.0).reshape(100, 200).t()
    torch.save({"weight": weight}, tmp_path / "file.pt")
    dcp.save({"weight": weight}, checkpoint_id=tmp_path / "stock", no_dist=True)
    for target, file in (("file.pt", tmp_path / "file.pt"), ("stock", next((tmp_path / "stock").glob("*.distcp")))):
        for dtype in (torch.float32, torch.float64):
            state = {"weight": torch.zeros(200, 100, dtype=dtype)}
            ray_ckpt.load(state, tmp_path / target, cast=True)
            assert torch.equal(state["weight"], weight.to(dtype))
        data = file.read_bytes()
        place = data.index(weight.t().numpy().tobytes()) + 70_001
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        for dtype in (torch.float32, torch.float64):
            with pytest.raises(IntegrityError, match="CRC-32"):
                ray_ckpt.load({"weight": torch.zeros(200, 100, dtype=dtype)}, tmp_path / target, cast=True)


def test_a_crc_of_zero_means_none(tmp_path: Path) -> None:
    """As torch leaves it when it is told to: then nothing can be compared, and nothing is refused."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.arange(5000.0)}, tmp_path / "file.pt")
        dcp.save({"weight": torch.arange(5000.0)}, checkpoint_id=tmp_path / "stock", no_dist=True)
    finally:
        torch.serialization.set_crc32_options(True)
    for target in (tmp_path / "file.pt", tmp_path / "stock"):
        state = {"weight": torch.zeros(5000)}
        ray_ckpt.load(state, target)
        assert torch.equal(state["weight"], torch.arange(5000.0))


def test_a_header_that_would_move_the_elements_is_damaged(tmp_path: Path) -> None:
    """A length in a local header: everything behind it would be read some bytes too early or too late."""
    dcp.save({"weight": torch.arange(5000.0)}, checkpoint_id=tmp_path, no_dist=True)
    [file] = tmp_path.glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[data.index(b"archive/data/0") - 2] ^= 2
    file.write_bytes(data)
    with pytest.raises(FormatError, match="local header"):
        ray_ckpt.load({"weight": torch.zeros(5000)}, tmp_path)
