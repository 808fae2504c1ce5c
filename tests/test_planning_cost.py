"""Planning and committing grow with the number of parts, not with its square; `benchmarks/planning.py` measures it."""

from __future__ import annotations

import gc
import math

import pytest

from benchmarks.planning import Case, measure_ours

GROWTH = 8


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (Case("stages", 8, 1_000), Case("stages", 8, 1_000 * GROWTH)),
        (Case("shards", 8, 100), Case("shards", 8 * GROWTH, 100)),
        (Case("stages", 8, 2_000), Case("stages", 256, 2_000)),
    ],
    ids=["tensors", "ranks of shards", "ranks"],
)
def test_the_coordinators_work_grows_no_faster_than_the_parts(small: Case, large: Case) -> None:
    """Processor time, the least of a few, in turn, because neighbors on the machine only ever add to it."""

    def seconds(case: Case) -> float:
        gc.collect()
        return measure_ours(case).coordinator

    factor = large.parts / small.parts
    of_small = of_large = math.inf
    for _ in range(8):
        of_small, of_large = min(of_small, seconds(small)), min(of_large, seconds(large))
        # The square would be 64 times as much, n log n less than 11; where only ranks are added, the same.
        if of_large < 3 * factor * of_small:
            break
    assert of_large < 3 * factor * of_small
