"""The cluster goes away under the main job: one line, exit code 1, and nothing is left of either."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import psutil
import pytest

import ray_ckpt
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.storage.store import CheckpointStore
from tests.conftest import REPOSITORY
from tests.support.clusters import JOB, Sandbox, Started, start_head, wait_until
from tests.support.struck import struck_at

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PAIR = ("--from", "pp2", "--to", "fsdp2x2", "--dim", "64", "--layers", "2", "--cpus-per-worker", "0.5")
RAYS_MINUTE_S = 60
"""After that Ray's core ends a driver that cannot reach the control service."""
RAY_ENDS_S = 120
"""Ray's own agents end by themselves, seen up to 50 s after their raylet."""


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_cluster_that_is_killed_while_the_job_trains(tmp_path: Path, name: str) -> None:
    """`ray start --block` ends with the first of its processes, and takes the others with it."""
    storage = tmp_path / "run"
    with Sandbox() as sandbox:
        job = start_job(sandbox, storage, "--steps", "1000000")
        job.wait_for("train: ", 180)
        check_end(sandbox, job, name)
        assert list(storage.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "has_saved"),
    [
        pytest.param("ray_ckpt.protocol.coordinator:merge", False, id="save"),
        pytest.param("ray_ckpt.protocol.agreement:agree", True, id="load"),
    ],
)
def test_a_cluster_that_is_killed_while_the_job_saves_or_loads(tmp_path: Path, place: str, has_saved: bool) -> None:
    """The driver stops itself at that place, and goes on when the cluster has lost its control service. The workers are
    still there for a moment, in which a save may end and be committed."""
    storage = tmp_path / "run"
    with Sandbox() as sandbox:
        job = start_job(sandbox, storage, "--steps", "1", command=struck_at(place, 1, signal.SIGSTOP))
        driver = psutil.Process(job.pid)
        wait_until(lambda: job.ended or driver.status() == psutil.STATUS_STOPPED, 180, lambda: job.stdout + job.stderr)
        assert not job.ended, job.stderr
        check_end(sandbox, job, "gcs_server")
        committed = (storage / MANIFEST_NAME).exists()
        assert committed or not has_saved
        CheckpointStore(storage).clean(older_than_s=0)
        assert any(path.is_file() for path in storage.rglob("*")) == committed
        assert not committed or ray_ckpt.verify(storage).verified


def start_job(sandbox: Sandbox, storage: Path, *options: str, command: tuple[str, ...] = (sys.executable,)) -> Started:
    where = ("--address", start_head(sandbox, num_cpus=2).address, "--storage", str(storage))
    return sandbox.start(*command, JOB, *PAIR, *where, *options, PYTHONPATH=str(REPOSITORY))


def check_end(sandbox: Sandbox, job: Started, name: str) -> None:
    """A process of the cluster is killed: the job ends in one line, and no process of either is left."""
    [process] = [process for process in sandbox.processes() if process.name() == name]
    process.kill()
    job.process.send_signal(signal.SIGCONT)
    assert job.wait(RAYS_MINUTE_S + 30) == 1, job.stdout + job.stderr
    [line] = job.stderr.splitlines()
    print(line)
    assert "Failed to connect to GCS within 60 seconds" in line or line.startswith("error: ")
    wait_until(lambda: not sandbox.processes(), RAY_ENDS_S, sandbox.processes)
