"""The phases of a save without anybody to carry the messages: several ranks in one process, every message pickled."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

import ray_ckpt
from ray_ckpt.errors import CheckpointError, CheckpointExistsError, CommitError, UsageError
from ray_ckpt.format import dcp_metadata
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.protocol.coordinator import Coordinator, PlanCache
from ray_ckpt.protocol.holdings import hold
from ray_ckpt.protocol.host_copy import HostCopy
from ray_ckpt.protocol.messages import Item, LocalPlan, RankRecord, TensorSpec
from ray_ckpt.protocol.rank_save import PlanMemory, RankSave
from ray_ckpt.storage.files import Storage
from tests.support.ranks import RanksError, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Ranks:
    """As many ranks as there are states, and the coordinator's memory."""

    def __init__(self, num_ranks: int) -> None:
        self.memories = [PlanMemory() for _ in range(num_ranks)]
        self.cache = PlanCache()
        self.sent: list[LocalPlan] = []

    def write(self, target: Path, states: list[Any], **options: Any) -> tuple[Coordinator, list[RankRecord]]:
        """Everything before the check."""
        storage = Storage(target)
        coordinator = Coordinator(storage, cache=self.cache, **options)
        writers = [RankSave(storage) for _ in states]
        self.sent = [
            pickle.loads(pickle.dumps(writer.plan(state, memory, self.cache.token_of(rank))))
            for rank, (writer, state, memory) in enumerate(zip(writers, states, self.memories, strict=True))
        ]
        assignments = pickle.loads(pickle.dumps(coordinator.merge(self.sent)))
        records = [writer.write(given) for writer, given in zip(writers, assignments, strict=True)]
        return coordinator, pickle.loads(pickle.dumps(records))

    def save(self, target: Path, states: list[Any], **options: Any) -> None:
        coordinator, records = self.write(target, states, **options)
        coordinator.check(records)
        coordinator.publish(dcp_metadata.dumps(coordinator.manifest))


def states() -> list[dict[str, Any]]:
    """Two ranks that share a tensor and an object, and have some of their own."""
    shared = {"shared": torch.arange(5000.0), "step": 7, "nested": {"list": [torch.ones(3), {"a": "text"}]}}
    return [{**shared, "own0": torch.eye(4), "none": None}, {**shared, "own1": torch.zeros(0, 3), "lr": 1e-3}]


def load(target: Path, like: dict[str, Any], reader: Any) -> dict[str, Any]:
    dcp.load(like, storage_reader=reader, no_dist=True)
    return like


@pytest.mark.parametrize("reader", [FileSystemReader, ray_ckpt.ArrowStorageReader])
def test_what_two_ranks_hold_is_one_checkpoint_for_any_reader(tmp_path: Path, reader: Any) -> None:
    Ranks(2).save(tmp_path / "run", states())
    expected = {**states()[0], **states()[1]}
    found = {
        "shared": torch.zeros(5000),
        "step": 0,
        "nested": {"list": [torch.zeros(3), {"a": ""}]},
        "own0": torch.zeros(4, 4),
        "own1": torch.ones(0, 3),
        "lr": 0.0,
        "none": 1,
    }
    assert not torch.equal(found["shared"], expected["shared"])
    load(tmp_path / "run", found, reader(tmp_path / "run"))
    for name in ("shared", "own0", "own1"):
        assert torch.equal(found[name], expected[name])
    assert torch.equal(found["nested"]["list"][0], torch.ones(3))
    assert (found["nested"]["list"][1], found["step"], found["lr"], found["none"]) == ({"a": "text"}, 7, 1e-3, None)


def test_each_replica_is_written_once_and_the_load_is_shared(tmp_path: Path) -> None:
    state = {str(number): torch.full((1000,), float(number)) for number in range(10)}
    Ranks(2).save(tmp_path / "run", [state, dict(state)])
    sizes = [path.stat().st_size for path in (tmp_path / "run").glob("*.distcp")]
    assert len(sizes) == 2
    assert sizes[0] == sizes[1] < 10 * 4000


