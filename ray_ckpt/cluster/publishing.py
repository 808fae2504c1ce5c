"""Publishing what the workers of a group hold as what has changed, without any collective.

driver                                          every worker
    offer   ── state_of, the version before ──> copy, and compare what it had with that    <── Offer ──
    decide  a delta ── code ──────────────────> code its parts; then a save of these
            else                                a save of the state, whole
    keep    ──────────────────────────────────> what it has copied is what it has published last
"""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray_ckpt.cluster import publish_side, worker_side
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.cluster.saving import save
from ray_ckpt.format.saved import Saved
from ray_ckpt.protocol.publications import Publications
from ray_ckpt.protocol.save_options import Cast, SaveOptions
from ray_ckpt.report import SaveReport
from ray_ckpt.storage.resolve import Target

__all__ = ["WeightPublisher"]


class WeightPublisher:
    """Publishes the weights of a group again and again, as `ray_ckpt.WeightPublisher` does under collectives.

    No process group is needed. Each worker holds a copy of what it has published last, and of twice that while it
    publishes.

    Example:
        >>> import torch
        >>> from ray_ckpt import WorkerGroup, cluster, load
        >>> def weights_of(ctx):
        ...     first = torch.zeros(1000, dtype=torch.bfloat16)
        ...     return ctx.objects.setdefault("weights", {f"layer{ctx.rank}": first})
        >>> def train(ctx):
        ...     weights_of(ctx)[f"layer{ctx.rank}"][:3] += 1
        >>> with WorkerGroup(2, process_group=False) as group:
        ...     publisher = cluster.WeightPublisher(group, weights_of, "policy")
        ...     for version in range(3):
        ...         _ = group.run(train)
        ...         report = publisher.save(version)
        >>> served = {f"layer{n}": torch.ones(1000, dtype=torch.bfloat16) for n in range(2)}
        >>> load(served, "policy").step, served["layer1"][:4].tolist()
        (2, [3.0, 3.0, 3.0, 0.0])

    Args:
        group, state_of: who holds what, as for `cluster.save`; weights alone.
        store: a `CheckpointStore`, or its path or URI, such as `ram://policy`.
        whole_every: of how many versions one is whole at least; 1 for all.

    Raises:
        UsageError: `whole_every` is below 1.
    """

    def __init__(
        self, group: WorkerGroup, state_of: worker_side.StateOf | str, store: Target, *, whole_every: int = 8
    ) -> None:
        self._group = group
        self._state_of = state_of
        self._published = Publications(store, whole_every)
        self._name = uuid.uuid4().hex[:12]

    def save(
        self,
        step: int,
        *,
        only: Sequence[str] | None = None,
        cast: Cast | None = None,
        key_map: Mapping[str, str | Saved] | None = None,
        layout: str | None = None,
        timeout_s: float | None = None,
    ) -> SaveReport:
        """Publish a version. It is whole where there is nothing to build on, as for `ray_ckpt.WeightPublisher.save`.

        Args:
            step: the version's number, above that of the version before.
            only, cast, key_map, layout, timeout_s: as for `cluster.save`.

        Raises:
            WorkerError, GroupTimeoutError: workers failed, died or were too slow, or an optimizer's state is in what
                they hold; names each. Nothing was published, and the next one builds on what was published before.
            CheckpointError: as `cluster.save`.
        """
        # The driver goes without torch until somebody publishes.
        from ray_ckpt.protocol.published_parts import decide

        options = SaveOptions.of(only, cast, key_map, fingerprints=False)
        deadline = time.monotonic() + (self._group.call_timeout_s if timeout_s is None else timeout_s)
        store, number = self._published.store, self._published.before(step)
        before = (None, None) if number is None else (store.holding(number), number)
        ranks = range(self._group.num_workers)
        offers = self._call(publish_side.offer, dict.fromkeys(ranks, (self._state_of, options, *before)), deadline)
        decided = decide([offers[rank] for rank in ranks])
        if decided is None:
            left_s = _left_s(deadline)
            report = save(
                self._group,
                self._state_of,
                store,
                step,
                only=only,
                cast=cast,
                key_map=key_map,
                layout=layout,
                timeout_s=left_s,
            )
        else:
            link, shares = decided
            self._call(publish_side.code, {rank: (share, link) for rank, share in enumerate(shares)}, deadline)
            entries_of = functools.partial(publish_side.entries_of, publisher=self._name)
            report = save(self._group, entries_of, store, step, layout=layout, timeout_s=_left_s(deadline))
        self._published.note(step, is_delta=decided is not None)
        self._call(publish_side.keep, dict.fromkeys(ranks, ()), deadline)
        return report

    def _call(self, fn: Callable[..., Any], args_of: Mapping[int, tuple[Any, ...]], deadline: float) -> dict[int, Any]:
        own = {rank: (self._name, *args) for rank, args in args_of.items()}
        return self._group.call(fn, own, timeout_s=_left_s(deadline))


def _left_s(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
