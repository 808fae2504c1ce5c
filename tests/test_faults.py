"""Faults in every phase of a save and a load, on every rank: nothing half-done is ever taken for a checkpoint.

Through `dcp.save` and `dcp.load`, and through `ray_ckpt.save` and `ray_ckpt.load`. Ranks other than the coordinator
touch no storage while they plan and commit: there the fault is in the rank's own work, its state dict or its process.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import signal
import threading
import uuid
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import ray_ckpt
from ray_ckpt.dcp.reader import ArrowStorageReader
from ray_ckpt.dcp.writer import ArrowStorageWriter
from ray_ckpt.errors import CheckpointError
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.storage.files import Storage
from tests.support import faulty
from tests.support.faulty import CountedStorage, Fault, TravellingStorage, wait_until
from tests.support.ranks import RanksError, run_ranks
from tests.support.s3 import run_s3

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


class _Dcp:
    """DCP's verbs on our plug-ins."""

    @staticmethod
    def save(state, storage):
        dcp.save(state, storage_writer=ArrowStorageWriter(storage))

    @staticmethod
    def load(state, storage):
        dcp.load(state, storage_reader=ArrowStorageReader(storage))


class _Ours:
    @staticmethod
    def save(state, storage):
        ray_ckpt.save(state, storage)

    @staticmethod
    def load(state, storage):
        ray_ckpt.load(state, storage)


VERBS = {"dcp": _Dcp, "ours": _Ours}


def _loads(target, step, verbs="dcp"):
    state = _state(0)
    assert not _is_step(state, step)
    VERBS[verbs].load(state, target)
    return _is_step(state, step)


def _blamed(action):
    """Ranks that are said to have failed, with the kind of error; empty when it went well."""
    try:
        action()
    except dcp.CheckpointException as error:
        return {rank: type(failure).__name__ for rank, (failure, _) in error.failures.items()}
    except CheckpointError as error:
        named = re.findall(r"rank ([\d, ]+): (\w+)", str(error))
        return {int(rank): kind for ranks, kind in named for rank in ranks.split(", ")} or {None: str(error)}
    return {}


def _run_faults(rank, target, actions, verbs):
    """Every fault in turn, in one process group. Returns what was wrong with the outcome, if anything."""
    problems = []
    faulty.here = rank
    for action, number in zip(actions, itertools.count()):
        for phase, fault in _faults(action):
            directory = target(f"{number}-{phase}-{fault.rank}-{fault.name}")
            problem = _run_fault(rank, directory, fault, phase, verbs)
            problems += [f"{action} on rank {fault.rank} in {phase} of {fault.name}: {problem}"] if problem else []
            dist.barrier()
    return problems


def _run_fault(rank, directory, fault, phase, verbs):
    previous, this = directory("step-1"), directory("step-2")
    VERBS[verbs].save(_state(1), previous)
    storage = TravellingStorage(this, fault)
    failed = _blamed(lambda: VERBS[verbs].save(_state(2), storage))
    committed = Storage(this).exists(MANIFEST_NAME)
    if phase == "read":
        failed = failed or _blamed(lambda: VERBS[verbs].load(_state(0), storage))
    recovers = fault.action in ("throttled", "slow")
    if failed != ({} if recovers else {fault.rank: "StorageError"}):
        return f"blamed {failed}"
    if rank == fault.rank and fault not in faulty.happened:
        return "the fault never happened"
    return _outcome(previous, this, committed, recovers or phase == "read", verbs)


def _outcome(previous, this, committed, should_be_committed, verbs):
    """What is wrong with the two steps, if anything."""
    previous_loads, this_loads = _loads(previous, 1, verbs), _loads(this, 2, verbs) if committed else None
    if committed != should_be_committed:
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


def _slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("verbs", "action"),
    [
        *(("dcp", action) for action in ("raises", "no space", "throttled", "slow")),
        ("ours", "no space"),
        *(_slow("ours", action) for action in ("raises", "throttled", "slow")),
    ],
)
def test_faults_on_local_files(tmp_path, verbs, action):
    assert run_ranks(_run_faults, WORLD_SIZE, tmp_path, _Below(tmp_path), [action], verbs) == [[]] * WORLD_SIZE


