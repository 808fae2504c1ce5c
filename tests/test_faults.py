"""Faults in every phase of a save and a load, on every rank: nothing half-done is ever taken for a checkpoint."""

from __future__ import annotations

import itertools
import signal
import uuid

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ray_ckpt.errors import StorageError
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.reader import ArrowStorageReader
from ray_ckpt.storage.writer import ArrowStorageWriter
from tests.faulty import CountedStorage, Fault, FaultyStorage
from tests.ranks import RanksError, run_ranks
from tests.s3 import run_s3

WORLD_SIZE = 3
ALL = ("create", "write", "finish", "sync")

PHASES = {
    "plan": ("look for",),
    "write": ALL,
    "commit": (*ALL, "rename"),
    "read": ("read",),
}


def _faults(action):
    """Planning and committing touch storage on the coordinator alone."""
    yield "plan", Fault(action, PHASES["plan"], 0)
    for rank in (0, 1):
        yield "write", Fault(action, PHASES["write"], rank, name=".distcp")
        yield "read", Fault(action, PHASES["read"], rank, name=".distcp")
    for name in (".metadata", MANIFEST_NAME):
        yield "commit", Fault(action, PHASES["commit"], 0, name=name)


def _state(step):
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    whole = torch.arange(40_000.0).reshape(200, 200) * step
    return {
        "sharded": distribute_tensor(whole, mesh, [Shard(0)]),
        "replica": torch.full((9,), float(step)),
        "step": step,
    }


def _is_step(state, step):
    expected = _state(step)
    return (
        torch.equal(state["sharded"].to_local(), expected["sharded"].to_local())
        and torch.equal(state["replica"], expected["replica"])
        and state["step"] == step
    )


def _loads(target, step):
    state = _state(0)
    assert not _is_step(state, step)
    dcp.load(state, storage_reader=ArrowStorageReader(target))
    return _is_step(state, step)


def _attempt(action):
    """Ranks that DCP says have failed, with their errors; empty when it went well."""
    try:
        action()
    except dcp.CheckpointException as error:
        return {rank: failure for rank, (failure, _) in error.failures.items()}
    return {}


def _run_faults(rank, target, actions):
    """Every fault in turn, in one process group. Returns what was wrong with the outcome, if anything."""
    problems = []
    for action, number in zip(actions, itertools.count()):
        for phase, fault in _faults(action):
            directory = target(f"{number}-{phase}-{fault.rank}-{fault.name}")
            problem = _run_fault(rank, directory, fault, phase)
            problems += [f"{action} on rank {fault.rank} in {phase} of {fault.name}: {problem}"] if problem else []
            dist.barrier()
    return problems


def _run_fault(rank, directory, fault, phase):
    previous, this = directory("step-1"), directory("step-2")
    dcp.save(_state(1), storage_writer=ArrowStorageWriter(previous))
    storage = FaultyStorage(this, fault, rank)
    failed = _attempt(lambda: dcp.save(_state(2), storage_writer=ArrowStorageWriter(storage)))
    committed = Storage(this).exists(MANIFEST_NAME)
    if phase == "read":
        failed = failed or _attempt(lambda: dcp.load(_state(0), storage_reader=ArrowStorageReader(storage)))
    previous_loads, this_loads = _loads(previous, 1), _loads(this, 2) if committed else None
    recovers = fault.action in ("throttled", "slow")
    if recovers != (not failed):
        return f"failures are {failed}"
    if failed and (set(failed) != {fault.rank} or not isinstance(failed[fault.rank], StorageError)):
        return f"blamed {failed}"
    if rank == fault.rank and not storage.happened:
        return "the fault never happened"
    if committed != (recovers or phase == "read"):
        return f"committed is {committed}"
    if this_loads is False or not previous_loads:
        return f"previous step loads: {previous_loads}, this one: {this_loads}"
    return None


class _Below:
    """Names directories below a path or a URI. Plain data, so that it travels to the ranks."""

    def __init__(self, base, options=""):
        self.base = base
        self.options = options

    def __call__(self, name):
        return (
            _Below(f"{self.base}/{name}", self.options) if "step" not in name else f"{self.base}/{name}{self.options}"
        )


