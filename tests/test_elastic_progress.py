"""What the elastic job makes of failures: how many it takes, and which it takes for one that repeats itself."""

from __future__ import annotations

import pytest

from ray_ckpt.errors import DIED, GroupError, PlacementError, RankFailure, WorkerError
from ray_ckpt.recipes.train_elastic.progress import Progress


def death(rank: int, process: int = 7) -> WorkerError:
    return WorkerError((RankFailure(rank, "127.0.0.1", DIED, f"process {process} was killed", ""),))


def train(progress: Progress, steps: int) -> None:
    for _ in range(steps):
        progress.trained(1.0)


@pytest.mark.parametrize("max_failures", [0, 1, 3])
def test_one_more_failure_than_is_allowed_ends_the_run(max_failures: int) -> None:
    progress = Progress()
    for _ in range(max_failures):
        train(progress, 1)
        progress.failed(death(rank=0), max_failures)
        train(progress, 1)
    last = death(rank=1)
    with pytest.raises(WorkerError) as raised:
        progress.failed(last, max_failures)
    assert raised.value is last
    assert [restart.step for restart in progress.restarts] == [1, 3, 5][:max_failures]


@pytest.mark.parametrize(
    ("second", "steps_between"),
    [(death(rank=1), 0), (death(rank=0), 1), (PlacementError("no room"), 0)],
    ids=["another rank", "another step", "another error"],
)
def test_what_differs_from_the_failure_before_is_tried_again(second: GroupError, steps_between: int) -> None:
    progress = Progress()
    progress.failed(death(rank=0), 9)
    train(progress, steps_between)
    progress.failed(second, 9)
    assert [restart.rank for restart in progress.restarts] == [0]


def test_the_same_failure_of_the_same_rank_at_the_same_step_is_not_tried_again() -> None:
    progress = Progress()
    progress.failed(death(rank=0, process=7), 9)
    again = death(rank=0, process=8)
    with pytest.raises(WorkerError) as raised:
        progress.failed(again, 9)
    assert raised.value is again


def test_a_failure_has_cost_the_time_until_training_is_back_where_it_had_been() -> None:
    progress = Progress()
    train(progress, 3)
    progress.failed(death(rank=1), 9)
    progress.losses = progress.losses[:2]  # resumed from step 2
    progress.caught_up()
    assert progress.restarts == []
    train(progress, 1)
    [restart] = progress.restarts
    assert (restart.rank, restart.step) == (1, 3)
    assert restart.seconds_lost > 0
