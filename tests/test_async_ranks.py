"""Saves beside training on several ranks: what they save, who learns of whose failure, and who waits for whom."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import ray_ckpt
from ray_ckpt.checkpoint.background import saver
from ray_ckpt.dcp.reader import ArrowStorageReader
from ray_ckpt.errors import (
    CheckpointError,
)
from ray_ckpt.protocol.save_handle import SaveHandle
from ray_ckpt.report import SaveReport
from ray_ckpt.storage.files import Storage
from tests.support.faulty import Fault, FaultyStorage, GatedStorage, wait_until
from tests.support.ranks import RanksError, run_ranks
from tests.test_async import committed, loaded

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def parts(rank: int, value: float) -> dict[str, Any]:
    """A sharded tensor, a replica, and something of this rank's own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "sharded": distribute_tensor(torch.arange(30_000.0).reshape(300, 100) + value, mesh, [Shard(0)]),
        "replica": torch.full((5000,), value),
        f"own{rank}": torch.full((rank + 1,), value),
        "step": value,
    }


def step(state: dict[str, Any]) -> None:
    """Training, as far as a save can tell: collectives of the trainer's group, and tensors that change in place."""
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            value += 1
            if name == "replica":
                dist.all_reduce(value, op=dist.ReduceOp.MAX)


def is_at(target: Path, value: float, world_size: int) -> bool:
    like = {"sharded": torch.zeros(300, 100), "replica": torch.zeros(5000), "step": -1.0}
    like |= {f"own{rank}": torch.zeros(rank + 1) for rank in range(world_size)}
    found = loaded(target, dict(like))
    return (
        torch.equal(found["sharded"], torch.arange(30_000.0).reshape(300, 100) + value)
        and torch.equal(found["replica"], torch.full((5000,), value))
        and all(torch.equal(found[f"own{rank}"], torch.full((rank + 1,), value)) for rank in range(world_size))
        and found["step"] == value
    )


def train_beside_saves(rank: int, directory: str) -> list[bool]:
    root, state, handles = Path(directory), parts(rank, 1.0), []
    for number in range(3):
        gate = root / f"gate{number}"
        storage = GatedStorage(root / f"run{number}", gate) if rank == 1 else Storage(root / f"run{number}")
        handles.append(ray_ckpt.save({**state, "step": 1.0 + 5 * number}, storage, blocking=False))
        for _ in range(5):
            step(state)
        assert not handles[-1].done()
        dist.barrier()
        gate.touch()
    for handle in handles:
        handle.result(timeout_s=30.0)
    # The memory of the saves holds what this rank writes, and the replica is written by one of them.
    sharded, replica = state["sharded"].to_local().nbytes, 20_000
    assert saver().host_copy.num_bytes <= sharded + 4 * 64 + (replica if "replica" in written(root, rank) else 0)
    return [is_at(root / f"run{number}", 1.0 + 5 * number, 2) for number in range(3)]


def written(root: Path, rank: int) -> set[str]:
    manifest = ArrowStorageReader(root / "run2").read_manifest()
    return {
        name
        for name, entry in manifest.tensors.items()
        for chunk in entry.chunks
        if chunk.file.startswith(f"__{rank}_")
    }


def test_ranks_train_with_collectives_while_they_are_saved(tmp_path: Path) -> None:
    assert run_ranks(train_beside_saves, 2, tmp_path, str(tmp_path)) == [[True] * 3] * 2


def fail_beside_training(rank: int, directory: str) -> list[str]:
    root, state, said = Path(directory), parts(rank, 1.0), []
    storage = FaultyStorage(str(root / "full"), Fault("no space", ("write",), 1, name=".distcp"), rank)
    handle = ray_ckpt.save(state, storage, blocking=False)
    with pytest.raises(CheckpointError) as caught:
        handle.result(timeout_s=30.0)
    said.append(str(caught.value))
    # Rank 1 cannot even copy its part, and rank 0 alone asks how it went.
    bad = {**state, "odd": torch.eye(3).to_sparse()} if rank == 1 else state
    handle = ray_ckpt.save(bad, root / "odd", blocking=False)
    if rank == 0:
        with pytest.raises(CheckpointError) as caught:
            handle.result(timeout_s=30.0)
        said.append(str(caught.value))
    with pytest.raises(CheckpointError) as caught:
        ray_ckpt.save(state, root / "next", blocking=False)
    said.append(str(caught.value))
    # All of them have seen it now.
    ray_ckpt.save(state, root / "good", blocking=False).result(timeout_s=30.0)
    assert is_at(root / "good", 1.0, 2)
    return said


