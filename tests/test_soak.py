"""Two hundred saves and loads, in which something is killed every tenth: nothing wrong, and nothing left."""

from __future__ import annotations

import json
import os
import random
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

import ray_ckpt
from ray_ckpt import CheckpointStore
from tests.support.clusters import Head, Sandbox, Started, add_node, joined, start_head, wait_until, wait_until_free

STEPS, KILL_EVERY, STEP_TIMEOUT_S = 200, 10, 180
VICTIMS = ("worker", "keeper", "node", "driver")

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3000)]


def told(driver: Started) -> Sequence[dict[str, Any]]:
    return [json.loads(line) for line in driver.stdout.splitlines() if line.startswith("{") and line.endswith("}")]


def kill_keeper(chance: random.Random) -> None:
    """That of any node."""
    keepers = [
        actor
        for actor in ray._private.state.actors().values()
        if actor["ActorClassName"] == "Keeper" and actor["State"] == "ALIVE"
    ]
    psutil.Process(chance.choice(keepers)["Pid"]).kill()


class Run:
    """The cluster, the driver on it, and what is killed of both."""

    def __init__(self, head: Head, store: Path, seed: int) -> None:
        self.head = head
        self.store = store
        self.nodes = {ip: add_node(head, ip, num_cpus=2) for ip in ("127.0.0.2", "127.0.0.3")}
        self.chance = random.Random(seed)
        self.drivers: list[Started] = []
        self.gate = store.parent / "gate"
        self.let_go_on(KILL_EVERY)
        self.start_driver()

    def let_go_on(self, step: int) -> None:
        """Up to this step, so that no kill comes too late."""
        written = self.gate.with_suffix(".new")
        written.write_text(str(step))
        written.replace(self.gate)

    def start_driver(self) -> None:
        front = f"ram://soak{uuid.uuid4().hex[:8]}?replicas=1"
        command = [
            "-m",
            "tests.support.soak_driver",
            self.head.address,
            str(self.store),
            front,
            str(STEPS),
            str(self.gate),
        ]
        self.drivers.append(self.head.sandbox.start(sys.executable, *command))

    @property
    def driver(self) -> Started:
        return self.drivers[-1]

    def wait_for(self, step: int) -> None:
        wait_until(
            lambda: self.driver.ended or any(line["step"] >= step for line in told(self.driver)),
            STEP_TIMEOUT_S,
            lambda: (step, self.driver.stdout[-2000:], self.driver.stderr[-2000:]),
        )
        assert not self.driver.ended or self.driver.process.returncode == 0, self.driver.stderr[-4000:]

    def kill(self, victim: str) -> None:
        if victim == "worker":
            os.kill(self.chance.choice(told(self.driver)[-1]["workers"]), 9)
        elif victim == "keeper":
            kill_keeper(self.chance)
        elif victim == "driver":
            self.driver.process.kill()
            self.driver.wait(30)
            self.start_driver()
        else:
            ip = self.chance.choice(sorted(self.nodes))
            self.head.sandbox.kill(self.nodes[ip])
            wait_until(lambda: not is_alive(ip), 60, ray.nodes)
            self.nodes[ip] = add_node(self.head, ip, num_cpus=2)


def is_alive(ip: str) -> bool:
    return any(node["Alive"] and node["NodeManagerAddress"] == ip for node in ray.nodes())


def test_two_hundred_steps_under_kills_leave_nothing(tmp_path: Path) -> None:
    shared_before = set(os.listdir("/dev/shm"))
    with Sandbox() as sandbox:
        head = start_head(sandbox, num_cpus=0)
        with joined(head):
            run = Run(head, tmp_path / "run", seed=0)
            for number, step in enumerate(range(KILL_EVERY, STEPS, KILL_EVERY)):
                run.wait_for(step)
                run.let_go_on(step + KILL_EVERY)
                run.kill(VICTIMS[number % len(VICTIMS)])
            run.wait_for(STEPS)
            assert run.driver.wait(STEP_TIMEOUT_S) == 0, run.driver.stderr
            wait_until_free(60)
            check_what_is_left(run, sandbox)
    assert {name for name in os.listdir("/dev/shm") if "ray_ckpt" in name} <= shared_before


def check_what_is_left(run: Run, sandbox: Sandbox) -> None:
    store = CheckpointStore(run.store)
    assert store.latest() == STEPS
    assert all(ray_ckpt.verify(store, step=step).verified for step in store.steps())
    store.clean(older_than_s=0)
    assert len(store.steps()) <= 3
    assert {path.parent.name for path in run.store.rglob("*") if path.is_file()} == {
        f"step-{step}" for step in store.steps()
    }
    for driver in run.drivers:
        lines = told(driver)
        first, last = lines[min(2, len(lines) - 1)], lines[-1]  # by then all that stays has been opened
        assert last["files"] <= first["files"] + 8, (first, last)
        assert last["threads"] <= first["threads"] + 4, (first, last)
    workers = {worker for driver in run.drivers for line in told(driver) for worker in line["workers"]}
    assert not [process for process in sandbox.processes() if process.pid in workers]
