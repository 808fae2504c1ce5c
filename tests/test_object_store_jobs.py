"""The jobs and `verify` on object stores, each as a server on loopback: S3 (moto), Azure (Azurite) and GCS."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ray_ckpt
from ray_ckpt.storage.store import CheckpointStore
from tests.support.azure import run_azure
from tests.support.clusters import BIN, Head, wait_until_free, workers
from tests.support.gcs import run_gcs
from tests.support.s3 import run_s3
from tests.test_train_elastic import JOB, MODEL, reference

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

STEPS = 60


@pytest.fixture(params=["s3", "azure", "gcs"])
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """URI of a place there, to be formatted with `path`."""
    if request.param == "s3":
        with run_s3() as server:
            yield server.uri("{path}")
        return
    with {"azure": run_azure, "gcs": run_gcs}[request.param]() as place:
        yield place


def test_the_jobs_and_the_check_work_there(head: Head, bucket: str, tmp_path: Path) -> None:
    """A worker is killed while the elastic job saves, and nothing is lost."""
    storage, report = bucket.format(path="elastic"), tmp_path / "report"
    job = head.sandbox.start(
        *(sys.executable, JOB, "--address", head.address, "--model", MODEL, "--layouts", "ddp2,single"),
        *("--steps", str(STEPS), "--save-every", "10", "--storage", storage, "--json", str(report)),
    )
    job.wait_for(f"step 20 of {STEPS}", 120)
    workers(head.sandbox)[-1].kill()
    assert job.wait(120) == 0, job.stdout + job.stderr
    found = json.loads(report.read_text())
    assert (found["final_step"], len(found["restarts"])) == (STEPS, 1)
    assert found["losses"] == pytest.approx(reference("ddp2,single", STEPS), rel=1e-3)
    store = CheckpointStore(storage)
    assert store.latest() == STEPS
    assert len(store.steps()) == 3
    assert ray_ckpt.verify(store).verified
    store.clean(older_than_s=0)
    wait_until_free(60)

    second = bucket.format(path="second")
    done = head.sandbox.run_job(
        *("--from", "pp2", "--to", "fsdp2x2", "--steps", "1", "--dim", "20", "--layers", "2"),
        *("--address", head.address, "--storage", second),
    )
    assert done.wait(0) == 0, done.stdout + done.stderr
    assert "verified" in done.stdout
    checked = head.sandbox.start(str(BIN / "ray-ckpt"), "verify", second, "--ray", RAY_ADDRESS=head.address)
    assert checked.wait(120) == 0, checked.stdout + checked.stderr
