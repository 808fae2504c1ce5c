"""A store whose steps are damaged, hostile or linked: what counts as a step, and what is never removed."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import ray_ckpt
from ray_ckpt.errors import CheckpointNotFoundError, FormatError, UnsafeCheckpointError, UsageError
from ray_ckpt.format.manifest import MANIFEST_NAME, Manifest
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.retention import Policy, keep, keep_every, keep_last
from ray_ckpt.storage.store import CheckpointStore
from tests.support.s3 import run_s3

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:Detected an existing checkpoint")

STRAY = "step-99999999999999999999999"


@pytest.fixture
def store(tmp_path):
    """With steps 1, 2 and 3."""
    store = CheckpointStore(tmp_path / "run")
    for step in (1, 2, 3):
        _save(store, step)
    return store


def _save(store, step, version=None, **options):
    value = step if version is None else version
    return ray_ckpt.save({"weight": torch.arange(30.0) * value, "step": value}, store, step=step, **options)


def _loads(directory, version):
    """Whether ours and stock DCP both read that version there."""
    ours, stock = ({"weight": torch.zeros(30), "step": -1} for _ in range(2))
    ray_ckpt.load(ours, directory)
    dcp.load(stock, checkpoint_id=str(directory))
    return all(s["step"] == version and torch.equal(s["weight"], torch.arange(30.0) * version) for s in (ours, stock))


def _path(store, name):
    return Storage(store.address).path(name)


def _data_file(store, step):
    [name] = store.manifest(step).files
    return _path(store, f"step-{step}/{name}")


def _empty_manifest(store, step):
    open(_path(store, f"step-{step}/{MANIFEST_NAME}"), "w").close()


def _empty_data(store, step):
    open(_data_file(store, step), "w").close()


def _longer_data(store, step):
    with open(_data_file(store, step), "ab") as file:
        file.write(b"x")


def _no_data(store, step):
    Storage(_data_file(store, step).rpartition("/")[0]).delete(_data_file(store, step).rpartition("/")[2])


def _other_manifest(store, step):
    Storage(_path(store, f"step-{step}")).write_atomic(MANIFEST_NAME, b'{"format": "another"}')


DAMAGES = {
    _empty_manifest: r"manifest\.json",
    _other_manifest: r"manifest\.json",
    _empty_data: r"distcp: has 0 bytes, and was saved with \d+",
    _longer_data: r"distcp: has \d+ bytes, and was saved with \d+",
    _no_data: r"distcp: is missing",
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_step_is_named_and_can_be_left_out(store, damage, reason, caplog):
    assert (store.latest(), store.damage(3)) == (3, "")
    damage(store, 3)
    for ask in (store.latest, lambda: ray_ckpt.load({"weight": torch.zeros(30), "step": 0}, store)):
        with pytest.raises(FormatError, match=rf"step 3 .* is damaged: .*/run/step-3/.*{reason}.*step 2 is good"):
            ask()
    assert _warnings(caplog) == []
    assert store.latest(fallback=True) == 2
    assert store.steps() == (1, 2, 3)
    [message] = _warnings(caplog)
    assert "step 3" in message
    assert "/run/step-3/" in message
    state = {"weight": torch.zeros(30), "step": 0}
    for verb in (ray_ckpt.load, ray_ckpt.resume):
        state["step"] = 0
        report = verb(state, store, fallback=True)
        assert (state["step"], report.step) == (2, 2)
        [passed_over] = report.passed_over
        assert re.match(rf"step 3: .*/run/step-3/.*{reason}", passed_over)
    with pytest.raises(CheckpointNotFoundError):
        store.damage(4)


def _warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "ray_ckpt" and r.levelno == logging.WARNING]


def test_when_no_step_is_good(store):
    for step in store.steps():
        _empty_manifest(store, step)
    for fallback in (False, True):
        with pytest.raises(FormatError, match=r"step 3 .* is damaged: .*no other is good"):
            store.latest(fallback=fallback)
    assert store.prune(keep_last(1)).removed == ()
    assert store.steps() == (1, 2, 3)


NOTHING = Policy("nothing", lambda steps: [])


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda value: value.__name__)
@pytest.mark.parametrize("policy", [keep_last(1), keep_last(2), keep_every(7), keep([3]), NOTHING], ids=str)
def test_the_highest_good_step_stays_whatever_the_policy(store, damage, policy):
    for step in (2, 3):
        damage(store, step)
    expected = store.prune(policy, dry_run=True)
    report = store.prune(policy)
    assert (report.removed, report.kept) == (expected.removed, expected.kept) == ((), (1,))
    assert set(report.damages) == {2, 3}
    assert store.steps() == (1, 2, 3)
    assert _loads(_path(store, "step-1"), 1)


@pytest.mark.parametrize("junk", [b"", b"{", b"[]", b"\0" * 100])
def test_a_stray_step_counts_for_nothing(store, junk):
    Storage(store.address).write_atomic(f"{STRAY}/{MANIFEST_NAME}", junk)
    with pytest.raises(FormatError, match=rf"{STRAY}/{MANIFEST_NAME}.*step 3 is good"):
        store.latest()
    assert store.latest(fallback=True) == 3
    report = store.prune(keep_last(1))
    assert (report.removed, report.kept) == ((1, 2), (3,))
    assert _loads(_path(store, "step-3"), 3)


class Counted(Storage):
    """Writes down every operation, of its children too."""

    def __init__(self, target):
        super().__init__(target)
        self.operations = []

    def perform(self, operation, name, action):
        self.operations.append(operation)
        return super().perform(operation, name, action)


def test_latest_looks_at_few_steps(tmp_path):
    for step in range(500):
        _path_of = tmp_path / f"step-{step}"
        _path_of.mkdir()
        (_path_of / MANIFEST_NAME).touch()
    store = CheckpointStore(tmp_path)
    for step in (497, 498, 499):
        _save(store, step, overwrite=True)
    _empty_data(store, 499)
    counted = Counted(tmp_path)
    assert CheckpointStore(counted).latest(fallback=True) == 498
    assert counted.operations.count("read") == 2
    assert counted.operations.count("list") == 1
    assert len(counted.operations) < 10


# --------------------------------------------------------------------------------------------- what is never removed


def _hostile(store, step, *names):
    """A record that names what is not the checkpoint's."""
    manifest = store.manifest(step)
    hostile = dataclasses.replace(manifest, files={**manifest.files, **dict.fromkeys(names, 1)})
    Storage(_path(store, f"step-{step}")).write_atomic(MANIFEST_NAME, hostile.to_json().encode())


