"""The elastic job leaves a drained node within its notice, and loses no step by it. Real nodes, really drained."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import yaml

from tests.conftest import REPOSITORY
from tests.support.clusters import (
    BIN,
    Head,
    Sandbox,
    Started,
    joined_head,
    nodes_added,
    start_head,
    wait_until,
    wait_until_free,
)
from tests.test_train_elastic import NEVER_ALIKE, events_of, reference, report_of, start_job

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

MANIFEST = REPOSITORY / "deploy" / "kuberay" / "rayjob.yaml"

HOLD = """
import sys, time, ray
from ray_ckpt.cluster.ray_internals import draining_nodes

ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
held = ray.remote(num_cpus=1)(type("Held", (), {"ping": lambda self: None})).remote()
ray.get(held.ping.remote())
print("holds", flush=True)
deadline = time.monotonic() + 120
while not draining_nodes() and time.monotonic() < deadline:
    time.sleep(0.1)
print("drained", list(draining_nodes()) == [ray.get_runtime_context().get_node_id()], flush=True)
"""

NOTICE_S = 15
STEPS = 1000


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with joined_head() as head:
        yield head


@pytest.fixture
def nodes(head: Head) -> Iterator[dict[str, Started]]:
    """Two nodes of one CPU each, by address."""
    with nodes_added(head, [f"127.0.0.{next(NEVER_ALIKE)}" for _ in range(2)]) as started:
        yield started


def drain(head: Head, node_id: str) -> None:
    """As a person, or what hears a spot notice, does it."""
    command = [str(BIN / "ray"), "drain-node", "--address", head.address, "--node-id", node_id]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    done = subprocess.run(
        [*command, *reason, "--deadline-remaining-seconds", str(NOTICE_S)],
        env=head.sandbox.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("of_first_rank", [True, False], ids=["with-rank-0", "with-rank-1"])
def test_a_drained_node_is_left_within_its_notice_and_no_step_is_lost(
    head: Head, nodes: dict[str, Started], tmp_path: Path, of_first_rank: bool
) -> None:
    storage = tmp_path / "run"
    options = ("--steps", str(STEPS), "--save-every", "200", "--start-timeout", "60")
    job = start_job(head, "fsdp2x2,single", storage, *options)
    job.wait_for(f"step 200 of {STEPS}", 90)
    # Ranks are ordered by node address.
    address = sorted(nodes)[0 if of_first_rank else -1]
    [node_id] = [node["NodeID"] for node in ray.nodes() if node["NodeManagerAddress"] == address and node["Alive"]]
    began = time.monotonic()
    drain(head, node_id)
    wait_until(lambda: "start: single from step" in job.stdout or job.ended, 60, lambda: job.stdout + job.stderr)
    left_s = time.monotonic() - began
    head.sandbox.kill(nodes[address])  # as the cloud does when the notice is over
    assert job.wait(120) == 0, job.stdout + job.stderr
    report = report_of(storage)
    assert left_s < NOTICE_S
    assert report["layouts_used"] == ["fsdp2x2", "single"]
    assert report["restarts"] == []
    [drained] = report["drains"]
    assert drained["ranks"] == [0 if of_first_rank else 1]
    assert 0 < drained["notice_s"] <= NOTICE_S
    [resume] = report["resumes"]
    assert resume["step"] == drained["step"]
    steps = [event["step"] for event in events_of(storage) if event["phase"] == "step"]
    assert steps == list(range(1, STEPS + 1))  # each was trained once
    # Later, where little is left to learn, the rounding of another layout is as large as what is left.
    seen = drained["step"] + 50
    assert report["losses"][:seen] == pytest.approx(reference("fsdp2x2,single", seen), rel=1e-3)
    wait_until_free(60)


def test_the_manifests_pre_stop_drains_the_node_that_it_runs_on(tmp_path: Path) -> None:
    [job] = [each for each in yaml.safe_load_all(MANIFEST.read_text()) if each["kind"] == "RayJob"]
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    shell = group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    drained, _, waits = shell[-1].partition(" && sleep ")
    assert waits == "45"
    with Sandbox() as sandbox:
        head = start_head(sandbox, num_cpus=1)
        held = sandbox.start(sys.executable, "-c", HOLD, head.address)  # what is idle would go at once
        held.wait_for("holds", 60)
        done = subprocess.run(
            [*shell[:-1], drained],
            env=sandbox.environment(RAY_ADDRESS=head.address),
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        held.wait_for("drained True", 30)
