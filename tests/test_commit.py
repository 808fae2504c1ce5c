"""What becomes a checkpoint and what does not: existing targets, missing and contradicting results, lost replicas."""

from __future__ import annotations

import dataclasses
import itertools
import os

import pytest
import torch
import torch.distributed.checkpoint as dcp

import ray_ckpt
from ray_ckpt.dcp.reader import ArrowStorageReader
from ray_ckpt.dcp.writer import ArrowStorageWriter
from ray_ckpt.errors import CheckpointExistsError, CheckpointNotFoundError, CommitError, UsageError
from ray_ckpt.format.fingerprinting import fingerprint
from ray_ckpt.format.manifest import MANIFEST_NAME, Manifest
from ray_ckpt.storage.files import Storage
from tests.support import driver
from tests.support.faulty import LyingStorage

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def _files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _load(directory):
    state = {"weight": torch.zeros(6), "step": 0}
    assert not torch.equal(state["weight"], torch.arange(6.0))
    return driver.load(state, ArrowStorageReader(directory))


def _save(directory, step, **options):
    dcp.save(
        {"weight": torch.arange(6.0) * step, "step": step}, storage_writer=ArrowStorageWriter(directory, **options)
    )


def test_existing_checkpoint_is_refused_before_a_byte_is_written(tmp_path):
    _save(tmp_path, 1)
    before = _files(tmp_path)
    with pytest.raises(dcp.CheckpointException) as raised:
        _save(tmp_path, 2)
    assert isinstance(raised.value.failures[0][0], CheckpointExistsError)
    assert _files(tmp_path) == before


def test_foreign_checkpoint_is_not_overwritten_unasked(tmp_path):
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=tmp_path)
    with pytest.raises(CheckpointExistsError):
        ArrowStorageWriter(tmp_path).set_up_storage_writer(True)


def test_overwrite_keeps_the_old_one_until_the_new_one_is_committed(tmp_path):
    _save(tmp_path, 1)
    old = set(Manifest.from_json((tmp_path / MANIFEST_NAME).read_bytes()).files)
    writer = ArrowStorageWriter(tmp_path, overwrite=True)
    metadata, results = driver.write([{"weight": torch.arange(6.0) * 2, "step": 2}], [writer])
    assert _load(tmp_path)["step"] == 1
    writer.finish(metadata, results)
    loaded = _load(tmp_path)
    assert loaded["step"] == 2
    assert torch.equal(loaded["weight"], torch.arange(6.0) * 2)
    assert not old & set(_files(tmp_path))


def test_overwriting_a_foreign_checkpoint_removes_its_files(tmp_path):
    dcp.save({"weight": torch.ones(6), "step": 9}, checkpoint_id=tmp_path)
    assert (tmp_path / "__0_0.distcp").exists()
    _save(tmp_path, 1, overwrite=True)
    assert not (tmp_path / "__0_0.distcp").exists()
    assert _load(tmp_path)["step"] == 1


def test_interrupted_before_the_manifest_is_not_a_checkpoint(tmp_path):
    _save(tmp_path, 1)
    (tmp_path / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointNotFoundError, match="interrupted"):
        _load(tmp_path)
    _save(tmp_path, 2)  # and the next attempt is not refused
    assert _load(tmp_path)["step"] == 2


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="neither"):
        ArrowStorageReader(tmp_path / "nowhere").read_manifest()


def test_attempts_at_one_step_never_share_a_file(tmp_path):
    names = []
    for _ in range(3):
        driver.write([{"weight": torch.ones(2)}], [ArrowStorageWriter(tmp_path)])
        names.append(set(_files(tmp_path)))
    assert [len(found) for found in names] == [1, 2, 3]


def _two_ranks():
    rows = torch.arange(6.0)
    return [{"first": rows, "step": 1}, {"second": rows + 1, "step": 1}]


def test_missing_result_is_refused_and_named(tmp_path):
    writers = [ArrowStorageWriter(tmp_path) for _ in range(2)]
    metadata, results = driver.write(_two_ranks(), writers)
    for rank, of_rank in enumerate(results):
        for lost in range(len(of_rank)):
            fewer = [list(other) for other in results]
            gone = fewer[rank].pop(lost)
            if gone.size_in_bytes == 0:
                continue  # a replica's digest, not an item
            with pytest.raises(CommitError, match=gone.index.fqn):
                writers[0].finish(metadata, fewer)
    assert not Storage(tmp_path).exists(MANIFEST_NAME)
    writers[0].finish(metadata, results)
    assert Storage(tmp_path).exists(MANIFEST_NAME)


