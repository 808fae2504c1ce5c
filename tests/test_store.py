"""A store of checkpoints on local files, on S3 and in memory: what is a step, what is removed, and what never is."""

from __future__ import annotations

import os
import pickle
import uuid

import pytest
import torch

import ray_ckpt
from ray_ckpt.dcp.reader import ArrowStorageReader
from ray_ckpt.errors import CheckpointError, CheckpointNotFoundError, StorageError, UsageError
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.retention import keep, keep_every, keep_last
from ray_ckpt.storage.store import CheckpointStore
from tests.support.azure import run_azure
from tests.support.faulty import AT_ONCE
from tests.support.gcs import run_gcs
from tests.support.s3 import run_s3

ATTEMPT = "0123456789ab"


@pytest.fixture(scope="module")
def s3():
    with run_s3() as server:
        yield server


@pytest.fixture(scope="module")
def gcs():
    with run_gcs() as place:
        yield place


@pytest.fixture(scope="module")
def azure():
    with run_azure() as place:
        yield place


@pytest.fixture(params=["path", "s3", "gs", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("abfs", "ram"))])
def store(request, tmp_path):
    if request.param == "path":
        return CheckpointStore(tmp_path / "run")
    if request.param == "ram":
        request.getfixturevalue("local_ray")
        return CheckpointStore(Storage(f"ram://suite/{uuid.uuid4().hex}?replicas=0", retry=AT_ONCE))
    if request.param == "abfs":
        return CheckpointStore(Storage(request.getfixturevalue("azure").format(path=uuid.uuid4().hex), retry=AT_ONCE))
    if request.param == "gs":
        return CheckpointStore(request.getfixturevalue("gcs").format(path=uuid.uuid4().hex))
    return CheckpointStore(Storage(request.getfixturevalue("s3").uri(uuid.uuid4().hex), retry=AT_ONCE))


def _state(step):
    return {"weight": torch.arange(300.0) * (step + 1), "step": step, "shape": torch.Size([step])}


def save(store, step, **options):
    return ray_ckpt.save(_state(step), store.location(step).uri, **options)


def loads(storage, step):
    """Whether what is there is that step, bit for bit."""
    state = _state(step + 1)
    assert not torch.equal(state["weight"], _state(step)["weight"])
    ray_ckpt.load(state, storage)
    return torch.equal(state["weight"], _state(step)["weight"]) and state["step"] == step


def _files(store):
    return Storage(store._storage.uri).list()


def _write(store, name, data=b"x"):
    Storage(store._storage.uri).write_atomic(name, data)


def _put_foreign_files(store):
    """What others may keep in the same place. Returns its names."""
    names = [
        "step-007/manifest.json",
        "step-7a/manifest.json",
        "step--7/manifest.json",
        "step-\u0667/manifest.json",
        "Step-7/manifest.json",
        "step-8/__0_0.distcp",
        "step-8/.metadata",
        "step-9/notes.txt",
        "step-9/deeper/__0_0-0123456789ab.distcp",
        "step-9/deeper/manifest.json",
        "manifest.json",
        "__0_0-0123456789ab.distcp",
        ".pins/notes",
        "notes.txt",
    ]
    for name in names:
        _write(store, name)
    return set(names)


def test_an_empty_store(store):
    assert (store.steps(), store.latest(), store.pins()) == ((), None, ())
    for ask in (store.manifest, store.delete, store.pin):
        with pytest.raises(CheckpointNotFoundError, match="no committed step"):
            ask(3)
    with pytest.raises(CheckpointNotFoundError, match="no committed step"), store.reading():
        pass
    store.unpin(3)
    assert store.prune(keep_last(1)).removed == ()
    assert store.clean(older_than_s=0).files == ()
    assert _files(store) == {}


def test_committed_steps_are_listed_by_number(store):
    for step in (10, 9, 0, 100):
        save(store, step)
    (Storage(store.location(200).uri)).write_atomic(f"__0_0-{ATTEMPT}.distcp", b"x")
    assert store.steps() == (0, 9, 10, 100)
    assert store.latest() == 100
    assert store.manifest(9).values()["step"] == 9
    with store.reading() as storage:
        assert loads(storage, 100)
    with store.reading(9) as storage:
        assert loads(storage, 9)
    with pytest.raises(CheckpointNotFoundError, match=r"step 200 is not committed.*latest one is 100"):
        store.manifest(200)
    assert pickle.loads(pickle.dumps(store)).steps() == store.steps()


@pytest.mark.parametrize("step", [-1, True, 1.5, "7", None])
def test_a_step_that_is_not_a_number_from_zero_is_refused(tmp_path, step):
    store = CheckpointStore(tmp_path)
    for ask in (store.location, store.manifest, store.delete, store.pin, store.unpin):
        with pytest.raises(UsageError, match="not a step"):
            ask(step)