def _bystanders(store, step):
    names = [f"step-{step}/{name}" for name in ("notes.txt", "deeper/__0_0-0123456789ab.distcp", "model.pt")]
    names += ["step-1/notes.txt", "notes.txt"]
    for name in names:
        Storage(store.address).write_atomic(name, b"x")
    return names


def test_an_overwrite_removes_data_files_only(store):
    names = _bystanders(store, 2)
    _hostile(store, 2, "notes.txt", "deeper/__0_0-0123456789ab.distcp", "model.pt", MANIFEST_NAME, ".metadata")
    _save(store, 2, version=7, overwrite=True)
    assert _loads(_path(store, "step-2"), 7)
    assert set(names) <= Storage(store.address).list().keys()
    assert len([name for name in Storage(_path(store, "step-2")).list_files() if name.endswith(".distcp")]) == 1


@pytest.mark.parametrize("remove", [lambda s: s.delete(2), lambda s: s.prune(keep([3]))], ids=["delete", "prune"])
def test_a_record_makes_nobody_remove_what_is_not_its_own(store, remove):
    names = _bystanders(store, 2)
    _hostile(store, 2, "notes.txt", "deeper/__0_0-0123456789ab.distcp", "model.pt", ".metadata")
    for name in ("notes.txt", "model.pt", ".metadata", "deeper/__0_0-0123456789ab.distcp"):
        with open(_path(store, f"step-2/{name}"), "r+b") as file:
            file.truncate(1)
    remove(store)
    assert 2 not in store.steps()
    assert set(names) <= Storage(store.address).list().keys()


def test_nothing_is_removed_through_a_link(store, tmp_path):
    other = CheckpointStore(tmp_path / "other")
    for step in (5, 6):
        _save(other, step)
    for step in (1, 2):
        (tmp_path / "other" / f"step-{step}").symlink_to(tmp_path / "run" / f"step-{step}")
    Storage(_path(store, "step-2")).write_atomic("__0_9-0123456789ab.distcp", b"of a save under way")
    assert other.prune(keep_last(1)).removed == (5,)
    with pytest.raises(UsageError, match="behind a link"):
        other.delete(1)
    assert other.clean(older_than_s=0).files == ()
    assert "__0_9-0123456789ab.distcp" in Storage(_path(store, "step-2")).list_files()
    assert all(_loads(_path(store, f"step-{step}"), step) for step in (1, 2, 3))
    assert other.latest() == 6


@pytest.mark.parametrize("policy", [keep_last(1), keep([9]), keep_every(9)], ids=str)
def test_a_step_that_is_a_link_does_not_count_and_what_it_leads_to_stays(store, tmp_path, policy):
    (tmp_path / "run" / "step-9").symlink_to(tmp_path / "run" / "step-1")
    report = store.prune(policy)
    assert (report.removed, report.kept) == ((2,), (1, 3, 9))
    assert _loads(_path(store, "step-3"), 3)
    assert _loads(_path(store, "step-9"), 1)


