"""How far workers are, as the driver is told while it waits for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ckpt import WorkerContext, WorkerError, cluster, save
from ray_ckpt.cluster.group import WorkerGroup

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

NUM_WORKERS = 3
ELEMENTS = 1 << 20

Told = list[tuple[int, int]]


@pytest.fixture(scope="module")
def group(local_ray: None) -> Iterator[WorkerGroup]:
    with WorkerGroup(
        NUM_WORKERS, cpus_per_worker=0.5, process_group=False, start_timeout_s=60, call_timeout_s=100
    ) as group:
        yield group


def state_of(ctx: WorkerContext) -> dict[str, Any]:
    return ctx.objects.setdefault("state", {f"stage{ctx.rank}": torch.ones(ELEMENTS)})


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.01)


def count_and_wait(ctx: WorkerContext, seen: str) -> int:
    ctx.progress(10 + ctx.rank, 100)
    wait_for(Path(seen))
    ctx.progress(100, 100)
    return ctx.rank


def test_the_driver_is_told_the_sum_while_the_workers_work(group: WorkerGroup, tmp_path: Path) -> None:
    told: Told = []

    def show(done: int, total: int) -> None:
        told.append((done, total))
        if (done, total) == (33, 300):
            (tmp_path / "seen").touch()

    assert group.run(count_and_wait, str(tmp_path / "seen"), progress=show) == [0, 1, 2]
    assert (33, 300) in told
    assert told[-1] == (300, 300)
    assert group.run(lambda ctx: ctx.told) == [(0, 0)] * NUM_WORKERS


def save_and_wait(ctx: WorkerContext, target: str, seen: str) -> None:
    """A save from inside a worker, which is held up after the first bytes until the driver has seen them."""

    def progress(done: int, total: int) -> None:
        ctx.progress(done, total)
        wait_for(Path(seen))

    save({"weight": torch.ones(ELEMENTS)}, f"{target}/{ctx.rank}", progress=progress)


def test_a_save_inside_the_workers_reaches_the_driver(group: WorkerGroup, tmp_path: Path) -> None:
    told: Told = []

    def show(done: int, total: int) -> None:
        told.append((done, total))
        if total == NUM_WORKERS * ELEMENTS * 4:
            (tmp_path / "seen").touch()

    group.run(save_and_wait, str(tmp_path), str(tmp_path / "seen"), progress=show)
    halfway = [done for done, total in told if 0 < done < total]
    assert halfway
    assert told[-1] == (NUM_WORKERS * ELEMENTS * 4,) * 2


@pytest.mark.parametrize("blocking", [True, False])
def test_the_verbs_of_a_group_tell_sums(group: WorkerGroup, tmp_path: Path, blocking: bool) -> None:
    num_bytes = NUM_WORKERS * ELEMENTS * 4
    told: Told = []

    def show(done: int, total: int) -> None:
        told.append((done, total))

    saved = cluster.save(group, state_of, tmp_path, blocking=blocking, progress=show)
    if not blocking:
        saved.result(timeout_s=60)
    assert told[-1] == (num_bytes, num_bytes)
    told.clear()
    cluster.load(group, state_of, tmp_path, progress=show)
    assert told[-1][0] == told[-1][1] >= num_bytes
    told.clear()
    report = cluster.verify(group, tmp_path, progress=show)
    assert told[-1] == (report.total_bytes, report.total_bytes)


def test_a_callable_that_raises_on_the_driver_does_not_end_the_save(group: WorkerGroup, tmp_path: Path) -> None:
    def broken(done: int, total: int) -> None:
        raise ValueError("no such bar")

    with pytest.warns(RuntimeWarning, match="progress= raised ValueError: no such bar"):
        report = cluster.save(group, state_of, tmp_path, progress=broken)
    assert report.num_files == NUM_WORKERS


def fail_on_one(ctx: WorkerContext) -> None:
    if ctx.rank == 1:
        raise ValueError("boom")


def test_a_rank_that_fails_is_named_whether_or_not_anybody_watches(group: WorkerGroup) -> None:
    told: Told = []
    with pytest.raises(WorkerError, match="boom") as raised:
        group.call(fail_on_one, dict.fromkeys(range(NUM_WORKERS), ()), progress=lambda *both: told.append(both))
    assert raised.value.ranks == (1,)
