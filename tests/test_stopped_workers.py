"""A worker that is stopped rather than dead, as by SIGSTOP: the job names it within its time limit.

Where the job stands when the worker is stopped is exact: the driver stops itself there, and goes on afterwards.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.storage.store import CheckpointStore
from tests.conftest import REPOSITORY
from tests.support.clusters import JOB, Head, Started, wait_until, wait_until_free, workers
from tests.support.commands import assert_one_line
from tests.support.struck import struck_at

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PAIR = ("--from", "pp2", "--to", "fsdp2x2", "--steps", "1", "--dim", "64", "--layers", "2", "--cpus-per-worker", "0.5")
TIMEOUT_S = 100
"""Time limit of each phase. Much of it is for a loaded machine to start the workers in."""
ENDS_S = 60
"""How long after the limit the job may take to tell, and to give back what it had."""


def start_job(head: Head, storage: Path, *options: str, command: tuple[str, ...] = (sys.executable,)) -> Started:
    where = ("--address", head.address, "--storage", str(storage), "--timeout", str(TIMEOUT_S))
    return head.sandbox.start(*command, JOB, *PAIR, *where, *options, PYTHONPATH=str(REPOSITORY))


def stop_a_worker(head: Head) -> int:
    """Its process."""
    pid = max(worker.pid for worker in workers(head.sandbox))
    os.kill(pid, signal.SIGSTOP)
    return pid


def check_end(head: Head, job: Started, pid: int) -> None:
    """The job tells the stopped process in one line, in time, and leaves nothing in the cluster."""
    began = time.monotonic()
    assert job.wait(TIMEOUT_S + ENDS_S) == 1, job.stdout + job.stderr
    print(f"told after {time.monotonic() - began:.1f} s: {job.stderr}")
    assert_one_line(job.stderr, f"(process {pid}) responds to nothing: stopped, or stuck")
    assert "no answer within" in job.stderr
    wait_until_free(60)
    assert not psutil.pid_exists(pid)


def test_a_worker_that_is_stopped_in_training(head: Head, tmp_path: Path) -> None:
    storage = tmp_path / "run"
    job = start_job(head, storage, "--steps", "1000000")
    job.wait_for("train: ", 120)
    check_end(head, job, stop_a_worker(head))
    assert list(storage.iterdir()) == []


def test_the_elastic_job_goes_on_without_a_worker_that_is_stopped(head: Head, tmp_path: Path) -> None:
    storage, report = tmp_path / "run", tmp_path / "out.json"
    where = ("--address", head.address, "--storage", str(storage), "--json", str(report))
    flags = ("--layouts", "pp2", "--steps", "40", "--save-every", "2", "--dim", "64", "--cpus-per-worker", "0.5")
    job = head.sandbox.start(sys.executable, "jobs/train_elastic.py", *flags, *where, "--timeout", "20")
    job.wait_for("step 4 of 40", 120)
    pid = stop_a_worker(head)
    assert job.wait(20 + ENDS_S) == 0, job.stdout + job.stderr
    assert not psutil.pid_exists(pid)
    told = json.loads(report.read_text())
    assert (told["final_step"], told["layouts_used"]) == (40, ["pp2", "pp2"])
    [restart] = told["restarts"]
    assert f"(process {pid}) responds to nothing: stopped, or stuck" in restart["cause"]
    assert restart["step"] >= 4
    wait_until_free(60)


@pytest.mark.parametrize(
    ("place", "committed"),
    [
        pytest.param("ray_ckpt.protocol.coordinator:merge", False, id="save"),
        pytest.param("ray_ckpt.protocol.agreement:agree", True, id="load"),
    ],
)
def test_a_worker_that_is_stopped_in_a_save_or_a_load(head: Head, tmp_path: Path, place: str, committed: bool) -> None:
    storage = tmp_path / "run"
    job = start_job(head, storage, command=struck_at(place, 1, signal.SIGSTOP))
    driver = psutil.Process(job.pid)
    wait_until(lambda: job.ended or driver.status() == psutil.STATUS_STOPPED, 120, lambda: (job.stdout, job.stderr))
    assert not job.ended, job.stderr
    pid = stop_a_worker(head)
    job.process.send_signal(signal.SIGCONT)
    check_end(head, job, pid)
    assert (storage / MANIFEST_NAME).exists() == committed
    CheckpointStore(storage).clean(older_than_s=0)
    assert committed or not any(path.is_file() for path in storage.rglob("*"))
