"""The cluster goes away under the main job: one line, exit code 1, and nothing is left of either."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.support.clusters import JOB, Sandbox, start_head, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PAIR = ("--from", "pp2", "--to", "fsdp2x2", "--dim", "64", "--layers", "2", "--cpus-per-worker", "0.5")
RAYS_MINUTE_S = 60
"""After that Ray's core ends a driver that cannot reach the control service."""
RAY_ENDS_S = 120
"""Ray's own agents end by themselves, seen up to 50 s after their raylet."""


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_cluster_that_is_killed_under_the_job(tmp_path: Path, name: str) -> None:
    """`ray start --block` ends with the first of its processes, and takes the others with it."""
    storage = tmp_path / "run"
    with Sandbox() as sandbox:
        head = start_head(sandbox, num_cpus=2)
        where = ("--address", head.address, "--storage", str(storage))
        job = sandbox.start(*(sys.executable, JOB, *PAIR, "--steps", "1000000", *where), PYTHONPATH=str(REPOSITORY))
        job.wait_for("train: ", 180)
        [process] = [process for process in sandbox.processes() if process.name() == name]
        process.kill()
        assert job.wait(RAYS_MINUTE_S + 30) == 1, job.stdout + job.stderr
        [line] = job.stderr.splitlines()
        assert "Failed to connect to GCS within 60 seconds" in line
        assert list(storage.iterdir()) == []
        wait_until(lambda: not sandbox.processes(), RAY_ENDS_S, sandbox.processes)
