"""SIGKILL of a job on a shared cluster, which nobody can handle: at exact places, and at moments spread over its life.

No actor, placement group or worker process stays in the cluster, and on storage only a committed checkpoint and what
`clean` removes.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

import ray_ckpt
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.storage.store import CheckpointStore
from tests.conftest import REPOSITORY
from tests.support.clusters import JOB, Head, Started, wait_until, wait_until_free, workers
from tests.support.moments import IMPORTS_S, JOB_ENDS_S, PARTS, durations, moments, strike
from tests.support.struck import struck_at

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PAIR = ("--from", "pp2", "--to", "fsdp2x2", "--steps", "1", "--dim", "64", "--layers", "2", "--cpus-per-worker", "0.5")


def start_job(head: Head, storage: Path, *options: str, command: tuple[str, ...] = (sys.executable,)) -> Started:
    where = ("--address", head.address, "--storage", str(storage))
    return head.sandbox.start(*command, JOB, *PAIR, *where, *options, PYTHONPATH=str(REPOSITORY))


def assert_nothing_left(head: Head, storage: Path) -> bool:
    """In the cluster, and on storage but for a committed checkpoint and what `clean` removes. Whether one is there."""
    wait_until_free(60)
    wait_until(lambda: not workers(head.sandbox), 60, lambda: workers(head.sandbox))
    CheckpointStore(storage).clean(older_than_s=0)
    left = {path.name for path in storage.rglob("*") if path.is_file()}
    if MANIFEST_NAME in left:
        assert ray_ckpt.verify(storage).verified
        assert left == {MANIFEST_NAME, ".metadata", *ray_ckpt.inspect(storage).manifest.files}
        return True
    assert left == set()
    return False


GROUP, COORDINATOR, PUBLISH = "ray_ckpt.cluster.group", "ray_ckpt.protocol.coordinator", "ray_ckpt.storage.publish"


@pytest.mark.parametrize(
    ("place", "time", "committed"),
    [
        pytest.param(f"{GROUP}:_start_actors", 1, False, id="placed"),
        pytest.param(f"{GROUP}:_placed_workers", 1, False, id="workers-start"),
        pytest.param(f"{GROUP}:_enlist", 1, False, id="workers-join"),
        pytest.param("ray_ckpt.recipes.probe:look", 1, False, id="storage-looked-at"),
        pytest.param(f"{COORDINATOR}:merge", 1, False, id="save-planned"),
        pytest.param(f"{COORDINATOR}:check", 1, False, id="save-written"),
        pytest.param(f"{PUBLISH}:_publish_first", 1, False, id="commit-prepared"),
        pytest.param("ray_ckpt.storage.local_files:rename", 2, False, id="commit-half-done"),
        pytest.param("ray_ckpt.cluster.worker_side:tell_all", 1, True, id="committed"),
        pytest.param(f"{GROUP}:_placed_workers", 2, True, id="new-workers-start"),
        pytest.param("ray_ckpt.protocol.agreement:agree", 1, True, id="load"),
        pytest.param("ray_ckpt.format.snapshot:compare", 1, True, id="verify"),
    ],
)
def test_a_job_that_is_killed_at_this_place_leaves_nothing(
    head: Head, tmp_path: Path, place: str, time: int, committed: bool
) -> None:
    storage = tmp_path / "run"
    job = start_job(head, storage, command=struck_at(place, time))
    assert job.wait(120) == -signal.SIGKILL, job.stderr
    assert assert_nothing_left(head, storage) == committed


def test_a_job_that_is_killed_while_it_trains_leaves_nothing(head: Head, tmp_path: Path) -> None:
    job = start_job(head, tmp_path / "run", "--steps", "1000000")
    job.wait_for("train: ", 110)
    job.process.kill()
    job.wait(10)
    assert not assert_nothing_left(head, tmp_path / "run")


def test_a_job_that_is_killed_while_its_workers_write_leaves_nothing(head: Head, tmp_path: Path) -> None:
    storage = tmp_path / "run"
    job = start_job(head, storage, "--dim", "2000")
    wait_until(lambda: any(storage.glob("__*.distcp")) or job.ended, 110, lambda: job.stdout + job.stderr)
    job.process.kill()
    job.wait(10)
    assert not (storage / MANIFEST_NAME).exists()
    assert not assert_nothing_left(head, storage)


@pytest.fixture(scope="module")
def joined_s(head: Head, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Part of the life of a job that joins a cluster -> seconds."""
    return durations(start_job(head, tmp_path_factory.mktemp("joined") / "run"))


@pytest.mark.parametrize("part", PARTS)
def test_a_job_that_is_killed_at_any_moment_leaves_nothing(
    request: pytest.FixtureRequest, head: Head, tmp_path: Path, part: str
) -> None:
    part_s = IMPORTS_S if part == "imports" else request.getfixturevalue("joined_s")[part]
    killed = committed = 0
    for moment, after_s in enumerate(moments(part_s)):
        storage = tmp_path / str(moment)
        job = start_job(head, storage)
        struck = strike(job, signal.SIGKILL, part, after_s)
        killed += struck is not None
        job.wait(JOB_ENDS_S)
        committed += assert_nothing_left(head, storage)
    print(f"SIGKILL while {part} ({part_s:.1f} s): {killed} killed, {committed} left a committed checkpoint")
    assert killed > 0
