"""A worker group on a local Ray: results, failures, time limits, and what is left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
import ray
from ray.util import placement_group_table

from ray_ckpt.cluster import gather
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.cluster.worker import WorkerInfo, attempt
from ray_ckpt.errors import DIED, GroupError, GroupTimeoutError, PlacementError, UsageError, WorkerError
from tests.support import rank_functions, task_functions
from tests.support.clusters import CGROUPS, needs_cgroups, wait_until
from tests.support.faulty import WITHOUT_WAITING_S

pytestmark = pytest.mark.usefixtures("local_ray")


def assert_nothing_is_left(pids: list[int]) -> None:
    """No placement group, no actor, no resource in use and no process of the group, before long."""
    deadline = time.monotonic() + 30
    while True:
        actors = [actor for actor in ray._private.state.actors().values() if actor["State"] != "DEAD"]
        placed = [entry for entry in placement_group_table().values() if entry["state"] != "REMOVED"]
        free = ray.available_resources().get("CPU", 0)
        alive = [pid for pid in pids if is_alive(pid)]
        if not actors and not placed and free == ray.cluster_resources()["CPU"] and not alive:
            return
        assert time.monotonic() < deadline, (actors, placed, free, alive)
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[WorkerGroup]:
    """Four workers, or as many as the test asks for: each takes a core two seconds to start."""
    with WorkerGroup(getattr(request, "param", 4), start_timeout_s=60, call_timeout_s=60) as group:
        pids = [worker.pid for worker in group.workers]
        yield group
    assert_nothing_is_left(pids)


def test_results_come_in_rank_order_with_a_context(group: WorkerGroup) -> None:
    results = group.run(rank_functions.describe, "a", 2)
    assert [result["rank"] for result in results] == [0, 1, 2, 3]
    assert [result["local_rank"] for result in results] == [0, 1, 2, 3]
    assert {result["world_size"] for result in results} == {4}
    assert {result["sum_of_ranks"] for result in results} == {6.0}
    assert {result["device"] for result in results} == {"cpu"}
    assert {result["backend"] for result in results} == {"gloo"}
    assert {result["args"] for result in results} == {("a", 2)}
    assert [result["pid"] for result in results] == [worker.pid for worker in group.workers]
    # Objects stay on the worker from one call to the next.
    group.run(rank_functions.remember, {"answer": 42})
    assert group.run(rank_functions.recall) == [{"answer": 42}] * 4


@pytest.mark.parametrize("group", [2], indirect=True)
@pytest.mark.parametrize(
    ("ranks", "kind", "error_type"),
    [
        pytest.param([0], "ValueError", "ValueError", marks=pytest.mark.slow),
        ([0, 1], "ValueError", "ValueError"),
        pytest.param([1], "unpicklable", "tests.support.rank_functions.UnpicklableError", marks=pytest.mark.slow),
        pytest.param([1], "checkpoint", "torch.distributed.checkpoint.api.CheckpointException", marks=pytest.mark.slow),
    ],
)
def test_a_raising_rank_is_named_while_others_sit_in_a_collective(
    group: WorkerGroup, ranks: list[int], kind: str, error_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(ranks) == group.num_workers:  # all are waited for, however much later one of them raises
        monkeypatch.setattr(gather, "CAUSE_GRACE_S", 30.0)
    start = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        group.run(rank_functions.raise_on, ranks, kind)
    assert time.monotonic() - start < WITHOUT_WAITING_S
    assert sorted(caught.value.ranks) == ranks
    assert {failure.error_type for failure in caught.value.failures} == {error_type}
    assert {failure.node for failure in caught.value.failures} == {group.workers[0].node}
    assert all("raise_on" in failure.traceback for failure in caught.value.failures)
    # Equal errors are grouped: one text, all ranks.
    assert str(caught.value).count(error_type) == 1
    assert caught.value.tracebacks().count("raise_on") >= 1
    with pytest.raises(GroupError, match="closed"):
        group.run(rank_functions.recall)


@pytest.mark.parametrize("group", [3], indirect=True)
@pytest.mark.parametrize(("rank", "how"), [(0, "SIGKILL"), pytest.param(2, "exit", marks=pytest.mark.slow)])
def test_a_dead_rank_is_named_without_waiting_for_the_others(group: WorkerGroup, rank: int, how: str) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        group.run(rank_functions.die_on, rank, how)
    assert time.monotonic() - start < WITHOUT_WAITING_S
    assert caught.value.ranks == (rank,)
    assert caught.value.failures[0].error_type == DIED
    assert f"rank {rank} on {group.workers[rank].node}: died: process {group.workers[rank].pid}" in str(caught.value)


@pytest.mark.parametrize("group", [2], indirect=True)
def test_a_call_that_outlasts_its_timeout_names_who_is_silent(group: WorkerGroup) -> None:
    start = time.monotonic()
    with pytest.raises(GroupTimeoutError, match=r"no answer within 1\.5 s from rank 1 on "):
        group.run(rank_functions.stop_answering, 1, timeout_s=1.5)
    assert time.monotonic() - start < WITHOUT_WAITING_S


@pytest.mark.slow
@pytest.mark.parametrize("group", [2], indirect=True)
def test_a_stopped_process_is_told_from_those_that_wait_for_it(group: WorkerGroup) -> None:
    os.kill(group.workers[1].pid, signal.SIGSTOP)
    with pytest.raises(GroupTimeoutError) as caught:
        group.run(rank_functions.describe, timeout_s=1.0)
    assert "no answer within 1 s from rank 0 on " in str(caught.value)
    stopped = rf"; rank 1 \(process {group.workers[1].pid}\) responds to nothing: stopped, or stuck; `ray stack`"
    assert re.search(stopped, str(caught.value))


class Stubborn:
    def __reduce__(self) -> str:
        raise ValueError("I stay here")


@pytest.mark.parametrize("group", [2], indirect=True)
def test_what_does_not_pickle_is_told_in_one_line(group: WorkerGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "CAUSE_GRACE_S", 30.0)  # all are waited for
    lock = threading.Lock()
    told = r"^cannot send {} and its arguments to the workers: {}; they have to pickle, as those of a top-level "
    of_the_lock = "TypeError: cannot pickle '_thread.lock' object"
    with pytest.raises(UsageError, match=told.format("describe", of_the_lock)):
        group.run(rank_functions.describe, lock)
    with pytest.raises(UsageError, match=told.format(r"test_what\S+<lambda>", of_the_lock)):
        group.run(lambda ctx: lock)
    with pytest.raises(UsageError, match=told.format("remember", "ValueError: I stay here")):
        group.call(rank_functions.remember, {0: ("it",), 1: (Stubborn(),)})
    assert len(group.run(rank_functions.describe)) == 2  # nothing has happened to the group
    with pytest.raises(WorkerError, match=rf"^ranks 0, 1 on .*: TypeError: its result does not pickle: {of_the_lock}$"):
        group.run(rank_functions.return_a_lock)


def test_a_group_may_be_closed_twice_and_formed_anew_with_another_size() -> None:
    first = WorkerGroup(1, start_timeout_s=60)
    pids = [worker.pid for worker in first.workers]
    first.close()
    first.close()
    assert_nothing_is_left(pids)
    with WorkerGroup(2, start_timeout_s=60) as second:
        assert [result["world_size"] for result in second.run(rank_functions.describe)] == [2, 2]
        assert not {worker.pid for worker in second.workers} & set(pids)


def test_an_interrupted_driver_leaves_nothing() -> None:
    pids: list[int] = []

    def interrupt() -> None:
        with WorkerGroup(1, start_timeout_s=60) as group:
            pids.extend(worker.pid for worker in group.workers)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert_nothing_is_left(pids)


def test_a_group_that_does_not_fit_says_what_is_missing_and_leaves_nothing() -> None:
    waits = []
    with pytest.raises(PlacementError) as caught:
        WorkerGroup(4, cpus_per_worker=3, start_timeout_s=2, on_wait=waits.append)
    total = ray.cluster_resources()["CPU"]
    assert f"asked for 4 x {{CPU: 3}}; the cluster has 1 node with {{CPU: {total:g}" in str(caught.value)
    assert f"CPU: needs 12, has {total:g}" in str(caught.value)
    assert waits
    assert waits[0].asked == "4 x {CPU: 3}"
    assert_nothing_is_left([])


def test_a_failing_rendezvous_leaves_nothing() -> None:
    with pytest.raises(WorkerError, match="rank"):
        WorkerGroup(2, backend="no-such-backend", start_timeout_s=60)
    assert_nothing_is_left([])


def end_by_signal(process: psutil.Process) -> None:
    process.kill()


def end_by_memory(process: psutil.Process) -> None:
    """As the kernel does when a container has no more memory: SIGKILL of the process that asks for some."""
    limited = CGROUPS / f"ray-ckpt-{process.pid}"
    limited.mkdir()
    try:
        (limited / "memory.limit_in_bytes").write_text("4096")
        (limited / "cgroup.procs").write_text(str(process.pid))
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(30)
    finally:
        wait_until(lambda: not (limited / "cgroup.procs").read_text(), 30, (limited / "cgroup.procs").read_text)
        limited.rmdir()


def worker_processes() -> Iterator[psutil.Process]:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Worker"):
                yield process


def end_a_starting_worker(end: Callable[[psutil.Process], None], others: set[int], ended: list[float]) -> None:
    """The first worker process that shows up before the group is formed, and is none of `others`, which may be what an
    earlier group left behind for a moment. Notes when it was dead."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for process in worker_processes():
            if process.pid in others:
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
                wait_until(lambda process=process: not is_alive(process.pid), 30, process.status)
                ended.append(time.monotonic())
                return
        time.sleep(0.005)


