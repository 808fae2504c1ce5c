"""Saves and loads that the driver coordinates by actor calls: what arrives, who is named, and who can go on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ray_ckpt import cluster
from ray_ckpt.cluster import gather
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.dcp.reader import ArrowStorageReader
from ray_ckpt.errors import (
    DIED,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CommitError,
    GroupError,
    GroupTimeoutError,
    UsageError,
    WorkerError,
)
from ray_ckpt.format.fingerprinting import fingerprint
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.recipes import probe
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.store import CheckpointStore
from tests.support import rank_functions, rank_states
from tests.support.faulty import WITHOUT_WAITING_S, Fault, TravellingStorage

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

NUM_WORKERS = 3
T = TypeVar("T")
WRITE = ("create", "write", "finish", "sync")


def make_group() -> WorkerGroup:
    # Half a core each: two groups fit.
    return WorkerGroup(NUM_WORKERS, cpus_per_worker=0.5, process_group=False, start_timeout_s=60, call_timeout_s=60)


@pytest.fixture(scope="module")
def group(local_ray: None) -> Iterator[WorkerGroup]:
    """Shared by the tests whose failures it must survive."""
    with make_group() as group:
        yield group


@pytest.fixture
def doomed_group() -> Iterator[WorkerGroup]:
    """For a test that takes a worker away from it."""
    with make_group() as group:
        # What a first save loads is not counted where seconds are.
        group.run(probe.load_code, "ray_ckpt.protocol.rank_save")
        yield group


def load_step(target: Path, step: int) -> bool:
    """Whether what stock DCP reads is what the workers held at this step."""
    state = {f"stage{rank}": torch.full((1000 + rank,), -1.0) for rank in range(NUM_WORKERS)}
    state |= {"common": torch.full((7,), -1.0), "step": -1}
    dcp.load(state, storage_reader=dcp.FileSystemReader(str(target)), no_dist=True)
    return (
        all(torch.equal(state[f"stage{rank}"], torch.arange(1000.0 + rank) + step) for rank in range(NUM_WORKERS))
        and torch.equal(state["common"], torch.full((7,), float(step)))
        and state["step"] == step
    )


def assert_nothing_was_committed(target: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        ArrowStorageReader(target).read_manifest()


def assert_can_go_on(group: WorkerGroup, ranks: list[int], target: Path) -> None:
    """These workers still answer, on both of their threads."""
    args_of = dict.fromkeys(ranks, (100,))
    assert group.call(rank_functions.remember, args_of, timeout_s=10) == dict.fromkeys(ranks)
    recalled = group.call(rank_functions.recall, dict.fromkeys(ranks, ()), timeout_s=10, beside=True)
    assert recalled == dict.fromkeys(ranks, 100)
    # Their own files of the failed attempt are gone.
    assert [path.name for path in target.glob("*.distcp") if int(path.name[2]) in ranks] == []


def test_workers_without_a_process_group_save_one_checkpoint(group: WorkerGroup, tmp_path: Path) -> None:
    assert group.run(rank_functions.has_process_group) == [False] * NUM_WORKERS
    group.run(rank_functions.remember, 5)
    report = cluster.save(group, rank_states.stage_of, tmp_path / "a", layout="pp3")
    assert report.num_files == NUM_WORKERS
    assert load_step(tmp_path / "a", 5)
    assert not load_step(tmp_path / "a", 6)
    assert ArrowStorageReader(tmp_path / "a").read_manifest().layout == "pp3"
    assert group.run(rank_states.held_saves) == [0] * NUM_WORKERS
    # Unchanged plans travel as tokens now; what they are filled with is new.
    group.run(rank_functions.remember, 6)
    cluster.save(group, "tests.support.rank_states:stage_of", tmp_path / "b", fingerprints=True)
    assert load_step(tmp_path / "b", 6)
    digests = ArrowStorageReader(tmp_path / "b").read_manifest().fingerprints
    assert digests["stage2"] == fingerprint(torch.arange(1002.0) + 6).digest
    assert digests.keys() == {"common", *(f"stage{rank}" for rank in range(NUM_WORKERS))}
    assert ArrowStorageReader(tmp_path / "a").read_manifest().fingerprints == {}
    assert load_step(tmp_path / "a", 5)
    assert cluster.compare(group, rank_states.stage_of, tmp_path / "b").equal
    group.run(rank_functions.remember, 7)
    assert "stage1" in cluster.compare(group, rank_states.stage_of, tmp_path / "b").differing


def test_the_layout_that_the_states_name_is_in_the_manifest(group: WorkerGroup, tmp_path: Path) -> None:
    cluster.save(group, rank_states.replica_of, tmp_path / "named")
    cluster.save(group, rank_states.replica_of, tmp_path / "told", layout="other")
    layouts = [ArrowStorageReader(tmp_path / name).read_manifest().layout for name in ("named", "told")]
    assert layouts == ["ddp3", "other"]


def test_steps_of_a_store_are_saved_by_number(group: WorkerGroup, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (3, 4):
        group.run(rank_functions.remember, step)
        report = cluster.save(group, rank_states.stage_of, store if step == 3 else str(tmp_path), step=step)
        assert report.uri == str(tmp_path / f"step-{step}")
    assert store.steps() == (3, 4)
    assert load_step(tmp_path / "step-3", 3)
    assert load_step(tmp_path / "step-4", 4)
    with pytest.raises(UsageError, match=r"which step .* save\(..., step=N\)"):
        cluster.save(group, rank_states.stage_of, store)


def held_steps(group: WorkerGroup) -> list[int]:
    return list(group.run(rank_states.held_step))


def test_workers_without_a_process_group_load_what_they_hold(group: WorkerGroup, tmp_path: Path) -> None:
    for step in (1, 2):
        group.run(rank_states.hold_step, step)
        cluster.save(group, rank_states.held_state_of, tmp_path, step=step)
    group.run(rank_states.hold_step, 7)
    assert held_steps(group) == [7] * NUM_WORKERS
    reports = cluster.load(group, rank_states.held_state_of, tmp_path, 1)
    assert held_steps(group) == [1] * NUM_WORKERS
    assert [report.num_bytes for report in reports] == [4 * (1000 + rank) + 4 * 7 for rank in range(NUM_WORKERS)]
    assert {report.uri for report in reports} == {str(tmp_path / "step-1")}
    cluster.load(group, "tests.support.rank_states:held_state_of", CheckpointStore(tmp_path))
    assert held_steps(group) == [2] * NUM_WORKERS
    assert group.run(rank_states.held_loads) == [0] * NUM_WORKERS


def test_an_object_that_refuses_on_one_worker_leaves_all_as_they_were(group: WorkerGroup, tmp_path: Path) -> None:
    cluster.save(group, rank_states.versioned_state_of, tmp_path / "run")
    group.run(rank_states.set_version, 1, 2)
    with pytest.raises(WorkerError, match=r"rank 1 on .*extra\.object \(Versioned\) refuses .*; nothing was changed"):
        cluster.load(group, rank_states.versioned_state_of, tmp_path / "run")
    assert group.run(rank_states.versioned_sum) == [(0.0, 5)] * NUM_WORKERS
    assert group.run(rank_states.held_loads) == [0] * NUM_WORKERS
    group.run(rank_states.set_version, 1, 1)
    cluster.load(group, rank_states.versioned_state_of, tmp_path / "run")
    assert group.run(rank_states.versioned_sum) == [(4.0, 0)] * NUM_WORKERS


def test_what_does_not_fit_is_refused_on_every_worker_before_anything_changes(
    group: WorkerGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "CAUSE_GRACE_S", 30.0)  # all are waited for, however much later one of them refuses
    group.run(rank_states.hold_step, 1)
    cluster.save(group, rank_states.grown_stage_of, tmp_path / "grown")
    group.run(rank_states.hold_step, 7)
    with pytest.raises(
        WorkerError, match=r"ranks 0, 1, 2 on .*StateMismatchError: .*common: saved float32\[8\]"
    ) as caught:
        cluster.load(group, rank_states.held_state_of, tmp_path / "grown")
    assert caught.value.ranks == (0, 1, 2)
    # Nobody wants what is left over, which no worker can know alone.
    group.run(rank_states.hold_step, 1)
    cluster.save(group, rank_states.with_more_state_of, tmp_path / "more")
    group.run(rank_states.hold_step, 7)
    with pytest.raises(WorkerError, match=r"more: saved .*not wanted"):
        cluster.load(group, rank_states.held_state_of, tmp_path / "more")
    assert held_steps(group) == [7] * NUM_WORKERS
    assert group.run(rank_states.held_loads) == [0] * NUM_WORKERS
    reports = cluster.load(group, rank_states.held_state_of, tmp_path / "more", strict=False)
    assert [report.unexpected for report in reports] == [("more",)] * NUM_WORKERS
    assert held_steps(group) == [1] * NUM_WORKERS
    with pytest.raises(CheckpointNotFoundError):
        cluster.load(group, rank_states.held_state_of, tmp_path / "nothing")
    with pytest.raises(UsageError, match="give a sequence"):
        cluster.load(group, rank_states.held_state_of, tmp_path / "more", only="common")


def test_stages_of_different_jobs_are_saved_and_loaded_by_one_group(group: WorkerGroup, tmp_path: Path) -> None:
    """Every worker holds a stage of a run of its own, trained to a step of its own."""
    group.call(rank_states.hold_own_run, {rank: (rank + 1,) for rank in range(NUM_WORKERS)})
    cluster.save(group, rank_states.held_state_of, tmp_path)
    names = ArrowStorageReader(tmp_path).read_manifest().tensors
    assert sorted(names) == ["run0.weight", "run1.weight", "run2.weight"]
    group.call(rank_states.hold_own_run, dict.fromkeys(range(NUM_WORKERS), (9,)))
    cluster.load(group, rank_states.held_state_of, tmp_path)
    assert group.run(rank_states.own_run) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_what_others_wrote_is_loaded_under_the_names_of_the_state(group: WorkerGroup, tmp_path: Path) -> None:
    layer = torch.nn.Linear(5, 3)
    torch.save(
        {"state_dict": {f"net.{name}": value for name, value in layer.state_dict().items()}}, tmp_path / "x.ckpt"
    )
    group.run(rank_states.hold_layer)
    assert not any(torch.equal(weight, layer.weight) for weight in group.run(rank_states.held_weight))
    reports = cluster.load(group, rank_states.held_state_of, tmp_path / "x.ckpt")
    assert all(torch.equal(weight, layer.weight) for weight in group.run(rank_states.held_weight))
    assert reports[0].unexpected == ()


def test_the_workers_share_the_files_of_a_checkpoint_that_is_verified(group: WorkerGroup, tmp_path: Path) -> None:
    group.run(rank_functions.remember, 3)
    cluster.save(group, rank_states.stage_of, tmp_path, step=1)
    report = cluster.verify(group, tmp_path)
    assert report.verified
    files = sorted((tmp_path / "step-1").glob("*.distcp"))
    assert report.total_bytes == sum(path.stat().st_size for path in files)
    for rank in range(NUM_WORKERS):
        [chunk] = CheckpointStore(tmp_path).manifest(1).tensors[f"stage{rank}"].chunks
        data = bytearray((tmp_path / "step-1" / chunk.file).read_bytes())
        data[(chunk.data_start or 0) + 900] ^= 1
        (tmp_path / "step-1" / chunk.file).write_bytes(data)
    assert cluster.verify(group, CheckpointStore(tmp_path), 1).damaged == ("stage0", "stage1", "stage2")


def test_a_driver_that_does_not_see_the_workers_files_commits_nothing(group: WorkerGroup, tmp_path: Path) -> None:
    group.run(rank_functions.move_into, str(tmp_path))
    with pytest.raises(CommitError, match="where the driver sees no such file; give a directory that is mounted on"):
        cluster.save(group, rank_states.stage_of, "/proc/self/cwd/run")
    assert list((tmp_path / "run").iterdir()) == []
    assert not Path("run").exists()


def test_a_changed_state_is_never_saved_under_an_old_plan(group: WorkerGroup, tmp_path: Path) -> None:
    group.run(rank_functions.remember, 1)
    cluster.save(group, rank_states.stage_of, tmp_path / "before")
    cluster.save(group, rank_states.grown_stage_of, tmp_path / "grown")
    cluster.save(group, rank_states.stage_of, tmp_path / "after")
    grown = ArrowStorageReader(tmp_path / "grown").read_manifest()
    assert grown.tensors["common"].shape == (8,)
    assert [grown.tensors[f"new{rank}"].shape for rank in range(NUM_WORKERS)] == [(3, 1), (3, 2), (3, 3)]
    assert load_step(tmp_path / "before", 1)
    assert load_step(tmp_path / "after", 1)


def test_wrong_use_is_refused_by_the_driver(group: WorkerGroup, tmp_path: Path) -> None:
    group.run(rank_functions.remember, 2)
    cluster.save(group, rank_states.stage_of, tmp_path)
    with pytest.raises(CheckpointExistsError, match="already holds a committed checkpoint"):
        cluster.save(group, rank_states.stage_of, tmp_path)
    group.run(rank_functions.remember, 3)
    with pytest.raises(CommitError, match="'common' on ranks"):
        cluster.save(group, rank_states.differing_replicas_of, tmp_path, overwrite=True)
    assert load_step(tmp_path, 2)
    cluster.save(group, rank_states.stage_of, tmp_path, overwrite=True)
    assert load_step(tmp_path, 3)
    assert len(list(tmp_path.glob("*.distcp"))) == NUM_WORKERS


class Outrun(Storage):
    """Another writer commits here just before the driver does."""

    def __init__(self, target: Path, other: Path) -> None:
        super().__init__(target)
        self.target, self.other, self.driver = target, other, os.getpid()

    def perform(self, operation: str, name: str, action: Callable[[], T]) -> T:
        if os.getpid() == self.driver and MANIFEST_NAME in name and operation != "look for" and self.other.exists():
            for path in self.other.iterdir():
                shutil.move(path, self.target)
            self.other.rmdir()
        return super().perform(operation, name, action)


def test_of_two_writers_at_one_place_the_second_leaves_nothing_of_its_own(group: WorkerGroup, tmp_path: Path) -> None:
    group.run(rank_functions.remember, 1)
    cluster.save(group, rank_states.stage_of, tmp_path / "other")
    files = {path.name for path in (tmp_path / "other").iterdir()}
    group.run(rank_functions.remember, 2)
    with pytest.raises(CheckpointExistsError):
        cluster.save(group, rank_states.stage_of, Outrun(tmp_path / "run", tmp_path / "other"))
    assert {path.name for path in (tmp_path / "run").iterdir()} == files
    assert load_step(tmp_path / "run", 1)


def test_a_rank_that_raises_while_planning_is_named_and_all_go_on(group: WorkerGroup, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"rank 1 on .*: ValueError: the model is gone") as caught:
        cluster.save(group, rank_states.failing_state_of, tmp_path)
    assert caught.value.ranks == (1,)
    assert_nothing_was_committed(tmp_path)
    assert_can_go_on(group, [0, 1, 2], tmp_path)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("action", ["raises", "no space"])
def test_a_rank_that_cannot_write_is_named_and_all_go_on(
    group: WorkerGroup, tmp_path: Path, rank: int, action: str
) -> None:
    cause = {"raises": "Permission denied", "no space": "No space left on device"}[action]
    with pytest.raises(WorkerError, match=f"rank {rank} on .*StorageError: cannot .*{cause}") as caught:
        cluster.save(group, rank_states.stage_of, TravellingStorage(str(tmp_path), Fault(action, WRITE, rank)))
    assert caught.value.ranks == (rank,)
    assert_nothing_was_committed(tmp_path)
    assert_can_go_on(group, [0, 1, 2], tmp_path)
    group.run(rank_functions.remember, 4)
    cluster.save(group, rank_states.stage_of, tmp_path)
    assert load_step(tmp_path, 4)


@pytest.mark.parametrize("action", ["throttled", "slow"])
def test_a_transient_error_does_not_end_a_save(group: WorkerGroup, tmp_path: Path, action: str) -> None:
    group.run(rank_functions.remember, 8)
    cluster.save(group, rank_states.stage_of, TravellingStorage(str(tmp_path), Fault(action, WRITE, 2)))
    assert load_step(tmp_path, 8)


def test_a_failed_write_is_retried_on_that_rank_alone(group: WorkerGroup, tmp_path: Path) -> None:
    group.run(rank_functions.remember, 7)
    fails_twice = Fault("raises twice", ("finish",), rank=1)
    with pytest.raises(WorkerError, match=r"rank 1 .*Permission denied"):
        cluster.save(group, rank_states.stage_of, TravellingStorage(str(tmp_path / "a"), fails_twice), retries=1)
    assert_nothing_was_committed(tmp_path / "a")
    cluster.save(group, rank_states.stage_of, TravellingStorage(str(tmp_path / "b"), fails_twice), retries=2)
    assert load_step(tmp_path / "b", 7)
    # File names count the tries: rank 1 needed a third, the others wrote once.
    manifest = ArrowStorageReader(tmp_path / "b").read_manifest()
    assert sorted(name.partition("-")[0] for name in manifest.files) == ["__0_0", "__1_2", "__2_0"]


def in_planning(state_of: Callable[..., object], action: str, target: Path) -> tuple[object, object]:
    return state_of, target


def in_writing(state_of: Callable[..., object], action: str, target: Path) -> tuple[object, object]:
    return rank_states.stage_of, TravellingStorage(str(target), Fault(action, WRITE, rank=1))


PHASES = [in_writing, pytest.param(in_planning, marks=pytest.mark.slow)]


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_that_dies_is_named_without_waiting_for_the_others(
    doomed_group: WorkerGroup, tmp_path: Path, phase: Callable[..., tuple[object, object]]
) -> None:
    state_of, target = phase(rank_states.dying_state_of, "killed", tmp_path)
    start = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        cluster.save(doomed_group, state_of, target)
    assert time.monotonic() - start < WITHOUT_WAITING_S
    assert caught.value.ranks == (1,)
    assert caught.value.failures[0].error_type == DIED
    assert_nothing_was_committed(tmp_path)
    assert_can_go_on(doomed_group, [0, 2], tmp_path)


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_that_hangs_is_named_when_the_time_is_up(
    doomed_group: WorkerGroup, tmp_path: Path, phase: Callable[..., tuple[object, object]]
) -> None:
    state_of, target = phase(rank_states.hanging_state_of, "hangs", tmp_path)
    start = time.monotonic()
    with pytest.raises(GroupTimeoutError, match=r"no answer within .* from rank 1 on"):
        cluster.save(doomed_group, state_of, target, timeout_s=2)
    assert time.monotonic() - start < WITHOUT_WAITING_S
    assert_nothing_was_committed(tmp_path)
    assert_can_go_on(doomed_group, [0, 2], tmp_path)


def test_a_closed_group_saves_nothing(tmp_path: Path) -> None:
    group = WorkerGroup(1, cpus_per_worker=0.5, process_group=False, start_timeout_s=60)
    group.close()
    with pytest.raises(GroupError, match="closed"):
        cluster.save(group, rank_states.stage_of, tmp_path)


def test_the_driver_needs_no_torch() -> None:
    code = "import sys, ray_ckpt.cluster; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
