"""Saves of a worker group that go on beside its other calls: what is in them, and who learns of their failures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import ray_ckpt
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.errors import DIED, CheckpointError, RayCkptError, SavePendingError, WorkerError
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.protocol.save_handle import SaveHandle
from ray_ckpt.storage.store import CheckpointStore
from tests.conftest import REPOSITORY
from tests.support import rank_states
from tests.support.faulty import Fault, GatedStorage, TravellingStorage

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

NUM_WORKERS = 2
STATE = "tests.support.rank_states:held_state_of"


def make_group() -> WorkerGroup:
    return WorkerGroup(NUM_WORKERS, cpus_per_worker=0.5, process_group=False, start_timeout_s=60, call_timeout_s=60)


@pytest.fixture(scope="module")
def group(local_ray: None) -> Iterator[WorkerGroup]:
    with make_group() as group:
        yield group


def steps_of(group: WorkerGroup) -> list[int]:
    return list(group.run(rank_states.held_step))


def test_what_the_workers_train_meanwhile_is_not_in_the_checkpoint(group: WorkerGroup, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    group.run(rank_states.hold_step, 5)
    handle = ray_ckpt.cluster.save(group, STATE, GatedStorage(tmp_path / "run", gate), blocking=False)
    group.run(rank_states.train_in_place)
    assert steps_of(group) == [6] * NUM_WORKERS
    assert not handle.done()
    with pytest.raises(SavePendingError, match=r"has not ended within 0 s; it goes on"):
        handle.result(timeout_s=0.0)
    with pytest.raises(SavePendingError):
        ray_ckpt.cluster.save(group, STATE, tmp_path / "other", timeout_s=0.1)
    assert not (tmp_path / "run" / MANIFEST_NAME).exists()
    gate.touch()
    assert handle.result(timeout_s=30.0).num_files == NUM_WORKERS
    ray_ckpt.cluster.load(group, STATE, tmp_path / "run")
    assert steps_of(group) == [5] * NUM_WORKERS
    assert group.run(rank_states.held_saves) == [0] * NUM_WORKERS


def test_one_save_is_in_flight_and_the_next_one_waits_for_it(group: WorkerGroup, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        group.run(rank_states.hold_step, step)
        handle = ray_ckpt.cluster.save(group, STATE, store, step, blocking=False)
        assert store.steps() == tuple(range(1, step)) or handle.done()
    handle.result(timeout_s=30.0)
    assert store.steps() == (1, 2, 3)
    for step in (1, 2, 3):
        ray_ckpt.cluster.load(group, STATE, store, step)
        assert steps_of(group) == [step] * NUM_WORKERS


def test_a_failure_is_raised_once_by_the_result_or_by_the_next_save(group: WorkerGroup, tmp_path: Path) -> None:
    group.run(rank_states.hold_step, 1)
    group.run(rank_states.stage_of)  # tells the workers' storage where it is
    broken = TravellingStorage(str(tmp_path / "broken"), Fault("raises", ("create",), rank=1))
    handle = ray_ckpt.cluster.save(group, STATE, broken, blocking=False)
    with pytest.raises(WorkerError, match="Permission denied") as caught:
        handle.result(timeout_s=30.0)
    assert caught.value.ranks == (1,)
    ray_ckpt.cluster.save(group, STATE, tmp_path / "good")
    ray_ckpt.cluster.save(group, STATE, broken, blocking=False)
    with pytest.raises(CheckpointError, match=r"rank 1 on .*Permission denied; what was asked for now was not begun"):
        ray_ckpt.cluster.save(group, STATE, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    ray_ckpt.cluster.save(group, STATE, tmp_path / "other")
    assert list((tmp_path / "broken").iterdir()) == []
    assert group.run(rank_states.held_saves) == [0] * NUM_WORKERS


def test_with_a_warning_instead_the_next_save_begins(group: WorkerGroup, tmp_path: Path) -> None:
    group.run(rank_states.hold_step, 1)
    group.run(rank_states.stage_of)
    broken = TravellingStorage(str(tmp_path / "broken"), Fault("raises", ("create",), rank=1))
    ray_ckpt.cluster.save(group, STATE, broken, blocking=False, on_error="warn")
    with pytest.warns(RuntimeWarning, match=r"rank 1 on .*Permission denied; the one now begins all the same"):
        handle = ray_ckpt.cluster.save(group, STATE, tmp_path / "good", blocking=False, on_error="warn")
    assert handle.result(timeout_s=30.0).num_failed_before == 1
    (tmp_path / "file").touch()

    def save_twice() -> SaveHandle:
        failed = ray_ckpt.cluster.save(group, STATE, tmp_path / "file" / "run", blocking=False, on_error="warn")
        with pytest.raises(RayCkptError):
            failed.result(timeout_s=30.0)
        return ray_ckpt.cluster.save(group, STATE, tmp_path / "next", blocking=False, on_error="warn")

    with warnings.catch_warnings(record=True) as told:
        handle = save_twice()
    assert handle.result(timeout_s=30.0).num_failed_before == 1
    assert len(told) <= 1, "a failure that `result` has raised is not told again"
    handle = ray_ckpt.cluster.save(group, STATE, tmp_path / "last", blocking=False)
    assert handle.result(timeout_s=30.0).num_failed_before == 0


def test_closing_the_group_waits_for_the_save(local_ray: None, tmp_path: Path) -> None:
    with make_group() as group:
        group.run(rank_states.hold_step, 1)
        handle = ray_ckpt.cluster.save(group, STATE, tmp_path / "run", blocking=False)
    assert handle.done()
    assert (tmp_path / "run" / MANIFEST_NAME).exists()


@pytest.mark.slow
def test_a_worker_that_dies_meanwhile_is_named_within_ten_seconds(local_ray: None, tmp_path: Path) -> None:
    with make_group() as group:
        group.run(rank_states.hold_step, 1)
        handle = ray_ckpt.cluster.save(group, STATE, GatedStorage(tmp_path / "run", tmp_path / "never"), blocking=False)
        os.kill(group.workers[1].pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(WorkerError) as caught:
            handle.result(timeout_s=10.0)
        assert time.monotonic() - start < 10
        assert caught.value.ranks == (1,)
        assert caught.value.failures[0].error_type == DIED
        group.close(patience_s=0)
    assert not (tmp_path / "run" / MANIFEST_NAME).exists()


UNSEEN = """
import sys, ray_ckpt
from tests.support import rank_states
from tests.support.faulty import Fault, TravellingStorage

with ray_ckpt.WorkerGroup(1, process_group=False) as group:
    group.run(rank_states.hold_step, 1)
    broken = TravellingStorage(sys.argv[1], Fault("raises", ("create",)))
    ray_ckpt.cluster.save(group, "tests.support.rank_states:held_state_of", broken, blocking=False)
print("the program's last line")
"""


@pytest.mark.slow
def test_a_failure_that_nobody_saw_is_told_at_the_end(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNSEEN, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == "the program's last line\n"
    [line] = done.stderr.splitlines()
    assert line.startswith(f"ray_ckpt: the save of {tmp_path} in the background failed: WorkerError: rank 0 on ")
    assert "Permission denied" in line
