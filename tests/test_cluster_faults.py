"""Faults in every phase of what the driver coordinates, on rank 0 and another, and on the driver: nobody hangs.

| phase  | where                        | fault                                                       |
| ------ | ---------------------------- | ----------------------------------------------------------- |
| plan   | rank 0, rank 1               | the worker's state: raises, killed, hangs                   |
| plan   | driver                       | its look at the target: raises, throttled, slow             |
| write  | rank 0, rank 1               | data files: raises, no space, throttled, slow, killed, hangs |
| commit | driver                       | each record: raises, no space, throttled, slow              |
| commit | rank 0, which makes a record | killed, stopped                                             |
| read   | rank 0, rank 1               | data files: raises, throttled, slow, killed, hangs          |

What recovers is committed, or loaded; so is what another rank can do in the place of a dead one. Else the rank is
named (a dead one without waiting, a silent one when the time is up), nothing is committed, the step before still
loads, and the other workers go on with the same group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ray_ckpt import cluster
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.errors import DIED, GroupTimeoutError, RayCkptError, StorageError, WorkerError
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.recipes import probe
from ray_ckpt.storage.files import Storage
from tests.support import faulty, rank_states
from tests.support.faulty import WITHOUT_WAITING_S, Fault, TravellingStorage
from tests.support.s3 import S3, run_s3

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

NUM_WORKERS = 2
DRIVER = -1
TIMEOUT_S = 5.0
WRITE = ("create", "write", "finish", "sync")
RECOVERS = ("throttled", "slow")


@dataclass(frozen=True)
class Case:
    phase: str
    action: str
    rank: int
    name: str = ".distcp"
    """Only files whose name contains this."""

    def __str__(self) -> str:
        return f"{self.phase}-{self.action}-{'driver' if self.rank == DRIVER else self.rank}{self.name}"

    @property
    def recovers(self) -> bool:
        """The record that rank 0 makes, the next rank makes as well."""
        return self.action in RECOVERS or (self.phase, self.action, self.rank) == ("commit", "killed", 0)

    @property
    def storage_fault(self) -> Fault:
        operations = {"plan": ("look for",), "write": WRITE, "commit": (*WRITE, "rename"), "read": ("read",)}
        return Fault(self.action, operations[self.phase], self.rank, self.name)


WORKERS = (0, 1)
HARMLESS = [
    *(Case("plan", "raises", rank) for rank in WORKERS),
    *(Case("plan", action, DRIVER, MANIFEST_NAME) for action in ("raises", "throttled", "slow")),
    *(Case("write", action, rank) for action in ("raises", "no space", *RECOVERS) for rank in WORKERS),
    *(
        Case("commit", action, DRIVER, name)
        for action in ("raises", "no space", *RECOVERS)
        for name in (".metadata", MANIFEST_NAME)
    ),
    *(Case("read", action, rank) for action in ("raises", *RECOVERS) for rank in WORKERS),
]
"""All workers live on: one group serves them all."""

DEADLY = [
    Case(phase, action, rank)
    for phase in ("plan", "write", "commit", "read")
    for action in ("killed", "hangs")
    for rank in WORKERS
    if not (phase == "commit" and rank)
]
"""They cost a group each."""

IN_MAKE_TEST = {("read", "killed", 1)}
"""`test_cluster_saving.py` has a rank that dies and one that hangs while it writes."""


def make_group() -> WorkerGroup:
    group = WorkerGroup(NUM_WORKERS, cpus_per_worker=0.5, process_group=False, start_timeout_s=120, call_timeout_s=60)
    # What a first save and load import is not counted where seconds are.
    for module in ("ray_ckpt.protocol.rank_save", "ray_ckpt.protocol.rank_load"):
        group.run(probe.load_code, module)
    return group


@pytest.fixture(scope="module")
def group(local_ray: None) -> Iterator[WorkerGroup]:
    with make_group() as group:
        yield group


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with run_s3() as server:
        yield server


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults for the driver happen in this process."""
    monkeypatch.setattr(faulty, "here", DRIVER)


def hold(group: WorkerGroup, step: int, ranks: tuple[int, ...] = WORKERS) -> None:
    group.call(rank_states.hold_step, dict.fromkeys(ranks, (step,)), timeout_s=30)


def held(group: WorkerGroup, ranks: tuple[int, ...] = WORKERS) -> set[int]:
    """The steps that these workers hold, every element of them."""
    return set(group.call(rank_states.held_step, dict.fromkeys(ranks, ()), timeout_s=30).values())


class Striking(Storage):
    """Sends a signal to a worker when the driver looks for the files that workers have written."""

    def __init__(self, target: str, pid: int, number: signal.Signals) -> None:
        super().__init__(target)
        self.driver, self.pid, self.number = os.getpid(), pid, number

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        if os.getpid() == self.driver:
            os.kill(self.pid, self.number)
        return super().sizes(names)