def test_item_written_twice_is_refused(tmp_path):
    writers = [ArrowStorageWriter(tmp_path) for _ in range(2)]
    metadata, results = driver.write(_two_ranks(), writers)
    with pytest.raises(CommitError, match=r"'first' was written by ranks 0 and 1"):
        writers[0].finish(metadata, [results[0], results[1] + [r for r in results[0] if r.index.fqn == "first"]])


def test_unplanned_item_is_refused(tmp_path):
    writer = ArrowStorageWriter(tmp_path)
    metadata, [results] = driver.write([{"first": torch.ones(2)}], [writer])
    stranger = dataclasses.replace(results[0], index=dataclasses.replace(results[0].index, fqn="stranger"))
    with pytest.raises(CommitError, match="stranger"):
        writer.finish(metadata, [[*results, stranger]])


@pytest.mark.parametrize("gap", [True, False], ids=["gap", "overlap"])
def test_tensor_that_is_not_covered_exactly_once_is_refused(tmp_path, gap):
    writer = ArrowStorageWriter(tmp_path)
    metadata, results = driver.write([{"first": torch.ones(4)}], [writer])
    entry = metadata.state_dict_metadata["first"]
    entry.size = torch.Size([5]) if gap else torch.Size([3])
    with pytest.raises(CommitError, match="not covered exactly once"):
        writer.finish(metadata, results)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (torch.ones(50), torch.zeros(50)),
        (torch.ones(50), torch.ones(49)),
        (torch.zeros(50), torch.zeros(50, dtype=torch.int32)),
        (0.1, 0.2),
        (1, True),
        ("a", "b"),
        (torch.Size([1]), torch.Size([2])),
    ],
    ids=["bits", "shape", "dtype", "float", "bool", "text", "pickled"],
)
def test_ranks_that_hold_different_things_under_one_name_are_named(tmp_path, ours, theirs):
    states = [{"same": torch.ones(3), "clash": value} for value in (ours, ours, theirs)]
    for order in set(itertools.permutations(range(3))):
        writers = [ArrowStorageWriter(tmp_path) for _ in states]
        metadata, results = driver.write([states[rank] for rank in order], writers)
        with pytest.raises(CommitError, match=r"'clash' on ranks \d and \d") as raised:
            writers[0].finish(metadata, results)
        assert "'same'" not in str(raised.value)
        assert str(order.index(2)) in str(raised.value)


def test_equal_replicas_are_saved_once(tmp_path):
    states = [{"replica": torch.arange(1000.0), "step": 3, "betas": (0.9, 0.99)} for _ in range(4)]
    driver.save(states, [ArrowStorageWriter(tmp_path) for _ in states])
    manifest = ArrowStorageReader(tmp_path).read_manifest()
    assert len(manifest.tensors["replica"].chunks) == 1
    assert manifest.total_bytes < 2 * 4000 + 4 * 2048


def test_layout_and_fingerprints_are_kept(tmp_path):
    weight = torch.arange(6.0)
    digest = fingerprint(weight).digest
    writer = ArrowStorageWriter(tmp_path, layout="pp=4", fingerprints={"weight": digest})
    driver.save([{"weight": weight}], [writer])
    manifest = ArrowStorageReader(tmp_path).read_manifest()
    assert manifest.layout == "pp=4"
    assert manifest.fingerprints == {"weight": digest}
    writer = ArrowStorageWriter(tmp_path / "other", fingerprints={"stranger": digest})
    with pytest.raises(CommitError, match="stranger"):
        driver.save([{"weight": weight}], [writer])


def test_without_a_path_the_checkpoint_id_says_where(tmp_path):
    state = {"weight": torch.arange(6.0), "step": 1}
    writer, reader = ArrowStorageWriter(), ArrowStorageReader()
    for directory in (tmp_path / "a", tmp_path / "b"):  # the same plug-ins, one checkpoint after the other
        state["weight"] += 1
        dcp.save(state, checkpoint_id=directory, storage_writer=writer)
        found = {"weight": torch.zeros(6), "step": 0}
        dcp.load(found, checkpoint_id=directory, storage_reader=reader)
        assert torch.equal(found["weight"], state["weight"])
        assert (writer.checkpoint_id, reader.checkpoint_id) == (str(directory), str(directory))


