"""Both ends of a transfer in one process: every byte arrives in its place; what is damaged or lost is noticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from ray_ckpt.errors import CheckpointError, CommitError
from ray_ckpt.protocol.agreement import agree
from ray_ckpt.protocol.comparison import Comparing, compare_with
from ray_ckpt.protocol.load_options import LoadOptions
from ray_ckpt.protocol.save_options import SaveOptions
from ray_ckpt.protocol.share_plan import Wants
from ray_ckpt.protocol.stream_plan import Proof, StreamPlan, plan_streams, stream_name
from ray_ckpt.protocol.streaming import RankStream, StreamedLoad, StreamWindow
from ray_ckpt.storage.files import Storage

State = dict[str, Any]
KB = 1 << 10


def source_states(value: float) -> list[State]:
    """Two ranks: one tensor each, of kinds that are copied in different ways, and a replica."""
    common = {"common": torch.full((9,), value), "version": int(value)}
    return [
        {"rows": torch.arange(70_000.0).reshape(700, 100) + value, "empty": torch.empty(0, 2), **common},
        {"turned": (torch.arange(9_000.0).reshape(90, 100) + value).t().bfloat16(), **common},
    ]


def target_state() -> State:
    return {
        "rows": torch.zeros(700, 100),
        "empty": torch.empty(0, 2),
        "turned": torch.zeros(100, 90, dtype=torch.bfloat16),
        "common": torch.zeros(9),
        "version": 0,
    }


@dataclass
class Pair:
    """Both ends, after the planning."""

    streams: list[RankStream]
    plan: StreamPlan
    load: StreamedLoad
    wants: Wants
    finish: Callable[[], object]
    proofs: list[Proof] = field(default_factory=lambda: [Proof(), Proof()])
    by_fingerprint: frozenset[str] = frozenset()

    def windows(self, max_bytes: int) -> Iterator[tuple[int, StreamWindow]]:
        for rank, stream in enumerate(self.streams):
            is_last = False
            while not is_last:
                window = stream.window(max_bytes)
                assert window.num_bytes <= max_bytes
                self.proofs[rank].add(window.proof)
                is_last = window.is_last
                yield rank, window

    def take(self, rank: int, window: StreamWindow) -> None:
        copied = [piece._replace(data=np.array(piece.data)) for piece in window.pieces]
        for piece in copied:
            piece.data.flags.writeable = False  # as what Ray gives
        self.load.fill(stream_name(rank), copied, window.checksum)


def pair_of(sources: list[State], target: State, *, atomic: bool = False) -> Pair:
    streams = [RankStream(SaveOptions.of(None, None, None, fingerprints=True)) for _ in sources]
    plan = plan_streams([stream.offer(state) for stream, state in zip(streams, sources, strict=True)], "attempt")
    by_fingerprint = Comparing(target, None, plan.planned).needing()
    for stream, assignment in zip(streams, plan.assignments, strict=True):
        stream.begin(assignment, by_fingerprint)
    load = StreamedLoad(Storage("nowhere"), LoadOptions(), atomic=atomic)
    load.open(plan.manifest)
    verdict = agree([load.offer(target)])
    load.prepare(verdict)
    pair = Pair(streams, plan, load, load.expect(), lambda: load.finish(verdict))
    pair.by_fingerprint = by_fingerprint
    return pair


@pytest.mark.parametrize("max_bytes", [KB, 100 * KB, 10_000 * KB])
@pytest.mark.parametrize("atomic", [False, True])
def test_all_bytes_arrive_in_windows_of_any_size(max_bytes: int, atomic: bool) -> None:
    target = target_state()
    pair = pair_of(source_states(3.0), target, atomic=atomic)
    for rank, window in pair.windows(max_bytes):
        assert not (atomic and target["rows"].any())
        pair.take(rank, window)
    proof = pair.plan.proven(pair.proofs)
    # The control: what the target was, and for as long as it is kept still is, is not what was sent.
    assert bool(compare_with(proof, [Comparing(target_state(), None, proof).held(pair.by_fingerprint)]).differing)
    pair.load.settle()
    pair.finish()
    found = compare_with(proof, [Comparing(target, None, proof).held(pair.by_fingerprint)])
    assert (dict(found.differing), found.num_compared) == ({}, 4)
    for name, value in {**source_states(3.0)[0], **source_states(3.0)[1]}.items():
        assert torch.equal(target[name], value) if isinstance(value, torch.Tensor) else target[name] == value


def test_a_flipped_bit_and_a_lost_window_are_noticed() -> None:
    pair = pair_of(source_states(3.0), target_state())
    windows = list(pair.windows(100 * KB))
    rank, first = windows[0]
    damaged = np.array(first.pieces[0].data)
    damaged[1234] ^= 1
    with pytest.raises(CheckpointError, match="has arrived with other bytes than were sent"):
        pair.take(rank, first._replace(pieces=[first.pieces[0]._replace(data=damaged), *first.pieces[1:]]))
    for rank, window in windows[1:]:
        pair.take(rank, window)
    with pytest.raises(CheckpointError, match=r"[0-9]+ wanted bytes of .* have not come"):
        pair.load.settle()


def test_replicas_that_differ_are_not_taken_for_one() -> None:
    one, other = source_states(3.0)
    other["common"] = other["common"].clone()
    other["common"][4] += 1
    pair = pair_of([one, other], target_state())
    for rank, window in pair.windows(100 * KB):
        pair.take(rank, window)
    with pytest.raises(CommitError, match="different things under one name: common"):
        pair.plan.proven(pair.proofs)


def test_only_those_that_want_bytes_of_a_window_get_it() -> None:
    pair = pair_of(source_states(3.0), target_state())
    nothing = Wants({})
    for rank, window in pair.windows(100 * KB):
        if window.pieces:
            start, end = window.pieces[0].start, window.pieces[-1].start + len(window.pieces[-1].data)
            assert pair.plan.wanted_by([nothing, pair.wants], rank, start, end) == [1]
    assert pair.plan.wanted_by([pair.wants], 0, 10**9, 10**9 + 1) == []