def attempt(group: WorkerGroup, case: Case, target: str) -> tuple[RayCkptError | None, float]:
    """Do what meets the fault. What it raised, and how long it took."""
    storage: Storage = TravellingStorage(target, case.storage_fault)
    state_of = rank_states.held_state_of
    if case.phase == "plan" and case.rank != DRIVER:
        storage, state_of = Storage(target), rank_states.faulty_state_of
        group.run(rank_states.expect, case.action, case.rank)
    elif case.phase == "commit" and case.rank != DRIVER:
        number = signal.SIGKILL if case.action == "killed" else signal.SIGSTOP
        storage = Striking(target, group.workers[case.rank].pid, number)
    timeout_s = TIMEOUT_S if case.action == "hangs" else 60.0
    start = time.monotonic()
    try:
        if case.phase == "read":
            cluster.load(group, state_of, storage, timeout_s=timeout_s)
        else:
            cluster.save(group, state_of, storage, timeout_s=timeout_s)
    except RayCkptError as error:
        return error, time.monotonic() - start
    return None, time.monotonic() - start


def check(group: WorkerGroup, case: Case, before: str, target: str) -> None:
    """Everything that is promised of one fault."""
    hold(group, 1)
    cluster.save(group, rank_states.held_state_of, before)
    if case.phase == "read":
        hold(group, 2)
        cluster.save(group, rank_states.held_state_of, target)
    hold(group, 3)
    error, seconds = attempt(group, case, target)
    recovers = case.recovers
    others = tuple(rank for rank in WORKERS if case.action not in ("killed", "hangs") or rank != case.rank)
    assert (error is None) == recovers, error
    assert not group.closed
    if error is not None:
        assert_blamed(case, error, seconds)
    if case.phase == "read":
        assert not recovers or held(group) == {2}
    else:
        assert Storage(target).exists(MANIFEST_NAME) == recovers
    # The step before loads on whoever is left, one worker at a time or all together: no process group is needed.
    load_on = others if len(others) < NUM_WORKERS else WORKERS
    hold(group, 9, load_on)
    reload(group, before, load_on)
    assert held(group, load_on) == {1}
    if recovers and case.phase != "read":
        reload(group, target, load_on)
        assert held(group, load_on) == {3}


def reload(group: WorkerGroup, target: str, ranks: tuple[int, ...]) -> None:
    if len(ranks) == NUM_WORKERS:
        cluster.load(group, rank_states.held_state_of, target)
    else:
        group.call(rank_states.load_alone, dict.fromkeys(ranks, (target,)), timeout_s=30)


def assert_blamed(case: Case, error: RayCkptError, seconds: float) -> None:
    if case.rank == DRIVER:
        assert isinstance(error, StorageError)
        return
    if case.action == "hangs":
        assert isinstance(error, GroupTimeoutError)
        assert f"from rank {case.rank} on" in str(error)
        assert f"rank {1 - case.rank} on" not in str(error)
        assert seconds < TIMEOUT_S + WITHOUT_WAITING_S
        return
    assert isinstance(error, WorkerError)
    assert error.ranks == (case.rank,)
    if case.action == "killed":
        assert error.failures[0].error_type == DIED
        assert seconds < WITHOUT_WAITING_S
    else:
        expected = "ValueError" if case.phase == "plan" else "StorageError"
        assert error.failures[0].error_type.endswith(expected)


@pytest.mark.parametrize("phase", ["plan", "write", "commit", "read"])
def test_faults_that_workers_survive(group: WorkerGroup, tmp_path: Path, phase: str) -> None:
    cases = [case for case in HARMLESS if case.phase == phase]
    assert cases
    for case in cases:
        check(group, case, str(tmp_path / f"{case}" / "before"), str(tmp_path / f"{case}" / "now"))
        assert group.run(rank_states.held_saves) == [0] * NUM_WORKERS, case
        assert group.run(rank_states.held_loads) == [0] * NUM_WORKERS, case


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, marks=[] if (case.phase, case.action, case.rank) in IN_MAKE_TEST else pytest.mark.slow, id=str(case)
        )
        for case in DEADLY
    ],
)
def test_faults_that_cost_a_worker(local_ray: None, tmp_path: Path, case: Case) -> None:
    with make_group() as group:
        check(group, case, str(tmp_path / "before"), str(tmp_path / "now"))
        with contextlib.suppress(ProcessLookupError):
            os.kill(group.workers[case.rank].pid, signal.SIGKILL)


ON_S3 = [Case("write", "no space", 1), Case("write", "throttled", 0), Case("read", "raises", 1)]


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow, id=str(case)) for case in ON_S3])
def test_faults_on_s3(group: WorkerGroup, s3: S3, case: Case) -> None:
    name = str(case).replace(" ", "-")
    check(group, case, s3.uri(f"{name}/before"), s3.uri(f"{name}/now"))


@pytest.mark.slow
def test_a_worker_that_is_killed_on_s3(local_ray: None, s3: S3) -> None:
    with make_group() as group:
        check(group, Case("write", "killed", 0), s3.uri("killed/before"), s3.uri("killed/now"))