def test_delete_takes_a_step_and_nothing_else(store):
    for step in (1, 2, 9):
        save(store, step)
    foreign = _put_foreign_files(store)
    before = _files(store)
    report = store.delete(9)
    after = _files(store)
    gone = before.keys() - after.keys()
    assert foreign <= after.keys()
    assert {name for name in gone if name.endswith(".distcp")} == set(report.files)
    assert gone - set(report.files) == {"step-9/manifest.json", "step-9/.metadata"}
    assert report.total_bytes == sum(before[name] for name in report.files) > 0
    assert (report.removed, report.dry_run, report.uri) == ((9,), False, store.address)
    assert store.steps() == (1, 2)
    assert loads(store.location(2), 2)
    with pytest.raises(CheckpointNotFoundError, match="step 9"):
        store.delete(9)
    save(store, 9)
    assert store.latest() == 9


def test_nothing_is_left_of_a_deleted_step(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    store.delete(1)
    assert list(tmp_path.glob("**/*")) == [tmp_path / ".pins"]


def test_a_damaged_step_can_be_deleted(store):
    save(store, 1)
    _write(store, "step-1/manifest.json", b"{")
    assert store.steps() == (1,)
    assert store.clean(older_than_s=0).files == ()
    assert store.delete(1).files == ()
    assert store.steps() == ()
    assert store.clean(older_than_s=0).total_bytes > 0
    assert _files(store) == {}


def test_prune_keeps_what_a_policy_or_a_pin_keeps(store):
    for step in range(0, 90, 10):
        save(store, step)
    foreign = _put_foreign_files(store)
    store.pin(10)
    expected = (0, 10, 30, 60, 70, 80)
    before = _files(store)
    rehearsal = store.prune(keep_last(2), keep_every(30), dry_run=True)
    assert _files(store) == before
    assert rehearsal.dry_run
    report = store.prune(keep_last(2), keep_every(30))
    assert store.steps() == report.kept == expected
    assert (report.removed, report.files, report.total_bytes) == (
        rehearsal.removed,
        rehearsal.files,
        rehearsal.total_bytes,
    )
    assert report.removed == (20, 40, 50)
    assert foreign <= _files(store).keys()
    assert all(loads(store.location(step), step) for step in expected)
    assert store.prune(keep_last(2) | keep_every(30)).removed == ()
    store.unpin(10)
    assert store.prune(keep([])).kept == (80,)
    with pytest.raises(UsageError, match="say what to keep"):
        store.prune()


def test_pins_are_seen_by_all_and_stop_a_delete(store):
    for step in (1, 2):
        save(store, step)
    other = CheckpointStore(Storage(store._storage.uri))
    store.pin(1)
    store.pin(1)
    assert other.pins() == (1,)
    with pytest.raises(UsageError, match=r"step 1 .* is pinned.*unpin\(1\)"):
        other.delete(1)
    assert loads(store.location(1), 1)
    with pytest.raises(CheckpointNotFoundError, match="step 3 is not committed"):
        store.pin(3)
    assert store.pins() == (1,)
    other.unpin(1)
    assert store.pins() == ()
    store.delete(1)
    assert _files(store).keys() == {name for name in _files(store) if name.startswith("step-2/")}


def _orphans(store):
    """What failed attempts leave in step 2, which is committed, and in step 3, which is not."""
    names = {
        f"step-2/__0_5-{ATTEMPT}.distcp",
        f"step-2/manifest.json.{ATTEMPT}.tmp",
        f"step-3/__0_0-{ATTEMPT}.distcp",
        f"step-3/__1_0-{ATTEMPT}.distcp",
        f"step-3/.metadata.{ATTEMPT}.tmp",
    }
    for name in names:
        _write(store, name, b"orphan")
    save(store, 4)
    data = {name for name in _files(store) if name.startswith("step-4/") and not name.endswith(MANIFEST_NAME)}
    Storage(store._storage.uri).delete("step-4/manifest.json")
    return names | data


def test_clean_takes_orphans_when_they_are_old_enough(store):
    save(store, 2)
    foreign = _put_foreign_files(store)
    orphans = _orphans(store)
    before = _files(store)
    assert store.clean().files == ()
    assert set(store.clean(older_than_s=0, dry_run=True).files) == orphans
    assert _files(store) == before
    report = store.clean(older_than_s=0)
    assert set(report.files) == orphans
    assert report.total_bytes == sum(before[name] for name in orphans)
    assert before.keys() - _files(store).keys() == orphans
    assert foreign <= _files(store).keys()
    assert (store.steps(), report.kept) == ((2,), (2,))
    assert loads(store.location(2), 2)
    with pytest.raises(UsageError, match="older_than_s=-1"):
        store.clean(older_than_s=-1)


def test_a_checkpoint_without_a_store_is_cleaned_up_after_too(tmp_path):
    """As the main job saves it: in the very directory that it was given."""
    steps = CheckpointStore(tmp_path)
    ray_ckpt.save(_state(1), tmp_path)
    for attempt in (ATTEMPT, "f" * 12):
        _write(steps, f"__0_0-{attempt}.distcp", b"orphan")
    for name in (f"manifest.json.{ATTEMPT}.tmp", f"probe-{ATTEMPT}-3", "__0_0.distcp", "notes.txt"):
        _write(steps, name, b"left")
    committed = {path.name for path in tmp_path.iterdir()} - {".pins"}
    assert steps.clean().files == ()
    ours = {f"__0_0-{ATTEMPT}.distcp", f"__0_0-{'f' * 12}.distcp", f"manifest.json.{ATTEMPT}.tmp", f"probe-{ATTEMPT}-3"}
    assert set(steps.clean(older_than_s=0).files) == ours
    assert {path.name for path in tmp_path.iterdir()} - {".pins"} == committed - ours
    assert loads(Storage(tmp_path), 1)
    (tmp_path / MANIFEST_NAME).unlink()
    steps.clean(older_than_s=0)
    assert {path.name for path in tmp_path.iterdir()} - {".pins"} == {"__0_0.distcp", "notes.txt"}


def test_an_attempt_is_as_old_as_its_youngest_file(tmp_path):
    store = CheckpointStore(tmp_path)
    for number in range(2):
        for attempt in (ATTEMPT, "f" * 12):
            _write(store, f"step-3/__{number}_0-{attempt}.distcp")
    long_ago = 1_000_000_000
    for name in (f"__0_0-{ATTEMPT}.distcp", f"__1_0-{ATTEMPT}.distcp", f"__0_0-{'f' * 12}.distcp"):
        os.utime(tmp_path / "step-3" / name, (long_ago, long_ago))
    assert set(store.clean().files) == {f"step-3/__0_0-{ATTEMPT}.distcp", f"step-3/__1_0-{ATTEMPT}.distcp"}


def test_steps_take_one_listing_on_s3(s3):
    storage = Storage(s3.uri(uuid.uuid4().hex))
    store = CheckpointStore(storage)
    for step in range(60):
        for name in (MANIFEST_NAME, f"__0_0-{ATTEMPT}.distcp"):
            storage.write_atomic(f"step-{step}/{name}", b"x")
    save(store, 59, overwrite=True)
    s3.reset()
    assert store.steps() == tuple(range(60))
    assert dict(s3.requests) == {"GET": 1}
    s3.reset()
    assert store.latest() == 59
    assert dict(s3.requests) == {"GET": 3, "HEAD": 1}  # the steps, the record, its files


def test_ten_thousand_local_steps_are_listed_at_once(tmp_path):
    for step in range(10_000):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / MANIFEST_NAME).touch()
    save(CheckpointStore(tmp_path), 9_999, overwrite=True)
    counted = Counted(tmp_path)
    assert CheckpointStore(counted).steps() == tuple(range(10_000))
    assert counted.operations.count("list") == 1
    assert len(counted.operations) <= 3
    counted.operations.clear()
    assert CheckpointStore(counted).latest() == 9_999
    assert counted.operations.count("list") == 1


