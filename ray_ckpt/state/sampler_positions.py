"""How far data loaders are in an epoch that their ranks go through together, for any number of ranks to go on from.

torch's `DistributedSampler` deals one order of all samples out in turns: of n replicas, number r gets items r, r + n,
r + 2n and so on, and the order depends on no n. When each has taken s, the first n * s items are taken, and each of m
goes on behind n * s / m of its own. torchdata's `StatefulDistributedSampler` can be set there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DistributedSampler

__all__ = ["Position", "mover", "position_of", "replica_of"]


@dataclass(frozen=True)
class Position:
    replica: int
    num_replicas: int
    num_taken: int
    """Samples of the running epoch that this replica has taken."""


def position_of(loader: Any, state: Mapping[str, Any]) -> Position | None:
    """None of a loader whose order of samples nothing tells.

    Args:
        state: what it shows, in the form of torchdata's `StatefulDataLoader`.
    """
    sampler, num_batches = _sampler(loader), _num_batches(state)
    if sampler is None or num_batches is None:
        return None
    num_taken = min(num_batches * loader.batch_sampler.batch_size, len(sampler))
    return Position(sampler.rank, sampler.num_replicas, num_taken)


def replica_of(loader: Any) -> tuple[int, int] | None:
    """Number of the replica that it is of, and how many there are."""
    sampler = _sampler(loader)
    return None if sampler is None else (sampler.rank, sampler.num_replicas)


def mover(loader: Any, saved: Sequence[Position]) -> tuple[Callable[[], None], int] | None:
    """What lets a loader go on where all of the saved ones were, and how many samples come again in all.

    None if it cannot be set there, or they had not taken equally many.
    """
    sampler = _sampler(loader)
    taken = {(position.num_replicas, position.num_taken) for position in saved}
    if len(taken) != 1 or sampler is None or not _can_be_set(sampler):
        return None
    [(num_replicas, num_taken)] = taken
    each, again = divmod(num_replicas * num_taken, sampler.num_replicas)

    def move() -> None:
        loader.load_state_dict({})  # forgets an iterator that it has begun
        sampler.load_state_dict({"yielded": each})  # type: ignore[attr-defined]

    return move, again


def _sampler(loader: Any) -> DistributedSampler[Any] | None:
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return sampler if isinstance(sampler, DistributedSampler) else None


def _can_be_set(sampler: Any) -> bool:
    return hasattr(sampler, "load_state_dict") and list(sampler.state_dict()) == ["yielded"]


def _num_batches(state: Mapping[str, Any]) -> int | None:
    """Batches of the running epoch that were handed out, whatever its workers have fetched ahead."""
    if state.get("_iterator_finished"):
        return 0
    if "_snapshot" in state:
        return int(state["_snapshot"]["_snapshot_step"] + state["_steps_since_snapshot"])
    return state.get("_num_yielded")