def test_with_neither_a_path_nor_a_checkpoint_id_both_plug_ins_say_so():
    with pytest.raises(UsageError, match=r"^where is the checkpoint to be saved\? Say ArrowStorageWriter\(path\) or"):
        dcp.save({"weight": torch.ones(3)}, storage_writer=ArrowStorageWriter())
    with pytest.raises(UsageError, match=r"^where is the checkpoint\? Say ArrowStorageReader\(path\) or dcp\.load"):
        dcp.load({"weight": torch.ones(3)}, storage_reader=ArrowStorageReader())
    for use in (lambda: ArrowStorageWriter().checkpoint_id, ArrowStorageReader().read_manifest):
        with pytest.raises(UsageError, match="where is the checkpoint"):
            use()


def test_rank_local_metadata_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no_dist"):
        ArrowStorageWriter(tmp_path).set_up_storage_writer(True, rank=0, use_collectives=False)


def test_files_are_cut_at_their_limit_and_written_by_threads(tmp_path):
    state = {f"t{number}": torch.arange(1000.0) + number for number in range(10)}
    writer = ArrowStorageWriter(tmp_path, threads=3, max_file_bytes=2 * 4000)
    driver.save([state], [writer])
    manifest = ArrowStorageReader(tmp_path).read_manifest()
    assert len(manifest.files) >= 5
    loaded = driver.load({name: torch.zeros(1000) for name in state}, ArrowStorageReader(tmp_path))
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert {name: (tmp_path / name).stat().st_size for name in manifest.files} == dict(manifest.files)


SEEN = {
    "all": r"of \d+ bytes to .*, where {who} sees __0_0-\w+\.distcp of 0 bytes; the storage has lost what was written",
    "last": r"__0_0-\w+\.distcp of (\d+) bytes to .*, where {who} sees __0_0-\w+\.distcp of \d+ bytes; the storage",
    "file": r"__0_0-\w+\.distcp of \d+ bytes to .*, where {who} sees no such file; give a directory that is mounted on",
}


SAVES = {
    "the coordinator": lambda state, storage: driver.save([state], [ArrowStorageWriter(storage)]),
    "rank 0": ray_ckpt.save,
    "rank 0, beside training": lambda state, storage: ray_ckpt.save(state, storage, blocking=False).result(30.0),
}


@pytest.mark.parametrize("loses", list(SEEN))
@pytest.mark.parametrize("by", list(SAVES))
def test_what_the_storage_has_lost_is_not_committed(tmp_path, by, loses):
    state, storage = {"weight": torch.arange(6.0), "step": 1}, LyingStorage(tmp_path / "run", loses)
    with pytest.raises(CommitError, match=SEEN[loses].format(who=by.partition(",")[0])):
        SAVES[by](state, storage)
    assert not list((tmp_path / "run").glob("*manifest*")) + list((tmp_path / "run").glob(".metadata*"))
    with pytest.raises(CheckpointNotFoundError):
        ray_ckpt.load(state, tmp_path / "run")


@pytest.mark.parametrize("kind", ["directory", "fifo", "dangling link"])
def test_what_is_no_regular_file_is_not_committed(tmp_path, kind):
    """Something else takes the place of a data file between its write and the commit."""
    writer = ArrowStorageWriter(tmp_path)
    metadata, results = driver.write([{"weight": torch.arange(6.0)}], [writer])
    [path] = tmp_path.glob("*.distcp")
    path.rename(tmp_path / "aside")
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CommitError, match="sees no such file"):
        writer.finish(metadata, results)
    (path.rmdir if kind == "directory" else path.unlink)()
    (tmp_path / "aside").rename(path)
    writer.finish(metadata, results)


def test_state_that_changes_during_a_save_is_noticed(tmp_path):
    state = {"grows": torch.ones(3)}

    class Grower(ArrowStorageWriter):
        def write_data(self, plan, planner):
            planner.state_dict["grows"] = torch.ones(4)
            return super().write_data(plan, planner)

    with pytest.raises(UsageError, match="'grows' was planned as"):
        driver.save([state], [Grower(tmp_path)])


def test_a_writer_that_loses_leaves_nothing_behind(tmp_path):
    losers = [ArrowStorageWriter(tmp_path) for _ in range(2)]
    begun = [driver.write([{"weight": torch.ones(6), "step": 7}], [writer]) for writer in losers]
    lost = {name for of_rank in begun[0][1] for result in of_rank if (name := result.storage_data.part.file)}
    assert lost <= {*_files(tmp_path)}
    losers[1].finish(*begun[1])
    kept = _files(tmp_path)
    with pytest.raises(CheckpointExistsError):
        losers[0].finish(*begun[0])
    assert _files(tmp_path) == {name: data for name, data in kept.items() if name not in lost}
    with pytest.raises(CheckpointExistsError):  # and whoever commits twice keeps what is committed
        losers[1].finish(*begun[1])
    assert ray_ckpt.verify(tmp_path).verified