class Counted(Storage):
    """Writes down every operation, of its children too."""

    def __init__(self, target):
        super().__init__(target)
        self.operations = []

    def perform(self, operation, name, action):
        self.operations.append(operation)
        return super().perform(operation, name, action)


def _read_while_it_is_deleted(store, read):
    with store.reading() as storage:
        [file] = store.manifest(2).files
        CheckpointStore(Storage(store._storage.uri)).delete(2)
        read(storage, file)


@pytest.mark.parametrize(
    "read",
    [lambda storage, file: ArrowStorageReader(storage).read_manifest(), lambda storage, file: storage.read_bytes(file)],
    ids=["manifest", "data"],
)
def test_a_reader_of_a_deleted_step_is_told_so(store, read):
    for step in (1, 2):
        save(store, step)
    if store.address.startswith("ram://"):  # it stays whole
        _read_while_it_is_deleted(store, read)
    else:
        with pytest.raises(CheckpointNotFoundError, match=r"step 2 .* was deleted while it was read"):
            _read_while_it_is_deleted(store, read)
    assert store.steps() == (1,)
    with store.reading() as storage:
        assert loads(storage, 1)
    with pytest.raises(StorageError, match="nothing"), store.reading() as storage:
        storage.read_bytes("nothing")
    with pytest.raises(CheckpointError), store.reading() as storage:
        raise CheckpointError("something else")
