"""A store with two tiers: saved in memory, durable a moment later."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

import ray_ckpt
from ray_ckpt import CheckpointStore, cluster, keep_last
from ray_ckpt.cli.main import cli
from ray_ckpt.cluster.ram.index import find_index
from ray_ckpt.errors import CheckpointError, CheckpointNotFoundError, UsageError
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.storage.files import RetryPolicy, Storage
from tests.support.clusters import wait_until
from tests.support.s3 import run_s3


@pytest.fixture
def name() -> Iterator[str]:
    name = f"run{uuid.uuid4().hex[:8]}"
    yield name
    if ray.is_initialized():
        cluster.drop_memory(name)


def state_of(step: int) -> dict[str, object]:
    return {"x": torch.arange(70000.0) + step, "seen": step, "odd": {step}}


def saved(store: CheckpointStore, *steps: int) -> list[ray_ckpt.SaveReport]:
    return [ray_ckpt.save(state_of(step), store, step=step) for step in steps]


def loaded(store: CheckpointStore, step: int) -> ray_ckpt.LoadReport:
    """The report of a load that found this step, bit for bit."""
    state = {"x": torch.full((70000,), -1.0), "seen": -1, "odd": set[int]()}
    report = ray_ckpt.load(state, store)
    assert (report.step, state["seen"], state["odd"]) == (step, step, {step})
    assert torch.equal(state["x"], state_of(step)["x"])
    return report


def test_what_cannot_work_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no other process keeps its files"):
        CheckpointStore(tmp_path / "run", front=tmp_path / "nvme")
    with pytest.raises(UsageError, match="is the durable store itself"):
        CheckpointStore("ram://run", front="ram://run?replicas=0")
    with pytest.raises(UsageError, match="durable_every=0 must be at least 1"):
        CheckpointStore(tmp_path / "run", front="ram://run", durable_every=0)
    with pytest.raises(UsageError, match="there is none"):
        CheckpointStore(tmp_path / "run", durable_every=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("local_ray")
class TestTwoTiers:
    def test_every_second_step_becomes_durable_and_either_tier_is_read(self, tmp_path: Path, name: str) -> None:
        store = CheckpointStore(tmp_path / "run", front=f"ram://{name}?replicas=0", durable_every=2)
        reports = saved(store, 1, 2, 3)
        assert {report.uri for report in reports} == {f"ram://{name}/step-{step}" for step in (1, 2, 3)}
        assert [report.not_durable for report in reports] == [(), (), ()]
        assert store.make_durable(2, timeout_s=60) == 2
        durable = CheckpointStore(tmp_path / "run")
        assert (durable.steps(), store.steps(), store.latest()) == ((2,), (1, 2, 3), 3)
        assert ray_ckpt.verify(durable, step=2).verified
        report = loaded(store, 3)
        assert (report.tier, report.durable_bytes, report.damaged_copies) == ("front", 0, ())
        cluster.drop_memory(name)
        assert store.steps() == (2,)
        report = loaded(pickle.loads(pickle.dumps(store)), 2)
        assert (report.tier, report.durable_bytes) == ("durable", report.num_bytes)
        assert report.num_bytes == 280000

    def test_the_last_step_is_made_durable_at_the_end(self, tmp_path: Path, name: str) -> None:
        store = CheckpointStore(tmp_path / "run", front=f"ram://{name}?replicas=0", durable_every=100)
        saved(store, 7, 8)
        assert (store.make_durable(timeout_s=60), CheckpointStore(tmp_path / "run").steps()) == (8, (8,))
        assert store.make_durable(timeout_s=0) == 8
        with pytest.raises(CheckpointNotFoundError, match="step 9"):
            store.make_durable(9, timeout_s=60)

    def test_a_durable_store_that_fails_stops_nothing_and_is_told_until_it_heals(
        self, tmp_path: Path, name: str
    ) -> None:
        store = CheckpointStore(tmp_path / "run", front=f"ram://{name}?replicas=0")
        (tmp_path / "run").write_text("a file where the directory is to be")
        saved(store, 1)
        wait_until(lambda: store.copying().problems != (), 60, store.copying)
        [report] = saved(store, 2)
        assert any(text.startswith("step 1 is not durable: cannot ") for text in report.not_durable)
        with pytest.raises(CheckpointError, match=r"step 2 of .* is not durable after 0 s"):
            store.make_durable(timeout_s=0)
        store.prune(keep_last(1))
        assert (store.steps(), loaded(store, 2).tier) == ((1, 2), "front")  # step 1 is still to be copied
        (tmp_path / "run").unlink()
        wait_until(lambda: not store.copying().waiting, 90, store.copying)
        assert CheckpointStore(tmp_path / "run").steps() == (1, 2)
        assert store.prune(keep_last(1)).removed == (1,)
        assert ray_ckpt.verify(tmp_path / "run").verified

    def test_another_attempts_step_is_replaced_only_when_that_was_asked_for(self, tmp_path: Path, name: str) -> None:
        durable = CheckpointStore(tmp_path / "run")
        ray_ckpt.save({"x": torch.zeros(2)}, durable, step=1)
        before = (tmp_path / "run" / "step-1" / MANIFEST_NAME).read_bytes()
        store = CheckpointStore(tmp_path / "run", front=f"ram://{name}?replicas=0")
        saved(store, 1)
        with pytest.raises(CheckpointError, match=r"step 1 of .* already holds a committed checkpoint"):
            store.make_durable(1, timeout_s=60)
        assert (tmp_path / "run" / "step-1" / MANIFEST_NAME).read_bytes() == before
        ray_ckpt.save(state_of(1), store, step=1, overwrite=True)
        assert store.make_durable(1, timeout_s=60) == 1
        assert loaded(durable, 1).tier is None
        assert ray_ckpt.verify(durable).verified

    def test_pins_and_deletes_hold_in_both_tiers(self, tmp_path: Path, name: str) -> None:
        store = CheckpointStore(tmp_path / "run", front=f"ram://{name}?replicas=0")
        saved(store, 1, 2)
        store.make_durable(1, timeout_s=60)
        store.make_durable(2, timeout_s=60)
        store.pin(1)
        with pytest.raises(UsageError, match="pinned"):
            store.delete(1)
        assert store.prune(keep_last(1)).removed == ()
        store.unpin(1)
        assert store.delete(1).removed == (1,)
        assert (store.steps(), CheckpointStore(tmp_path / "run").steps()) == ((2,), (2,))

    def test_memory_that_is_full_lets_go_of_what_is_durable_first(self, tmp_path: Path, name: str) -> None:
        store = CheckpointStore(
            tmp_path / "run", front=f"ram://{name}?replicas=0&capacity_bytes=1000000", durable_every=2
        )
        saved(store, 1, 2)
        store.make_durable(2, timeout_s=60)
        (tmp_path / "run").rename(tmp_path / "healthy")
        (tmp_path / "run").write_text("a file where the directory is to be")
        saved(store, 3, 4, 5, 6, 7)  # three steps fit
        assert CheckpointStore(f"ram://{name}").steps() == (4, 6, 7)
        assert store.copying().given_up == {}
        saved(store, 8)
        assert CheckpointStore(f"ram://{name}").steps() == (6, 7, 8)
        assert "no longer in memory" in store.copying().given_up[4]

    def test_orders_that_an_index_has_forgotten_are_carried_out_after_the_next_save(
        self, tmp_path: Path, name: str
    ) -> None:
        store = CheckpointStore(tmp_path / "run", front=f"ram://{name}?replicas=0")
        (tmp_path / "run").write_text("a file where the directory is to be")
        saved(store, 1)
        index = find_index(name)
        assert index is not None
        ray.kill(index, no_restart=False)
        wait_until(lambda: store.copying().waiting == {}, 60, store.copying)
        (tmp_path / "run").unlink()
        saved(store, 2)
        wait_until(lambda: not store.copying().waiting, 60, store.copying)
        assert CheckpointStore(tmp_path / "run").steps() == (1, 2)

    def test_commands_show_both_tiers_and_drop_the_memory(
        self, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        store = CheckpointStore(tmp_path / "run", front=f"ram://{name}?replicas=0", durable_every=2)
        saved(store, 2, 3)
        store.make_durable(2, timeout_s=60)
        assert cli.main(["ls", str(tmp_path / "run"), "--front", f"ram://{name}"], standalone_mode=False) == 0
        shown = capsys.readouterr().out.splitlines()
        assert [line.split()[-2:] for line in shown[-2:]] == [["front", "durable"], ["front", "latest"]]
        found = [cli.main(["ram", "--drop", name], standalone_mode=False) for _ in range(2)]
        assert (found, store.steps()) == ([0, 1], (2,))

    @pytest.mark.slow
    def test_an_object_store_that_throttles_becomes_durable_later_and_is_not_read_by_a_resume(self, name: str) -> None:
        with run_s3() as s3:
            durable = Storage(s3.uri("run"), retry=RetryPolicy(attempts=2, first_wait_s=0.001, max_wait_s=0.002))
            store = CheckpointStore(durable, front=f"ram://{name}?replicas=0")
            with s3.throttled(lambda request: request["REQUEST_METHOD"] in ("PUT", "POST")):
                saved(store, 1)
                wait_until(lambda: store.copying().problems != (), 60, store.copying)
                [problem] = store.copying().problems
            assert "step 1 is not durable: cannot " in problem
            assert "secret" not in problem
            assert store.make_durable(1, timeout_s=60) == 1
            read: list[str] = []

            def note(request: dict[str, Any]) -> bool:
                if request["REQUEST_METHOD"] == "GET" and "step-" in request["PATH_INFO"]:
                    read.append(request["PATH_INFO"])
                return False

            with s3.throttled(note):
                assert loaded(store, 1).durable_bytes == 0
                assert read == []
                cluster.drop_memory(name)
                assert loaded(store, 1).durable_bytes == 280000
                assert any(path.endswith(".distcp") for path in read)
            assert ray_ckpt.verify(durable, step=1).verified
