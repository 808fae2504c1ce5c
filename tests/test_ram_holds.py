"""A step in the cluster's memory stays whole until those that read it are done, and no longer."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from rich.console import Console

import ray_ckpt
from ray_ckpt import cluster
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.cluster.ram.holds import File, Holds
from ray_ckpt.cluster.ram.index import find_index, index_name
from ray_ckpt.errors import CheckpointNotFoundError, StorageError, WorkerError
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.recipes.reshard import job
from ray_ckpt.recipes.screen import Screen
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.rewrite import BATCH_BYTES
from ray_ckpt.storage.store import CheckpointStore
from tests.support import rank_states
from tests.support.clusters import wait_until

READER = """
import sys, threading, ray, ray_ckpt
ray.init(address=sys.argv[1], log_to_driver=False)
with ray_ckpt.CheckpointStore(sys.argv[2]).reading():
    print("reading", flush=True)
    threading.Event().wait()
"""

LEAVER = """
import sys, threading, ray, ray_ckpt
from ray_ckpt.cluster.ram import client
client.RENEW_S = 0.05
ray.init(address=sys.argv[1], log_to_driver=False)
store = ray_ckpt.CheckpointStore(sys.argv[2])
weights = ray_ckpt.open_weights(store)
[renewal] = [thread for thread in threading.enumerate() if thread.name == "ray_ckpt-ram-renew"]
ray.shutdown()
renewal.join(60)
print(renewal.is_alive(), ray.is_initialized())
try:
    store.steps()
except ray_ckpt.StorageError as error:
    print(error)
