"""Following published weights: what a process holds becomes the next version by what has changed alone.

one rank      find ── broadcast ──>
every rank    plan: read the changes ──> all of them can?    yes: apply, in place      no: load, all of it
every rank    note what it holds
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from ray_ckpt.checkpoint.exchange import TrainersExchange
from ray_ckpt.checkpoint.loading import Found, find_and_hold, load_found, wait_together
from ray_ckpt.errors import UsageError
from ray_ckpt.events import Telling
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.protocol.followed_parts import FollowedParts
from ray_ckpt.protocol.load_options import LoadOptions
from ray_ckpt.report import LoadReport
from ray_ckpt.state.plain_state import is_stateful
from ray_ckpt.storage.record_files import read_if_there
from ray_ckpt.storage.resolve import Target, wait_before

__all__ = ["WeightFollower"]


class WeightFollower:
    """Fetches published weights, and of the next version only what has changed, if it was published so.

    Whether what it holds is still what it fetched last is seen by digests, each time. Where it is not, or the version
    is no delta on what it holds, all of it is loaded. It may hold the weights in any layout.

    Example:
        >>> import torch
        >>> from ray_ckpt import WeightFollower, WeightPublisher
        >>> weights = {"weight": torch.randn(100_000).to(torch.bfloat16)}
        >>> publisher, follower = WeightPublisher("policy"), WeightFollower("policy")
        >>> report = publisher.save(weights, 0)
        >>> served = {"weight": torch.zeros(100_000, dtype=torch.bfloat16)}
        >>> follower.fetch(served).num_bytes
        200000
        >>> _ = weights["weight"][:100].add_(1)
        >>> report = publisher.save(weights, 1)
        >>> follower.fetch(served).num_bytes < 2000, torch.equal(served["weight"], weights["weight"])
        (True, True)

    Args:
        store: a `CheckpointStore`, or its path or URI, such as `ram://policy`.
    """

    def __init__(self, store: Target) -> None:
        self._store = store
        self._parts = FollowedParts()

    def fetch(
        self,
        state: dict[str, Any],
        step: int | None = None,
        *,
        wait_for: int | None = None,
        wait_s: float = 600.0,
        timeout_s: float | None = None,
    ) -> LoadReport:
        """Make the state the latest version. All ranks of the process group call it, if there is one.

        Args:
            state: a state dict, as for `load`, whose tensors are changed in place.
            step: the version; by default the latest.
            wait_for, wait_s, timeout_s: as for `load`.

        Returns:
            As `load`; `num_bytes` is what this rank has read of tensors.

        Raises:
            UsageError: something in the state gives its tensors by a `state_dict` of its own.
            CheckpointNotFoundError, FormatError: there is no such version, or a step that it is built on is gone or was
                saved again; names it.
            StateMismatchError: names or shapes do not fit; nothing changed.
            CheckpointError: ranks failed. What is held may be of two versions, unless all of it fails before it is
                changed; the next fetch loads all.
        """
        if not isinstance(state, dict) or any(map(is_stateful, state.values())):
            raise UsageError("what follows is changed in place: give fetch a state dict of tensors, not an object's")
        target, wait = wait_before(self._store, step, wait_for, wait_s, fallback=False)
        ranks = TrainersExchange("fetch", timeout_s) if wait is None else wait_together(wait, "fetch", timeout_s)
        started = time.monotonic()
        with contextlib.ExitStack() as holds:

            def find() -> Found:
                location, _ = find_and_hold(target, step, False, holds)
                return Found(location, read_if_there(location.storage, MANIFEST_NAME))

            location, record = found = ranks.broadcast(find)
            plan = ranks.on_all(lambda: self._parts.plan(state, location.storage, record))
            if ranks.ask_any(plan is None)():
                self._parts.forget()
                report = load_found(ranks, state, found, LoadOptions(), None, Telling(None, "load", rank=ranks.rank))
            else:
                assert plan is not None, "nobody lacks one"
                ranks.on_all(lambda: self._parts.apply(plan, state))
                report = LoadReport(
                    uri=location.storage.address,
                    num_bytes=plan.num_bytes,
                    seconds=time.monotonic() - started,
                    missing=(),
                    unexpected=(),
                    cast=(),
                    rng=None,
                    dataloader=None,
                    step=location.step,
                )
            ranks.on_all(lambda: self._parts.note(state))
        return report
