"""Start or resume: one decision for all ranks; and steps, as verbs take them and as reports tell them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ray_ckpt
from ray_ckpt.errors import CheckpointNotFoundError, StateMismatchError
from ray_ckpt.storage.store import CheckpointStore
from tests.support.ranks import run_ranks
from tests.test_state import fresh, trained


def test_there_is_nothing_to_resume_from_until_a_step_is_committed(tmp_path: Path) -> None:
    store, state = CheckpointStore(tmp_path / "run"), fresh()
    before = state.snapshot(0)
    assert ray_ckpt.resume(state, store) is None
    (tmp_path / "run" / "step-9").mkdir(parents=True)  # an attempt that was never committed
    for given in (store, tmp_path / "run", str(tmp_path / "run")):
        assert ray_ckpt.resume(state, given) is None
    assert state.snapshot(0) == before
    for step in (8, 30, 4):
        ray_ckpt.save(trained(steps=step // 4), store, step)
    report = ray_ckpt.resume(state, store)
    assert report is not None
    assert (report.step, report.uri) == (30, str(tmp_path / "run" / "step-30"))
    assert state.snapshot(0) == trained(steps=7).snapshot(0)


def test_what_does_not_fit_is_not_taken_for_nothing(tmp_path: Path) -> None:
    ray_ckpt.save({"other": torch.ones(3)}, tmp_path, 1)
    with pytest.raises(StateMismatchError):
        ray_ckpt.resume(fresh(), tmp_path)


class Late(CheckpointStore):
    """Sees no step that was committed after it was made, as an old listing would."""

    def latest(self, *, fallback: bool = False) -> int | None:
        return None


def resume_with_stores_that_differ(rank: int, directory: str) -> tuple[int | None, list[float], bool]:
    """What rank 0 sees counts."""
    state: dict[str, Any] = {f"own{rank}": torch.full((2,), float(rank)), "step": 5}
    ray_ckpt.save(state, directory, 5)
    state[f"own{rank}"].zero_()
    report = ray_ckpt.resume(state, CheckpointStore(directory) if rank == 0 else Late(directory))
    nothing = ray_ckpt.resume(state, Late(directory) if rank == 0 else CheckpointStore(directory))
    return None if report is None else report.step, state[f"own{rank}"].tolist(), nothing is None


def test_all_ranks_resume_from_one_step_or_none_does(tmp_path: Path) -> None:
    found = run_ranks(resume_with_stores_that_differ, 3, tmp_path, str(tmp_path / "run"))
    assert found == [(5, [float(rank)] * 2, True) for rank in range(3)]


def test_reports_tell_the_step_of_a_store_and_none_elsewhere(tmp_path: Path) -> None:
    state = {"w": torch.ones(3)}
    assert ray_ckpt.save(state, tmp_path / "run", 7).step == 7
    assert ray_ckpt.save(state, tmp_path / "run", 8, blocking=False).result(30.0).step == 8
    for step, expected in ((None, 8), (7, 7)):
        assert ray_ckpt.load(state, tmp_path / "run", step).step == expected
        assert ray_ckpt.verify(tmp_path / "run", step).step == expected
    assert ray_ckpt.save(state, tmp_path / "alone").step is None
    assert ray_ckpt.load(state, tmp_path / "alone").step is None
    assert ray_ckpt.verify(tmp_path / "alone").step is None


@pytest.mark.parametrize("verb", [ray_ckpt.load, lambda _, *target: ray_ckpt.verify(*target)])
def test_a_named_step_that_is_not_there_says_so_and_names_the_latest(tmp_path: Path, verb: Any) -> None:
    state = {"w": torch.ones(3)}
    with pytest.raises(CheckpointNotFoundError, match=r"^no committed step in .*/run; step 70 was asked for$"):
        verb(state, tmp_path / "run", 70)
    for step in (60, 80):
        ray_ckpt.save(state, tmp_path / "run", step)
    (tmp_path / "run" / "step-70").mkdir()
    (tmp_path / "run" / "step-70" / "__0_0-0123456789ab.distcp").touch()  # what a failed save leaves
    for target in (tmp_path / "run", CheckpointStore(tmp_path / "run")):
        with pytest.raises(CheckpointNotFoundError, match=r"^step 70 is not committed in .*; the latest one is 80$"):
            verb(state, target, 70)