def test_every_rank_gets_every_failure(tmp_path: Path) -> None:
    for rank, said in enumerate(run_ranks(fail_beside_training, 2, tmp_path, str(tmp_path))):
        assert re.fullmatch(r"save failed on rank 1: StorageError: cannot write .*No space left on device", said[0])
        assert re.match(r"save failed on rank 1: UsageError: 'odd' is a tensor of layout", said[1]) or rank == 1
        unseen = r"save failed on rank 1: CheckpointError: the save of .*/odd in the background failed: "
        assert re.match(unseen + "CheckpointError: save failed on rank 1: UsageError: 'odd' is", said[-1])
    assert not any(committed(tmp_path / name) for name in ("full", "odd", "next"))
    assert list((tmp_path / "full").iterdir()) == []


def skip_when_one_is_busy(rank: int, directory: str) -> bool:
    """Rank 1's thread is late, rank 0 has nothing to do."""
    gate = Path(directory) / "gate"

    def late() -> SaveReport:
        wait_until(gate.exists)
        return SaveReport("elsewhere", 0, 0, 0.0)

    if rank == 1:
        saver().meet()
        saver().start(SaveHandle("elsewhere"), late)
    if rank == 0:
        with pytest.warns(UserWarning, match="is skipped"):
            skipped = ray_ckpt.save(parts(rank, 1.0), f"{directory}/run", blocking=False, if_busy="skip")
    else:
        skipped = ray_ckpt.save(parts(rank, 1.0), f"{directory}/run", blocking=False, if_busy="skip")
    gate.touch()
    ray_ckpt.save(parts(rank, 1.0), f"{directory}/run", blocking=False).result(timeout_s=30.0)
    return skipped is None


def test_all_ranks_skip_when_one_is_busy(tmp_path: Path) -> None:
    assert run_ranks(skip_when_one_is_busy, 2, tmp_path, str(tmp_path)) == [True, True]
    assert is_at(tmp_path / "run", 1.0, 2)


def leave_the_group(rank: int, directory: str) -> int:
    """The trainer destroys its group while a save is pending, and forms another one."""
    root = Path(directory)
    gate = root / "gate"
    storage = GatedStorage(root / "run", gate) if rank == 1 else Storage(root / "run")
    handle = ray_ckpt.save(parts(rank, 1.0), storage, blocking=False)
    dist.barrier()
    dist.destroy_process_group()
    if rank == 1:
        assert not handle.done()
        gate.touch()
    num_files = handle.result(timeout_s=30.0).num_files
    dist.init_process_group("gloo", store=dist.FileStore(str(root / "other"), 3), rank=rank, world_size=3)
    ray_ckpt.save(parts(rank, 2.0), root / "run2", blocking=False).result(timeout_s=30.0)
    return num_files


def test_a_pending_save_outlives_the_trainers_group(tmp_path: Path) -> None:
    assert run_ranks(leave_the_group, 3, tmp_path, str(tmp_path)) == [3] * 3
    assert is_at(tmp_path / "run", 1.0, 3)
    assert is_at(tmp_path / "run2", 2.0, 3)


def lose_rank_2(rank: int, directory: str) -> None:
    root = Path(directory)
    survivors = dist.new_group([0, 1], backend="gloo")
    storage = FaultyStorage(str(root / "run"), Fault("killed", ("create",), 2, name=".distcp"), rank)
    handle = ray_ckpt.save(parts(rank, 1.0), storage, blocking=False)
    with pytest.raises(CheckpointError) as caught:
        handle.result(timeout_s=20.0)
    total = torch.ones(1)
    dist.all_reduce(total, group=survivors)
    (root / f"rank{rank}").write_text(f"{total.item()} {caught.value}")


def test_a_rank_that_dies_beside_training_is_named_to_the_others_at_once(tmp_path: Path) -> None:
    with pytest.raises(RanksError) as raised:
        run_ranks(lose_rank_2, 3, tmp_path, str(tmp_path))
    assert raised.value.failures[2] == f"died with exit code {-signal.SIGKILL}"
    for rank in (0, 1):
        wait_until((tmp_path / f"rank{rank}").exists)
        text = (tmp_path / f"rank{rank}").read_text()
        assert re.match(r"2\.0 save failed on rank 2: LostContact: rank 2 cannot be heard: .*Connection", text)
    assert not committed(tmp_path / "run")
