"""The four ways to start the main job, on real clusters: alone, on a running one, as a submitted job, interrupted.

All tests share one `ray start` head with two CPUs, except those that need another kind of Ray.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util import placement_group_table

from tests.conftest import REPOSITORY
from tests.support.clusters import (
    BIN,
    JOB,
    Head,
    Sandbox,
    Started,
    add_node,
    drivers,
    free_port,
    start_head,
    wait_until,
    wait_until_free,
)

SHORT = ("--workers", "2", "--steps", "3")
ENDLESS = ("--workers", "2", "--steps", "100000")
TRAINING = "train: 100000 steps"
FAILS_ONCE_JOINED = ("--workers", "2", "--backend", "nccl")
"""Wrong use that only a look at the cluster's resources can find: proof that the job got there, in a second."""

OUR_LINE = re.compile(
    r"(ray|group|train|save|regroup|load|verify|resume|reference|loss|verified)[: ].*|[┏┃┡│└].*",
)
"""What the job prints: a line per phase, the table, the verdict."""

JSON_KEYS = {
    *("verified", "workers", "backend", "target", "storage", "checkpoint_bytes", "tensors_compared"),
    *("objects_compared", "mismatches", "losses", "phases"),
}


pytestmark = pytest.mark.jobs


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


# Alone


@pytest.mark.slow
def test_alone_the_job_starts_its_own_ray_and_leaves_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    """A local Ray from a bare environment: verified, nothing but our own lines, no trace of it afterwards."""
    done = sandbox.run_job(*SHORT, "--json", str(tmp_path / "out.json"))
    assert done.wait(0) == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report.keys() >= JSON_KEYS
    assert report["losses"].keys() == {"pipeline", "resumed", "reference"}
    assert report["verified"] is True
    assert report["tensors_compared"] == 32
    assert done.stderr == ""
    assert [line for line in done.stdout.splitlines() if not OUR_LINE.fullmatch(line)] == []
    assert "verified: 32 tensors" in done.stdout
    # Its token lived in its environment, its Ray in this sandbox, its checkpoint in a directory that went with it.
    assert not (sandbox.home / ".ray").exists()
    assert len(ray_sessions(sandbox)) == 1
    assert Path(report["storage"]).parent == sandbox.tmp
    assert not Path(report["storage"]).exists()
    wait_until(lambda: not sandbox.processes(), 60, sandbox.processes)


@pytest.mark.slow
def test_verbose_lets_rays_own_lines_through(sandbox: Sandbox) -> None:
    done = sandbox.run_job(*FAILS_ONCE_JOINED, "--verbose", timeout_s=60)
    assert done.wait(0) == 2
    assert "Started a local Ray instance" in done.stdout + done.stderr


def test_ctrl_c_in_mid_training_ends_the_job_and_its_ray(sandbox: Sandbox) -> None:
    """SIGINT reaches the whole foreground group of a terminal, Ray's processes included. Prompt, and nothing left."""
    started = sandbox.start_job(*ENDLESS)
    started.wait_for(TRAINING, 90)
    interrupted_at = time.monotonic()
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait(60) == 128 + signal.SIGINT
    print(f"Ctrl-C: {time.monotonic() - interrupted_at:.2f} s until the job had ended")
    # After the line that `^C` stands on.
    assert started.stderr.strip() == "error: interrupted"
    wait_until(lambda: not sandbox.processes(), 60, sandbox.processes)
    assert list(sandbox.tmp.glob("ray-ckpt-*")) == []


