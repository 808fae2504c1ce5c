"""What ranks do together, or alone, and how every rank learns of every failure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from ray_ckpt.checkpoint.carriers import Carrier, LostContact, carrier, on_any_rank
from ray_ckpt.errors import CheckpointError, RayCkptError, StorageError
from ray_ckpt.storage.files import Storage

T = TypeVar("T")


@contextmanager
def together(operation: str) -> Iterator[None]:
    """Run the block on every rank, then exchange failures: all ranks go on, or all raise, with every failure named."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if not on_any_rank(failure is not None):
        return
    text = None if failure is None else _describe(failure)
    texts: list[str | None] = [text]
    if dist.is_initialized():
        texts *= dist.get_world_size()
        dist.all_gather_object(texts, text)
    failures = {rank: text for rank, text in enumerate(texts) if text is not None}
    raise _combine(operation, failures, len(texts), failure) from failure


class Exchange:
    """Values between the coordinator and all ranks, and failures with them.

    What a rank's function raises travels as well: a round in which anybody failed raises on every rank, with every
    failure named, so nobody waits for somebody who has given up. All ranks make the same calls.

    Args:
        operation: for the messages: "{operation} failed on rank 2: ...".
    """

    def __init__(self, operation: str, carrier: Carrier) -> None:
        self._operation = operation
        self._carrier = carrier
        self._failures: dict[int, Exception] = {}

    def gather(self, of_rank: Callable[[], T]) -> list[T]:
        """Call `of_rank` on every rank. The coordinator gets the values by rank, the others an empty list.

        A failure is raised by the call that follows, `scatter` or `broadcast`.
        """
        outcomes = self._carrier.gather(_attempt(of_rank))
        # In place of a rank that is lost stands how it was lost.
        pairs: list[tuple[Any, Exception | None]] = [
            (None, outcome) if isinstance(outcome, LostContact) else outcome for outcome in outcomes
        ]
        self._failures = {rank: failure for rank, (_, failure) in enumerate(pairs) if failure is not None}
        return [value for value, _ in pairs]

    def scatter(self, of_coordinator: Callable[[], Sequence[T]]) -> T:
        """Call `of_coordinator` there, unless a rank has failed, and give every rank its own of the values.

        Raises:
            RayCkptError: a rank failed in the `gather` before, or the coordinator did just now.
        """
        values, failure = self._coordinate(of_coordinator)
        several = values if values is not None else [None] * self._carrier.num_ranks
        return _take(self._carrier.scatter([(value, failure) for value in several]))  # type: ignore[no-any-return]

    def broadcast(self, of_coordinator: Callable[[], T]) -> T:
        """Call `of_coordinator` there, unless a rank has failed, and give every rank its value.

        Raises:
            RayCkptError: a rank failed in the `gather` before, or the coordinator did just now.
        """
        return _take(self._carrier.broadcast(self._coordinate(of_coordinator)))  # type: ignore[no-any-return]

    def _coordinate(self, of_coordinator: Callable[[], T]) -> tuple[T | None, Exception | None]:
        if self._carrier.rank != 0:
            return None, None
        if self._failures:
            texts = {rank: _describe(failure) for rank, failure in self._failures.items()}
            example = next(iter(self._failures.values()))
            return None, _combine(self._operation, texts, self._carrier.num_ranks, example)
        value, failure = _attempt(of_coordinator)
        # What is wrong with the checkpoint is wrong for all; what its storage does is the coordinator's own experience.
        if isinstance(failure, StorageError) or not isinstance(failure, RayCkptError | None):
            failure = _combine(self._operation, {0: _describe(failure)}, self._carrier.num_ranks, failure)
        return value, failure


def _take(outcome: tuple[Any, Exception | None]) -> Any:
    value, failure = outcome
    if failure is not None:
        raise failure
    return value


def _attempt(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The value or the failure, as something that pickles."""
    try:
        return function(), None
    except RayCkptError as error:
        return None, error
    except Exception as error:
        return None, RankError(_describe(error))


class RankError(Exception):
    """What a rank raised that is none of our own errors, and may not pickle. Its text is that error's."""


def chosen_by_one(operation: str, choose: Callable[[], Storage]) -> Storage:
    """Where a load comes from; all ranks call it, and get what the coordinator has chosen.

    Args:
        operation: for the message when it fails.
        choose: called on the coordinator alone, and what it raises is raised on all ranks.
    """
    return Exchange(operation, carrier()).broadcast(choose)


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, RankError) else f"{type(error).__name__}: {error}"


def _combine(
    operation: str, failures: Mapping[int, str], num_ranks: int, example: BaseException | None
) -> RayCkptError:
    """What a rank raises: the failure itself where it is everybody's, else an error that names who failed."""
    if isinstance(example, RayCkptError) and len(failures) == num_ranks and len(set(failures.values())) == 1:
        return example
    ranks_of: dict[str, list[str]] = {}
    for rank, text in failures.items():
        ranks_of.setdefault(text, []).append(str(rank))
    causes = "; ".join(f"rank {', '.join(ranks)}: {text}" for text, ranks in ranks_of.items())
    return CheckpointError(f"{operation} failed on {causes}")