@pytest.mark.parametrize("changed", ["shared", "step"])
def test_replicas_that_differ_are_not_committed_and_both_ranks_are_named(tmp_path: Path, changed: str) -> None:
    first, second = states()
    second[changed] = second[changed] + 1
    coordinator, records = Ranks(2).write(tmp_path / "run", [first, second])
    with pytest.raises(CommitError, match=rf"'{changed}' on ranks [01] and [01]; give them different names"):
        coordinator.check(records)
    assert not (tmp_path / "run" / MANIFEST_NAME).exists()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"w": torch.zeros(4)}, r"'w' is float32\[4\] on rank 1 and float32\[3\] on another rank"),
        ({"w": torch.zeros(3, dtype=torch.bfloat16)}, r"'w' is bfloat16\[3\] on rank 1 and float32\[3\]"),
        ({"w": "text"}, r"'w' is no tensor on rank 1 and float32\[3\]"),
    ],
)
def test_one_name_for_two_things_is_refused_before_a_byte_is_written(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    with pytest.raises(CommitError, match=message):
        Ranks(2).save(tmp_path / "run", [{"w": torch.zeros(3)}, other])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([((0,), (3,))], r"tensor 'w' is not covered exactly once: 3 of 6 elements are missing"),
        ([((0,), (3,)), ((2,), (4,))], r"overlap"),
        ([((0,), (3,)), ((0,), (4,))], r"the part of 'w' at \(0,\) is of size \[4\] on rank 1 and of size \[3\]"),
        ([((0,), (3,)), ((3,), (4,))], r"lies outside the shape"),
    ],
)
def test_parts_that_do_not_cover_a_tensor_exactly_once_are_refused(
    tmp_path: Path, parts: list[Any], message: str
) -> None:
    plans = [
        LocalPlan(str(rank), (Item("w", None, TensorSpec("float32", (6,), offsets, sizes)),))
        for rank, (offsets, sizes) in enumerate(parts)
    ]
    with pytest.raises(CommitError, match=message):
        Coordinator(Storage(tmp_path / "run")).merge(plans)


@pytest.mark.parametrize("lost", ["file", "object"])
def test_what_a_rank_does_not_report_is_not_committed(tmp_path: Path, lost: str) -> None:
    coordinator, records = Ranks(2).write(tmp_path / "run", states())
    if lost == "file":
        records[1] = RankRecord((), records[1].replicas)
    else:
        [file] = records[0].files
        file.objects.pop(max(file.objects))  # type: ignore[attr-defined]
    with pytest.raises(CommitError, match=rf"what rank {int(lost == 'file')} reports to have written lacks"):
        coordinator.check(records)


def test_an_unchanged_plan_travels_as_a_token_and_a_changed_one_in_full(tmp_path: Path) -> None:
    ranks = Ranks(2)
    first, second = states()
    ranks.save(tmp_path / "1", [first, second])
    assert all(plan.items is not None for plan in ranks.sent)
    merged = ranks.cache.merged
    first["shared"] = second["shared"] = torch.full((5000,), 3.0)
    ranks.save(tmp_path / "2", [first, second])
    assert all(plan.items is None for plan in ranks.sent)
    assert ranks.cache.merged is merged
    found = load(tmp_path / "2", {"shared": torch.zeros(5000)}, ray_ckpt.ArrowStorageReader(tmp_path / "2"))
    assert torch.equal(found["shared"], first["shared"])
    # Another shape, another name, another owner: nothing of the old plan is left.
    second["own1"], second["new"] = torch.full((2, 3), 9.0), torch.ones(2)
    ranks.save(tmp_path / "3", [first, second])
    assert [plan.items is None for plan in ranks.sent] == [True, False]
    found = {"own1": torch.zeros(2, 3), "new": torch.zeros(2)}
    load(tmp_path / "3", found, ray_ckpt.ArrowStorageReader(tmp_path / "3"))
    assert torch.equal(found["own1"], second["own1"])
    assert torch.equal(found["new"], second["new"])


def test_a_refused_merge_leaves_no_plan_behind(tmp_path: Path) -> None:
    ranks = Ranks(2)
    with pytest.raises(CommitError):
        ranks.save(tmp_path / "1", [{"w": torch.zeros(3)}, {"w": torch.zeros(4)}])
    with pytest.raises(CommitError):
        ranks.save(tmp_path / "2", [{"w": torch.zeros(3)}, {"w": torch.zeros(4)}])
    ranks.save(tmp_path / "3", [{"w": torch.ones(4)}, {"w": torch.ones(4)}])
    found = load(tmp_path / "3", {"w": torch.zeros(4)}, ray_ckpt.ArrowStorageReader(tmp_path / "3"))
    assert torch.equal(found["w"], torch.ones(4))