del weights
print(ray.is_initialized())
"""


def values(step: int) -> dict[str, torch.Tensor]:
    return {"x": torch.arange(5000.0) + step}


def publish(store: CheckpointStore, step: int, *, version: int | None = None) -> None:
    ray_ckpt.save(values(step if version is None else version), store, step=step, overwrite=True)


class DeletedOnceHeld(Storage):
    """A step of a store whose steps somebody deletes as soon as the last hold that its reader takes is there."""

    store: CheckpointStore
    last: str
    """Address of what is held last."""

    @contextlib.contextmanager
    def held(self) -> Iterator[Storage]:
        with super().held() as held:
            if self.address == self.last:
                self.store.delete(*self.store.steps())
            yield held


def loaded(source: Any) -> torch.Tensor:
    state = {"x": torch.zeros(5000)}
    ray_ckpt.load(state, source)
    return state["x"]


def assert_holds(directory: Path, wanted: dict[str, torch.Tensor]) -> None:
    found = dict(ray_ckpt.open_weights(directory))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def make_keys(directory: Path) -> tuple[Path, Path]:
    key, public = directory / "key.pem", directory / "key.pub"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key)], check=True)
    subprocess.run(["openssl", "ec", "-in", str(key), "-pubout", "-out", str(public)], check=True, capture_output=True)
    return key, public


class TestHolds:
    """Without any cluster."""

    @staticmethod
    def file(name: str) -> File:
        return File(f"run/step-1/{name}", f"key of {name}", 1, 10, 0.0, {})

    def test_what_several_hold_is_freed_by_the_last(self) -> None:
        holds, file = Holds(), self.file("a")
        first, second = holds.begin({file.path: file}), holds.begin({file.path: file})
        assert holds.keep(file)
        assert holds.end(first) == []
        assert holds.files(second) == {file.path: file}
        assert holds.end(second) == [file]
        assert not holds.keep(file)

    def test_nobody_keeps_what_was_removed_before_the_hold(self) -> None:
        holds, removed, there = Holds(), self.file("a"), self.file("b")
        hold = holds.begin({there.path: there})
        assert not holds.keep(removed)
        assert holds.keep(there)
        assert holds.directories == {"run/step-1"}
        assert holds.end(hold) == [there]

    def test_a_hold_that_is_not_renewed_is_overdue(self) -> None:
        holds = Holds(lease_s=1.0)
        left, renewed = holds.begin({}), holds.begin({})

        def overdue() -> list[str]:
            holds.renew(renewed)
            return holds.overdue()

        assert overdue() == []
        wait_until(lambda: overdue() == [left], 60, overdue)


@pytest.mark.usefixtures("local_ray")
class TestOneNode:
    @pytest.fixture
    def store(self) -> CheckpointStore:
        return CheckpointStore(f"ram://held{uuid.uuid4().hex[:8]}/run?replicas=0")

    @staticmethod
    def name_of(store: CheckpointStore) -> str:
        return store.address.removeprefix("ram://").partition("/")[0]

    def used(self, store: CheckpointStore) -> int:
        index = find_index(self.name_of(store))
        assert index is not None
        return sum(used for used, _ in ray.get(index.nodes.remote()).values())

    def test_a_deleted_step_is_read_to_its_end_by_those_that_had_begun(self, store: CheckpointStore) -> None:
        publish(store, 1)
        before = self.used(store)
        publish(store, 2)
        with store.reading(1) as begun:
            store.delete(1)
            assert store.steps() == (2,)
            # Who comes later does not see it, though it is still there for others.
            with pytest.raises(CheckpointNotFoundError), store.reading(1):
                pass
            with CheckpointStore(store._storage).reading(2) as other:
                assert torch.equal(loaded(other), values(2)["x"])
            with pytest.raises(CheckpointNotFoundError):
                ray_ckpt.load(values(0), store, step=1)
            assert torch.equal(loaded(begun), values(1)["x"])
            assert self.used(store) > 1.5 * before
        assert abs(self.used(store) - before) < before / 10

    def test_weights_are_read_to_their_end_as_long_as_somebody_has_them(self, store: CheckpointStore) -> None:
        for step in (1, 2):
            ray_ckpt.save({"model": values(step)}, store, step=step)
        kept = self.used(store) / 2
        weights = ray_ckpt.open_weights(store, 1)
        store.delete(1)
        for _ in range(2):
            assert torch.equal(dict(weights)["x"], values(1)["x"])
        assert torch.equal(dict(ray_ckpt.open_weights(store, wait_for=2))["x"], values(2)["x"])
        assert self.used(store) > 1.5 * kept
        del weights
        wait_until(lambda: self.used(store) < 1.1 * kept, 20, lambda: self.used(store))

    @pytest.mark.parametrize(
        "verb",
        [
            "export",
            *(
                pytest.param(verb, marks=pytest.mark.slow)
                for verb in ("convert", "diff", "scan", "verify signature", "report")
            ),
        ],
    )
    def test_whoever_looks_or_copies_reads_to_the_end_too(
        self, store: CheckpointStore, tmp_path: Path, verb: str
    ) -> None:
        """The step is deleted once the first bytes have been read; as many as these are left by then."""
        large = {"model": {name: torch.arange(float(BATCH_BYTES // 4)) for name in "abc"}}
        ray_ckpt.save(large, store, step=1)
        ray_ckpt.save(large, store, step=2)
        begun = store.location(1)
        deletions = []

        def delete_once(done: int, total: int) -> None:
            if not deletions:
                deletions.append((done, total))
                store.delete(1)

        if verb == "export":
            ray_ckpt.export(store, tmp_path / "out", step=1, to="safetensors", progress=delete_once)
            assert_holds(tmp_path / "out", large["model"])
        elif verb == "convert":
            ray_ckpt.convert(store, tmp_path / "out", step=1, progress=delete_once)
            assert_holds(tmp_path / "out", large["model"])
        elif verb == "diff":
            report = ray_ckpt.diff(store, store, left_step=1, right_step=2, progress=delete_once)
            assert (report.equal, report.num_equal) == (True, 3)
        elif verb == "scan":
            assert not ray_ckpt.scan_nonfinite(store, 1, progress=delete_once)
        elif verb == "report":
            page = ray_ckpt.write_report(store, tmp_path / "page.html", 1, layout="tp2", progress=delete_once)
            assert page.verification is not None
            assert (page.verification.verified, page.damage, page.num_tensors) == (True, "", 3)
        else:
            key, public = make_keys(tmp_path)
            ray_ckpt.sign(store, key, 1)
            assert len(ray_ckpt.verify_signature(store, public, 1, progress=delete_once).files) == 3
        [(done, total)] = deletions
        assert done < total
        assert store.steps() == (2,)
        with pytest.raises(StorageError):  # what does not hold it sees it no more
            begun.read_bytes(MANIFEST_NAME)

    @pytest.mark.parametrize("is_delta", [pytest.param(False, marks=pytest.mark.slow), True])
    def test_a_record_is_read_to_its_end(self, store: CheckpointStore, is_delta: bool) -> None:
        """The step is deleted, with all that it is built on, once its reader holds it and before anything is read."""
        publisher, state = ray_ckpt.WeightPublisher(store, whole_every=3 if is_delta else 1), values(0)
        for step in (1, 2):
            state["x"][step] += 1
            publisher.save(state, step)
        gone = DeletedOnceHeld(store.location(2).uri)
        gone.store = store
        gone.last = store.address if is_delta else store.location(2).address  # of a delta it is all of the store
        contents = ray_ckpt.inspect(gone)
        assert store.steps() == ()
        assert contents.tensor("x").shape == (5000,)
        assert contents.manifest.attempt
        with pytest.raises(CheckpointNotFoundError):
            ray_ckpt.inspect(store, 2)

    @pytest.mark.slow
    def test_a_reshard_rewrites_what_is_deleted_meanwhile(self, store: CheckpointStore, tmp_path: Path) -> None:
        """Once the job has read the record, and before its tasks read the first tensor."""
        publish(store, 1)
        screen = Screen(console=Console(file=io.StringIO()))
        with contextlib.ExitStack() as holds:
            options = job.Options(store._storage.uri, "tp2", str(tmp_path / "resharded"))
            prepared = job.prepare(options, screen, holds)
            store.delete(1)
            with pytest.raises(CheckpointNotFoundError):
                job.prepare(options, screen, holds)
            job.rewrite(prepared, 100, screen)
            job.commit(prepared, screen)
        assert torch.equal(loaded(tmp_path / "resharded"), values(1)["x"])
        assert ray_ckpt.verify(tmp_path / "resharded").verified

    def test_what_a_delta_is_built_on_stays_for_its_readers(self, store: CheckpointStore) -> None:
        publisher, follower = ray_ckpt.WeightPublisher(store, whole_every=3), ray_ckpt.WeightFollower(store)
        state, served = values(0), {"x": torch.zeros(5000)}
        for step in range(3):
            state["x"][step] += 1
            publisher.save(state, step)
        third = state["x"].clone()
        begun = ray_ckpt.open_weights(store, 2)
        assert follower.fetch(served).num_bytes == 20_000
        state["x"][7] += 1
        publisher.save(state, 3)
        store.prune(ray_ckpt.keep_last(1))
        assert store.steps() == (3,)
        for _ in range(2):
            assert torch.equal(dict(begun)["x"], third)
        assert torch.equal(served["x"], third)
        assert follower.fetch(served).step == 3
        state["x"][8] += 1
        publisher.save(state, 4)
        assert follower.fetch(served).num_bytes < 1000
        assert torch.equal(served["x"], state["x"])
        assert ray_ckpt.verify(store, step=4).verified

    def test_a_replaced_step_is_both_to_each_reader_its_own(self, store: CheckpointStore) -> None:
        publish(store, 1)
        with store.reading(1) as old:
            publish(store, 1, version=7)
            with store.reading(1) as new:
                publish(store, 1, version=9)
                assert torch.equal(loaded(old), values(1)["x"])
                assert torch.equal(loaded(new), values(7)["x"])
                assert torch.equal(loaded(store), values(9)["x"])
            assert torch.equal(loaded(old), values(1)["x"])
        assert torch.equal(loaded(store), values(9)["x"])

    @pytest.mark.slow
    def test_memory_that_is_read_makes_no_room(self, store: CheckpointStore) -> None:
        small = CheckpointStore(f"ram://{self.name_of(store)}/run?replicas=0&capacity_bytes=80000")
        for step in (1, 2, 3):
            publish(small, step)
        with small.reading(1) as begun:
            publish(small, 4)  # step 2 makes room, though step 1 is older
            assert small.steps() == (1, 3, 4)
            small.delete(1, 3)
            publish(small, 5)
            small.delete(4)
            with pytest.raises(StorageError, match=r"of that is of removed steps that are still being read"):
                ray_ckpt.save({"x": torch.zeros(10_000)}, small, 6)
            assert torch.equal(loaded(begun), values(1)["x"])
        ray_ckpt.save({"x": torch.zeros(10_000)}, small, 6)
        assert small.steps() == (5, 6)

    def test_what_was_deleted_does_not_come_back_with_a_new_index(self, store: CheckpointStore) -> None:
        for step in (1, 2):
            publish(store, step)
        with store.reading(1):
            store.delete(1)
            index = find_index(self.name_of(store))
            pid = ray.get(index.__ray_call__.remote(lambda _: __import__("os").getpid()))  # type: ignore[union-attr]
            ray.kill(index, no_restart=False)

            def has_another() -> bool:
                again = ray.get_actor(index_name(self.name_of(store)), namespace="ray_ckpt")
                return bool(pid != ray.get(again.__ray_call__.remote(lambda _: __import__("os").getpid())))

            wait_until(has_another, 60, lambda: "the index did not start anew")
        assert store.steps() == (2,)
        assert torch.equal(loaded(store), values(2)["x"])

    def test_a_reader_that_has_left_the_cluster_begins_no_other(self, store: CheckpointStore) -> None:
        ray_ckpt.save({"model": values(1)}, store, step=1)
        command = [sys.executable, "-c", LEAVER, ray.get_runtime_context().gcs_address, store._storage.uri]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
        alive, told, running = done.stdout.splitlines()
        assert (alive, running) == ("False False", "False")
        assert f"ram://{self.name_of(store)} is out of reach: this process has left its Ray cluster" in told
        assert "Traceback" not in done.stderr

    @pytest.mark.slow
    def test_a_reader_that_is_killed_holds_nothing_for_long(self, store: CheckpointStore) -> None:
        publish(store, 1)
        before = self.used(store)
        publish(store, 2)
        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-c", READER, address, store._storage.uri]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
            try:
                assert reader.stdout is not None
                assert reader.stdout.readline() == "reading\n"
                store.delete(2)
                assert self.used(store) > 1.5 * before
            finally:
                reader.kill()
        start = time.monotonic()
        wait_until(lambda: abs(self.used(store) - before) < before / 10, 60, lambda: self.used(store))
        assert time.monotonic() - start < 45

    @pytest.mark.slow
    def test_workers_load_what_is_deleted_while_they_do(self, store: CheckpointStore, tmp_path: Any) -> None:
        with WorkerGroup(2, cpus_per_worker=0.5, process_group=False, call_timeout_s=60) as group:
            for target in (store._storage.uri, str(tmp_path / "run")):
                cluster.save(group, rank_states.stage_of, target, 4)
                cluster.save(group, rank_states.stage_of, target, 5)
            group.run(rank_states.set_publisher, store._storage.uri)
            [report, _] = cluster.load(group, rank_states.stage_of_a_follower, store, wait_for=5, wait_s=60)
            wanted = [float(torch.arange(1000.0 + rank).sum()) for rank in range(2)]
            assert [found[0] for found in group.run(rank_states.value_of_follower)] == wanted
            assert (report.step, store.steps()) == (5, (4,))
            # The control: a directory does not promise that.
            group.run(rank_states.set_publisher, str(tmp_path / "run"))
            with pytest.raises(WorkerError, match="step-5"):
                cluster.load(group, rank_states.stage_of_a_follower, tmp_path / "run")
            with pytest.raises(CheckpointNotFoundError, match=r"within 0\.2 s; the newest that is there is 4"):
                cluster.load(group, rank_states.stage_of_a_follower, tmp_path / "run", wait_for=5, wait_s=0.2)
