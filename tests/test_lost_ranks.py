"""What ranks can save when others are lost: the coordinator alone, all ranks in this process, nobody really dead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DistributedSampler

from ray_ckpt import load, verify
from ray_ckpt.errors import CommitError
from ray_ckpt.format import dcp_metadata, lost_ranks
from ray_ckpt.protocol.coordinator import Coordinator, PlanCache
from ray_ckpt.protocol.messages import LocalPlan, RankRecord
from ray_ckpt.protocol.rank_save import PlanMemory, RankSave
from ray_ckpt.report import SaveReport
from ray_ckpt.state.load_plan import SavedState
from ray_ckpt.state.rank_parts import RankPart
from ray_ckpt.storage.files import Storage

State = dict[str, Any]


class Ranks:
    """As many ranks as there are states, and the coordinator's memory."""

    def __init__(self, num_ranks: int) -> None:
        self.memories = [PlanMemory() for _ in range(num_ranks)]
        self.cache = PlanCache()

    def save(self, target: Path, states: list[State | None], layout: str | None = None) -> SaveReport:
        """None of a rank that is lost."""
        coordinator = Coordinator(Storage(target), cache=self.cache, layout=layout)
        writers = {rank: RankSave(Storage(target)) for rank, state in enumerate(states) if state is not None}
        plans: list[LocalPlan | None] = [
            None if state is None else writers[rank].plan(state, self.memories[rank], self.cache.token_of(rank))
            for rank, state in enumerate(states)
        ]
        records = {given.rank: writers[given.rank].write(given) for given in coordinator.merge(plans, layout)}
        coordinator.check([records.get(rank, RankRecord((), b"")) for rank in range(len(states))])
        return coordinator.publish(dcp_metadata.dumps(coordinator.manifest))


def replica(rank: int, value: float = 1.0) -> State:
    own = {f"rank{rank}": {"seed": rank}, "num_ranks": 2}
    return {"weight": torch.full((100,), value), "step": 3, "rng": own}


def test_what_a_rank_held_is_known_from_the_save_before(tmp_path: Path) -> None:
    ranks = Ranks(2)
    ranks.save(tmp_path / "1", [replica(0), replica(1)], "ddp2")
    report = ranks.save(tmp_path / "2", [None, replica(1, 2.0)], "ddp2")
    assert (report.lost_ranks, report.left_out) == ((0,), ("rng.rank0.seed",))
    assert verify(tmp_path / "2").verified
    found: State = {"weight": torch.zeros(100), "step": 0}
    load(found, tmp_path / "2", strict=False)
    assert torch.equal(found["weight"], torch.full((100,), 2.0))
    assert found["step"] == 3
    # The same again, and by the other rank alone once more: what was lost stays known.
    again = ranks.save(tmp_path / "3", [None, replica(1, 3.0)], "ddp2")
    assert again.left_out == report.left_out
    whole = Ranks(2)
    assert whole.save(tmp_path / "4", [replica(0), replica(1)], "ddp2").lost_ranks == ()


def test_what_it_alone_held_is_missed_by_name(tmp_path: Path) -> None:
    ranks = Ranks(2)
    extra = {**replica(0), "best": 0.5, "rng": {**replica(0)["rng"], "rank1": {"more": 1}}}
    ranks.save(tmp_path / "1", [extra, replica(1)], "ddp2")
    with pytest.raises(CommitError, match=r"no other rank holds what rank 0 held of best, rng\.rank1\.more"):
        ranks.save(tmp_path / "2", [None, replica(1)], "ddp2")
    assert not (tmp_path / "2").exists()
    # Also where the other's state is another than then, so that only the layout tells what a replica holds.
    with pytest.raises(CommitError, match="no other rank holds what rank 0 held of best"):
        ranks.save(tmp_path / "2", [None, {**replica(1), "new": 1}], "ddp2")


def test_shards_without_a_replica_do_not_cover_their_tensor(tmp_path: Path) -> None:
    ranks = Ranks(2)
    ranks.save(tmp_path / "1", [{"a": 1}, {"a": 1, "b": torch.ones(2)}], "fsdp2x2")
    with pytest.raises(CommitError, match="no other rank holds what rank 1 held of b"):
        ranks.save(tmp_path / "2", [{"a": 1}, None], "fsdp2x2")