def test_a_step_whose_data_file_no_load_opens_is_not_good(store, tmp_path):
    path = Path(_data_file(store, 3))
    (tmp_path / "elsewhere").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeCheckpointError, match="which leaves the checkpoint's directory"):
        _loads(_path(store, "step-3"), 3)
    assert store.latest(fallback=True) == 2
    assert store.prune(keep_last(1)).kept == (2,)
    assert _loads(_path(store, "step-2"), 2)


def test_pins_behind_a_link_are_refused(store, tmp_path):
    (tmp_path / "pins").mkdir()
    (tmp_path / "run" / ".pins").symlink_to(tmp_path / "pins")
    prune = functools.partial(store.prune, keep_last(1))
    for change in (prune, *(functools.partial(how, 1) for how in (store.pin, store.unpin, store.delete))):
        with pytest.raises(UsageError, match=r"\.pins is a link"):
            change()
    assert list((tmp_path / "pins").iterdir()) == []
    assert store.steps() == (1, 2, 3)


def test_a_data_file_that_is_a_link_is_left_alone(store, tmp_path):
    path = _data_file(store, 1)
    (tmp_path / "elsewhere").write_bytes(Path(path).read_bytes())
    Storage(_path(store, "step-1")).delete(path.rpartition("/")[2])
    (tmp_path / "run" / "step-1" / path.rpartition("/")[2]).symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    _save(store, 1, version=8, overwrite=True)
    assert (tmp_path / "elsewhere").read_bytes() == before
    assert _loads(_path(store, "step-1"), 8)


def test_a_wrong_clock_of_the_host_removes_nothing(store, monkeypatch):
    Storage(_path(store, "step-4")).write_atomic("__0_0-0123456789ab.distcp", b"of a save under way")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 30 * 86400)
    assert store.clean().files == ()
    monkeypatch.setattr(time, "time", lambda: now - 30 * 86400)
    assert store.clean(older_than_s=1e-9).files == ("step-4/__0_0-0123456789ab.distcp",)
    assert Storage(_path(store, ".pins")).list() == {}


# ------------------------------------------------------------------------------------------------------- two writers


class Raced(Storage):
    """Lets a rival act just before an operation on a file."""

    def __init__(self, target, operation, name, rival):
        super().__init__(target)
        self.when, self.rival = (operation, name), rival

    def perform(self, operation, name, action):
        if (operation, name) == self.when and self.rival:
            rival, self.rival = self.rival, None
            rival()
        return super().perform(operation, name, action)


def test_of_two_writers_one_wins(tmp_path):
    state = {"weight": torch.arange(30.0) * 2, "step": 2}
    rival = {"weight": torch.arange(30.0) * 5, "step": 5}
    for name in (".metadata", MANIFEST_NAME):
        directory = tmp_path / name.strip(".")
        storage = Raced(directory, "rename", name, lambda directory=directory: ray_ckpt.save(rival, directory))
        with pytest.raises(ray_ckpt.CheckpointExistsError):
            ray_ckpt.save(state, storage)
        assert _loads(directory, 5)
        assert not list(directory.glob("*.tmp"))
        assert len(list(directory.glob("*.distcp"))) == 1, "the loser has removed its own"
        assert ray_ckpt.verify(directory).verified, "and left what stock DCP reads"


@pytest.fixture(scope="module")
def s3():
    with run_s3() as server:
        yield server


class Replaced(Storage):
    """Where no kernel decides who is first: another record takes the place of ours right after the commit."""

    def perform(self, operation, name, action):
        result = super().perform(operation, name, action)
        if name == MANIFEST_NAME and operation == ("rename" if "memory" in self.uri else "finish"):
            Storage(self.uri).write_atomic(MANIFEST_NAME, self.record)
        return result


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_a_lost_race_is_seen_where_nothing_decides_it(request, kind):
    uri = "memory://raced/step-1" if kind == "memory" else request.getfixturevalue("s3").uri("raced/step-1")
    place = Storage(uri)
    ray_ckpt.save({"step": 5}, place)
    raced = Replaced(uri)
    raced.record = place.read_bytes(MANIFEST_NAME)
    place.delete(MANIFEST_NAME)
    with pytest.raises(ray_ckpt.CheckpointExistsError):
        ray_ckpt.save({"step": 6}, raced)
    assert Manifest.from_json(raced.record).attempt.encode() in place.read_bytes(".metadata")
    state = {"step": 0}
    ray_ckpt.load(state, place)
    assert state == {"step": 5}


class Hidden(Storage):
    """A listing of a while ago: the record does not show right after the commit."""

    def perform(self, operation, name, action):
        result = super().perform(operation, name, action)
        if name == MANIFEST_NAME and operation == "rename":
            self.hidden = self.read_bytes(name)
            self.delete(name)
        return result