@pytest.mark.parametrize("end", [end_by_signal, pytest.param(end_by_memory, marks=[needs_cgroups, pytest.mark.slow])])
def test_a_worker_that_dies_while_the_group_starts_is_named_in_one_line(end: Callable[[psutil.Process], None]) -> None:
    """Not only when the time of the start is over."""
    ended: list[float] = []
    others = {process.pid for process in worker_processes()}
    ender = threading.Thread(target=end_a_starting_worker, args=(end, others, ended))
    ender.start()
    with pytest.raises(WorkerError) as caught:
        WorkerGroup(2, cpus_per_worker=0.5, start_timeout_s=60)
    named = time.monotonic()
    ender.join()
    assert named - ended[0] < WITHOUT_WAITING_S
    [failure] = caught.value.failures
    assert failure.error_type == DIED
    place = re.escape(f"{socket.gethostname()} ({ray.util.get_node_ip_address()})")
    told = rf"rank [01] on {place}: died: process \d+ is gone without a word: killed by a signal, as by the kernel when"
    assert re.match(told, str(caught.value))
    assert "\n" not in str(caught.value)
    assert_nothing_is_left([])


@pytest.mark.slow
@pytest.mark.parametrize("inside", ["task", "actor"])
def test_a_group_inside_another_process_of_ray_leaves_that_its_own_cpus(inside: str) -> None:
    """Of four CPUs the task holds three: two workers share the fourth."""
    if inside == "task":
        former, formed = None, ray.remote(num_cpus=3)(task_functions.form_group).remote(2, 60)
    else:
        former = ray.remote(num_cpus=3)(task_functions.Former).remote()
        formed = former.form_group.remote(2, 60)
    assert ray.get(formed, timeout=90) == [0.5, ["rank 0", "rank 1"]]
    if former is not None:
        ray.kill(former)
    assert_nothing_is_left([])


