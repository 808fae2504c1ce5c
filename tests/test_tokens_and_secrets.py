"""A cluster that asks for a token, and planted secrets that must be found nowhere afterwards."""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from ray_ckpt.storage.files import Storage
from tests.support.clusters import BIN, Head, Sandbox, Started, start_head, wait_until, workers
from tests.support.s3 import S3, run_s3

pytestmark = pytest.mark.timeout(300)

SECRET, TOKEN = secrets.token_hex(16), secrets.token_hex(32)  # made here: Ray copies the sources of a job, this one too
GUARDED = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture
def s3() -> Iterator[S3]:
    with run_s3() as server:
        yield server


@pytest.fixture
def guarded() -> Iterator[Head]:
    """A cluster that asks for a token, whose nodes have the credentials of the object store."""
    with Sandbox() as sandbox:
        yield start_head(sandbox, num_cpus=2, **GUARDED, **KEYS)


def asked(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
        text: str = answer.read().decode()
        return text


def scraped(head: Head) -> str:
    """What Prometheus gets of the cluster, whose endpoints it finds in the file that Ray writes for it."""
    found = ""
    for path in head.sandbox.root.rglob("prom_metrics_service_discovery.json"):
        for target in {target for entry in json.loads(path.read_text()) for target in entry["targets"]}:
            with contextlib.suppress(OSError):  # one that is not up yet
                found += asked(f"http://{target}/metrics")
    return found


def told_by_ray(head: Head) -> str:
    """What the cluster tells of jobs, actors, tasks and nodes to those that have the token."""
    for_all = {"Authorization": f"Bearer {TOKEN}"}
    pages = ("api/jobs/", *(f"api/v0/{what}?detail=1&limit=1000" for what in ("jobs", "actors", "tasks", "workers")))
    with pytest.raises(urllib.error.HTTPError, match="401"):
        asked(f"{head.dashboard}/api/jobs/")
    return "".join(asked(f"{head.dashboard}/{page}", **for_all) for page in pages)


def files_with(text: str, *directories: Path) -> list[str]:
    files = (path for directory in directories for path in directory.rglob("*") if path.is_file())
    return [str(path) for path in files if not path.is_symlink() and text.encode() in path.read_bytes()]


def objects_with(text: str, s3: S3) -> tuple[int, list[str]]:
    """Number of objects in the bucket, and those with the text."""
    filesystem, place = pafs.FileSystem.from_uri(s3.uri(""))
    files = [
        info.path
        for info in filesystem.get_file_info(pafs.FileSelector(place.strip("/"), recursive=True))
        if info.type == pafs.FileType.File
    ]
    return len(files), [path for path in files if text.encode() in filesystem.open_input_file(path).read()]


def run_to_end(head: Head, *command: str, fails_with: int = 0) -> Started:
    done = head.sandbox.start(*command, **GUARDED, **KEYS)
    assert done.wait(120) in (0, fails_with), done.stdout + done.stderr
    return done


@pytest.mark.cluster
def test_with_a_token_everything_works_and_no_secret_is_left_anywhere(guarded: Head, s3: S3, tmp_path: Path) -> None:
    where = s3.uri("run").replace("key:secret@", f"key:{SECRET}@")
    outputs = [
        *("--json", str(tmp_path / "json"), "--events", str(tmp_path / "events"), "--report", str(tmp_path / "page")),
        *("--front", "ram", "--layouts", "ddp2,single", "--dim", "20", "--layers", "2", "--save-every", "5"),
    ]
    job = guarded.sandbox.start(
        *(sys.executable, "jobs/train_elastic.py", "--address", guarded.address, "--steps", "3000", "--verbose"),
        *("--storage", where, *outputs),
        **GUARDED,
    )
    job.wait_for("step 20 of", 100)
    workers(guarded.sandbox)[0].kill()
    job.wait_for("failed at step", 60)
    seen = ""

    def is_counted() -> bool:
        nonlocal seen
        seen = scraped(guarded)
        return "ray_ckpt_restarts" in seen and 'kind="died"' in seen

    wait_until(is_counted, 60, lambda: seen[-3000:])
    assert not job.ended
    told = told_by_ray(guarded)
    job.process.terminate()
    job.wait(60)
    report = json.loads((tmp_path / "json").read_text())
    assert (report["stopped"], len(report["restarts"])) == (True, 1)

    # The credentials of the nodes, and Ray's own way to start a job.
    bare = where.replace(f"key:{SECRET}@", "")
    submitted = run_to_end(
        *(guarded, str(BIN / "ray"), "job", "submit", "--address", guarded.dashboard, "--working-dir", "."),
        *("--", "python", "jobs/pipeline_to_fsdp.py", "--from", "pp2", "--to", "ddp2", "--steps", "1", "--dim", "20"),
        *("--cpus-per-worker", "1", "--storage", bare.replace("/run?", "/second?")),
    )
    assert "succeeded" in submitted.stdout
    checked = run_to_end(guarded, str(BIN / "ray-ckpt"), "verify", bare, "--ray")
    assert "verified" in checked.stdout or "intact" in checked.stdout
    doctor = (str(BIN / "ray-ckpt"), "doctor", "--storage", bare, "--address", guarded.address)
    looked = run_to_end(guarded, *doctor, fails_with=1)  # this machine may have faults of its own
    assert "1 nodes with 2 CPUs answer" in looked.stdout
    assert f"{Storage(bare).address} can be written" in looked.stdout
    told += told_by_ray(guarded)

    guarded.sandbox.end_all()
    assert "train_elastic.py" in told
    assert SECRET not in told + seen
    assert TOKEN not in told + seen
    number, with_secret = objects_with(SECRET, s3)
    assert number > 6
    assert with_secret == []
    left = (guarded.sandbox.root, tmp_path)
    assert files_with(SECRET, *left) == []
    assert files_with(TOKEN, *left) == []
    (tmp_path / "control").write_text(f"--storage {where} {TOKEN}")
    assert files_with(SECRET, *left) == files_with(TOKEN, *left) == [str(tmp_path / "control")]
