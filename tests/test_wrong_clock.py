"""Commands and workers on a host whose clock is days off: nothing depends on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ray_ckpt
from ray_ckpt.storage.store import CheckpointStore
from tests.conftest import REPOSITORY
from tests.support.clusters import BIN, Head, add_node, wait_until_free, workers
from tests.support.shim import has_compiler

pytestmark = pytest.mark.skipif(not has_compiler(), reason="needs gcc, on Linux")

SEES_TIME = "import time; print(int(time.time()))"


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library to be preloaded."""
    library = tmp_path_factory.mktemp("clock") / "clock.so"
    source = Path(__file__).with_name("support") / "clock.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True, timeout=60)
    return str(library)


def wrong(clock: str, by_s: int) -> dict[str, str]:
    """Environment of a process whose clock is wrong; that it is, is looked at."""
    settings = {"LD_PRELOAD": clock, "CLOCK_SHIFT_S": str(by_s)}
    seen = [
        int(subprocess.check_output([sys.executable, "-c", SEES_TIME], env={**os.environ, **extra}, timeout=60))
        for extra in ({}, settings)
    ]
    assert abs(seen[1] - seen[0] - by_s) < 600
    return settings


@pytest.mark.parametrize("days", [-3, 3])
def test_clean_goes_by_the_clock_of_the_storage(tmp_path: Path, clock: str, days: int) -> None:
    store = CheckpointStore(tmp_path / "run")
    ray_ckpt.save({"weight": torch.ones(3)}, store, step=1)
    young, old = ("step-2/__0_0-0123456789ab.distcp", "step-2/__0_0-ba9876543210.distcp")
    for name in (young, old):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_bytes(b"left")
    two_days_ago = (tmp_path / "run" / young).stat().st_mtime - 2 * 86_400
    os.utime(tmp_path / "run" / old, (two_days_ago, two_days_ago))
    command = [str(BIN / "ray-ckpt"), "clean", str(tmp_path / "run"), "--yes", "--json"]
    environment = {**os.environ, **wrong(clock, days * 86_400)}
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == [old]
    assert store.steps() == (1,)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_job_is_done_though_the_clock_of_one_node_is_days_off(head: Head, tmp_path: Path, clock: str) -> None:
    node = add_node(head, "127.0.0.2", num_cpus=1, **wrong(clock, 3 * 86_400))
    storage = tmp_path / "run"
    where = ("--address", head.address, "--storage", str(storage))
    job = head.sandbox.start_job("--workers", "3", "--dim", "64", "--steps", "3", *where)
    job.wait_for("train: ", 110)
    shifted = [worker for worker in workers(head.sandbox) if "CLOCK_SHIFT_S" in worker.environ()]
    assert len(shifted) == 1
    assert job.wait(110) == 0, job.stdout + job.stderr
    assert "3 workers on 2 nodes" in job.stdout
    assert "verified: continuation: " in job.stdout
    assert job.stderr == ""
    wait_until_free(60)
    head.sandbox.kill(node)