@pytest.mark.slow
def test_a_group_inside_a_task_that_holds_all_cpus_is_told_what_is_missing() -> None:
    form = ray.remote(num_cpus=ray.cluster_resources()["CPU"])(task_functions.form_group)
    with pytest.raises(PlacementError, match=r"not placed within 3 s: .* missing CPU: needs 2, has 0"):
        ray.get(form.remote(2, 3), timeout=90)
    assert_nothing_is_left([])


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_whatever_is_raised_comes_back_as_a_short_text() -> None:
    def raise_(error: BaseException) -> None:
        raise error

    long = attempt(3, raise_, ValueError("x" * (1 << 20))).failure
    assert long is not None
    assert (long.rank, long.error_type) == (3, "ValueError")
    assert re.fullmatch(r"x{5000} \.\.\. 1038576 more \.\.\. x{5000}", long.message)
    assert len(long.traceback) < 11_000
    silent = attempt(0, raise_, Unspeakable()).failure
    assert silent is not None
    assert silent.message == "its message cannot be had: RuntimeError"
    assert "raise_" in silent.traceback


def test_wrong_use_is_said_before_anything_is_placed() -> None:
    with pytest.raises(UsageError, match="at least one worker"):
        WorkerGroup(0)
    with pytest.raises(UsageError, match="needs GPUs"):
        WorkerGroup(2, gpus_per_worker=0, backend="nccl")
    assert_nothing_is_left([])


ALONE = """
import os, signal
import ray
from ray_ckpt import WorkerError, WorkerGroup

def die(ctx):
    os.kill(os.getpid(), signal.SIGKILL)

try:
    with WorkerGroup(1) as group:
        group.run(die)
except WorkerError as error:
    print(error.ranks, ray.is_initialized())
"""


@pytest.mark.slow
def test_a_group_that_started_ray_itself_also_stops_it_after_a_failure() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "(0,) False"


IN_A_NOTEBOOK = """
import asyncio
import ray
from ray_ckpt import WorkerGroup
from tests.support.task_functions import name

quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
ray.init("local", num_cpus=2, namespace="somebody's", **quiet)

async def cell():
    with WorkerGroup(1) as one, WorkerGroup(1) as other:
        return one.run(name) + other.run(name)

print(asyncio.run(cell()), ray.is_initialized())
"""


@pytest.mark.slow
def test_two_groups_at_once_on_a_ray_of_the_drivers_own_in_a_running_event_loop() -> None:
    done = subprocess.run([sys.executable, "-c", IN_A_NOTEBOOK], capture_output=True, text=True, timeout=90)
    assert (done.stdout, done.stderr) == ("['rank 0', 'rank 0'] True\n", "")


def test_ranks_follow_node_and_device() -> None:
    workers = [
        WorkerInfo("a", "10.0.0.2", "two", 1, ("0",)),
        WorkerInfo("b", "10.0.0.1", "one", 2, ("10",)),
        WorkerInfo("b", "10.0.0.1", "one", 3, ("2",)),
    ]
    assert [worker.pid for worker in sorted(workers, key=lambda worker: worker.position)] == [3, 2, 1]
