"""Waiting for a step that somebody else saves: by one process, by all ranks, to its end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ray_ckpt
from ray_ckpt.errors import CheckpointNotFoundError, FormatError, UsageError
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.storage.store import CheckpointStore
from tests.support.ranks import run_ranks

PUBLISH = """
import sys, torch, ray_ckpt
for line in sys.stdin:
    step = int(line)
    ray_ckpt.save({"weight": torch.full((5,), float(step))}, sys.argv[1], step=step)
    print(step, flush=True)
"""


@contextmanager
def publisher(target: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which saves the steps whose numbers it is sent."""
    command = [sys.executable, "-c", PUBLISH, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def tell(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{step}\n")
    process.stdin.flush()


def save_step(target: Path, step: int) -> None:
    ray_ckpt.save({"weight": torch.full((5,), float(step))}, target, step=step)


def test_a_load_waits_for_the_step_and_takes_the_latest(tmp_path: Path) -> None:
    save_step(tmp_path, 3)
    state = {"weight": torch.zeros(5)}
    publish = threading.Timer(0.3, save_step, (tmp_path, 6))
    publish.start()
    report = ray_ckpt.load(state, tmp_path, wait_for=5, wait_s=60)
    publish.join()
    assert (report.step, state["weight"].tolist()) == (6, [6.0] * 5)
    # What is there is not waited for.
    start = time.monotonic()
    assert ray_ckpt.load(state, CheckpointStore(tmp_path), wait_for=6, wait_s=100).step == 6
    assert time.monotonic() - start < 50


def test_what_does_not_come_is_told_with_the_newest_that_is_there(tmp_path: Path) -> None:
    state = {"weight": torch.zeros(5)}
    with pytest.raises(
        CheckpointNotFoundError, match=r"step 5 of .*, or a higher one, .* within 0 s; there is no step"
    ):
        ray_ckpt.load(state, tmp_path, wait_for=5, wait_s=0)
    save_step(tmp_path, 3)
    start = time.monotonic()
    with pytest.raises(CheckpointNotFoundError, match=r"within 0\.3 s; the newest that is there is 3$"):
        ray_ckpt.load(state, tmp_path, wait_for=5, wait_s=0.3)
    assert time.monotonic() - start >= 0.3
    assert not state["weight"].any()


def test_a_damaged_step_is_not_taken_for_the_one_that_is_waited_for(tmp_path: Path) -> None:
    save_step(tmp_path, 3)
    save_step(tmp_path, 5)
    (tmp_path / "step-5" / MANIFEST_NAME).write_text("{")
    state, store = {"weight": torch.zeros(5)}, CheckpointStore(tmp_path)
    with pytest.raises(FormatError, match=r"step 5 .* is damaged"):
        ray_ckpt.load(state, store, wait_for=4, wait_s=60)
    with pytest.raises(CheckpointNotFoundError, match=r"within 0\.2 s; the newest .* is 5; step 5 is damaged: "):
        ray_ckpt.load(state, store, wait_for=4, wait_s=0.2, fallback=True)
    assert not state["weight"].any()
    save_step(tmp_path, 4)
    report = ray_ckpt.load(state, store, wait_for=4, wait_s=60, fallback=True)
    assert (report.step, len(report.passed_over)) == (4, 1)


def test_a_checkpoint_beside_the_steps_is_not_taken_for_one(tmp_path: Path) -> None:
    ray_ckpt.save({"weight": torch.ones(5)}, tmp_path)
    with pytest.raises(CheckpointNotFoundError):
        ray_ckpt.load({"weight": torch.zeros(5)}, tmp_path, wait_for=0, wait_s=0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"step": 3, "wait_for": 3}, r"step=3 .* wait_for=3"),
        ({"wait_for": -1}, "-1 is not a step"),
        ({"wait_for": 3, "wait_s": -1.0}, r"-1\.0 s are no time to wait for step 3"),
        ({"wait_for": 3, "wait_s": float("nan")}, "nan s are no time"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(tmp_path: Path, options: dict[str, int | float], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        ray_ckpt.load({}, tmp_path, **options)  # type: ignore[arg-type]


def follow(rank: int, target: str) -> tuple[int | None, list[float], str]:
    """Longer than the others wait for any rank."""
    state = {"weight": torch.zeros(5)}
    with publisher(Path(target)) if rank == 1 else nullcontext() as process:
        if process is not None:
            threading.Timer(2.0, tell, (process, 9)).start()
        report = ray_ckpt.load(state, target, wait_for=8, wait_s=60, timeout_s=1.5)
    with pytest.raises(CheckpointNotFoundError) as told:
        ray_ckpt.load(state, target, wait_for=12, wait_s=2.0, timeout_s=1.5)
    dist.barrier()  # the group is as good as before
    return report.step, state["weight"].tolist(), str(told.value)


@pytest.mark.slow
def test_one_rank_waits_for_all_longer_than_they_wait_for_one_another(tmp_path: Path) -> None:
    found = run_ranks(follow, 3, tmp_path, str(tmp_path / "run"))
    there = "the newest that is there is 9"
    told = f"step 12 of {tmp_path / 'run'}, or a higher one, was not committed within 2 s; {there}"
    assert found == [(9, [9.0] * 5, told)] * 3
