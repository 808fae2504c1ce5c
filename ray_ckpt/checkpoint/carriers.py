"""How outcomes travel between the coordinator, which is rank 0, and all ranks.

Alone         one process: nothing travels
Collectives   the trainer's own process group; only on the thread that trains
Star          messages between the coordinator and each rank, over a gloo group of their own, beside training
"""

from __future__ import annotations

import contextlib
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ray_ckpt.checkpoint.meetings import Deadline, meetings_of
from ray_ckpt.errors import CheckpointError
from ray_ckpt.protocol.messages import Outcome
from ray_ckpt.protocol.peers import Peers, begin_to_ask_any

_COORDINATOR = 0
_SIZE, _DATA = 0, 1
"""Tags of the two parts of a message."""

_MOMENT_S = 0.01


class LostContact(Exception):
    """A message could not be sent or received: a rank has died, or did not answer in time."""


class Carrier(Protocol):
    """All ranks make the same calls, in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def num_ranks(self) -> int: ...

    def gather(self, outcome: Outcome[Any]) -> list[Outcome[Any]]:
        """The coordinator gets every rank's, by rank; for a lost rank a `LostContact`. The others get nothing."""
        ...

    def scatter(self, outcomes: Sequence[Outcome[Any]]) -> Outcome[Any]:
        """Every rank gets its own of the coordinator's."""
        ...

    def broadcast(self, outcome: Outcome[Any]) -> Outcome[Any]:
        """Every rank gets the coordinator's."""
        ...


class TrainersCarrier(Carrier, Protocol):
    """For the thread that trains."""

    told: CheckpointError | None
    """Why the ranks have given up: all know it, and there is nothing left to tell each other."""

    def ask_any(self, flag: bool) -> Callable[[], bool]:
        """Begin to ask whether the flag is set on any rank. What is returned waits for the answer."""
        ...

    def peers(self) -> Peers | None:
        """To send them bytes; None where there are none."""
        ...


def trainers_carrier(deadline: Deadline | None = None) -> TrainersCarrier:
    """For this process's group of trainers, or none.

    Args:
        deadline: for waiting for other ranks; by default as long as the group's collectives wait.
    """
    group = dist.group.WORLD if dist.is_initialized() else None
    return Alone() if group is None or group.size() == 1 else Collectives(group, deadline)


class Alone:
    rank, num_ranks = 0, 1
    told: CheckpointError | None = None

    def gather(self, outcome: Outcome[Any]) -> list[Outcome[Any]]:
        return [outcome]

    def scatter(self, outcomes: Sequence[Outcome[Any]]) -> Outcome[Any]:
        return outcomes[0]

    def broadcast(self, outcome: Outcome[Any]) -> Outcome[Any]:
        return outcome

    def ask_any(self, flag: bool) -> Callable[[], bool]:
        return lambda: flag

    def peers(self) -> None:
        return None


class Collectives:
    """A rank that is lost is an error of torch's, on some of the others at once, on the rest at the group's timeout.

    With a deadline, the ranks meet before each collective: then one that does not come is named.
    """

    def __init__(self, group: dist.ProcessGroup, deadline: Deadline | None = None) -> None:
        self.rank, self.num_ranks = group.rank(), group.size()
        self._group = group
        self._deadline = deadline
        self.told: CheckpointError | None = None

    def gather(self, outcome: Outcome[Any]) -> list[Outcome[Any]]:
        self._meet()
        outcomes: list[Any] | None = [None] * self.num_ranks if self.rank == _COORDINATOR else None
        dist.gather_object(outcome, outcomes, _COORDINATOR)
        return outcomes or []

    def scatter(self, outcomes: Sequence[Outcome[Any]]) -> Outcome[Any]:
        self._meet()
        received: list[Any] = [None]
        dist.scatter_object_list(received, list(outcomes) if self.rank == _COORDINATOR else None, _COORDINATOR)
        return received[0]  # type: ignore[no-any-return]

    def broadcast(self, outcome: Outcome[Any]) -> Outcome[Any]:
        self._meet()
        received = [outcome]
        dist.broadcast_object_list(received, _COORDINATOR)
        return received[0]

    def ask_any(self, flag: bool) -> Callable[[], bool]:
        answer = begin_to_ask_any(self._group, flag)

        def wait() -> bool:
            self._meet()
            return answer()

        return wait

    def peers(self) -> Peers:
        deadline = self._deadline
        left_s = (lambda: math.inf) if deadline is None else (lambda: deadline.left_s)
        return Peers(self._group, lambda flag: self.ask_any(flag)(), left_s)

    def _meet(self) -> None:
        if self._deadline is not None:
            try:
                meetings_of(self._group).meet(self._deadline)
            except CheckpointError as error:
                self.told = error
                raise


