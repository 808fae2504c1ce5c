"""Bounded waiting for the other ranks, for a verb that was given `timeout_s`.

Collectives wait as long as their group says, and afterwards the group is of no more use. So before each of them the
ranks meet by way of the group's store:

every rank         says that it has arrived
the last one       verdict: all have met                    ──> every rank goes on to the collective
one out of time    verdict: rank 2 has not arrived          ──> every rank raises that, rank 2 when it arrives

There is one verdict, so nobody enters a collective that another rank has given up: the group stays usable.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import MutableMapping
from typing import NamedTuple

import torch.distributed as dist

from ray_ckpt.errors import CheckpointError, UsageError

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.001, 0.05
"""Between two looks for the verdict. The store is asked again and again, because a blocking wait keeps it from other
threads of the process."""

_MET = b"met"


class Deadline(NamedTuple):
    """How long a verb may wait for other ranks, from its beginning to its end."""

    operation: str
    """The verb, for messages."""
    timeout_s: float
    at_s: float
    """The end, by `time.monotonic`."""

    @staticmethod
    def after(operation: str, timeout_s: float | None) -> Deadline | None:
        """None where nobody said how long.

        Raises:
            UsageError: it is no number of seconds above 0.
        """
        if timeout_s is None:
            return None
        if not timeout_s > 0:
            raise UsageError(f"{operation}(timeout_s={timeout_s}): give a number of seconds above 0, or leave it out")
        return Deadline(operation, timeout_s, time.monotonic() + timeout_s)

    @property
    def left_s(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self.at_s - time.monotonic())


class Meetings:
    """The meetings of one process group. All ranks call `meet` equally often."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._store: dist.Store = group.get_group_store()
        self._rank, self._num_ranks = group.rank(), group.size()
        self._held = 0

    def meet(self, deadline: Deadline) -> None:
        """Return when all ranks have called this.

        Raises:
            CheckpointError: some have not by the deadline of one of those that have; names them, on every rank.
        """
        number, self._held = self._held, self._held + 1
        self._store.set(self._key(number, str(self._rank)), "here")
        num_arrived = self._store.add(self._key(number, "arrived"), 1)
        verdict = self._decide(number, _MET) if num_arrived == self._num_ranks else self._await(number, deadline)
        self._leave(number)
        if verdict != _MET:
            raise CheckpointError(verdict.decode())

    def _await(self, number: int, deadline: Deadline) -> bytes:
        wait_s = _FIRST_WAIT_S
        while not self._store.check([self._key(number, "verdict")]):
            if not deadline.left_s:
                return self._decide(number, self._name_the_absent(number, deadline))
            time.sleep(min(wait_s, deadline.left_s))
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        return self._store.get(self._key(number, "verdict"))

    def _decide(self, number: int, verdict: bytes) -> bytes:
        """The first verdict counts."""
        return self._store.compare_set(self._key(number, "verdict"), "", verdict.decode())

    def _name_the_absent(self, number: int, deadline: Deadline) -> bytes:
        absent = [str(rank) for rank in range(self._num_ranks) if not self._store.check([self._key(number, str(rank))])]
        who = f"rank {', '.join(absent)}" if absent else "the last rank to arrive"
        text = (
            f"{deadline.operation} failed on {who}: not heard of within {deadline.timeout_s} s of the other ranks' "
            "call; what it has begun it may still finish"
        )
        return text.encode()

    def _leave(self, number: int) -> None:
        """The last to leave clears up: a run has many meetings, and the store keeps what nobody deletes."""
        self._store.delete_key(self._key(number, str(self._rank)))
        if self._store.add(self._key(number, "left"), 1) == self._num_ranks:
            for name in ("arrived", "verdict", "left"):
                self._store.delete_key(self._key(number, name))

    @staticmethod
    def _key(number: int, name: str) -> str:
        return f"ray_ckpt/meeting/{number}/{name}"


_meetings: MutableMapping[dist.ProcessGroup, Meetings] = weakref.WeakKeyDictionary()


def meetings_of(group: dist.ProcessGroup) -> Meetings:
    """Those of this process in the group."""
    if group not in _meetings:
        _meetings[group] = Meetings(group)
    return _meetings[group]
