"""The main job on an autoscaled cluster: a head without CPUs, nodes that come for the group and go after it."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import ray

from tests.support.clusters import Sandbox, joined, start_autoscaled_head, wait_until, wait_until_free


def nodes_up() -> int:
    """Nodes of the cluster we have joined, the head included."""
    return sum(node["Alive"] for node in ray.nodes())


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_nodes_come_for_the_job_and_go_after_it(tmp_path: Path) -> None:
    """The placement group is the demand: the job says what it waits for, runs on the new nodes, and lets them go."""
    with Sandbox() as sandbox:
        head = start_autoscaled_head(sandbox, max_workers=2)
        with joined(head):
            assert nodes_up() == 1
            job = sandbox.start_job(
                *("--workers", "2", "--steps", "3", "--address", head.address, "--storage", str(tmp_path / "run"))
            )
            start = time.monotonic()
            wait_until(lambda: nodes_up() == 3, 90, lambda: (nodes_up(), job.stdout, job.stderr))
            print(f"2 nodes came within {time.monotonic() - start:.1f} s")
            assert job.wait(110) == 0, job.stdout + job.stderr
            waiting = r"group: waiting for 2 x \{CPU: 1\}; up: 1 node with \{CPU: 0, GPU: 0\}; \d+ of 300 s"
            assert re.search(waiting, job.stdout), job.stdout
            assert "group: 2 workers on 2 nodes, gloo" in job.stdout
            assert "verified: 32 tensors" in job.stdout
            assert job.stderr == ""
            took_s = wait_until(lambda: nodes_up() == 1, 60, lambda: ray.nodes())
            print(f"the nodes went within {took_s:.1f} s")
            wait_until_free(60)
    assert sandbox.processes() == []
