"""Waiting until somebody else has committed a step, as whoever follows a training run does."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ray_ckpt.errors import CheckpointNotFoundError, UsageError
from ray_ckpt.storage.step_names import directory_of

if TYPE_CHECKING:
    from ray_ckpt.storage.store import CheckpointStore

__all__ = ["Wait"]

POLL_S, POLL_BY_REQUESTS_S = 0.1, 1.0
"""Time between two looks; the second where a look costs requests to an object store."""


class Wait:
    """A wait for a step of a store or a higher one.

    Args:
        timeout_s: how long, from now on.
        fallback: whether a damaged step is passed over, instead of ending the wait.

    Raises:
        UsageError: `step` is not a number from 0, or `timeout_s` is negative.
    """

    def __init__(self, store: CheckpointStore, step: int, timeout_s: float, *, fallback: bool) -> None:
        directory_of(step)
        if not timeout_s >= 0:
            raise UsageError(f"{timeout_s} s are no time to wait for step {step}: give a number from 0")
        self._store = store
        self._step = step
        self._timeout_s = timeout_s
        self._fallback = fallback
        self._end = time.monotonic() + timeout_s

    def look(self, for_s: float | None = None) -> int | None:
        """Wait until it is there.

        Args:
            for_s: how long to wait now, at the most; by default to the end.

        Returns:
            The highest good step, which is at least the one waited for; None where it has not come yet.

        Raises:
            CheckpointNotFoundError: it has not come by the end of the wait.
            FormatError: the highest step is damaged, and is not passed over.
        """
        until = self._end if for_s is None else min(self._end, time.monotonic() + for_s)
        poll_s = POLL_BY_REQUESTS_S if self._store.looks_cost_requests else POLL_S
        while (found := self._find()) is None:
            left_s = until - time.monotonic()
            if left_s <= 0:
                if until < self._end:
                    return None
                raise self._not_come()
            time.sleep(min(poll_s, left_s))
        return found

    def _find(self) -> int | None:
        if not self._store.has_from(self._step):
            return None  # without a look into the record of those before, each time
        latest = self._store.latest(fallback=self._fallback)
        return latest if latest is not None and latest >= self._step else None

    def _not_come(self) -> CheckpointNotFoundError:
        steps = self._store.steps()
        asked = f"step {self._step} of {self._store.address}, or a higher one, was not committed"
        there = f"the newest that is there is {steps[-1]}" if steps else "there is no step yet"
        damaged = "".join(f"; step {step} is damaged: {self._damage(step)}" for step in steps if step >= self._step)
        return CheckpointNotFoundError(f"{asked} within {self._timeout_s:g} s; {there}{damaged}")

    def _damage(self, step: int) -> str:
        try:
            return self._store.damage(step) or "not any more"
        except CheckpointNotFoundError:
            return "it has been deleted"