def test_a_record_that_does_not_show_is_no_lost_race():
    place = Hidden("memory://hidden/step-1")
    with pytest.raises(ray_ckpt.StorageError, match=r"cannot find .*manifest\.json"):
        ray_ckpt.save({"step": 6}, place)
    later = Storage(place.uri)
    later.write_atomic(MANIFEST_NAME, place.hidden)
    state = {"step": 0}
    ray_ckpt.load(state, later)
    assert state == {"step": 6}, "its files were kept"


# --------------------------------------------------------------------------------------------- what was interrupted


class Crash(BaseException):
    """The end of a process: nothing tidies up after it."""


def _crash():
    raise Crash


def test_an_overwrite_cut_off_between_its_renames_is_mended(store, tmp_path):
    step = tmp_path / "run" / "step-2"
    with pytest.raises(Crash):
        ray_ckpt.save(
            {"weight": torch.arange(30.0) * 9, "step": 9}, Raced(step, "rename", ".metadata", _crash), overwrite=True
        )
    assert _reads(step) == (9, 2)
    store.clean()
    assert _reads(step) == (9, 2)  # too young to be touched
    store.clean(older_than_s=0)
    assert _reads(step) == (9, 9)
    assert ray_ckpt.verify(step).verified


def test_a_save_does_not_replace_what_stock_dcp_commits_meanwhile(tmp_path):
    stock = {"weight": torch.arange(30.0) * 5, "step": 5}
    storage = Raced(tmp_path, "rename", ".metadata", lambda: dcp.save(stock, checkpoint_id=tmp_path, no_dist=True))
    with pytest.raises(ray_ckpt.CheckpointExistsError):
        ray_ckpt.save({"weight": torch.arange(30.0), "step": 1}, storage)
    assert _reads(tmp_path) == (5, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".metadata", "__0_0.distcp"]


def test_an_overwrite_of_a_stock_checkpoint_that_was_cut_off_is_mended(tmp_path):
    step = tmp_path / "run" / "step-2"
    dcp.save({"weight": torch.arange(30.0) * 2, "step": 2}, checkpoint_id=step, no_dist=True)
    with pytest.raises(Crash):
        ray_ckpt.save(
            {"weight": torch.arange(30.0) * 9, "step": 9}, Raced(step, "rename", ".metadata", _crash), overwrite=True
        )
    assert _reads(step) == (9, 2)
    [damage] = ray_ckpt.verify(step).damages
    assert "still that of the checkpoint which was replaced" in damage.problem
    ray_ckpt.CheckpointStore(tmp_path / "run").clean(older_than_s=0)
    assert _reads(step) == (9, 9)
    assert ray_ckpt.verify(step).verified


def test_a_stock_record_of_files_that_clean_removes_is_restored(store, tmp_path):
    """Whoever left it there, and also when it is missing altogether."""
    step = tmp_path / "run" / "step-2"
    ray_ckpt.save({"weight": torch.arange(30.0) * 9, "step": 9}, tmp_path / "other")
    for path in (tmp_path / "other").iterdir():
        if path.name != MANIFEST_NAME:
            (step / path.name).write_bytes(path.read_bytes())
    assert _reads(step) == (2, 9)
    store.clean(older_than_s=0, dry_run=True)
    assert _reads(step) == (2, 9)
    store.clean(older_than_s=0)
    assert _reads(step) == (2, 2)
    (step / ".metadata").unlink()
    store.clean()
    assert _reads(step) == (2, 2)


def test_a_stock_record_of_somebody_else_is_not_replaced(store, tmp_path):
    step = tmp_path / "run" / "step-2"
    dcp.save({"weight": torch.arange(30.0) * 9, "step": 9}, checkpoint_id=step, no_dist=True)
    store.clean(older_than_s=0)
    with pytest.raises(FormatError, match="holds two checkpoints"):
        _reads(step)
    (step / MANIFEST_NAME).unlink()
    assert _reads(step) == (9, 9)


def _reads(directory):
    """The versions that ours and stock DCP read there."""
    found = []
    for load in (ray_ckpt.load, lambda state, target: dcp.load(state, checkpoint_id=target, no_dist=True)):
        state = {"weight": torch.zeros(30), "step": -1}
        load(state, directory)
        assert torch.equal(state["weight"], torch.arange(30.0) * state["step"])
        found.append(state["step"])
    return tuple(found)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "fifo"])
def test_a_record_that_is_no_file_is_damage(store, tmp_path, make):
    step = tmp_path / "run" / "step-3"
    (step / MANIFEST_NAME).unlink()
    make(step / MANIFEST_NAME)
    with pytest.raises(FormatError, match=r"step 3 .* is damaged: .*step-3/manifest\.json.*step 2 is good"):
        store.latest()
    assert store.latest(fallback=True) == 2
    assert store.prune(keep_last(1)).kept == (2,)
    assert store.clean(older_than_s=0).files == ()