def test_a_taken_target_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    Ranks(2).save(tmp_path / "run", states())
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(CheckpointExistsError):
        Ranks(2).save(tmp_path / "run", states())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    Ranks(2).save(tmp_path / "run", states(), overwrite=True)


def test_a_rank_may_write_again_and_discard_what_it_began(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "run")
    coordinator, writer = Coordinator(storage), RankSave(storage)
    [assignment] = coordinator.merge([writer.plan({"w": torch.ones(3)}, PlanMemory(), frozenset())])
    first, second = writer.write(assignment), writer.write(assignment)
    assert first.files[0].name != second.files[0].name
    assert len(storage.list()) == 2
    writer.discard()
    assert storage.list() == {}


def test_what_was_staged_is_saved_as_it_was_though_training_went_on(tmp_path: Path) -> None:
    storage, held = Storage(tmp_path / "run"), states()
    coordinator, writers = Coordinator(storage), [RankSave(storage) for _ in held]
    plans = [writer.plan(state, PlanMemory(), frozenset()) for writer, state in zip(writers, held, strict=True)]
    assignments = coordinator.merge(plans)
    for writer, assignment in zip(writers, assignments, strict=True):
        writer.stage(assignment, HostCopy())
    for state in held:
        state["shared"] += 1
        state["nested"]["list"][1]["a"] = "changed"
    coordinator.check([writer.write(given) for writer, given in zip(writers, assignments, strict=True)])
    coordinator.publish(dcp_metadata.dumps(coordinator.manifest))
    found = load(tmp_path / "run", states()[0], ray_ckpt.ArrowStorageReader(tmp_path / "run"))
    assert torch.equal(found["shared"], torch.arange(5000.0))
    assert not torch.equal(found["shared"], held[0]["shared"])
    assert found["nested"]["list"][1]["a"] == "text"


@pytest.mark.parametrize("changed", ["shared", "step"])
def test_staged_replicas_that_differ_are_not_committed(tmp_path: Path, changed: str) -> None:
    storage, held = Storage(tmp_path / "run"), states()
    held[1][changed] = held[1][changed] + 1
    coordinator, writers = Coordinator(storage), [RankSave(storage) for _ in held]
    plans = [writer.plan(state, PlanMemory(), frozenset()) for writer, state in zip(writers, held, strict=True)]
    assignments = coordinator.merge(plans)
    for writer, assignment in zip(writers, assignments, strict=True):
        writer.stage(assignment, HostCopy())
    # The ranks agree now, but they did not when the save began.
    if changed == "shared":
        held[1]["shared"].copy_(held[0]["shared"])
    held[1][changed] = held[0][changed]
    with pytest.raises(CommitError, match=f"'{changed}' on ranks"):
        coordinator.check([writer.write(given) for writer, given in zip(writers, assignments, strict=True)])


def test_two_entries_of_one_flat_name_are_refused() -> None:
    with pytest.raises(UsageError, match=r"two entries of one name"):
        hold({"a": {"b": 1}, "a.b": 2})


def hold_a_pending_sum(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    hold({"w": DTensor.from_local(torch.ones(3), mesh, [Partial()])})


def test_a_pending_sum_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RanksError, match="'w' is a pending sum over ranks"):
        run_ranks(hold_a_pending_sum, 2, tmp_path)


def fail_while_writing(rank: int, directory: str) -> str:
    """Rank 1's tensor is sparse, which nobody can write."""
    state = {"good": torch.ones(3), f"own{rank}": torch.eye(3).to_sparse() if rank else torch.eye(3)}
    with pytest.raises(CheckpointError) as caught:
        ray_ckpt.save(state, directory)
    return str(caught.value)


def test_after_a_failed_write_every_rank_knows_and_no_file_is_left(tmp_path: Path) -> None:
    for text in run_ranks(fail_while_writing, 2, tmp_path, str(tmp_path / "run")):
        assert text.startswith("save failed on rank 1: UsageError: 'own1' is a tensor of layout")
    assert list((tmp_path / "run").iterdir()) == []
