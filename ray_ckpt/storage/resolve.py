"""Which checkpoint is meant: the directory of one, or a step of a store."""

from __future__ import annotations

import os
from collections.abc import Callable

from ray_ckpt.errors import CheckpointNotFoundError, UsageError
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.foreign_names import is_file, is_foreign
from ray_ckpt.storage.publish import STOCK_RECORD_NAME
from ray_ckpt.storage.store import CheckpointStore

Target = str | os.PathLike[str] | Storage | CheckpointStore
"""A local path, a URI as `Storage` takes it, a `Storage`, or a store."""


def destination(target: Target, step: int | None) -> Storage:
    """Where a save goes: to the target itself, or with `step` to that step of the store at the target.

    Raises:
        UsageError: `target` is a store and there is no step, or `step` is not a number from 0.
    """
    if step is not None:
        return _store(target).location(step)
    if isinstance(target, CheckpointStore):
        raise UsageError(f"which step of {target.address} is to be saved? Say save(..., step=N)")
    return target if isinstance(target, Storage) else Storage(target)


def checkpoint_at(target: Target, step: int | None, *, fallback: bool = False) -> Storage:
    """Where a load comes from: the step, the checkpoint at the target itself, or the latest step of the store there.

    Of the processes that load together, one asks and tells the others: another save may commit at any moment.

    Args:
        fallback: where the latest step is damaged, take the highest one that is good.

    Raises:
        CheckpointNotFoundError: no step was named, and there is no committed checkpoint.
        FormatError: no step was named, and the latest is damaged.
    """
    return _found_at(target, step, lambda store: store.latest(fallback=fallback))


def committed_at(target: Target, step: int | None) -> Storage:
    """As `checkpoint_at`, also where the latest step is damaged: for whoever wants to know what of it is.

    Raises:
        CheckpointNotFoundError: no step was named, and there is no committed checkpoint.
    """
    return _found_at(target, step, lambda store: max(store.steps(), default=None))


def _found_at(target: Target, step: int | None, latest_of: Callable[[CheckpointStore], int | None]) -> Storage:
    if step is not None:
        return _store(target).location(step)
    if not isinstance(target, CheckpointStore):
        directory = destination(target, None)
        if directory.exists(MANIFEST_NAME) or directory.exists(STOCK_RECORD_NAME) or is_file(directory):
            return directory
    store = _store(target)
    latest = latest_of(store)
    if latest is not None:
        return store.location(latest)
    if not isinstance(target, CheckpointStore) and is_foreign(directory):
        return directory
    raise CheckpointNotFoundError(f"no committed checkpoint at {store.address}, nor in a step-<N> below it")


def _store(target: Target) -> CheckpointStore:
    return target if isinstance(target, CheckpointStore) else CheckpointStore(target)
