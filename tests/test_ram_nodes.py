"""`ram://` on several nodes: what is saved outlives some of them, and nothing outlives its owner."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import torch

import ray_ckpt
from ray_ckpt import Saved, cluster
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.cluster.ram.client import RamFiles, open_files
from ray_ckpt.cluster.ram.index import find_index
from ray_ckpt.storage.address import parse
from ray_ckpt.storage.store import CheckpointStore
from tests.support import rank_states
from tests.support.clusters import Head, Started, joined_head, nodes_added, wait_until, wait_until_free
from tests.support.sockets import bytes_received_from

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

DRIVER = Path(__file__).parent / "support" / "ram_driver.py"


@pytest.fixture
def name(head: Head) -> Iterator[str]:
    name = f"run{uuid.uuid4().hex[:8]}"
    yield name
    cluster.drop_memory(name)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with joined_head() as head:
        yield head


@pytest.fixture
def nodes(head: Head) -> Iterator[list[Started]]:
    """Two nodes of one CPU each, new for each test that takes one away."""
    with nodes_added(head, ["127.0.0.2", "127.0.0.3"]) as started:
        yield list(started.values())


def files_of(uri: str) -> RamFiles:
    return open_files(parse(uri))


def copies_of(name: str) -> set[int]:
    """How many copies the files have."""
    files = files_of(f"ram://{name}")
    return {len(file.copies) for file in files.find([path for path, _ in files.list("")]) if file is not None}


def holds_something(name: str, ip: str) -> bool:
    """Whether a node holds something, as far as the index knows."""
    files = files_of(f"ram://{name}")
    holders = {node for file in files.find([path for path, _ in files.list("")]) if file for node in file.copies}
    return any(node["NodeManagerAddress"] == ip for node in ray.nodes() if node["NodeID"] in holders)


def save_step(group: WorkerGroup, target: str, step: int) -> None:
    group.run(rank_states.hold_step, step)
    cluster.save(group, rank_states.held_state_of, CheckpointStore(target), step)


def loaded(target: str, num_workers: int, step: int | None = None) -> int:
    """The step whose state is found there, on one rank, bit for bit."""
    state = {f"stage{rank}": torch.full((1000 + rank,), -1.0) for rank in range(num_workers)}
    state |= {"common": torch.full((7,), -1.0), "step": -1}
    ray_ckpt.load(state, target, step=step)
    found = state["step"]
    for rank in range(num_workers):
        assert torch.equal(state[f"stage{rank}"], torch.arange(1000.0 + rank) + found)
    assert torch.equal(state["common"], torch.full((7,), float(found)))
    return found


def test_another_node_has_what_a_killed_one_held(head: Head, nodes: list[Started], name: str) -> None:
    target = f"ram://{name}"
    with WorkerGroup(2, process_group=False, start_timeout_s=60) as group:
        save_step(group, target, 1)
        save_step(group, target, 2)
    assert copies_of(name) == {2}
    # This process is on the head's node, which keeps the records that it wrote, and reads all else from others.
    assert loaded(target, 2) == 2
    head.sandbox.kill(nodes[0])
    assert loaded(target, 2) == 2
    wait_until(lambda: not holds_something(name, "127.0.0.2"), 60, lambda: copies_of(name))
    wait_until(lambda: copies_of(name) == {2}, 60, lambda: copies_of(name))
    head.sandbox.kill(nodes[1])
    assert loaded(target, 2) == 2
    assert ray_ckpt.verify(target).verified


def test_a_step_that_is_no_longer_whole_is_gone(head: Head, nodes: list[Started], name: str) -> None:
    """Step 1 has no copies, and a node takes a part of it along; step 2 was saved after that."""
    target = f"ram://{name}?replicas=0"
    with WorkerGroup(2, process_group=False, start_timeout_s=60) as group:
        save_step(group, target, 1)
    store = CheckpointStore(target)
    assert store.steps() == (1,)
    head.sandbox.kill(nodes[0])
    wait_until(lambda: store.steps() == (), 60, store.steps)
    assert store.latest() is None
    ray_ckpt.save({"x": torch.ones(3)}, store, step=2)
    assert store.latest() == 2


def test_the_index_starts_anew_from_what_the_keepers_hold(head: Head, name: str) -> None:
    store = CheckpointStore(f"ram://{name}?replicas=0")
    for step in (1, 2):
        ray_ckpt.save({"x": torch.full((5,), float(step))}, store, step=step)
    store.delete(1)
    before = store.location(2).list()
    [pid] = {worker.pid for worker in head.sandbox.processes() if _is_actor(worker, "Index")}
    os.kill(pid, signal.SIGKILL)
    assert store.steps() == (2,)
    assert store.location(2).list() == before
    state = {"x": torch.zeros(5)}
    ray_ckpt.load(state, store)
    assert torch.equal(state["x"], torch.full((5,), 2.0))
    ray_ckpt.save(state, store, step=3)
    assert store.steps() == (2, 3)


def test_the_command_joins_the_cluster(head: Head, name: str) -> None:
    ray_ckpt.save({"x": torch.ones(5)}, CheckpointStore(f"ram://{name}?replicas=0"), step=3)
    listing = head.sandbox.start(sys.executable, "-m", "ray_ckpt", "ls", f"ram://{name}", RAY_ADDRESS=head.address)
    assert listing.wait(60) == 0
    assert "3" in listing.stdout
    assert listing.stderr == ""


def test_of_blocks_on_another_node_only_what_is_wanted_is_moved(head: Head, nodes: list[Started], name: str) -> None:
    """And a flipped bit in its memory is found there, and read from another copy."""
    store = CheckpointStore(f"ram://{name}?replicas=1")
    with WorkerGroup(2, process_group=False, start_timeout_s=60) as group:
        for step in (1, 2):  # with the first one the memory of all nodes is begun
            cluster.save(group, rank_states.wide_matrix_of, store, step)
        wide = group.run(rank_states.wide_matrix_of)
    files = files_of(f"ram://{name}")
    manifest = store.manifest(2)
    # In a ring of three nodes the matrix of one rank has no copy on this one, where this process is.
    for rank in range(2):
        [chunk] = manifest.tensors[f"wide{rank}"].chunks
        [found] = files.find([f"step-2/{chunk.file}"])
        assert found is not None
        if files.node not in found.copies:
            break
    assert files.node not in found.copies
    doors = [place.door.location for place in found.copies.values()]
    ports = {int(location.rpartition(":")[2]) for location in doors}
    saved = wide[rank][f"wide{rank}"]
    rows, columns = saved.shape
    # The first read is not counted: threads open connections at the same time, and all but one are closed after it.
    for start in (0, 0, columns // 2):
        state = {"half": torch.full((rows, columns // 2), -1.0)}
        before = bytes_received_from(ports)
        half = {"half": Saved(f"wide{rank}").narrow(1, start, columns // 2)}
        ray_ckpt.load(state, store, key_map=half, strict=False)
        assert torch.equal(state["half"], saved[:, start : start + columns // 2])
        if before:
            moved = bytes_received_from(ports) - before
            assert saved.nbytes // 2 <= moved <= 1.05 * (saved.nbytes // 2)
    assert before
    assert chunk.data_start is not None
    with open(next(iter(found.copies.values())).path, "r+b") as memory:  # of the half that is not read
        memory.seek(chunk.data_start + 9)
        memory.write(b"\xff")
    state = {"half": torch.full((rows, columns // 2), -1.0)}
    report = ray_ckpt.load(state, store, key_map=half, strict=False)
    assert torch.equal(state["half"], saved[:, columns // 2 :])
    [told] = report.damaged_copies
    assert "of 'half' are damaged" in told
    assert told.endswith(f"read from node {list(found.copies)[1]} instead")


def _is_actor(process: psutil.Process, name: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.name().startswith(f"ray::{name}")
    return False


@pytest.mark.parametrize("lifetime", ["job", "detached"])
def test_it_ends_with_its_driver_however_that_ends_unless_detached(head: Head, name: str, lifetime: str) -> None:
    target = f"ram://{name}?replicas=0&lifetime={lifetime}"
    driver = head.sandbox.start(sys.executable, str(DRIVER), head.address, target)
    driver.wait_for("saved", 60)
    driver.process.kill()
    driver.wait(30)
    if lifetime == "job":
        wait_until_free(60)
        assert find_index(name) is None
        return
    state = {"x": torch.zeros(1000, dtype=torch.int64)}
    ray_ckpt.load(state, f"ram://{name}")
    assert torch.equal(state["x"], torch.arange(1000))
    cluster.drop_memory(name)
    wait_until_free(60)
