"""The functions that a `WeightPublisher` of a group calls on each worker. Between calls, what it has published last is
kept in `ctx.objects`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ray_ckpt.cluster.worker import WorkerContext, resolve
from ray_ckpt.cluster.worker_side import StateOf
from ray_ckpt.format.deltas import Key, Link
from ray_ckpt.protocol.save_options import SaveOptions

if TYPE_CHECKING:
    from ray_ckpt.protocol.published_parts import Offer, PublishedParts
    from ray_ckpt.storage.files import Storage

_PARTS, _ENTRIES = "ray_ckpt.published", "ray_ckpt.delta"


def offer(
    ctx: WorkerContext,
    publisher: str,
    state_of: StateOf | str,
    options: SaveOptions,
    storage: Storage | None,
    step: int | None,
) -> Offer:
    """Copy what is to be published, and compare what this worker had with the version before.

    Args:
        publisher: names the one that asks.
        storage: where the version before lies; None where there is none to build on.
        step: its number.
    """
    # The driver loads this module too, and goes without torch.
    from ray_ckpt.protocol.published_parts import Before, PublishedParts

    parts = _of(ctx, _PARTS).setdefault(publisher, PublishedParts())
    found: Offer = parts.offer(
        resolve(state_of)(ctx),
        options,
        lambda: None if storage is None or step is None else Before.at(storage, step),
    )
    return found


def code(ctx: WorkerContext, publisher: str, mine: Collection[Key], link: Link) -> None:
    """Make the entries of this worker in a delta."""
    _of(ctx, _ENTRIES)[publisher] = _parts(ctx, publisher).changes(mine, link, ctx.rank)


def entries_of(ctx: WorkerContext, publisher: str) -> Mapping[str, Any]:
    """What of a delta this worker saves."""
    entries: Mapping[str, Any] = _of(ctx, _ENTRIES)[publisher]
    return entries


def keep(ctx: WorkerContext, publisher: str) -> None:
    """What was offered last has been committed."""
    _of(ctx, _ENTRIES).pop(publisher, None)
    _parts(ctx, publisher).keep()


def _parts(ctx: WorkerContext, publisher: str) -> PublishedParts:
    parts: PublishedParts = _of(ctx, _PARTS)[publisher]
    return parts


def _of(ctx: WorkerContext, kind: str) -> dict[str, Any]:
    by_publisher: dict[str, Any] = ctx.objects.setdefault(kind, {})
    return by_publisher
