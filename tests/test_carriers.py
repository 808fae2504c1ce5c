"""What carries the messages of a save beside training: what arrives, and who is named when something does not."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ray_ckpt.checkpoint.carriers import Alone, Carrier, Collectives, LostContact, Star, timeout_of
from ray_ckpt.protocol.messages import Outcome
from tests.support.faulty import wait_until
from tests.support.ranks import RanksError, run_ranks

VALUES = ["", "a", {"nested": [1, (2.0, None)]}, b"0123456789" * 500_000]


def carry(rank: int, kind: str) -> list[Any]:
    """What this rank got in each kind of exchange, of values of any size."""
    world_size = dist.get_world_size()
    assert dist.group.WORLD is not None
    carrier: Carrier = Collectives(dist.group.WORLD)
    if kind == "star":
        assert timeout_of(dist.group.WORLD) == timedelta(seconds=30)
        carrier = Star(dist.new_group(backend="gloo"))
    assert (carrier.rank, carrier.num_ranks) == (rank, world_size)
    got = []
    for value in VALUES:
        got.append([outcome.get() for outcome in carrier.gather(Outcome((rank, value)))])
        got.append(carrier.scatter([Outcome((to, value)) for to in range(world_size)] if rank == 0 else []).get())
        got.append(carrier.broadcast(Outcome(value) if rank == 0 else Outcome()).get())
    return got


@pytest.mark.parametrize("kind", ["collectives", "star"])
def test_every_rank_gets_what_is_meant_for_it(tmp_path: Path, kind: str) -> None:
    for rank, got in enumerate(run_ranks(carry, 3, tmp_path, kind)):
        expected: list[Any] = []
        for value in VALUES:
            expected += [[(of, value) for of in range(3)] if rank == 0 else [], (rank, value), value]
        assert got == expected


def test_one_process_talks_to_itself() -> None:
    one, two, three = (Outcome(value) for value in (1, 2, 3))
    assert (Alone().gather(one), Alone().scatter([two]), Alone().broadcast(three)) == ([one], two, three)


def speak_and_listen(star: Star) -> None:
    star.gather(Outcome("of rank 2"))
    star.broadcast(Outcome())


def keep_silent(rank: int, directory: str) -> None:
    """Rank 1 never speaks; the group waits for a second."""
    star = Star(dist.new_group(backend="gloo", timeout=timedelta(seconds=1)))
    root = Path(directory)
    if rank == 1:
        wait_until(lambda: all((root / str(other)).exists() for other in (0, 2)))
    elif rank == 0:
        text = "; ".join(str(outcome.value or outcome.failure) for outcome in star.gather(Outcome("of rank 0")))
        with pytest.raises(LostContact):
            star._send({1: Outcome("anything")})
        (root / "0").write_text(text)
    else:
        with pytest.raises(LostContact) as caught:
            speak_and_listen(star)
        (root / "2").write_text(str(caught.value))
    raise RuntimeError("the end")


def test_a_rank_that_does_not_answer_in_time_is_named(tmp_path: Path) -> None:
    with pytest.raises(RanksError, match="the end"):
        run_ranks(keep_silent, 3, tmp_path, str(tmp_path), timeout_s=20)
    said = (tmp_path / "0").read_text().split("; ")
    assert said[0] == "of rank 0"
    assert re.match(r"rank 1 cannot be heard: .*Timed out waiting 1000ms", said[1])
    assert said[2] in ("was not heard: rank 1 did not answer in time", "of rank 2")
    assert re.match(r"rank 0 cannot be (heard|reached)", (tmp_path / "2").read_text())