class Star:
    """The coordinator in the middle, a connection to each of the other ranks around it.

    A collective passes through several ranks, and when one is lost, nobody can say which. Here every message concerns
    two: the coordinator knows whom it could not reach, and can tell the others.

    It speaks to the group itself, past the functions of `torch.distributed`: those fail once the trainer has called
    `destroy_process_group`, which it may do while a save is being written.

    Args:
        group: a gloo group of all ranks. Its timeout is how far apart ranks may be.
        deadline: for waiting for other ranks, where that is sooner.
    """

    def __init__(self, group: dist.ProcessGroup, deadline: Deadline | None = None) -> None:
        self.rank, self.num_ranks = group.rank(), group.size()
        self._group = group
        self._deadline = deadline

    def gather(self, outcome: Outcome[Any]) -> list[Outcome[Any]]:
        if self.rank != _COORDINATOR:
            self._send({_COORDINATOR: outcome})
            return []
        outcomes, late = [outcome], ""
        for rank in range(1, self.num_ranks):
            try:
                outcomes.append(self._receive(rank))
            except LostContact as lost:
                outcomes.append(Outcome(failure=LostContact(f"was not heard: {late}") if late else lost))
                if "Timed out" in str(lost):
                    # gloo closes its connections to all ranks then; those that follow are not to blame for it.
                    late = late or f"rank {rank} did not answer in time"
        return outcomes

    def scatter(self, outcomes: Sequence[Outcome[Any]]) -> Outcome[Any]:
        if self.rank != _COORDINATOR:
            return self._receive(_COORDINATOR)
        # An unreachable rank sees the lost connection itself, or has died.
        with contextlib.suppress(LostContact):
            self._send({rank: outcome for rank, outcome in enumerate(outcomes) if rank != _COORDINATOR})
        return outcomes[_COORDINATOR]

    def broadcast(self, outcome: Outcome[Any]) -> Outcome[Any]:
        return self.scatter([outcome] * self.num_ranks)

    def _send(self, outcomes: Mapping[int, Outcome[Any]]) -> None:
        """Send all before waiting for one, so that nobody waits for a rank that does not listen."""
        sent, lost = [], None
        for rank, outcome in outcomes.items():
            data = torch.frombuffer(bytearray(pickle.dumps(outcome)), dtype=torch.uint8)
            for tag, tensor in ((_SIZE, torch.tensor([data.numel()])), (_DATA, data)):
                try:
                    # With the tensor, which has to live until it has gone.
                    sent.append((rank, tensor, self._group.send([tensor], rank, tag)))
                except RuntimeError as error:
                    lost = LostContact(f"rank {rank} cannot be reached: {_brief(error)}")
        for rank, _, work in sent:
            try:
                self._wait(work)
            except RuntimeError as error:
                lost = LostContact(f"rank {rank} cannot be reached: {_brief(error)}")
        if lost is not None:
            raise lost

    def _receive(self, rank: int) -> Outcome[Any]:
        size = torch.zeros(1, dtype=torch.long)
        try:
            self._wait(self._group.recv([size], rank, _SIZE))
            data = torch.empty(int(size), dtype=torch.uint8)
            self._wait(self._group.recv([data], rank, _DATA))
        except RuntimeError as error:
            raise LostContact(f"rank {rank} cannot be heard: {_brief(error)}") from error
        return pickle.loads(data.numpy().tobytes())  # type: ignore[no-any-return]

    def _wait(self, work: dist.Work) -> None:
        if self._deadline is None:
            work.wait()
        else:
            # At least a moment, for what is there already; no time at all would mean the group's timeout.
            work.wait(timedelta(seconds=max(_MOMENT_S, self._deadline.left_s)))


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long its collectives wait."""
    timeout: timedelta = group._get_backend(group._device_types[0]).options._timeout
    return timeout


def _brief(error: RuntimeError) -> str:
    """gloo's message without its advice."""
    return str(error).partition(". This is")[0].strip()
