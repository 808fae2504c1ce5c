"""`verify` of what other programs wrote: directories and single files, and the checksums that they carry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import ray_ckpt
from benchmarks.damage import Subject, damage
from ray_ckpt.errors import CheckpointNotFoundError, FormatError, RayCkptError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

WEIGHTS = {"first": torch.arange(2000.0), "second": torch.arange(9, dtype=torch.int16)}


def stock(root: Path) -> Path:
    dcp.save({**WEIGHTS, "lr": 0.1}, checkpoint_id=root / "stock", no_dist=True)
    return root / "stock"


def torch_file(root: Path) -> Path:
    torch.save({**WEIGHTS, "lr": 0.1}, root / "file.pt")
    return root / "file.pt"


def safetensors_file(root: Path) -> Path:
    save_file(WEIGHTS, root / "file.safetensors")
    return root / "file.safetensors"


def safetensors_directory(root: Path) -> Path:
    (root / "shards").mkdir()
    for name, value in WEIGHTS.items():
        save_file({name: value}, root / "shards" / f"{name}.safetensors")
    return root / "shards"


def accelerate_directory(root: Path) -> Path:
    model = {"model": dict(WEIGHTS)}
    dcp.save(model, checkpoint_id=root / "accelerate" / "pytorch_model_fsdp_0", no_dist=True)
    return root / "accelerate"


def lightning_directory(root: Path) -> Path:
    dcp.save(WEIGHTS, checkpoint_id=root / "lightning", no_dist=True)
    torch.save({"epoch": 3, "more": torch.ones(5)}, root / "lightning" / "meta.pt")
    return root / "lightning"


MAKERS: dict[str, tuple[Callable[[Path], Path], int, bool]] = {
    "stock DCP": (stock, 3, True),
    "torch.save": (torch_file, 3, True),
    "safetensors": (safetensors_file, 2, False),
    "safetensors directory": (safetensors_directory, 2, False),
    "accelerate": (accelerate_directory, 2, True),
    "Lightning": (lightning_directory, 4, True),
}


@pytest.mark.parametrize(("make", "entries", "has_crc"), MAKERS.values(), ids=MAKERS)
def test_all_of_it_is_read(tmp_path: Path, make: Callable[[Path], Path], entries: int, has_crc: bool) -> None:
    target = make(tmp_path)
    report = ray_ckpt.verify(target)
    assert report.damages == ()
    assert (report.num_tensors + report.num_objects, len(report.unchecked)) == (entries, entries)
    assert not report.verified
    assert report.uri == str(target)
    assert any("CRC-32" in note for note in report.notes) == has_crc
    files = [target] if target.is_file() else [p for p in target.rglob("*") if p.is_file() and p.name != ".metadata"]
    assert report.total_bytes == sum(path.stat().st_size for path in files)
    assert report.num_files == len(files)


def is_undamaged(target: Path) -> bool:
    report = ray_ckpt.verify(target)
    if report.damages:
        raise RayCkptError(str(report.damages[0]))
    state: dict[str, Any] = {name: torch.zeros_like(value) for name, value in WEIGHTS.items()}
    ray_ckpt.load(state, target, strict=False)
    return all(torch.equal(state[name], value) for name, value in WEIGHTS.items())


@pytest.mark.parametrize("make", [stock, torch_file])
def test_a_flipped_bit_is_found_or_means_nothing(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    target = make(tmp_path)
    file = target if target.is_file() else next(target.glob("*.distcp"))
    tally = damage(Subject("", file, lambda: is_undamaged(target)), 100, seed=5)
    assert tally.is_clean, (tally.row(), tally.examples)
    assert tally.refused > 60


def test_the_damaged_tensor_is_named(tmp_path: Path) -> None:
    for target in (stock(tmp_path), torch_file(tmp_path)):
        file = target if target.is_file() else next(target.glob("*.distcp"))
        data = bytearray(file.read_bytes())
        place = data.index(WEIGHTS["first"].numpy().tobytes()) + 4000
        data[place] ^= 1
        file.write_bytes(data)
        [found] = ray_ckpt.verify(target).damages
        assert (found.file, found.name) == (file.name, "first")
        assert found.start <= place < found.end
        assert "CRC-32" in found.problem


def test_a_tensor_of_another_shape_than_the_record_says(tmp_path: Path) -> None:
    """Every checksum fits, but the file is another checkpoint's."""
    for name, shape in (("one", (40, 50)), ("other", (50, 40))):
        weight = torch.arange(2000.0).reshape(shape)
        dcp.save({"weight": weight}, checkpoint_id=tmp_path / name, no_dist=True)
    [file], [other] = (tmp_path / "one").glob("*.distcp"), (tmp_path / "other").glob("*.distcp")
    file.write_bytes(other.read_bytes())
    [found] = ray_ckpt.verify(tmp_path / "one").damages
    assert found.name == "weight"
    assert "of shape (50, 40) where the metadata says" in found.problem


def test_a_view_whose_elements_are_not_its_bytes_is_refused(tmp_path: Path) -> None:
    """A container of DCP with one is left to torch (test_kinds.py); a file is read by places alone."""
    torch.save({"weight": torch.ones(3, dtype=torch.complex64).conj()}, tmp_path / "file.pt")
    with pytest.raises(FormatError, match=r"'weight' is a conjugate or negated view.*resolve_conj"):
        ray_ckpt.load({"weight": torch.zeros(3, dtype=torch.complex64)}, tmp_path / "file.pt")


def test_a_truncated_file_and_one_that_is_none(tmp_path: Path) -> None:
    target = torch_file(tmp_path)
    target.write_bytes(target.read_bytes()[:-100])
    with pytest.raises(FormatError):
        ray_ckpt.verify(target)
    target.write_bytes(b"nothing that anybody knows")
    with pytest.raises(FormatError, match="neither a checkpoint's directory, nor a file"):
        ray_ckpt.verify(target)
    with pytest.raises(CheckpointNotFoundError):
        ray_ckpt.verify(tmp_path / "nothing.pt")
