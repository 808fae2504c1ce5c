"""Bytes from rank to rank, and whether any rank has failed, over the trainers' process group."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from ray_ckpt.errors import CheckpointError

_MOMENT_S = 0.01


class Message(NamedTuple):
    """Bytes for another rank, or from one."""

    rank: int
    """The other one."""
    number: int
    """The same on both sides, and that of no other message of the swap between them."""
    memory: torch.Tensor
    """Bytes, on the CPU."""


class Peers:
    """The other ranks of a group, for the thread that trains.

    Args:
        ask_any: whether the flag is set on any rank; all ranks call it together.
        left_s: how long other ranks may be waited for; infinite: as long as the group's collectives wait.
    """

    def __init__(
        self, group: dist.ProcessGroup, ask_any: Callable[[bool], bool], left_s: Callable[[], float] = lambda: math.inf
    ) -> None:
        self.rank = group.rank()
        self.ask_any = ask_any
        self._group = group
        self._left_s = left_s

    @classmethod
    def of_all(cls, timeout_s: float) -> Peers:
        """The ranks of the process group of all."""
        assert dist.group.WORLD is not None
        group, until = dist.group.WORLD, time.monotonic() + timeout_s
        return cls(group, lambda flag: begin_to_ask_any(group, flag)(), lambda: until - time.monotonic())

    def swap(self, sent: Sequence[Message], received: Sequence[Message], *, on_cuda: bool = False) -> None:
        """Send and receive at the same time, in the same order between any two ranks.

        Args:
            on_cuda: go by way of CUDA devices, where the group can. Otherwise bytes go from memory to memory.

        Raises:
            CheckpointError: a rank is lost, or late.
        """
        device = device_for(self._group, on_cuda=on_cuda)
        outgoing = [message.memory.to(device) for message in sent]
        incoming = [torch.empty_like(message.memory, device=device) for message in received]
        if device.type == "cpu":
            incoming = [message.memory for message in received]
        operations = [
            dist.P2POp(verb, memory, message.rank, self._group, message.number)
            for verb, messages, memories in ((dist.isend, sent, outgoing), (dist.irecv, received, incoming))
            for message, memory in zip(messages, memories, strict=True)
        ]
        works = dist.batch_isend_irecv(operations) if operations else []
        for place, work in enumerate(works):
            try:
                self._wait(work)
            except RuntimeError as error:
                # Where there is one work for all, nobody knows whose it is.
                who = f"rank {operations[place].peer}" if len(works) == len(operations) else "another rank"
                raise CheckpointError(f"no bytes could be sent to {who}, or received: {error}") from error
        if device.type != "cpu":
            for message, memory in zip(received, incoming, strict=True):
                message.memory.copy_(memory)

    def _wait(self, work: dist.Work) -> None:
        left_s = self._left_s()
        if math.isinf(left_s):
            work.wait()
        else:
            # Half of it: the rest is for ranks to tell each other who is late. At least a moment, for what is there
            # already; no time at all would mean the group's timeout.
            work.wait(timedelta(seconds=max(_MOMENT_S, left_s / 2)))


def begin_to_ask_any(group: dist.ProcessGroup, flag: bool) -> Callable[[], bool]:
    """Begin to ask whether the flag is set on any rank. What is returned waits for the answer.

    By one small collective: objects cost five times that.
    """
    told = torch.tensor([flag], dtype=torch.int32, device=device_for(group))
    answer = dist.all_reduce(told, dist.ReduceOp.MAX, group=group, async_op=True)

    def wait() -> bool:
        answer.wait()
        return bool(told.item())

    return wait


def device_for(group: dist.ProcessGroup, *, on_cuda: bool = False) -> torch.device:
    """Where tensors have to be that the group takes: the CPU if it may be that, unless CUDA is asked for."""
    kinds = {device.type for device in group._device_types}
    kind = "cuda" if on_cuda and "cuda" in kinds else "cpu" if "cpu" in kinds else kinds.pop()
    return torch.device(kind)