@pytest.fixture(scope="module")
def s3():
    with run_s3() as server:
        yield server


def _below_bucket(s3):
    base, _, options = s3.uri(uuid.uuid4().hex).partition("?")
    return _Below(base, f"?{options}")


@pytest.mark.parametrize(
    ("verbs", "action"),
    [
        ("ours", "slow"),
        *(_slow("ours", action) for action in ("raises", "no space", "throttled")),
        *(_slow("dcp", action) for action in ("raises", "no space", "throttled", "slow")),
    ],
)
def test_faults_on_s3(tmp_path, s3, verbs, action):
    assert run_ranks(_run_faults, WORLD_SIZE, tmp_path, _below_bucket(s3), [action], verbs) == [[]] * WORLD_SIZE


# ------------------------------------------------------------------------------------------------- a rank is killed


def _save_steps(rank, previous, this, fault, verbs):
    faulty.here = rank
    VERBS[verbs].save(_state(1), previous)
    dist.barrier()
    VERBS[verbs].save(_state(2), TravellingStorage(this, fault))
    VERBS[verbs].load(_state(0), TravellingStorage(this, fault))


def _outcome_of(rank, previous, this, should_be_committed, verbs):
    return _outcome(previous, this, Storage(this).exists(MANIFEST_NAME), should_be_committed, verbs)


def _kill(tmp_path, directory, phase, fault, verbs):
    previous, this = directory("step-1"), directory("step-2")
    with pytest.raises(RanksError) as raised:
        run_ranks(_save_steps, WORLD_SIZE, tmp_path, previous, this, fault, verbs)
    assert raised.value.failures[fault.rank] == f"died with exit code {-signal.SIGKILL}"
    assert run_ranks(_outcome_of, WORLD_SIZE, tmp_path, previous, this, phase == "read", verbs) == [None] * WORLD_SIZE


KILLED = list(_faults("killed"))


@pytest.mark.parametrize(
    ("verbs", "phase", "fault"),
    [
        *(("dcp", *case) for case in KILLED[::2]),
        *(_slow("dcp", *case) for case in KILLED[1::2]),
        ("ours", *KILLED[-1]),
        *(_slow("ours", *case) for case in KILLED[:-1]),
    ],
    ids=str,
)
def test_killed_rank_is_named(tmp_path, verbs, phase, fault):
    _kill(tmp_path, _Below(tmp_path), phase, fault, verbs)


@pytest.mark.parametrize(
    ("verbs", "phase", "fault"),
    [
        ("ours", *KILLED[3]),
        *(_slow("ours", *case) for case in KILLED if case != KILLED[3]),
        *(_slow("dcp", *case) for case in KILLED),
    ],
    ids=str,
)
def test_killed_rank_is_named_on_s3(tmp_path, s3, verbs, phase, fault):
    _kill(tmp_path, _below_bucket(s3), phase, fault, verbs)


# ------------------------------------------------------------------------------- a rank's own work, without storage


class _OwnState:
    """A state whose `state_dict` goes wrong on one rank."""

    def __init__(self, action):
        self.action = action
        self.state = _state(2)  # here, because making it is a collective

    def state_dict(self):
        self.action()
        return self.state

    def load_state_dict(self, state_dict):
        pass


OWN = {
    "raises": lambda: _raise(ValueError("the model is gone")),
    "no space": lambda: _raise(OSError(errno.ENOSPC, "No space left on device")),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "slow": lambda: faulty.ACTIONS["slow"][1](),
}


def _raise(error):
    raise error


def _save_own(state, storage, verbs):
    if verbs == "ours":
        ray_ckpt.save(state, storage)
    else:
        dcp.save({"state": state}, storage_writer=ArrowStorageWriter(storage))


