"""Stock DCP saves into a directory of ours: the older of two checkpoints is never loaded in silence."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ray_ckpt import CheckpointStore, FormatError, export, load, resume, save

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint:UserWarning"),
]

TOLD = r"holds two checkpoints: after ray_ckpt, another program has saved there"


def state_of(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((3, 5), value)}


def loaded(directory: Path) -> float:
    target = state_of(0.0)
    load(target, directory)
    assert target["weight"].unique().numel() == 1
    return float(target["weight"][0, 0])


def save_by_stock(value: float, directory: Path) -> None:
    dcp.save(state_of(value), checkpoint_id=directory, no_dist=True)
    younger = time.time() + 1  # also where the clock of files is coarse
    os.utime(directory / ".metadata", (younger, younger))


def test_a_load_takes_neither_of_two(tmp_path: Path) -> None:
    save(state_of(1.0), tmp_path / "c")
    assert loaded(tmp_path / "c") == 1.0
    save_by_stock(2.0, tmp_path / "c")
    target = state_of(0.0)
    with pytest.raises(FormatError, match=TOLD):
        load(target, tmp_path / "c")
    assert torch.equal(target["weight"], state_of(0.0)["weight"])
    with pytest.raises(FormatError, match=TOLD):
        export(tmp_path / "c", tmp_path / "out", to="safetensors")


@pytest.mark.parametrize(("removed", "value"), [("manifest.json", 2.0), (".metadata", 1.0)])
def test_the_one_whose_record_is_left_loads(tmp_path: Path, removed: str, value: float) -> None:
    save(state_of(1.0), tmp_path)
    save_by_stock(2.0, tmp_path)
    (tmp_path / removed).unlink()
    assert loaded(tmp_path) == value


def test_a_step_of_a_store(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(state_of(1.0), store, 3)
    save_by_stock(2.0, tmp_path / "step-3")
    with pytest.raises(FormatError, match=TOLD):
        resume(state_of(0.0), store)


def test_ours_over_stock_is_ours(tmp_path: Path) -> None:
    dcp.save(state_of(2.0), checkpoint_id=tmp_path, no_dist=True)
    save(state_of(1.0), tmp_path, overwrite=True)
    assert loaded(tmp_path) == 1.0


def test_a_copied_record_of_ours_loads(tmp_path: Path) -> None:
    save(state_of(1.0), tmp_path)
    os.utime(tmp_path / ".metadata", (time.time() + 9, time.time() + 9))
    assert loaded(tmp_path) == 1.0


def test_a_damaged_record_of_stock_does_not_stop_a_load(tmp_path: Path) -> None:
    save(state_of(1.0), tmp_path)
    (tmp_path / ".metadata").write_bytes(b"no pickle")
    os.utime(tmp_path / ".metadata", (time.time() + 9, time.time() + 9))
    assert loaded(tmp_path) == 1.0
