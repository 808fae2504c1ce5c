"""What ranks do together, or alone, and how every rank learns of every failure.

TrainersExchange   among the ranks that train, on the thread that trains
Exchange           over any carrier, as beside training
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ray_ckpt.checkpoint.carriers import Carrier, trainers_carrier
from ray_ckpt.checkpoint.meetings import Deadline
from ray_ckpt.errors import CheckpointError, RayCkptError, StorageError
from ray_ckpt.protocol.messages import Outcome, RankError

T = TypeVar("T")


class Exchange:
    """Values between the coordinator and all ranks, and failures with them.

    Failures travel like values: if a function fails on any rank, the round raises on every rank and names every
    failure, so no rank waits for one that has given up. All ranks make the same calls.

    Args:
        operation: for the messages: "{operation} failed on rank 2: ...".
    """

    def __init__(self, operation: str, carrier: Carrier) -> None:
        self._operation = operation
        self._carrier = carrier
        self._failures: dict[int, Exception] = {}

    @property
    def rank(self) -> int:
        return self._carrier.rank

    @property
    def num_ranks(self) -> int:
        return self._carrier.num_ranks

    def gather(self, of_rank: Callable[[], T]) -> list[T]:
        """Call `of_rank` on every rank. The coordinator gets the values by rank, the others an empty list.

        A failure is raised by the call that follows, `scatter` or `broadcast`.
        """
        outcomes = self._carrier.gather(Outcome.of(of_rank))
        self._failures = {rank: outcome.failure for rank, outcome in enumerate(outcomes) if outcome.failure is not None}
        return [outcome.value for outcome in outcomes]  # type: ignore[misc]

    def scatter(self, of_coordinator: Callable[[], Sequence[T]]) -> T:
        """Call `of_coordinator` on the coordinator, unless a rank has failed, and give each rank its own value.

        Raises:
            RayCkptError: a rank failed in the `gather` before, or the coordinator did just now.
        """
        outcome = self._coordinate(of_coordinator)
        shares: list[Outcome[Any]] = [outcome] * self.num_ranks
        if outcome.value is not None:
            shares = [Outcome(value) for value in outcome.value]
        return self._carrier.scatter(shares).get()  # type: ignore[no-any-return]

    def broadcast(self, of_coordinator: Callable[[], T]) -> T:
        """Call `of_coordinator` on the coordinator, unless a rank has failed, and give its value to every rank.

        Raises:
            RayCkptError: a rank failed in the `gather` before, or the coordinator did just now.
        """
        return self._carrier.broadcast(self._coordinate(of_coordinator)).get()  # type: ignore[no-any-return]

    def _coordinate(self, of_coordinator: Callable[[], T]) -> Outcome[T]:
        if self.rank != 0:
            return Outcome()
        failures = self._failures
        if not failures:
            outcome = Outcome.of(of_coordinator)
            # A fault of the checkpoint is the same for all ranks; an error of the storage is the coordinator's alone.
            is_everybodys = isinstance(outcome.failure, RayCkptError) and not isinstance(outcome.failure, StorageError)
            if outcome.failure is None or is_everybodys:
                return outcome
            failures = {0: outcome.failure}
        return Outcome(failure=combine(self._operation, failures, self.num_ranks))


class TrainersExchange(Exchange):
    """An exchange among the ranks that train, on the thread that trains.

    Args:
        timeout_s: how long to wait for other ranks in all; None: as long as the process group's collectives wait.

    Raises:
        UsageError: `timeout_s` is not above 0.
    """

    def __init__(self, operation: str, timeout_s: float | None = None) -> None:
        self.deadline = Deadline.after(operation, timeout_s)
        self._trainers = trainers_carrier(self.deadline)
        self.peers = self._trainers.peers()
        """The other ranks; None where there are none."""
        super().__init__(operation, self._trainers)

    def ask_any(self, flag: bool) -> Callable[[], bool]:
        """Begin to ask whether the flag is set on any rank. What is returned waits for the answer."""
        return self._trainers.ask_any(flag)

    def on_all(self, of_rank: Callable[[], T]) -> T:
        """Call `of_rank` on every rank; return its own value on each when all have come through.

        Raises:
            RayCkptError: a rank failed.
        """
        outcome = Outcome.of(of_rank)
        if self._trainers.told is not None and outcome.failure is self._trainers.told:
            raise self._trainers.told
        if self.ask_any(outcome.failure is not None)():
            # Only now are they told how: a collective for one bit costs a fraction of one for objects.
            self.gather(outcome.get)
            try:
                self.broadcast(lambda: None)
            except RayCkptError as error:
                if error is outcome.failure:
                    raise
                raise error from outcome.failure
        return outcome.get()


def combine(operation: str, failures: Mapping[int, Exception], num_ranks: int) -> RayCkptError:
    """What every rank raises: the failure itself where all ranks have the same, else an error that names who failed."""
    texts = {rank: _describe(failure) for rank, failure in failures.items()}
    example = next(iter(failures.values()))
    if isinstance(example, RayCkptError) and len(texts) == num_ranks and len(set(texts.values())) == 1:
        return example
    ranks_of: dict[str, list[str]] = {}
    for rank, text in texts.items():
        ranks_of.setdefault(text, []).append(str(rank))
    causes = "; ".join(f"rank {', '.join(ranks)}: {text}" for text, ranks in ranks_of.items())
    return CheckpointError(f"{operation} failed on {causes}")


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, RankError) else f"{type(error).__name__}: {error}"
