"""Events: what `events=` and `--events` tell of saves and loads, and that nobody is harmed by who listens."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ckpt import CheckpointStore, Event, EventFile, Storage, TrainState, load, resume, save, verify
from ray_ckpt.errors import CheckpointNotFoundError, StorageError, UsageError
from tests.support.faulty import AT_ONCE, Fault, FaultyStorage
from tests.support.ranks import run_ranks
from tests.support.s3 import S3, run_s3

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

NUM_BYTES = 4000
SAVE_PHASES = {"plan", "write", "checksum", "check", "commit"}
LOAD_PHASES = {"open", "plan", "read", "set"}


def state(value: float = 1.0) -> dict[str, Any]:
    return {"weight": torch.full((1000,), value), "step": 3}


@pytest.mark.parametrize("blocking", [True, False])
def test_a_save_tells_its_phases_its_end_and_how_long_it_held_up(tmp_path: Path, blocking: bool) -> None:
    told: list[Event] = []
    saved = save(state(), tmp_path, 7, blocking=blocking, events=told.append)
    report = saved if blocking else saved.result(timeout_s=60)
    by_phase = {event.phase: event for event in told}
    assert by_phase.keys() == {*SAVE_PHASES, "end", "blocked"} | (set() if blocking else {"copy"})
    assert {(event.operation, event.step, event.uri, event.failure) for event in told} == {("save", 7, report.uri, "")}
    assert (by_phase["write"].rank, by_phase["write"].num_bytes) == (0, NUM_BYTES)
    assert (by_phase["end"].seconds, by_phase["end"].num_bytes) == (report.seconds, report.total_bytes)
    assert by_phase["blocked"].seconds > 0
    if blocking:
        assert by_phase["blocked"].seconds >= report.seconds


def test_a_load_and_a_resume_tell_what_they_read(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(TrainState(torch.nn.Linear(10, 10)), store, 5)
    for verb in (load, resume):
        told: list[Event] = []
        report = verb(TrainState(torch.nn.Linear(10, 10)), store, events=told.append)
        assert report is not None
        assert {event.phase for event in told} >= {*LOAD_PHASES, "end"}
        assert {(event.operation, event.step, event.rank, event.uri) for event in told} == {("load", 5, 0, report.uri)}
        assert told[-1].num_bytes == report.num_bytes == 440
    told = []
    assert resume(TrainState(torch.nn.Linear(10, 10)), tmp_path / "none", events=told.append) is None
    assert told == []


@pytest.mark.parametrize("blocking", [True, False])
def test_a_failure_is_told_once_with_its_kind(tmp_path: Path, blocking: bool) -> None:
    told: list[Event] = []
    storage = FaultyStorage(str(tmp_path), Fault("no space", ("finish",), name=".distcp"), rank=0)

    def attempt() -> None:
        saved = save(state(), storage, blocking=blocking, events=told.append)
        if not blocking:
            saved.result(timeout_s=60)

    with pytest.raises(StorageError) as raised:
        attempt()
    [end] = [event for event in told if event.phase == "end"]
    assert (end.failure, end.message) == ("StorageError", str(raised.value))
    told.clear()
    with pytest.raises(CheckpointNotFoundError):
        load(state(), tmp_path / "none", events=told.append)
    assert [(event.operation, event.phase, event.failure) for event in told] == [
        ("load", "end", "CheckpointNotFoundError")
    ]


def test_a_check_is_told_and_damage_is_a_failure(tmp_path: Path) -> None:
    told: list[Event] = []
    save(state(), tmp_path, 7)
    report = verify(tmp_path, events=told.append)
    [(path, size)] = [(path, path.stat().st_size) for path in tmp_path.rglob("*.distcp")]
    [event] = told
    assert (event.operation, event.phase, event.step, event.failure) == ("verify", "end", 7, "")
    assert (event.num_bytes, event.uri, event.seconds) == (report.total_bytes, report.uri, report.seconds)
    assert report.total_bytes >= size
    data = bytearray(path.read_bytes())
    data[size // 2] ^= 1
    path.write_bytes(data)
    damaged = verify(tmp_path, events=told.append)
    assert (told[1].failure, told[1].message) == ("IntegrityError", str(damaged.damages[0]))
    with pytest.raises(CheckpointNotFoundError):
        verify(tmp_path / "none", events=told.append)
    assert [event.failure for event in told] == ["", "IntegrityError", "CheckpointNotFoundError"]


def test_retries_are_counted(tmp_path: Path) -> None:
    told: list[Event] = []
    save(
        state(),
        FaultyStorage(str(tmp_path), Fault("throttled", ("finish",), name=".distcp"), rank=0),
        events=told.append,
    )
    assert [event.num_retries for event in told if event.phase == "end"] == [3]


def test_a_callable_that_raises_is_called_once_and_the_save_goes_on(tmp_path: Path) -> None:
    told: list[Event] = []

    def broken(event: Event) -> None:
        told.append(event)
        raise ValueError("no such place")

    with pytest.warns(RuntimeWarning, match=r"events= raised ValueError: no such place; it was not called again"):
        save(state(), tmp_path, events=broken)
    assert len(told) == 1
    target = state(0.0)
    load(target, tmp_path)
    assert torch.equal(target["weight"], state()["weight"])


def test_a_file_gets_a_line_per_event_and_keeps_what_it_had(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for step in (1, 2):
        with EventFile(str(path)) as events:
            save(state(), tmp_path / "run", step, events=events)
            lines = path.read_text().splitlines()  # before it is closed: whoever follows it sees them
    parsed = [json.loads(line) for line in lines]
    assert [line["step"] for line in parsed if line["phase"] == "end"] == [1, 2]
    assert {frozenset(line) for line in parsed} == {frozenset(Event.__dataclass_fields__)}


def test_a_file_that_cannot_be_made_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot write events to .*: No such file or directory"):
        EventFile(str(tmp_path / "none" / "events.jsonl"))


@pytest.mark.parametrize("uri", ["s3://KEY:SEC/RET@bucket/x", "abfs://c@a/x?sig=SECRET"])
def test_a_uri_in_the_place_of_a_file_is_told_without_its_credentials(uri: str) -> None:
    with pytest.raises(UsageError, match="cannot write events to") as raised:
        EventFile(uri)
    assert not any(secret in str(raised.value) for secret in ("KEY", "SEC", "RET"))


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with run_s3() as server:
        yield server


def test_no_secret_is_told(s3: S3) -> None:
    told: list[Event] = []
    for path in (s3.uri("told"), s3.uri("told", bucket="no-such-bucket")):
        storage = Storage(path, retry=AT_ONCE)
        with contextlib.suppress(StorageError, CheckpointNotFoundError):
            save(state(), storage, events=told.append)
        with contextlib.suppress(StorageError, CheckpointNotFoundError):
            load(state(), storage, events=told.append)
    assert {event.uri for event in told} - {""} == {"s3://bucket/told", "s3://no-such-bucket/told"}
    assert {event.failure for event in told} == {"", "StorageError", "CheckpointNotFoundError"}
    text = "\n".join(event.to_json() for event in told)
    assert "no-such-bucket" in text
    for secret in ("secret", "key:", str(s3.port)):
        assert secret not in text


def save_and_load(rank: int, directory: str) -> list[tuple[str, str, int | None, int]]:
    told: list[Event] = []
    own = {f"part{rank}": torch.full((10 + rank,), 1.0)}
    save(own, directory, events=told.append)
    load(own, directory, events=told.append)
    return [(event.operation, event.phase, event.rank, event.num_bytes) for event in told]


def test_each_rank_tells_its_own_phases_and_the_first_those_of_the_coordinator(tmp_path: Path) -> None:
    told = run_ranks(save_and_load, 2, tmp_path, str(tmp_path / "run"))
    for rank, events in enumerate(told):
        assert [entry for entry in events if entry[1] == "write"] == [("save", "write", rank, 4 * (10 + rank))]
        assert {entry[2] for entry in events} == ({0, None} if rank == 0 else {1})
        assert [entry[:3] for entry in events if entry[1] == "end"] == [("save", "end", rank), ("load", "end", rank)]
    assert ("save", "commit", None, 0) in told[0]
    assert not [entry for entry in told[1] if entry[1] == "commit"]
