"""Who reads what for whom: every rank gets what it wants, every byte is read once, and all ranks read alike."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ckpt.protocol.share_plan import LONGEST_EXTENT_BYTES, WIDEST_GAP_BYTES, Extent, SharePlan, Wants, share_out

UNIT = WIDEST_GAP_BYTES // 3
NUM_UNITS = 60
WINDOW_BYTES = 20 * UNIT

Found = list[tuple[str, int, int]]
FOUND = st.lists(
    st.builds(
        lambda file, start, length: (file, start * UNIT, min(start + length, NUM_UNITS) * UNIT),
        st.sampled_from("ab"),
        st.integers(0, NUM_UNITS - 1),
        st.integers(1, 12),
    ),
    max_size=8,
)


def marked(found: Found, file: str) -> np.ndarray:
    """Which units of a file they hold."""
    units = np.zeros(NUM_UNITS, bool)
    for name, start, end in found:
        if name == file:
            units[start // UNIT : end // UNIT] = True
    return units


def extents_of(plan: SharePlan) -> list[Extent]:
    return [extent for window in plan.windows for extent in window]


@given(st.lists(FOUND, min_size=1, max_size=5))
@settings(max_examples=300, deadline=None)
def test_every_rank_gets_what_it_wants_and_every_byte_is_read_once(wants: list[Found]) -> None:
    plan = share_out([Wants.of(found) for found in wants], window_bytes=WINDOW_BYTES)
    held = {file: np.array([marked(found, file) for found in wants]) for file in "ab"}
    assert (plan is None) == all(units.sum(0).max() < 2 for units in held.values())
    if plan is None:
        return
    read = {file: np.zeros(NUM_UNITS, int) for file in "ab"}
    got = {file: np.zeros_like(held[file]) for file in "ab"}
    for extent in extents_of(plan):
        span = slice(extent.start // UNIT, extent.end // UNIT)
        read[extent.file][span] += 1
        for rank in (extent.reader, *extent.receivers):
            got[extent.file][rank, span] = True
        # Nobody is sent what nobody wants, but for small gaps, and the same ranks want all of the rest.
        wanted = held[extent.file][:, span]
        assert {tuple(np.flatnonzero(column)) for column in wanted.T} - {()} == {
            tuple(sorted((extent.reader, *extent.receivers)))
        }
    for file in "ab":
        assert (got[file] | ~held[file]).all()
        assert (read[file][held[file].any(0)] == 1).all()
        assert (read[file] <= 1).all()
    for window in plan.windows:
        parts = Counter[int]()
        for extent in window:
            parts.update(dict.fromkeys((extent.reader, *extent.receivers), extent.num_bytes))
        assert len(window) == 1 or max(parts.values()) <= WINDOW_BYTES


def test_replicas_read_equal_parts_all_the_time() -> None:
    found = [(f"file{n % 3}", n << 21, (n << 21) + (1 << 20) + n) for n in range(300)]
    plan = share_out([Wants.of(found)] * 4)
    assert plan is not None
    loads = Counter[int]()
    for window in plan.windows:
        for extent in window:
            loads[extent.reader] += extent.num_bytes
        assert max(loads.values()) - min(loads[rank] for rank in range(4)) <= LONGEST_EXTENT_BYTES


def test_shards_of_replicas_go_on_side_by_side() -> None:
    """Ranks 0 and 2 hold the first half of each file, 1 and 3 the other: no window is of one pair alone."""
    half = 64 << 20
    halves = [[("file", at, at + (4 << 20)) for at in range(n * half, (n + 1) * half, 4 << 20)] for n in (0, 1)]
    plan = share_out([Wants.of(halves[rank % 2]) for rank in range(4)], window_bytes=16 << 20)
    assert plan is not None
    assert all({extent.reader % 2 for extent in window} == {0, 1} for window in plan.windows)
    assert sum(extent.num_bytes for extent in extents_of(plan)) == 2 * half
