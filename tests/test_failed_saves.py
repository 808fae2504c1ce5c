"""Saves in the background that fail and end no run: they are told, counted, and tried again by the next one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ckpt import Event, Storage, load, save
from ray_ckpt.errors import CheckpointError, StorageError, UsageError
from ray_ckpt.storage.room import shortage
from tests.conftest import REPOSITORY
from tests.support.clusters import Sandbox, wait_until
from tests.support.faulty import Fault, FaultyStorage
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")


def full(path: Path, rank: int = 0) -> Storage:
    return FaultyStorage(str(path), Fault("no space", ("write",), name=".distcp"), rank)


def state(value: float = 1.0) -> dict[str, Any]:
    return {"weight": torch.full((100,), value)}


def test_the_next_save_begins_although_the_one_before_failed(tmp_path: Path) -> None:
    told: list[Event] = []
    failed = save(state(), full(tmp_path / "1"), blocking=False, on_error="warn", events=told.append)
    with pytest.warns(
        RuntimeWarning, match=r"the save of .*/1 in the background failed: .*No space left.*all the same"
    ):
        second = save(state(2.0), tmp_path / "2", blocking=False, on_error="warn", events=told.append)
    assert second.result(timeout_s=60).num_failed_before == 1
    with pytest.raises(StorageError, match="No space left"):
        failed.result(timeout_s=0)
    assert list((tmp_path / "1").iterdir()) == []
    target = state(0.0)
    load(target, tmp_path / "2")
    assert torch.equal(target["weight"], state(2.0)["weight"])
    assert [event.failure for event in told if event.phase == "end"] == ["StorageError", ""]
    third = save(state(), tmp_path / "3", blocking=False, on_error="warn")
    assert third.result(timeout_s=60).num_failed_before == 0


def test_a_save_that_cannot_even_begin_is_a_handle_that_has_failed(tmp_path: Path) -> None:
    storage = FaultyStorage(str(tmp_path), Fault("raises", ("look for",)), 0)
    with pytest.warns(RuntimeWarning, match=r"the save of .* in the background failed: StorageError: cannot look for"):
        handle = save(state(), storage, blocking=False, on_error="warn")
    assert handle.done()
    with pytest.raises(StorageError, match="Permission denied"):
        handle.result(timeout_s=0)
    assert save(state(), tmp_path, blocking=False, on_error="warn").result(timeout_s=60).num_failed_before == 1


def test_unless_it_is_asked_for_a_failure_is_raised_by_the_next_save(tmp_path: Path) -> None:
    save(state(), full(tmp_path / "1"), blocking=False)
    with pytest.raises(CheckpointError, match=r"No space left on device.* what was asked for now was not begun"):
        save(state(), tmp_path / "2", blocking=False)
    save(state(), tmp_path / "2", blocking=False).result(timeout_s=60)


@pytest.mark.parametrize(("blocking", "on_error"), [(True, "warn"), (False, "never")])
def test_what_makes_no_sense_is_refused(tmp_path: Path, blocking: bool, on_error: Any) -> None:
    with pytest.raises(UsageError, match=f"on_error='{on_error}'"):
        save(state(), tmp_path, blocking=blocking, on_error=on_error)  # type: ignore[call-overload]


def fail_once(rank: int, directory: str) -> tuple[int, list[str]]:
    root = Path(directory)
    part = {f"part{rank}": torch.full((10,), float(rank))}
    save(part, full(root / "1", rank), blocking=False, on_error="warn")
    with pytest.warns(RuntimeWarning) as warned:
        second = save(part, root / "2", blocking=False, on_error="warn")
    return second.result(timeout_s=30).num_failed_before, [str(warning.message) for warning in warned]


def test_all_ranks_go_on_after_a_failure_of_one(tmp_path: Path) -> None:
    told = run_ranks(fail_once, 2, tmp_path, str(tmp_path))
    for count, [warning] in told:
        assert count == 1
        assert re.search(r"save failed on rank 0: StorageError: .*No space left on device; the one now begins", warning)
    assert (tmp_path / "2" / "manifest.json").exists()
    assert list((tmp_path / "1").iterdir()) == []


def test_room_is_wanted_for_two_checkpoints(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "not" / "there" / "yet")
    assert shortage(storage, 1) == ""
    assert re.fullmatch(r".* free at .*/yet, and one checkpoint takes 1.* two must fit, .*", shortage(storage, 1 << 60))
    assert shortage(Storage("s3://bucket/run?region=us-east-1"), 1 << 60) == ""


@needs_root
@pytest.mark.parametrize("num_elements", [300_000, 100_000])
def test_the_first_save_tells_before_it_writes_that_the_next_will_not_fit(tmp_path: Path, num_elements: int) -> None:
    """Of 2 MiB, the smaller checkpoint fits twice."""
    code = (
        "import logging, pathlib, sys, torch, ray_ckpt\n"
        "seen = []\n"
        "def look(record):\n"
        "    seen.append((record.getMessage(), [*pathlib.Path('run').rglob('*.distcp')]))\n"
        "    return True\n"
        "logging.getLogger('ray_ckpt.protocol.coordinator').addFilter(look)\n"
        f"state = {{'weight': torch.ones({num_elements})}}\n"
        "for step in (1, 2):\n"
        "    ray_ckpt.save(state, 'run', step, overwrite=True)\n"
        "    ray_ckpt.CheckpointStore('run').delete(step)\n"
        "print(*[(text, written) for text, written in seen if 'two must fit' in text], sep='\\n')\n"
    )
    command = f'mount -t tmpfs -o size=2m x {tmp_path}; cd {tmp_path}; exec {sys.executable} -c "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", command, "sh", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line]
    assert len(told) == (1 if num_elements == 300_000 else 0)
    assert all("one checkpoint takes 1.14 MiB" in line and line.endswith("[])") for line in told)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


@needs_root
@pytest.mark.cluster
@pytest.mark.timeout(200)
def test_the_elastic_job_goes_on_when_the_disk_is_full_for_a_while(sandbox: Sandbox) -> None:
    """The checkpoints lie on 2 MiB, which are full until the first save has failed."""
    run, events, report = (sandbox.home / name for name in ("run", "events", "report"))
    run.mkdir()
    setting = f"mount -t tmpfs -o size=2m x {run}; head -c 1920K /dev/zero > {run}/filler"
    job = sandbox.start(
        *("unshare", "--mount", "sh", "-ec", f'{setting}\nexec "$@"', "sh", sys.executable, "jobs/train_elastic.py"),
        *("--layouts", "single", "--dim", "100", "--layers", "2", "--steps", "60", "--save-every", "5"),
        *("--keep-last", "1", "--storage", str(run), "--events", str(events), "--json", str(report)),
        PYTHONPATH=str(REPOSITORY),
    )
    inside = Path(f"/proc/{job.pid}/root{run}")
    has_failed = "training goes on and tries again"
    wait_until(lambda: has_failed in job.stdout or job.ended, 100, lambda: job.stdout + job.stderr)
    (inside / "filler").unlink()
    job.wait_for("committed", 60)
    assert job.wait(30) == 0, job.stdout + job.stderr
    found = json.loads(report.read_text())
    assert (found["final_step"], found["restarts"], len(found["losses"])) == (60, [], 60)
    assert found["failed_saves"]
    assert all("No space left on device" in failed["cause"] for failed in found["failed_saves"])
    assert re.search(r"start: .* one checkpoint takes 237 KiB: two must fit", job.stdout)
    told = [json.loads(line) for line in events.read_text().splitlines()]
    ends = [event for event in told if (event["operation"], event["phase"]) == ("save", "end")]
    assert [event["failure"] for event in ends] == ["StorageError"] * len(found["failed_saves"]) + [""] * (
        len(ends) - len(found["failed_saves"])
    )
    first = found["failed_saves"][0]["step"]
    assert first == 5
    assert ends[1]["step"] < 2 * first  # tried again at the next step, not at the next save
