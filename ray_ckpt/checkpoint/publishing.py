"""Publishing weights as what has changed since the version before.

every rank    copy, and look at the step before ── gather ──> one: decide ── scatter ──>
every rank    a delta: code its parts ──> save of these        else: save of the state, whole
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray_ckpt.checkpoint.exchange import TrainersExchange
from ray_ckpt.checkpoint.saving import State, save
from ray_ckpt.format.deltas import Key, Link
from ray_ckpt.format.saved import Saved
from ray_ckpt.protocol.publications import Publications
from ray_ckpt.protocol.published_parts import Before, PublishedParts, decide
from ray_ckpt.protocol.save_options import Cast, SaveOptions
from ray_ckpt.report import SaveReport
from ray_ckpt.storage.resolve import Target

__all__ = ["WeightPublisher"]


class WeightPublisher:
    """Publishes weights again and again: every K versions whole, in between only what has changed.

    A version that is a delta is a step of the store like any other: `load`, `compare`, `open_weights`, `verify` and
    `prune` take it. It is rebuilt from the step before and so on, down to one that is whole, and compared with the
    checksums of what was published. A step of the chain that is gone, or was saved again with other content, is refused
    by name. `prune` keeps what a version that it keeps is built on.

    It pays for bfloat16 weights at small learning rates. It holds a copy on the CPU of what this rank has published
    last, and of twice that while it publishes.

    Example:
        >>> import torch
        >>> from ray_ckpt import WeightPublisher, load
        >>> weights = {"model": {"weight": torch.ones(1000, dtype=torch.bfloat16)}}
        >>> publisher = WeightPublisher("policy", whole_every=8)
        >>> for version in range(3):
        ...     _ = weights["model"]["weight"].add_(1)
        ...     report = publisher.save(weights, version)
        >>> served = {"model": {"weight": torch.zeros(1000, dtype=torch.bfloat16)}}
        >>> load(served, "policy").step, served["model"]["weight"][0].item()
        (2, 4.0)

    Args:
        store: a `CheckpointStore`, or its path or URI, such as `ram://policy`.
        whole_every: of how many versions one is whole at least; 1 for all.

    Raises:
        UsageError: `whole_every` is below 1.
    """

    def __init__(self, store: Target, *, whole_every: int = 8) -> None:
        self._published = Publications(store, whole_every)
        self._parts = PublishedParts()

    def save(
        self,
        state: State,
        step: int,
        *,
        only: Sequence[str] | None = None,
        cast: Cast | None = None,
        key_map: Mapping[str, str | Saved] | None = None,
        layout: str | None = None,
        timeout_s: float | None = None,
    ) -> SaveReport:
        """Publish a version. All ranks of the process group call it, each on its own publisher, with the same options.

        It is whole where there is nothing to build on: the first one, one that holds other tensors or is cut otherwise
        than the one before, one after a failure on any rank, or where the store no longer has the one before; and one
        that a store with two tiers copies without the one before (`durable_every` above 1).

        Args:
            state: as for `save`; weights alone.
            step: the version's number, above that of the version before.
            only, cast, key_map, layout, timeout_s: as for `save`.

        Raises:
            UsageError: an optimizer's state is in it.
            CheckpointError: as `save`. Nothing was published, and the next one builds on what was published before.
        """
        options = SaveOptions.of(only, cast, key_map, fingerprints=False)
        ranks, store = TrainersExchange("save", timeout_s), self._published.store
        offers = ranks.gather(lambda: self._parts.offer(state, options, lambda: self._before(step)))

        def orders() -> Sequence[tuple[Link, list[Key]] | str]:
            decided = decide(offers)
            if decided is None:
                return ["whole"] * len(offers)
            link, shares = decided
            return [(link, share) for share in shares]

        order = ranks.scatter(orders)
        is_delta = not isinstance(order, str)
        if isinstance(order, str):
            report = save(state, store, step, only=only, cast=cast, key_map=key_map, layout=layout, timeout_s=timeout_s)
        else:
            link, mine = order
            entries = ranks.on_all(lambda: self._parts.changes(mine, link, ranks.rank))
            report = save(entries, store, step, layout=layout, timeout_s=timeout_s)
        self._published.note(step, is_delta=is_delta)
        self._parts.keep()
        return report

    def _before(self, step: int) -> Before | None:
        """The version before, where this one may be built on it."""
        number = self._published.before(step)
        return None if number is None else Before.at(self._published.store.holding(number), number)
