"""Notices that a node of the group is to go: by `ray drain-node`, an autoscaler, or a cloud that takes it back."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.cluster.ray_internals import draining_nodes

LOOK_EVERY_S = 0.5
"""Least time between two looks. A notice is of seconds, at least."""


@dataclass(frozen=True)
class Notice:
    """Nodes of a group that are drained."""

    ranks: tuple[int, ...]
    """The ranks that run there."""
    node: str
    """The first of the nodes, as a person reads it."""
    left_s: float | None
    """Seconds until it goes; None where that is not said."""

    @property
    def text(self) -> str:
        when = "" if self.left_s is None else f" and goes in {self.left_s:.0f} s"
        ranks = ", ".join(map(str, self.ranks))
        return f"{self.node}, with rank{'s' * (len(self.ranks) > 1)} {ranks}, is drained{when}"


class Notices:
    """Looks now and then whether a node of a group is drained."""

    def __init__(self, group: WorkerGroup) -> None:
        self._workers = group.workers
        self._due = 0.0

    def new(self) -> Notice | None:
        """A notice, if it is time to look and there is one."""
        now = time.monotonic()
        if now < self._due:
            return None
        self._due = now + LOOK_EVERY_S
        going = draining_nodes()
        ranks = tuple(rank for rank, worker in enumerate(self._workers) if worker.node_id in going)
        if not ranks:
            return None
        soonest = min((going[self._workers[rank].node_id] for rank in ranks), key=lambda at: at or float("inf"))
        left_s = max(0.0, soonest - time.time()) if soonest else None
        return Notice(ranks, self._workers[ranks[0]].node, left_s)
