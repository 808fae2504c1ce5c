"""How values travel between the coordinator, which is rank 0, and all ranks.

Alone         one process: nothing travels
Collectives   the trainer's own process group; only on the thread that trains
Star          messages between the coordinator and each rank, over a gloo group of their own, beside training
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

_COORDINATOR = 0
_SIZE, _DATA = 0, 1
"""Tags of the two parts of a message."""


class LostContact(Exception):
    """A message could not be sent or received: a rank has died, or did not answer in time."""


class Carrier(Protocol):
    """All ranks make the same calls, in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def num_ranks(self) -> int: ...

    def gather(self, value: Any) -> list[Any]:
        """The coordinator gets every rank's value, by rank, or a `LostContact` in its place; the others get nothing."""
        ...

    def scatter(self, values: Sequence[Any]) -> Any:
        """Every rank gets its own of the coordinator's values."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Every rank gets the coordinator's value."""
        ...


def carrier() -> Carrier:
    """For the thread that trains."""
    return Collectives() if dist.is_initialized() and dist.get_world_size() > 1 else Alone()


def on_any_rank(it_is_so: bool) -> bool:
    """Whether it is so on any rank of the trainer's group, by one small collective: objects cost five times that."""
    return ask_any_rank(it_is_so)()


def ask_any_rank(it_is_so: bool) -> Callable[[], bool]:
    """Begin what `on_any_rank` does, and go on; what is returned waits for the answer."""
    if not dist.is_initialized():
        return lambda: it_is_so
    trainers = dist.group.WORLD
    assert trainers is not None, "an initialized process has a group"
    kinds = {device.type for device in trainers._device_types}
    device = torch.device("cpu" if "cpu" in kinds else kinds.pop())
    flag = torch.tensor([it_is_so], dtype=torch.int32, device=device)
    answer = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)

    def wait() -> bool:
        answer.wait()
        return bool(flag.item())

    return wait


class Alone:
    rank, num_ranks = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def scatter(self, values: Sequence[Any]) -> Any:
        return values[0]

    def broadcast(self, value: Any) -> Any:
        return value


class Collectives:
    """A rank that is lost is an error of torch's, on some of the others at once, on the rest at the group's timeout."""

    def __init__(self) -> None:
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] | None = [None] * self.num_ranks if self.rank == _COORDINATOR else None
        dist.gather_object(value, values, _COORDINATOR)
        return values or []

    def scatter(self, values: Sequence[Any]) -> Any:
        received = [None]
        dist.scatter_object_list(received, list(values) if self.rank == _COORDINATOR else None, _COORDINATOR)
        return received[0]

    def broadcast(self, value: Any) -> Any:
        received = [value]
        dist.broadcast_object_list(received, _COORDINATOR)
        return received[0]


class Star:
    """Needs no other rank to reach a rank, so that the one which is lost can be named, and the others told.

    It speaks to the group itself, past the functions of `torch.distributed`: those fail once the trainer has called
    `destroy_process_group`, which it may do while a save is being written.

    Args:
        group: a gloo group of all ranks. Its timeout is how far apart ranks may be.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.num_ranks = group.rank(), group.size()
        self._group = group

    def gather(self, value: Any) -> list[Any]:
        if self.rank != _COORDINATOR:
            self._send({_COORDINATOR: value})
            return []
        values, given_up = [value], ""
        for rank in range(1, self.num_ranks):
            try:
                values.append(self._receive(rank))
            except LostContact as lost:
                values.append(LostContact(f"was not heard: {given_up}") if given_up else lost)
                if "Timed out" in str(lost):
                    # gloo closes its connections to all ranks then; those that follow are not to blame for it.
                    given_up = given_up or f"rank {rank} did not answer in time"
        return values

    def scatter(self, values: Sequence[Any]) -> Any:
        if self.rank != _COORDINATOR:
            return self._receive(_COORDINATOR)
        # Whom this does not reach learns it from its own side, or is no more.
        with contextlib.suppress(LostContact):
            self._send({rank: value for rank, value in enumerate(values) if rank != _COORDINATOR})
        return values[_COORDINATOR]

    def broadcast(self, value: Any) -> Any:
        return self.scatter([value] * self.num_ranks)

    def _send(self, values: Mapping[int, Any]) -> None:
        """Send all before waiting for one, so that nobody waits for a rank that does not listen."""
        sent, lost = [], None
        for rank, value in values.items():
            data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
            for tag, tensor in ((_SIZE, torch.tensor([data.numel()])), (_DATA, data)):
                try:
                    # With the tensor, which has to live until it has gone.
                    sent.append((rank, tensor, self._group.send([tensor], rank, tag)))
                except RuntimeError as error:
                    lost = LostContact(f"rank {rank} cannot be reached: {_brief(error)}")
        for rank, _, work in sent:
            try:
                work.wait()
            except RuntimeError as error:
                lost = LostContact(f"rank {rank} cannot be reached: {_brief(error)}")
        if lost is not None:
            raise lost

    def _receive(self, rank: int) -> Any:
        size = torch.zeros(1, dtype=torch.long)
        try:
            self._group.recv([size], rank, _SIZE).wait()
            data = torch.empty(int(size), dtype=torch.uint8)
            self._group.recv([data], rank, _DATA).wait()
        except RuntimeError as error:
            raise LostContact(f"rank {rank} cannot be heard: {_brief(error)}") from error
        return pickle.loads(data.numpy().tobytes())


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long its collectives wait."""
    timeout: timedelta = group._get_backend(group._device_types[0]).options._timeout
    return timeout


def _brief(error: RuntimeError) -> str:
    """gloo's message without its advice."""
    return str(error).partition(". This is")[0].strip()
