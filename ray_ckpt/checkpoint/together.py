"""What ranks do together, or alone, and how every rank learns of every failure."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ray_ckpt.errors import CheckpointError, RayCkptError

T = TypeVar("T")


@contextmanager
def together(operation: str) -> Iterator[None]:
    """Run the block on every rank, then exchange failures: all ranks go on, or all raise, with every failure named."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    text = None if failure is None else _describe(failure)
    texts: list[str | None] = [text]
    if dist.is_initialized():
        texts *= dist.get_world_size()
        dist.all_gather_object(texts, text)
    if failures := {rank: text for rank, text in enumerate(texts) if text is not None}:
        raise _combine(operation, failures, len(texts), failure) from failure


class Exchange:
    """Values between the coordinator, which is rank 0, and all ranks of a process group; or of one process alone.

    What a rank's function raises travels as well: a round in which anybody failed raises on every rank, with every
    failure named, so nobody waits for somebody who has given up. All ranks make the same calls.

    Args:
        operation: for the messages: "{operation} failed on rank 2: ...".
        group: of the process group; None for the default one.
    """

    def __init__(self, operation: str, group: dist.ProcessGroup | None = None) -> None:
        self._operation = operation
        self._group = group
        distributed = dist.is_initialized()
        self.rank = dist.get_rank(group) if distributed else 0
        self.num_ranks = dist.get_world_size(group) if distributed else 1
        self._failures: dict[int, Exception] = {}

    @property
    def is_coordinator(self) -> bool:
        return self.rank == 0

    def gather(self, of_rank: Callable[[], T]) -> list[T]:
        """Call `of_rank` on every rank. The coordinator gets the values by rank, the others an empty list.

        A failure is raised by the call that follows, `scatter` or `broadcast`.
        """
        value, failure = _attempt(of_rank)
        outcomes: list[Any] = [None] * self.num_ranks
        if self.num_ranks == 1:
            outcomes = [(value, failure)]
        else:
            dist.gather_object((value, failure), outcomes if self.is_coordinator else None, 0, self._group)
        if not self.is_coordinator:
            return []
        self._failures = {rank: failure for rank, (_, failure) in enumerate(outcomes) if failure is not None}
        values: list[T] = [value for value, _ in outcomes]
        return values

    def scatter(self, of_coordinator: Callable[[], Sequence[T]]) -> T:
        """Call `of_coordinator` there, unless a rank has failed, and give every rank its own of the values.

        Raises:
            RayCkptError: a rank failed in the `gather` before, or the coordinator did just now.
        """
        values, failure = self._coordinate(of_coordinator)
        received: list[Any] = [(None, failure)]
        if self.num_ranks > 1:
            outcomes = [(value, failure) for value in values or itertools.repeat(None, self.num_ranks)]
            dist.scatter_object_list(received, outcomes if self.is_coordinator else None, 0, self._group)
        elif values is not None:
            received = [(values[0], None)]
        return _take(received[0])  # type: ignore[no-any-return]

    def broadcast(self, of_coordinator: Callable[[], T]) -> T:
        """Call `of_coordinator` there, unless a rank has failed, and give every rank its value.

        Raises:
            RayCkptError: a rank failed in the `gather` before, or the coordinator did just now.
        """
        received: list[Any] = [self._coordinate(of_coordinator)]
        if self.num_ranks > 1:
            dist.broadcast_object_list(received, 0, self._group)
        return _take(received[0])  # type: ignore[no-any-return]

    def _coordinate(self, of_coordinator: Callable[[], T]) -> tuple[T | None, Exception | None]:
        if not self.is_coordinator:
            return None, None
        if self._failures:
            texts = {rank: _describe(failure) for rank, failure in self._failures.items()}
            example = next(iter(self._failures.values()))
            return None, _combine(self._operation, texts, self.num_ranks, example)
        value, failure = _attempt(of_coordinator)
        if failure is not None and not isinstance(failure, RayCkptError):
            failure = _combine(self._operation, {self.rank: _describe(failure)}, self.num_ranks, failure)
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


@contextmanager
def alone_with_dcp() -> Iterator[None]:
    """Call DCP on this rank alone, with `no_dist=True`: what failed is raised as it is."""
    try:
        with _as_one_process():
            yield
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            raise cause from error
        raise CheckpointError(str(error)) from error


@contextmanager
def _as_one_process() -> Iterator[None]:
    """Without a process group DCP warns that it assumes one process. That is as good as any other layout."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


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
