"""Shards that DCP's `HuggingFaceStorageWriter(save_distributed=True)` wrote, read in another layout."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

import ray_ckpt
from ray_ckpt.errors import FormatError, StateMismatchError
from tests.support.foreign import blank, blank_shards, differing, weights
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def _write(rank: int, directory: str, layout: str) -> None:
    warnings.simplefilter("ignore")
    target, expected = blank_shards(layout)
    for name, tensor in target.items():
        tensor.to_local().copy_(expected[name])
    dcp.save(target, storage_writer=HuggingFaceStorageWriter(directory, save_distributed=True))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("written")
    run_ranks(_write, 4, directory, str(directory / "at"), "fsdp2x2.tp2")
    return directory / "at"


def test_shards_become_whole_tensors(written: Path) -> None:
    assert len(list(written.glob("shard-*.safetensors"))) == 4
    found = blank()
    assert differing(found) == set(weights())
    ray_ckpt.load(found, written)
    assert differing(found) == set()


def test_a_missing_file_leaves_a_hole(written: Path, tmp_path: Path) -> None:
    for file in sorted(written.glob("shard-*"))[1:]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises((FormatError, StateMismatchError), match=r"are missing|where|saved"):
        ray_ckpt.load(blank(), tmp_path)


def test_a_file_twice_is_refused(written: Path, tmp_path: Path) -> None:
    for number, file in enumerate([*sorted(written.glob("shard-*")), sorted(written.glob("shard-*"))[0]]):
        (tmp_path / f"{number}.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(FormatError, match="overlap"):
        ray_ckpt.load(blank(), tmp_path)


def test_one_shard_alone_is_not_taken_for_the_tensor(written: Path) -> None:
    with pytest.raises((FormatError, StateMismatchError), match=r"layer37\.weight"):
        ray_ckpt.load({"layer37.weight": torch.zeros(37, 61)}, sorted(written.glob("shard-*"))[0], strict=False)
