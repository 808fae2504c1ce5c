"""Two tiers on several nodes: the elastic job goes on from its neighbors' memory, whoever is killed."""

from __future__ import annotations

import os
import random
import re
import signal
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

import ray_ckpt
from ray_ckpt import cluster
from ray_ckpt.cluster.ram.client import open_files
from ray_ckpt.errors import IntegrityError
from ray_ckpt.storage.address import parse
from ray_ckpt.storage.store import CheckpointStore
from tests.support.clusters import Head, Started, joined_head, nodes_added, wait_until, wait_until_free
from tests.test_train_elastic import NEVER_ALIKE, SAVE_EVERY, STEPS, reference, report_of, start_job

pytestmark = pytest.mark.timeout(400)

LAYOUTS = "fsdp2x3,pp2,single"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with joined_head() as head:
        yield head


@pytest.fixture
def nodes(head: Head) -> Iterator[dict[str, Started]]:
    """Three nodes of one CPU each, by address."""
    with nodes_added(head, [f"127.0.0.{next(NEVER_ALIKE)}" for _ in range(3)]) as started:
        yield started


def neighbors(front: str, nodes: Mapping[str, Started]) -> list[str]:
    """The addresses of two nodes that alone hold some file."""
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    files = open_files(parse(front))
    for file in files.find([path for path, _ in files.list("")]):
        pair = [] if file is None else [addresses[node] for node in file.copies]
        if len(pair) == 2 and nodes.keys() >= set(pair):
            return pair
    raise AssertionError("all files are on the head's node")


def strike(head: Head, job: Started, storage: Path, step: int, choose: Callable[[], Sequence[Started]]) -> None:
    """Once the job saves this step beside training, and some step is durable, kill some nodes at once."""
    saving = re.compile(rf"step {step} of {STEPS}, .* saving")
    wait_until(
        lambda: job.ended or (bool(saving.search(job.stdout)) and CheckpointStore(storage).steps() != ()),
        120,
        lambda: (step, job.stdout, job.stderr),
    )
    assert not job.ended, (step, job.stdout, job.stderr)
    victims = choose()
    for node in victims:
        os.killpg(node.pid, signal.SIGSTOP)  # so that no copy is made between two kills
    for node in victims:
        head.sandbox.kill(node)


def finished(job: Started, storage: Path) -> dict[str, Any]:
    """The report, after what holds for every run."""
    assert job.wait(200) == 0, job.stdout + job.stderr
    report = report_of(storage)
    assert report["final_step"] == STEPS
    assert report["losses"] == pytest.approx(reference(LAYOUTS), rel=1e-4)
    store = CheckpointStore(storage)
    assert store.latest() == STEPS
    assert all(ray_ckpt.verify(store, step=step).verified for step in store.steps())
    wait_until_free(60)  # no actor of the memory is left, and what they held is gone with their processes
    store.clean(older_than_s=0)
    assert {path.parent.name for path in storage.rglob("*") if path.is_file()} == {
        f"step-{step}" for step in store.steps()
    }
    return report


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(20))
def test_nodes_are_killed_at_random_steps(head: Head, nodes: dict[str, Started], tmp_path: Path, seed: int) -> None:
    """Of eight runs, five lose one node, one loses two, one after the other; one has no copies, and one loses two nodes
    at once, which had the copies of each other."""
    chance = random.Random(seed)
    replicas = 0 if seed % 8 == 3 else 1
    front = f"ram://run{uuid.uuid4().hex[:8]}?replicas={replicas}"
    storage = tmp_path / "run"
    shared_before = set(os.listdir("/dev/shm"))
    job = start_job(head, LAYOUTS, storage, "--front", front, "--max-failures", "6", "--start-timeout", "60")
    first = chance.randrange(6, STEPS // 2, SAVE_EVERY)
    one, other, _ = chance.sample(sorted(nodes), 3)
    lose_neighbors = seed % 8 == 7
    strike(
        head, job, storage, first, lambda: [nodes[ip] for ip in (neighbors(front, nodes) if lose_neighbors else [one])]
    )
    if seed % 8 == 5:
        strike(head, job, storage, first + 4 * SAVE_EVERY, lambda: [nodes[other]])
    report = finished(job, storage)
    resumes = report["resumes"]
    assert resumes, job.stdout
    assert all(resume["layout"] != "fsdp2x3" for resume in resumes)
    if replicas == 0 or lose_neighbors:
        assert resumes[0]["durable_bytes"] > 0
    else:
        assert [(resume["tier"], resume["durable_bytes"]) for resume in resumes] == [("front", 0)] * len(resumes)
        assert resumes[0]["step"] >= first - SAVE_EVERY  # at most the save that was under way is lost
    assert {name for name in os.listdir("/dev/shm") if "ray_ckpt" in name} <= shared_before


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_driver_leaves_whole_steps_in_the_durable_store(
    head: Head, nodes: dict[str, Started], tmp_path: Path, seed: int
) -> None:
    storage = tmp_path / "run"
    job = start_job(head, LAYOUTS, storage, "--front", "ram", "--keep-last", "100")
    wait_until(lambda: job.ended or len(CheckpointStore(storage).steps()) > seed, 120, lambda: job.stdout + job.stderr)
    job.process.kill()
    job.wait(30)
    wait_until_free(60)
    store = CheckpointStore(storage)
    assert len(store.steps()) > seed
    assert all(ray_ckpt.verify(store, step=step).verified for step in store.steps())


@pytest.mark.slow
def test_a_flipped_bit_in_memory_is_read_from_another_copy_and_told(
    head: Head, nodes: dict[str, Started], tmp_path: Path
) -> None:
    name = f"run{uuid.uuid4().hex[:8]}"
    store = CheckpointStore(tmp_path / "run", front=f"ram://{name}?replicas=1")
    ray_ckpt.save({"x": torch.arange(2_000_000)}, store, step=1)
    store.make_durable(timeout_s=60)
    files = open_files(parse(f"ram://{name}"))
    [path] = [path for path, _ in files.list("step-1") if path.endswith(".distcp")]
    [found] = files.find([path])
    assert found is not None
    assert len(found.copies) == 2
    damaged = []
    for node, place in found.copies.items():
        with open(place.path, "r+b") as memory:
            memory.seek(found.num_bytes // 2)
            byte = memory.read(1)[0]
            memory.seek(found.num_bytes // 2)
            memory.write(bytes([byte ^ 1]))
        damaged.append(node)
        state = {"x": torch.zeros(2_000_000, dtype=torch.int64)}
        report = ray_ckpt.load(state, store)
        assert torch.equal(state["x"], torch.arange(2_000_000))
        assert report.tier == "front"
        if len(damaged) == 1 and report.damaged_copies:  # it was the first that was read
            assert report.durable_bytes == 0
            assert report.damaged_copies[0].endswith(f"read from node {list(found.copies)[1]} instead")
    [told] = report.damaged_copies
    assert told.endswith(f"read from {tmp_path / 'run' / 'step-1'} instead")
    assert 0 < report.durable_bytes < report.num_bytes == 16_000_000
    state = {"x": torch.zeros(2_000_000, dtype=torch.int64)}
    with pytest.raises(IntegrityError):
        ray_ckpt.load(state, f"ram://{name}")
    cluster.drop_memory(name)
