"""A worker is killed at an exact place of a save, and the others commit what they hold too; else it is named."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ray_ckpt
from ray_ckpt import cluster
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.errors import DIED, CheckpointNotFoundError, WorkerError
from ray_ckpt.format import lost_ranks
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.recipes.workload import Workload
from ray_ckpt.report import SaveReport
from ray_ckpt.storage.store import CheckpointStore
from tests.support import survivor_ranks

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(200)]

RANK_SAVE, WORKER_SIDE = "ray_ckpt.protocol.rank_save", "ray_ckpt.cluster.worker_side"

PLACES = {
    "plan": f"{RANK_SAVE}:plan",
    "planned": "ray_ckpt.protocol.holdings:hold",
    "copy": f"{RANK_SAVE}:stage",
    "write": f"{WORKER_SIDE}:write",
    "file-begun": "ray_ckpt.storage.data_file:_finish_tensor",
    "written": f"{RANK_SAVE}:_digest_replicas",
    "commit": f"{WORKER_SIDE}:stock_record",
}
"""Where it strikes -> the function that is entered."""

ON_SECOND_THREAD = ("write", "file-begun", "written", "commit")


def make_group(layout: Layout) -> WorkerGroup:
    group = WorkerGroup(layout.world_size, cpus_per_worker=0.5, start_timeout_s=120, call_timeout_s=60)
    group.run(survivor_ranks.hold, Workload.of(None, 16, 4, [layout]), layout)
    return group


def strike_at(group: WorkerGroup, rank: int, place: str) -> None:
    args_of = {rank: (PLACES[place],)}
    group.call(survivor_ranks.strike_at, args_of, beside=place in ON_SECOND_THREAD)


def save(group: WorkerGroup, target: Path, step: int, place: str) -> SaveReport:
    if place != "copy":
        return cluster.save(group, survivor_ranks.state_of, target, step)
    return cluster.save(group, survivor_ranks.state_of, target, step, blocking=False).result(60)


def names_of(target: Path, step: int) -> set[str]:
    manifest = CheckpointStore(target).manifest(step)
    return {*manifest.tensors, *manifest.objects}


def assert_saved_without(target: Path, report: SaveReport, rank: int, layout: Layout) -> None:
    """Everything is as in the step before, which all ranks have saved, but for what was the rank's own."""
    assert report.lost_ranks == (rank,)
    own = {name for name in names_of(target, 1) if lost_ranks.is_own(name, rank)}
    assert own
    assert set(report.left_out) == own
    assert names_of(target, 1) - names_of(target, 2) == own
    assert names_of(target, 2) <= names_of(target, 1)
    found = ray_ckpt.diff(target / "step-1", target / "step-2")
    assert not found.tensors
    assert not found.values
    assert set(found.only_left) == own
    assert CheckpointStore(target).manifest(2).layout == f"{layout} without rank {rank}"
    assert ray_ckpt.verify(target, 2).verified
    assert not ray_ckpt.diff(target / "step-0", target / "step-2").equal, "nothing was trained"


def check(layout: Layout, rank: int, place: str, target: Path) -> None:
    with make_group(layout) as group:
        cluster.save(group, survivor_ranks.state_of, target, 0)
        group.run(survivor_ranks.train, Workload.of(None, 16, 4, [layout]))
        cluster.save(group, survivor_ranks.state_of, target, 1)
        strike_at(group, rank, place)
        report = save(group, target, 2, place)
        assert_dead(group, rank)
        if place == "commit":
            assert report.lost_ranks == ()  # it had written all that was its
            assert ray_ckpt.diff(target / "step-1", target / "step-2").equal
            assert not ray_ckpt.diff(target / "step-0", target / "step-2").equal
            return
        assert_saved_without(target, report, rank, layout)
        again = cluster.save(group, survivor_ranks.state_of, target, 3)
        assert (again.lost_ranks, again.left_out) == (report.lost_ranks, report.left_out)
        assert ray_ckpt.diff(target / "step-2", target / "step-3").equal


def assert_dead(group: WorkerGroup, rank: int) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(group.workers[rank].pid, 0)


MORE = [
    ("ddp2", 0, "plan"),
    ("ddp2", 1, "planned"),
    ("ddp2", 1, "copy"),
    ("ddp2", 0, "commit"),
    ("ddp4", 0, "write"),
    ("ddp4", 3, "written"),
    ("hsdp2x2", 0, "file-begun"),
    ("hsdp2x2", 1, "planned"),
    ("hsdp2x2", 2, "written"),
    ("hsdp2x2", 3, "copy"),
    ("hsdp2x2", 0, "commit"),
    ("pp2.hsdp2x1", 2, "write"),
]


