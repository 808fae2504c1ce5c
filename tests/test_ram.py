"""`ram://` on one node: an ordinary storage, with limits and an owner."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import ray
import torch

import ray_ckpt
from ray_ckpt.cluster.ram.index import find_index
from ray_ckpt.errors import CheckpointNotFoundError, StorageError, UsageError
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.store import CheckpointStore


@pytest.fixture
def name() -> str:
    return f"run{uuid.uuid4().hex[:8]}"


@pytest.mark.usefixtures("local_ray")
class TestOneNode:
    def test_an_open_file_stays_whole_when_its_name_goes_to_another(self, name: str) -> None:
        storage = Storage(f"ram://{name}?replicas=0")
        storage.write_atomic("file", b"first")
        memory = bytearray(5)
        with storage.open_input("file") as file:
            storage.write_atomic("file", b"other")
            file.read_into(0, memoryview(memory))
        assert (memory, storage.read_bytes("file")) == (b"first", b"other")

    def test_a_write_that_fails_leaves_nothing(self, name: str) -> None:
        storage = Storage(f"ram://{name}?replicas=0")
        with contextlib.suppress(ZeroDivisionError), storage.create("file") as file:
            file.write(b"half")
            _ = 1 / 0
        assert storage.list() == {}
        index = find_index(name)
        assert index is not None
        assert [used for used, _ in ray.get(index.nodes.remote()).values()] == [0]

    def test_looking_begins_nothing(self, name: str) -> None:
        assert CheckpointStore(f"ram://{name}").steps() == ()
        with pytest.raises(CheckpointNotFoundError):
            ray_ckpt.load({"x": torch.ones(1)}, f"ram://{name}")
        assert find_index(name) is None

    @pytest.mark.parametrize("option", ["replicas=-1", "replica=1", "capacity_bytes=1GB", "lifetime=forever", "x"])
    def test_options_that_are_none_are_refused(self, name: str, option: str) -> None:
        with pytest.raises(UsageError):
            ray_ckpt.save({"x": torch.ones(1)}, f"ram://{name}?{option}")
        assert find_index(name) is None

    def test_other_options_than_it_was_begun_with_are_refused(self, name: str) -> None:
        Storage(f"ram://{name}?replicas=0").write_atomic("file", b"x")
        with pytest.raises(UsageError, match="replicas=0"):
            Storage(f"ram://{name}?replicas=2").read_bytes("file")
        assert Storage(f"ram://{name}").read_bytes("file") == b"x"

    def test_the_oldest_superseded_step_makes_room(self, name: str) -> None:
        store = CheckpointStore(f"ram://{name}?replicas=0&capacity_bytes=120000")
        for step in range(3):
            ray_ckpt.save({"x": torch.full((7000,), float(step))}, store, step=step)
        store.pin(0)
        ray_ckpt.save({"x": torch.full((7000,), 3.0)}, store, step=3)
        assert store.steps() == (0, 2, 3)
        state = {"x": torch.ones(7000)}
        ray_ckpt.load(state, store, step=0)
        assert torch.equal(state["x"], torch.zeros(7000))

    def test_what_never_fits_is_refused_with_the_numbers(self, name: str) -> None:
        store = CheckpointStore(f"ram://{name}?replicas=0&capacity_bytes=100000")
        ray_ckpt.save({"x": torch.ones(7000)}, store, step=1)
        with pytest.raises(StorageError, match=r"cannot create .* no room for 156 KiB .* of 97\.7 KiB"):
            ray_ckpt.save({"x": torch.ones(40000)}, store, step=2)
        assert (store.steps(), store.latest()) == ((1,), 1)
        assert store.damage(1) == ""


def test_a_reader_without_ray_is_told_what_to_do(tmp_path: Path) -> None:
    code = "import ray_ckpt; print(ray_ckpt.CheckpointStore('ram://run').latest())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "RAY_TMPDIR": str(tmp_path)},
    )
    assert "UsageError: ram://run is memory of a Ray cluster" in done.stderr
