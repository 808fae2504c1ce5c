"""Copies of committed checkpoints: byte for byte what was saved, or nothing that counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ray_ckpt
from ray_ckpt.errors import CheckpointExistsError, CheckpointNotFoundError, CommitError, IntegrityError
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.storage.copying import commit_copy, copy_files
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.store import CheckpointStore


def state() -> dict[str, object]:
    return {"large": torch.arange(5_000_000), "small": torch.ones(3), "empty": torch.ones(0), "odd": {1}, "step": 7}


@pytest.fixture
def source(tmp_path: Path) -> Storage:
    ray_ckpt.save(state(), tmp_path / "source")
    return Storage(tmp_path / "source")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_copy_is_the_same_bytes_and_is_there_only_once_it_is_committed(source: Storage, tmp_path: Path) -> None:
    target = Storage(tmp_path / "target")
    files = source.list()
    assert copy_files(source, target, files) == sum(size for name, size in files.items() if "distcp" in name)
    with pytest.raises(CheckpointNotFoundError):
        ray_ckpt.verify(tmp_path / "target")
    commit_copy(source, target, overwrite=False)
    assert contents(tmp_path / "target") == contents(tmp_path / "source")
    assert ray_ckpt.verify(tmp_path / "target").verified
    # A second order, whose first answer was lost, changes nothing.
    assert copy_files(source, target, files) == 0
    commit_copy(source, target, overwrite=False)


@pytest.mark.parametrize("share_from_the_end", [0.01, 0.5])
def test_a_flipped_bit_is_not_copied(source: Storage, tmp_path: Path, share_from_the_end: float) -> None:
    [file] = (tmp_path / "source").glob("*.distcp")
    flip(file, int(file.stat().st_size * (1 - share_from_the_end)))
    with pytest.raises(IntegrityError):
        copy_files(source, Storage(tmp_path / "target"), source.list())
    assert contents(tmp_path / "target") == {}
    # Another copy of the file has the bytes: the one that is damaged is told.
    ray_ckpt.save(state(), tmp_path / "source", overwrite=True)
    copy_files(source, Storage(tmp_path / "whole"), source.list())
    [file] = (tmp_path / "source").glob("*.distcp")
    good = file.read_bytes()
    flip(file, int(file.stat().st_size * (1 - share_from_the_end)))
    source.durable = Storage(tmp_path / "whole")
    copy_files(source, Storage(tmp_path / "target"), source.list())
    assert (tmp_path / "target" / file.name).read_bytes() == good
    assert {(again.place, again.is_durable) for again in source.rereads} == {(str(tmp_path / "whole"), True)}


def test_a_load_takes_what_is_damaged_from_the_durable_copy_and_says_so(source: Storage, tmp_path: Path) -> None:
    copy_files(source, Storage(tmp_path / "whole"), source.list())
    [file] = (tmp_path / "source").glob("*.distcp")
    flip(file, file.stat().st_size // 2)
    wanted = {**state(), "large": torch.zeros(5_000_000, dtype=torch.int64)}
    with pytest.raises(IntegrityError):
        ray_ckpt.load(wanted, source)
    source.durable = Storage(tmp_path / "whole")
    wanted["large"] = torch.zeros(5_000_000, dtype=torch.int64)
    report = ray_ckpt.load(wanted, source)
    assert torch.equal(wanted["large"], torch.arange(5_000_000))
    assert 0 < report.durable_bytes < report.num_bytes
    [told] = report.damaged_copies
    assert "checksum" in told
    assert told.endswith(f"read from {tmp_path / 'whole'} instead")


def test_what_is_not_all_there_or_is_anothers_is_not_committed(source: Storage, tmp_path: Path) -> None:
    target = Storage(tmp_path / "target")
    with pytest.raises(CommitError, match="lacks __0_0"):
        commit_copy(source, target, overwrite=False)
    ray_ckpt.save({"other": 1}, target)
    before = (tmp_path / "target" / MANIFEST_NAME).read_bytes()
    copy_files(source, target, source.list())
    with pytest.raises(CheckpointExistsError):
        commit_copy(source, target, overwrite=False)
    assert (tmp_path / "target" / MANIFEST_NAME).read_bytes() == before
    commit_copy(source, target, overwrite=True)
    assert ray_ckpt.verify(target).verified
    assert {name for name in target.list() if "distcp" in name} == {name for name in source.list() if "distcp" in name}


def test_a_copy_that_was_cut_off_is_cleaned_up(source: Storage, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "store")
    copy_files(source, store.location(1), source.list())
    [file] = (tmp_path / "store" / "step-1").iterdir()
    file.rename(file.with_name(f"{file.name}.0123456789ab.tmp"))
    copy_files(source, store.location(1), source.list())
    assert len(store.clean(older_than_s=0).files) == 2
    assert store.steps() == ()