@pytest.mark.parametrize("listening", [False, True], ids=["nobody", "not-ray"])
def test_an_address_where_no_cluster_is(sandbox: Sandbox, listening: bool) -> None:
    """One line, whether the port is closed or something else than Ray answers there."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        if listening:
            server.listen()
        done = sandbox.run_job(*SHORT, "--address", f"127.0.0.1:{port}", timeout_s=55)  # Ray's client waits 60 s
    assert_refused(done, f"127.0.0.1:{port}")
    assert ray_sessions(sandbox) == []


# On a running cluster


@pytest.mark.slow
def test_four_workers_share_the_two_cpus_of_the_cluster_in_ray_address(head: Head, tmp_path: Path) -> None:
    """Joined, not doubled: the run shows up in that cluster, asks for half a CPU each, and gives everything back."""
    before = set(placement_group_table())
    arguments = ("--workers", "4", "--steps", "3", "--json", str(tmp_path / "out.json"))
    done = head.sandbox.run_job(*arguments, RAY_ADDRESS=head.address)
    assert done.wait(0) == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["verified"] is True
    assert done.stderr == ""
    assert_joined(head, done)
    groups = [entry for key, entry in placement_group_table().items() if key not in before]
    assert [list(entry["bundles"].values()) for entry in groups] == [[{"CPU": 0.5}] * 4] * 2
    wait_until_free(60)


@pytest.mark.parametrize("how", ["address", "address-file"])
def test_the_cluster_is_found_by_other_ways(head: Head, how: str) -> None:
    """Through `--address`, and with no word at all through the file that `ray start` leaves."""
    arguments = ("--address", head.address) if how == "address" else ()
    done = head.sandbox.run_job(*FAILS_ONCE_JOINED, *arguments)
    assert_refused(done, "needs GPUs")
    assert_joined(head, done)
    wait_until_free(60)


@pytest.mark.slow
def test_a_stale_address_file_is_passed_over(sandbox: Sandbox) -> None:
    """The cluster that `ray start` had recorded is gone: the job runs on a local Ray."""
    sandbox.ray.mkdir()
    (sandbox.ray / "ray_current_cluster").write_text(f"127.0.0.1:{free_port()}")
    done = sandbox.run_job(*FAILS_ONCE_JOINED)
    assert_refused(done, "needs GPUs")
    assert len(ray_sessions(sandbox)) == 1


def test_a_group_that_cannot_be_placed_says_what_is_missing(head: Head) -> None:
    """Exit code 1 and one line: the resource, what was asked, what the cluster has, what to do."""
    done = head.sandbox.run_job(
        *("--workers", "2", "--cpus-per-worker", "3", "--start-timeout", "3", "--address", head.address)
    )
    assert done.wait(0) == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("error: the group was not placed within 3 s: asked for 2 x {CPU: 3}; ")
    assert "the cluster has 1 node with {CPU: 2, GPU: 0}" in line
    assert "missing CPU: needs 6, has 2" in line
    assert "What to do: ask for less (--workers, --cpus-per-worker" in line
    assert "waiting for 2 x {CPU: 3}; up: 1 node with {CPU: 2, GPU: 0}" in done.stdout
    wait_until_free(60)


# ray job


def test_a_submitted_job_ends_as_its_verification_does(head: Head, tmp_path: Path) -> None:
    """SUCCEEDED and 0; then, on the same storage, FAILED with the job's own exit code 2."""
    storage, report_path = tmp_path / "run", tmp_path / "out.json"
    arguments = (*SHORT, "--storage", str(storage), "--json", str(report_path))
    first = submit(head, "first", *arguments)
    assert first.wait(110) == 0, first.stdout + first.stderr
    client = JobSubmissionClient(head.dashboard)
    assert client.get_job_status("first") == JobStatus.SUCCEEDED
    assert json.loads(report_path.read_text())["verified"] is True
    assert "verified: 32 tensors" in client.get_job_logs("first")
    second = submit(head, "second", *arguments)
    assert second.wait(110) == 1, "the Jobs CLI knows 0 and 1 only"
    info = client.get_job_info("second")
    assert (info.status, info.driver_exit_code) == (JobStatus.FAILED, 2)
    assert "already holds a committed checkpoint" in client.get_job_logs("second")
    assert "Traceback" not in client.get_job_logs("second")
    wait_until_free(60)


def test_a_stopped_job_leaves_nothing_in_the_cluster_and_no_checkpoint(head: Head, tmp_path: Path) -> None:
    """`ray job stop` in mid-training: STOPPED, everything given back, nothing committed."""
    storage = tmp_path / "run"
    submitted = submit(head, "stopped", *ENDLESS, "--storage", str(storage), wait=False)
    assert submitted.wait(60) == 0, submitted.stdout + submitted.stderr
    client = JobSubmissionClient(head.dashboard)
    wait_until(lambda: TRAINING in client.get_job_logs("stopped"), 90, lambda: client.get_job_logs("stopped"))
    stop = head.sandbox.start(str(BIN / "ray"), "job", "stop", "--address", head.dashboard, "stopped")
    assert stop.wait(30) == 0, stop.stdout + stop.stderr
    assert client.get_job_status("stopped") == JobStatus.STOPPED
    wait_until_free(60)
    assert not (storage / "manifest.json").exists()
    assert list(storage.glob("probe-*")) == []