@pytest.mark.parametrize(
    ("layout", "why"),
    [
        (None, "names no layout of 2 ranks"),
        ("my own", "names no layout of 2 ranks"),
        ("ddp4", "names no layout of 2 ranks"),
        ("fsdp2x2", "is its replica in the layout fsdp2x2"),
        ("pp2", "is its replica in the layout pp2"),
    ],
)
def test_without_a_plan_before_the_layout_has_to_tell(tmp_path: Path, layout: str | None, why: str) -> None:
    with pytest.raises(CommitError, match=f"nothing tells what rank 0 held.*{why}"):
        Ranks(2).save(tmp_path / "1", [None, replica(1)], layout)
    assert Ranks(2).save(tmp_path / "2", [None, replica(1)], "ddp2").lost_ranks == (0,)


def test_of_many_replicas_several_may_be_lost(tmp_path: Path) -> None:
    """Of hsdp2x2 the ranks 0 and 3: the others are a shard each."""
    states: list[State | None] = [{"step": 3}] * 4
    report = Ranks(4).save(tmp_path / "1", [None, states[1], states[2], None], "hsdp2x2")
    assert report.lost_ranks == (0, 3)
    with pytest.raises(CommitError, match="nothing tells what rank 1 held"):
        Ranks(4).save(tmp_path / "2", [states[0], None, states[2], None], "hsdp2x2")


@pytest.mark.parametrize(
    ("layout", "ranks", "text"),
    [("ddp4", (2,), "ddp4 without rank 2"), ("pp2", (1, 0), "pp2 without ranks 0, 1"), (None, (3,), "without rank 3")],
)
def test_the_layout_tells_which_ranks_were_lost(layout: str | None, ranks: tuple[int, ...], text: str) -> None:
    assert lost_ranks.with_lost(layout, ranks) == text
    assert lost_ranks.in_layout(text) == frozenset(ranks)
    assert lost_ranks.in_layout(layout) == frozenset()
    assert lost_ranks.with_lost(layout, ()) == layout


@pytest.mark.parametrize(
    ("name", "is_own"),
    [
        ("rng.rank1.seed", True),
        ("dataloader.positions.1", True),
        ("dataloader.rank1.state", True),
        ("rng.rank11.seed", False),
        ("dataloader.positions.11", False),
        ("model.rng.rank1.seed", False),
        ("rng.num_ranks", False),
    ],
)
def test_what_is_a_ranks_own(name: str, is_own: bool) -> None:
    assert lost_ranks.is_own(name, 1) == is_own


class Sampler(DistributedSampler[int]):
    """Can be set, as torchdata's `StatefulDistributedSampler` can."""

    def __init__(self, rank: int) -> None:
        super().__init__(range(40), num_replicas=2, rank=rank)  # type: ignore[arg-type]
        self.yielded = 0

    def state_dict(self) -> dict[str, int]:
        return {"yielded": self.yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.yielded = state["yielded"]


class Loader:
    """Has given out three batches of two samples, before it is set."""

    def __init__(self, rank: int) -> None:
        self.batch_sampler = BatchSampler(Sampler(rank), 2, drop_last=False)
        self.state: dict[str, Any] = {"_num_yielded": 3}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


@pytest.mark.parametrize("rank", [0, 1])
def test_data_loaders_go_on_together_where_the_other_ranks_were(rank: int) -> None:
    """The one whose rank was lost is set to where all were, and so is the other, whose own state is there."""
    leaves = {f"dataloader.{name}": value for name, value in RankPart("dataloader", Loader(1), "ddp2").leaves().items()}
    # Outside of a process group it takes itself for the only rank.
    saved = {name.replace("rank0", "rank1"): value for name, value in leaves.items()} | {"dataloader.num_ranks": 2}
    saved = {name.replace("positions.0", "positions.1"): value for name, value in saved.items()}
    assert {name for name in saved if lost_ranks.is_own(name, 1)}
    loader = Loader(rank)
    plan = RankPart("dataloader", loader, "ddp2").plan(SavedState({}, saved, layout="ddp2 without rank 0"))
    assert (plan.claims, plan.notes) == ({}, {"dataloader": "restored"})
    plan.apply({})
    sampler: Any = loader.batch_sampler.sampler
    assert (sampler.state_dict(), loader.state) == ({"yielded": 6}, {})
    # Of a save that lost nobody, the one that was at this place takes its own state.
    whole = RankPart("dataloader", Loader(1), "ddp2").plan(SavedState({}, saved, layout="hsdp2x1"))
    assert "dataloader.rank1._num_yielded" in whole.claims
