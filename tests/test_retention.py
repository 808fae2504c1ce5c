"""Which steps stay: policies as pure functions of step numbers, by tables."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ckpt.errors import UsageError
from ray_ckpt.storage.retention import Policy, keep, keep_every, keep_last, retained

STEPS = (0, 100, 200, 900, 1000, 1100, 2000, 2050)


@pytest.mark.parametrize(
    ("policies", "pins", "expected"),
    [
        ([keep_last(1)], [], (2050,)),
        ([keep_last(3)], [], (1100, 2000, 2050)),
        ([keep_last(99)], [], STEPS),
        ([keep_every(1000)], [], (0, 1000, 2000, 2050)),
        ([keep_every(7)], [], (0, 2050)),
        ([keep_every(1)], [], STEPS),
        ([keep([])], [], (2050,)),
        ([keep([100, 150])], [], (100, 2050)),
        ([keep_last(2), keep_every(1000)], [], (0, 1000, 2000, 2050)),
        ([keep_last(2) | keep_every(1000)], [], (0, 1000, 2000, 2050)),
        ([keep_last(2) | keep([200])], [900], (200, 900, 2000, 2050)),
        ([keep_last(1)], [100, 7777], (100, 2050)),
    ],
    ids=str,
)
def test_a_step_stays_if_a_policy_or_a_pin_keeps_it(
    policies: Sequence[Policy], pins: Sequence[int], expected: tuple[int, ...]
) -> None:
    assert retained(STEPS, policies, pins) == expected
    assert retained(reversed(STEPS), policies, pins) == expected, "in whatever order they are listed"


def test_an_empty_store_keeps_nothing() -> None:
    assert retained([], [keep_last(3)], [5]) == ()


@pytest.mark.parametrize("make", [lambda: keep_last(0), lambda: keep_every(0), lambda: retained([1], [])])
def test_wrong_use_is_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(UsageError):
        make()


POLICIES = st.one_of(
    st.integers(1, 5).map(keep_last), st.integers(1, 20).map(keep_every), st.sets(st.integers(0, 60)).map(keep)
)


@given(st.sets(st.integers(0, 60), min_size=1), st.lists(POLICIES, min_size=1, max_size=3), st.sets(st.integers(0, 60)))
def test_the_highest_and_the_pinned_always_stay_and_more_policies_keep_more(
    steps: set[int], policies: list[Policy], pins: set[int]
) -> None:
    kept = retained(steps, policies, pins)
    assert max(steps) in kept
    assert pins & steps <= set(kept) <= steps
    assert list(kept) == sorted(kept)
    assert set(retained(steps, policies[:1], pins)) <= set(kept)
    assert retained(kept, policies, pins)[-1] == max(steps)