@pytest.mark.slow
def test_a_model_that_is_only_in_the_working_directory(head: Head, tmp_path: Path) -> None:
    """Driver and workers find it there, and what it needs."""
    (tmp_path / "needed_here.py").write_text("LAYERS = 2\n")
    (tmp_path / "model_here.py").write_text(
        "import needed_here\nfrom ray_ckpt.recipes.model import PipelineModel\n"
        "def make():\n    return PipelineModel(8, needed_here.LAYERS)\n"
    )
    flags = ("--workers", "2", "--steps", "2", "--model", "model_here:make")
    job = submit(head, "own-model", *flags, directory=tmp_path)
    assert job.wait(110) == 0, job.stdout + job.stderr
    client = JobSubmissionClient(head.dashboard)
    assert "verified: 16 tensors" in client.get_job_logs("own-model")
    assert str(tmp_path) not in client.get_job_logs("own-model")
    wait_until_free(60)


def submit(head: Head, name: str, *arguments: str, wait: bool = True, directory: Path | None = None) -> Started:
    flags = ("--address", head.dashboard, "--submission-id", name, "--working-dir", str(directory or "."))
    command = (str(BIN / "ray"), "job", "submit", *flags, *(() if wait else ("--no-wait",)))
    return head.sandbox.start(*command, "--", "python", str(REPOSITORY / JOB) if directory else JOB, *arguments)


# A node goes


@pytest.mark.slow
@pytest.mark.parametrize("what", ["node", "raylet"])
def test_the_rank_of_a_killed_node_is_named(head: Head, what: str) -> None:
    """Three workers on two nodes; of the second node, all processes or its raylet are killed in mid-training."""
    address = "127.0.0.2" if what == "node" else "127.0.0.3"  # Ray knows a dead node by its address for a while
    node = add_node(head, address, num_cpus=1)
    job = head.sandbox.start_job("--workers", "3", "--steps", "100000", "--address", head.address)
    job.wait_for(TRAINING, 100)
    assert "3 workers on 2 nodes" in job.stdout
    killed_at = time.monotonic()
    if what == "node":
        head.sandbox.kill(node)
    else:
        [raylet] = [process for process in head.sandbox.processes(node) if process.name() == "raylet"]
        raylet.kill()
    assert job.wait(30) == 1
    took_s = time.monotonic() - killed_at
    print(f"{what} killed: {took_s:.2f} s until the job had ended")
    # Ranks are ordered by their node's address, and two of three fit on the head.
    doomed = 0 if head.host > address else 2
    last = job.stderr.splitlines()[-1]
    place = re.escape(f"{socket.gethostname()} ({address})")
    assert re.match(rf"error: rank {doomed} on {place}: died: ", last), last
    assert re.findall(r"ranks? [\d, ]*\d", last) == [f"rank {doomed}"]
    assert took_s < 10
    wait_until_free(60)


# Token authentication


@pytest.fixture(scope="module")
def guarded_head() -> Iterator[Head]:
    """A cluster that asks for a token."""
    with Sandbox() as sandbox:
        yield start_head(sandbox, num_cpus=1, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 64)


def test_the_same_token_joins(guarded_head: Head) -> None:
    """Server and client agree on mode and token."""
    done = guarded_head.sandbox.run_job(
        *FAILS_ONCE_JOINED, RAY_ADDRESS=guarded_head.address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 64
    )
    assert_refused(done, "needs GPUs")


@pytest.mark.parametrize(
    "settings",
    [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 64}, {}],
    ids=["disabled", "other-token", "unset"],
)
def test_another_mode_or_token_is_refused_and_explained(guarded_head: Head, settings: dict[str, str]) -> None:
    """One line that names RAY_AUTH_MODE, and its value here."""
    done = guarded_head.sandbox.run_job(*FAILS_ONCE_JOINED, RAY_ADDRESS=guarded_head.address, **settings)
    assert_refused(done, f"RAY_AUTH_MODE is {settings.get('RAY_AUTH_MODE', 'unset')} here")


def assert_refused(done: Started, message: str) -> None:
    """Exit code 2, one line on standard error, no traceback."""
    assert done.wait(0) == 2, (done.stdout, done.stderr)
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def assert_joined(head: Head, done: Started) -> None:
    """The run was a driver of this cluster, and no second Ray was started."""
    assert done.pid in drivers()
    assert len(ray_sessions(head.sandbox)) == 1
    assert [node["Alive"] for node in ray.nodes()] == [True]


def ray_sessions(sandbox: Sandbox) -> list[str]:
    """One directory for every Ray that was started in the sandbox."""
    return [path.name for path in sandbox.ray.glob("session_2*")]
