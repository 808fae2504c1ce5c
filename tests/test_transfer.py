"""From the workers of one group to those of another, without a store: what arrives, who is named, what is left."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_ckpt import Event, Saved, cluster
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.errors import CommitError, UsageError, WorkerError
from ray_ckpt.format.fingerprint import by_name, merge
from tests.support import transfer_ranks as ranks

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

SMALL = 2 << 20
"""Memory for windows of a MiB."""


def make_group(num_workers: int = 2, *, process_group: bool = False) -> WorkerGroup:
    return WorkerGroup(
        num_workers, cpus_per_worker=0.4, process_group=process_group, start_timeout_s=120, call_timeout_s=90
    )


@pytest.fixture(scope="module")
def groups(local_ray: None) -> Iterator[tuple[WorkerGroup, WorkerGroup]]:
    with make_group() as source, make_group() as target:
        yield source, target


@pytest.fixture
def source(groups: tuple[WorkerGroup, WorkerGroup]) -> WorkerGroup:
    groups[0].run(ranks.reset)
    return groups[0]


@pytest.fixture
def target(groups: tuple[WorkerGroup, WorkerGroup]) -> WorkerGroup:
    groups[1].run(ranks.reset)
    return groups[1]


@pytest.mark.parametrize("atomic", [False, True])
def test_every_kind_of_tensor_arrives_in_windows(source: WorkerGroup, target: WorkerGroup, atomic: bool) -> None:
    assert target.run(ranks.has_all) == [False, False]
    told: list[Event] = []
    options: dict[str, Any] = {"atomic": atomic, "memory_bytes": SMALL, "timeout_s": 60, "events": told.append}
    report = cluster.transfer(source, ranks.source_of, target, ranks.target_of, **options)
    assert target.run(ranks.has_all) == [True, True]
    assert source.run(ranks.source_values) == [True, True]
    assert report.num_compared == 13
    assert report.num_windows > 5
    assert 0 < report.source_seconds <= report.seconds
    assert [group.run(ranks.left_behind) for group in (source, target)] == [[[], []], [[], []]]
    assert [(event.operation, event.phase) for event in told] == [
        ("transfer", phase) for phase in ("copy", "end", "blocked")
    ]
    assert [event.seconds for event in told[:2]] == [report.source_seconds, report.seconds]
    assert [event.num_bytes for event in told[:2]] == [report.num_bytes] * 2
    assert not any(event.failure for event in told)


def test_the_source_goes_on_as_soon_as_its_part_is_copied(source: WorkerGroup, target: WorkerGroup) -> None:
    told: list[Event] = []
    options: dict[str, Any] = {"memory_bytes": SMALL, "events": told.append}
    handle = cluster.transfer(source, ranks.source_of, target, ranks.target_of, blocking=False, **options)
    source.run(ranks.change_source)
    assert handle.result(timeout_s=60).num_compared == 13
    assert {event.phase for event in told} == {"copy", "end", "blocked"}
    assert handle.done()
    assert target.run(ranks.has_all) == [True, True]
    assert source.run(ranks.source_values) == [False, False]


def test_weights_are_cast_and_joined_on_the_way(source: WorkerGroup, target: WorkerGroup) -> None:
    key_map = {"qk": Saved.cat([Saved("q"), Saved("k")])}
    cluster.transfer(source, ranks.parts_of, target, ranks.joined_of, cast="bfloat16", key_map=key_map)
    assert target.run(ranks.joined) == [[0, 1, 2, 3, 4, 5, 0, -1, -2]] * 2


def test_a_group_publishes_weights_in_another_form_while_it_trains_on(
    source: WorkerGroup, target: WorkerGroup, tmp_path: Path
) -> None:
    key_map = {"qk": Saved.cat([Saved("q"), Saved("k")])}
    for store in ("ram://weights?replicas=0", str(tmp_path / "weights")):
        options: dict[str, Any] = {"only": ("q", "k"), "cast": "bfloat16", "key_map": key_map, "fingerprints": True}
        for version in range(5):
            handle = cluster.save(source, ranks.growing_parts_of, store, version, blocking=False, **options)
            source.run(ranks.grow)
            handle.result(60)
        threading.Timer(0.5, cluster.save, (source, ranks.growing_parts_of, store, 5), options).start()
        # Who joins late takes the version that it waits for.
        [report, _] = cluster.load(target, ranks.joined_of, store, wait_for=5, wait_s=60)
        assert report.step == 5
        assert target.run(ranks.joined) == [[5, 6, 7, 8, 9, 10, 5, 4, 3]] * 2
        assert cluster.compare(target, ranks.joined_of, store, 5).equal
        assert not cluster.compare(target, ranks.joined_of, store, 4).equal
        source.run(ranks.reset)
        target.run(ranks.reset)
    cluster.drop_memory("weights")


def test_within_one_group(source: WorkerGroup) -> None:
    cluster.transfer(source, ranks.source_of, source, ranks.target_of, memory_bytes=SMALL)
    assert source.run(ranks.has_all) == [True, True]


def test_what_does_not_fit_is_refused_before_anything_changes(source: WorkerGroup, target: WorkerGroup) -> None:
    told: list[Event] = []
    with pytest.raises(WorkerError, match=r"common: not saved, wanted .*; it is the target of a transfer"):
        cluster.transfer(source, ranks.parts_of, target, ranks.common_of, events=told.append)
    [failed] = told
    assert (failed.operation, failed.phase, failed.failure) == ("transfer", "end", "StateMismatchError")
    assert "it is the target of a transfer" in failed.message
    with pytest.raises(UsageError, match=r"no rank holds anything of only='model'"):
        cluster.transfer(source, ranks.parts_of, target, ranks.common_of, only=("model",))
    with pytest.raises(WorkerError, match=r"not records.*: leave that out by only=.*it is the source of a transfer"):
        cluster.transfer(source, ranks.with_an_object_of, target, ranks.common_of)
    report = cluster.transfer(source, ranks.parts_of, target, ranks.partly_of, strict=False)
    assert (report.missing, report.unexpected, report.num_compared) == (("z",), ("k",), 1)
    with pytest.raises(UsageError, match="memory_bytes=1 "):
        cluster.transfer(source, ranks.parts_of, target, ranks.common_of, memory_bytes=1)


def test_ranks_that_hold_different_things_are_not_taken_for_one(source: WorkerGroup, target: WorkerGroup) -> None:
    with pytest.raises(CommitError, match=r"different things under one name: common"):
        cluster.transfer(source, ranks.differing_replicas_of, target, ranks.common_of, atomic=True)


def kill_when_begun(group: WorkerGroup) -> Callable[[int, int], None]:
    """A progress that kills rank 1 once a part has been sent, of which some has been taken."""
    pid, killed = group.workers[1].pid, threading.Event()

    def kill(done: int, total: int) -> None:
        if 0.2 * total < done < total and not killed.is_set():
            killed.set()
            os.kill(pid, signal.SIGKILL)

    return kill


@pytest.mark.slow
def test_a_target_that_is_killed_is_named_and_the_source_goes_on(source: WorkerGroup, target: WorkerGroup) -> None:
    with make_group() as doomed:
        with pytest.raises(WorkerError, match=r"rank 1 .*; it is the target of a transfer") as told:
            cluster.transfer(
                source,
                ranks.source_of,
                doomed,
                ranks.target_of,
                memory_bytes=SMALL,
                progress=kill_when_begun(doomed),
                timeout_s=60,
            )
        assert told.value.ranks == (1,)
    assert source.run(ranks.source_values) == [True, True]
    cluster.transfer(source, ranks.source_of, target, ranks.target_of)
    assert target.run(ranks.has_all) == [True, True]


@pytest.mark.parametrize(
    ("atomic", "left"), [pytest.param(True, "old", marks=pytest.mark.slow), pytest.param(False, "both")]
)
def test_a_source_that_is_killed_leaves_an_atomic_target_as_it_was(
    target: WorkerGroup, atomic: bool, left: str
) -> None:
    with make_group() as doomed, pytest.raises(WorkerError, match=r"rank 1 .*it is the source of a transfer") as told:
        cluster.transfer(
            doomed,
            ranks.source_of,
            target,
            ranks.target_of,
            atomic=atomic,
            memory_bytes=SMALL,
            progress=kill_when_begun(doomed),
            timeout_s=60,
        )
    assert set(target.run(ranks.how_new)) == {left}
    assert ("what the failed load has left" in str(told.value)) is not atomic
    assert target.run(ranks.left_behind) == [[], []]


LAYOUTS = ["fsdp1x4", "fsdp2x4", "hsdp2x2", "tp4", "pp4", "pp2.tp2", "pp2.fsdp2x2", "fsdp2x2.tp2"]


def digests(group: WorkerGroup) -> dict[str, str]:
    found = by_name(group.run(ranks.held_of))
    return {name: merge(parts).digest for name, parts in found.items()}


@pytest.mark.slow
@pytest.mark.timeout(380)
def test_every_layout_to_another_in_both_directions_by_transfer_and_by_memory() -> None:
    with make_group(4, process_group=True) as one, make_group(4, process_group=True) as other:
        for number, (layout, another) in enumerate(zip(LAYOUTS, LAYOUTS[1:] + LAYOUTS[:1], strict=True)):
            one.run(ranks.lay_out, layout, 2 * number + 1)
            other.run(ranks.lay_out, another, 2 * number + 2)
            for source, target in ((one, other), (other, one)):
                source.run(ranks.spoil)
                assert digests(source) != digests(target)
                cluster.transfer(source, ranks.laid_out, target, ranks.laid_out, only=("model",), atomic=target is one)
                assert digests(source) == digests(target), (layout, another)
                source.run(ranks.spoil)
                assert digests(source) != digests(target)
                cluster.save(source, ranks.laid_out, "ram://policy", 2 * number, only=("model",), overwrite=True)
                cluster.load(target, ranks.laid_out, "ram://policy", 2 * number, only=("model",))
                assert digests(source) == digests(target), (layout, another)
    cluster.drop_memory("policy")
