"""The oldest Ray that is supported really runs, in every process, where `make test-oldest` has put it; and two jobs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import psutil
import pytest
import ray
import torch

from ray_ckpt import WorkerGroup, cluster
from tests.conftest import REPOSITORY
from tests.support import rank_functions, rank_states
from tests.support.clusters import Sandbox

pytestmark = pytest.mark.oldest

DAEMONS = {"gcs_server", "raylet"}


def oldest() -> str:
    """The version that pyproject.toml asks for at least."""
    [found] = set(re.findall(r'"ray\[\w+\]>=([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text()))
    return str(found)


@pytest.mark.usefixtures("local_ray")
def test_it_runs_in_the_driver_in_rays_own_processes_and_in_workers(tmp_path: Path) -> None:
    assert ray.__version__.startswith(f"{oldest()}.")
    home = str(Path(ray.__file__).parent)
    assert home.startswith(sys.prefix)
    started = [process for process in psutil.Process().children(recursive=True) if process.name() in DAEMONS]
    assert {process.name() for process in started} == DAEMONS
    assert [process.exe() for process in started if not process.exe().startswith(home)] == []
    with WorkerGroup(2, cpus_per_worker=0.5, start_timeout_s=60, call_timeout_s=60) as group:
        assert group.run(rank_functions.versions) == [{"ray": ray.__version__, "torch": torch.__version__}] * 2
        report = cluster.save(group, rank_states.stage_of, tmp_path)
    assert report.num_files == 2


@pytest.mark.timeout(300)
def test_the_jobs_run_under_it(tmp_path: Path) -> None:
    with Sandbox() as sandbox:
        done = sandbox.run_job(
            *("--from", "pp2", "--to", "fsdp2x2", "--steps", "1", "--dim", "20", "--layers", "2"), timeout_s=120
        )
        assert done.wait(0) == 0, done.stdout + done.stderr
        assert "verified: continuation" in done.stdout
        elastic = ("jobs/train_elastic.py", "--layouts", "ddp2,single", "--steps", "10", "--dim", "20", "--layers", "2")
        job = sandbox.start(
            sys.executable, *elastic, "--storage", str(tmp_path / "run"), "--json", str(tmp_path / "report")
        )
        assert job.wait(120) == 0, job.stdout + job.stderr
    assert json.loads((tmp_path / "report").read_text())["final_step"] == 10