def _fail_while_planning(rank, directory, actions, verbs):
    problems = []
    for action in actions:
        previous, this = directory(f"{action}-step-1"), directory(f"{action}-step-2")
        VERBS[verbs].save(_state(1), previous)
        state = _OwnState(OWN[action] if rank == 1 else lambda: None)
        failed = _blamed(lambda state=state, this=this: _save_own(state, this, verbs))
        committed = Storage(this).exists(MANIFEST_NAME)
        expected = {"raises": {1: "ValueError"}, "no space": {1: "OSError"}}.get(action, {})
        if failed != expected or committed != (not expected):
            problems.append(f"{action}: blamed {failed}, committed is {committed}")
        if not _loads(previous, 1, verbs):
            problems.append(f"{action}: the previous step does not load")
        if committed and verbs == "ours" and not _loads(this, 2, verbs):
            problems.append(f"{action}: this step does not load")
    return problems


@pytest.mark.parametrize("verbs", ["ours", _slow("dcp")])
def test_a_rank_other_than_the_coordinator_fails_while_planning(tmp_path, verbs):
    actions = ["raises", "no space", "slow"] if verbs == "ours" else ["slow"]
    found = run_ranks(_fail_while_planning, WORLD_SIZE, tmp_path, _Below(tmp_path), actions, verbs)
    assert found == [[]] * WORLD_SIZE


@pytest.mark.parametrize("verbs", [_slow("ours"), _slow("dcp")])
def test_a_rank_other_than_the_coordinator_is_killed_while_planning(tmp_path, verbs):
    with pytest.raises(RanksError) as raised:
        run_ranks(_fail_while_planning, WORLD_SIZE, tmp_path, _Below(tmp_path), ["killed"], verbs)
    assert raised.value.failures[1] == f"died with exit code {-signal.SIGKILL}"
    previous, this = tmp_path / "killed-step-1", tmp_path / "killed-step-2"
    assert run_ranks(_outcome_of, WORLD_SIZE, tmp_path, str(previous), str(this), False, verbs) == [None] * WORLD_SIZE


class _WaitsForDeath(Storage):
    """Commits only when another process is dead, which it tells when to die."""

    def __init__(self, target, note):
        super().__init__(target)
        self.note = note

    def perform(self, operation, name, action):
        if operation == "create" and name.startswith(MANIFEST_NAME):
            self.note.with_name("committing").touch()
            wait_until(lambda: not Path(f"/proc/{self.note.read_text()}/stat").exists() or _is_zombie(self.note))
        return super().perform(operation, name, action)


def _is_zombie(note):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{note.read_text()}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def _die_during_the_commit(rank, previous, this, note, verbs):
    VERBS[verbs].save(_state(1), previous)
    if rank == 1:
        note.write_text(str(os.getpid()))
        threading.Thread(target=_die_on_sight, args=(note.with_name("committing"),), daemon=True).start()
    dist.barrier()
    VERBS[verbs].save(_state(2), _WaitsForDeath(this, note))


def _die_on_sight(path):
    wait_until(path.exists)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("verbs", ["ours", _slow("dcp")])
def test_a_rank_that_dies_while_the_coordinator_commits_loses_nothing(tmp_path, verbs):
    """All of it was written and reported: the step is committed, and the survivors learn that a rank is lost."""
    previous, this = str(tmp_path / "step-1"), str(tmp_path / "step-2")
    with pytest.raises(RanksError) as raised:
        run_ranks(_die_during_the_commit, WORLD_SIZE, tmp_path, previous, this, tmp_path / "pid", verbs)
    assert raised.value.failures[1] == f"died with exit code {-signal.SIGKILL}"
    assert run_ranks(_outcome_of, WORLD_SIZE, tmp_path, previous, this, True, verbs) == [None] * WORLD_SIZE


# --------------------------------------------------------------------------------------- killed at every operation


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
@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["local", "s3"])
def test_kill_at_every_file_operation(tmp_path, request, where, overwrite):
    """Killed before its k-th operation, for all k: the target holds the old step, or nothing, or all of the new one."""
    below = _Below(tmp_path) if where == "local" else _below_bucket(request.getfixturevalue("s3"))

    def prepared(name):
        directory = below(f"step-{name}")
        if overwrite:
            old = {"weight": torch.arange(50_000.0), "other": torch.zeros(3), "step": 1}
            dcp.save(old, storage_writer=ArrowStorageWriter(directory))
        return directory

    [total] = run_ranks(_save_counted, 1, tmp_path, prepared("all"), None, overwrite)
    assert total > (15 if where == "local" else 8)
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
