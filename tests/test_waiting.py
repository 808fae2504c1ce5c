"""How long a verb waits for other ranks, who is named when some do not come, and what is left usable afterwards."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ray_ckpt
from ray_ckpt.errors import CheckpointError, SavePendingError, UsageError
from ray_ckpt.storage.files import Storage
from tests.support.faulty import GatedStorage, wait_until
from tests.support.ranks import run_ranks

VERBS: dict[str, Callable[[dict[str, Any], Path, float | None], Any]] = {
    "save": lambda state, root, timeout_s: ray_ckpt.save(state, root / "run", 2, overwrite=True, timeout_s=timeout_s),
    "save, beside training": lambda state, root, timeout_s: ray_ckpt.save(
        state, root / "run", 3, overwrite=True, blocking=False, timeout_s=timeout_s
    ).result(30.0),
    "load": lambda state, root, timeout_s: ray_ckpt.load(state, root / "run", 1, timeout_s=timeout_s),
    "resume": lambda state, root, timeout_s: ray_ckpt.resume(state, root / "run", timeout_s=timeout_s),
    "verify": lambda state, root, timeout_s: ray_ckpt.verify(root / "run", 1, timeout_s=timeout_s),
}


def come_too_late(rank: int, directory: str) -> dict[str, str]:
    """Rank 2 calls each verb when the others have given it up. What this rank is told by each."""
    root, told = Path(directory), {}
    state = {f"own{rank}": torch.full((3,), float(rank)), "all": torch.ones(5)}
    ray_ckpt.save(state, root / "run", 1)
    for verb, call in VERBS.items():
        # Ranks 0 and 1 begin together, rank 2 when both have ended.
        (root / f"{verb}, begun{rank}").touch()
        before = f"{verb}, begun" if rank < 2 else verb
        wait_until(lambda before=before: all((root / f"{before}{other}").exists() for other in (0, 1)))  # type: ignore[misc]
        start = time.monotonic()
        with pytest.raises(CheckpointError) as caught:
            call(state, root, 1.0)
        assert time.monotonic() - start < 25.0  # the time that was given, and not another
        (root / f"{verb}{rank}").touch()
        told[verb] = str(caught.value)
        call(state, root, 30.0)  # the group is as good as before
    ray_ckpt.load(state, root / "run", 1)  # without a time, too
    # The meetings leave nothing in the group's store.
    dist.barrier()
    assert dist.group.WORLD is not None
    store = dist.group.WORLD.get_group_store()
    keys = [f"ray_ckpt/meeting/{n}/{key}" for n in range(40) for key in ("arrived", "verdict", "left", str(rank))]
    assert not [key for key in keys if store.check([key])]
    return told


def test_a_rank_that_does_not_come_in_time_is_named_to_all_and_the_group_goes_on(tmp_path: Path) -> None:
    of_ranks = run_ranks(come_too_late, 3, tmp_path, str(tmp_path))
    for told in of_ranks:
        for verb in VERBS:
            name = verb.partition(",")[0]
            assert re.match(
                rf"{name} failed on rank 2: not heard of within 1\.0 s of the other ranks' call", told[verb]
            )


def fall_behind(rank: int, directory: str) -> str:
    """Rank 1 does not get on with writing."""
    root = Path(directory)
    gate = root / "gate"
    storage = GatedStorage(root / "run", gate) if rank == 1 else Storage(root / "run")
    handle = ray_ckpt.save({f"own{rank}": torch.ones(3)}, storage, blocking=False, timeout_s=1.0)
    if rank == 0:
        with pytest.raises(CheckpointError) as caught:
            handle.result(20.0)
        gate.touch()
    else:
        with pytest.raises(CheckpointError) as caught:
            handle.result(20.0)
    ray_ckpt.save({f"own{rank}": torch.ones(3)}, root / "next", blocking=False, timeout_s=20.0).result(20.0)
    return str(caught.value)


def test_a_rank_that_falls_behind_beside_training_is_named(tmp_path: Path) -> None:
    first, second = run_ranks(fall_behind, 2, tmp_path, str(tmp_path))
    assert re.match(r"save failed on rank 1: LostContact: rank 1 cannot be heard: .*Timed out", first)
    assert re.match(r"save failed: rank 0 cannot be (reached|heard): .*; it may or may not have been committed", second)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_the_save_before_is_not_waited_for_longer_than_that(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    first = ray_ckpt.save({"w": torch.ones(3)}, GatedStorage(tmp_path / "first", gate), blocking=False)
    with pytest.raises(SavePendingError, match=r"the save of .*/first has not ended within \S+ s; it goes on"):
        ray_ckpt.save({"w": torch.ones(3)}, tmp_path / "second", timeout_s=0.05)
    gate.touch()
    assert first.result(30.0).num_files == 1
    assert ray_ckpt.save({"w": torch.ones(3)}, tmp_path / "second", timeout_s=30.0).num_files == 1


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan")])
def test_no_time_is_refused(tmp_path: Path, timeout_s: float) -> None:
    for call in VERBS.values():
        with pytest.raises(UsageError, match=r"\(timeout_s=.*\): give a number of seconds above 0, or leave it out"):
            call({"w": torch.ones(3)}, tmp_path, timeout_s)