@pytest.mark.parametrize("action", ["raises", "no space", "throttled", "slow"])
def test_faults_on_local_files(tmp_path, action):
    assert run_ranks(_run_faults, WORLD_SIZE, tmp_path, _Below(tmp_path), [action]) == [[]] * WORLD_SIZE


@pytest.fixture(scope="module")
def s3():
    with run_s3() as server:
        yield server


@pytest.mark.parametrize(
    "action", ["no space", "throttled", *(pytest.param(name, marks=pytest.mark.slow) for name in ("raises", "slow"))]
)
def test_faults_on_s3(tmp_path, s3, action):
    base, _, options = s3.uri(uuid.uuid4().hex).partition("?")
    assert run_ranks(_run_faults, WORLD_SIZE, tmp_path, _Below(base, f"?{options}"), [action]) == [[]] * WORLD_SIZE


def _save_steps(rank, previous, this, fault):
    dcp.save(_state(1), storage_writer=ArrowStorageWriter(previous))
    dist.barrier()
    dcp.save(_state(2), storage_writer=ArrowStorageWriter(FaultyStorage(this, fault, rank)))
    dcp.load(_state(0), storage_reader=ArrowStorageReader(FaultyStorage(this, fault, rank)))


def _load_both(rank, previous, this):
    committed = Storage(this).exists(MANIFEST_NAME)
    return committed, _loads(previous, 1), _loads(this, 2) if committed else None


@pytest.mark.parametrize(("phase", "fault"), list(_faults("killed")), ids=str)
def test_killed_rank_is_named(tmp_path, phase, fault):
    previous, this = str(tmp_path / "step-1"), str(tmp_path / "step-2")
    with pytest.raises(RanksError) as raised:
        run_ranks(_save_steps, WORLD_SIZE, tmp_path, previous, this, fault)
    assert raised.value.failures[fault.rank] == f"died with exit code {-signal.SIGKILL}"
    committed, previous_loads, this_loads = zip(
        *run_ranks(_load_both, WORLD_SIZE, tmp_path, previous, this), strict=True
    )
    assert all(previous_loads)
    assert set(committed) == {phase == "read"}
    assert phase != "read" or all(this_loads)


def _save_counted(rank, directory, die_at, overwrite):
    storage = CountedStorage(directory, die_at)
    state = {"weight": torch.arange(50_000.0) * 2, "other": torch.ones(3), "step": 2}
    dcp.save(state, storage_writer=ArrowStorageWriter(storage, overwrite=overwrite, max_file_bytes=100_000))
    return storage.num_operations


def _step_in(directory):
    state = {"weight": torch.zeros(50_000), "other": torch.zeros(3), "step": 0}
    dcp.load(state, storage_reader=ArrowStorageReader(directory), no_dist=True)
    assert torch.equal(state["weight"], torch.arange(50_000.0) * state["step"])
    return state["step"]


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize(
    "overwrite", [pytest.param(False, marks=pytest.mark.slow, id="fresh"), pytest.param(True, id="over")]
)
def test_kill_at_every_file_operation(tmp_path, overwrite):
    """Killed before its k-th operation, for all k: the target holds the old step, or nothing, or all of the new one."""

    def prepared(name):
        directory = str(tmp_path / name)
        if overwrite:
            old = {"weight": torch.arange(50_000.0), "other": torch.zeros(3), "step": 1}
            dcp.save(old, storage_writer=ArrowStorageWriter(directory))
        return directory

    [total] = run_ranks(_save_counted, 1, tmp_path, prepared("all"), None, overwrite)
    assert total > 15
    found = []
    for die_at in range(1, total + 1):
        directory = prepared(f"killed-{die_at}")
        with pytest.raises(RanksError, match="died"):
            run_ranks(_save_counted, 1, tmp_path, directory, die_at, overwrite)
        committed = Storage(directory).exists(MANIFEST_NAME)
        found.append(_step_in(directory) if committed else None)
    before = 1 if overwrite else None
    switch = found.index(2) if 2 in found else len(found)
    assert found == [before] * switch + [2] * (len(found) - switch)
    assert not overwrite or 2 in found  # the last operations delete the old step's files