@pytest.mark.parametrize(
    ("layout", "rank", "place"),
    [("ddp2", 0, "file-begun"), *(pytest.param(*case, marks=pytest.mark.cluster) for case in MORE)],
)
def test_replicas_save_without_the_one_that_dies(tmp_path: Path, layout: str, rank: int, place: str) -> None:
    check(Layout.parse(layout), rank, place, tmp_path)


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("layout", "rank", "place", "held"),
    [
        ("fsdp2x4", 1, "plan", "is not covered exactly once"),
        ("fsdp2x4", 2, "file-begun", "is not covered exactly once"),
        ("fsdp2x4", 0, "written", "is not covered exactly once"),
        ("pp2", 1, "write", r"no other rank holds what rank 1 held of model\.layer3"),
        ("pp2", 1, "plan", r"no other rank holds what rank 1 held of model\.layer3"),
    ],
)
def test_what_nobody_else_holds_is_never_committed(
    tmp_path: Path, layout: str, rank: int, place: str, held: str
) -> None:
    with make_group(Layout.parse(layout)) as group:
        cluster.save(group, survivor_ranks.state_of, tmp_path, 1)
        strike_at(group, rank, place)
        for step in (2, 3):
            with pytest.raises(WorkerError, match=held) as caught:
                cluster.save(group, survivor_ranks.state_of, tmp_path, step)
            assert caught.value.ranks == (rank,)
            assert caught.value.failures[0].error_type == DIED
        assert_dead(group, rank)
    assert CheckpointStore(tmp_path).steps() == (1,)


def die_in_first_plan(layout: str, rank: int, target: Path, state_of: Callable[..., Any]) -> SaveReport:
    with make_group(Layout.parse(layout)) as group:
        strike_at(group, rank, "planned")
        return cluster.save(group, state_of, target, 1)


@pytest.mark.cluster
def test_before_a_rank_has_told_what_it_holds_its_layout_does(tmp_path: Path) -> None:
    report = die_in_first_plan("hsdp2x2", 3, tmp_path / "a", survivor_ranks.state_of)
    assert (report.lost_ranks, report.left_out) == ((3,), ())  # its own part is not known by name
    with make_group(Layout.parse("hsdp2x2")) as group:
        cluster.save(group, survivor_ranks.state_of, tmp_path / "b", 1)
    found = ray_ckpt.diff(tmp_path / "a" / "step-1", tmp_path / "b" / "step-1")
    assert not found.tensors
    assert not found.values
    assert {name.split(".")[1] for name in found.only_right} == {"rank3"}
    assert not found.only_left


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("layout", "state_of", "why"),
    [
        ("fsdp2x2", survivor_ranks.state_of, "no rank that is left is its replica in the layout fsdp2x2"),
        ("ddp2", survivor_ranks.dict_of, "its state names no layout of 2 ranks"),
    ],
)
def test_what_nothing_tells_of_is_never_committed(
    tmp_path: Path, layout: str, state_of: Callable[..., Any], why: str
) -> None:
    with pytest.raises(WorkerError, match=f"nothing tells what rank 1 held.*{why}"):
        die_in_first_plan(layout, 1, tmp_path, state_of)
    with pytest.raises(CheckpointNotFoundError):
        ray_ckpt.verify(tmp_path)


@pytest.mark.cluster
def test_a_new_group_goes_on_from_what_the_survivors_saved(tmp_path: Path) -> None:
    layout = Layout.parse("ddp2")
    with make_group(layout) as group:
        cluster.save(group, survivor_ranks.state_of, tmp_path, 1)
        strike_at(group, 0, "write")
        cluster.save(group, survivor_ranks.state_of, tmp_path, 2)
    with make_group(layout) as group:
        assert [report.rng for report in cluster.load(group, survivor_ranks.state_of, tmp_path, 1)] == ["restored"] * 2
        restored = group.run(survivor_ranks.generator)
        reports = cluster.load(group, survivor_ranks.state_of, tmp_path, 2)
        assert [(report.rng, report.missing) for report in reports] == [("reseeded", ())] * 2
        reseeded = group.run(survivor_ranks.generator)
        assert reseeded[0] != reseeded[1]
        assert all(new != old for new in reseeded for old in restored)
        assert cluster.compare(group, survivor_ranks.state_of, tmp_path, 2, only=("model", "optim")).equal
        group.run(survivor_ranks.train, Workload.of(None, 16, 4, [layout]))
        assert not cluster.compare(group, survivor_ranks.state_of, tmp_path, 2, only=("model", "optim")).equal


@pytest.mark.cluster
def test_of_a_save_beside_training_a_worker_that_dies_while_it_writes_is_named(tmp_path: Path) -> None:
    with make_group(Layout.parse("ddp2")) as group:
        strike_at(group, 1, "write")
        handle = cluster.save(group, survivor_ranks.state_of, tmp_path, 1, blocking=False)
        with pytest.raises(WorkerError) as caught:
            handle.result(60)
        assert caught.value.ranks == (1,)
        report = cluster.save(group, survivor_ranks.state_of, tmp_path, 2)
        assert report.lost_ranks == (1,)
    assert CheckpointStore(tmp_path).steps() == (2,)


@pytest.mark.cluster
def test_when_all_workers_die_there_is_nobody_to_save(tmp_path: Path) -> None:
    with make_group(Layout.parse("ddp2")) as group:
        for worker in group.workers:
            os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(WorkerError) as caught:
            cluster.save(group, survivor_ranks.state_of, tmp_path, 1)
        assert sorted(caught.value.ranks) == [0, 1]
