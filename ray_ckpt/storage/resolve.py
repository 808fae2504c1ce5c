"""Which checkpoint is meant: the directory of one, or a step of a store."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ray_ckpt.errors import CheckpointError, CheckpointNotFoundError, StorageError, UsageError
from ray_ckpt.format.deltas import link_of
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.foreign_names import Listing, is_file, is_foreign, kind_of, list_target
from ray_ckpt.storage.overwritten import refuse_overwritten
from ray_ckpt.storage.publish import DATA_FILE, STOCK_RECORD_NAME
from ray_ckpt.storage.record_files import parse_and_keep, read_record
from ray_ckpt.storage.step_names import directory_of, parse_steps
from ray_ckpt.storage.store import CheckpointStore
from ray_ckpt.storage.unread import in_directory
from ray_ckpt.storage.waiting import Wait

RUN_CHECKPOINTS = "checkpoint"
"""Where torchtitan's run folder keeps its steps, unless told otherwise."""

Target = str | os.PathLike[str] | Storage | CheckpointStore
"""A local path, a URI as `Storage` takes it, a `Storage`, or a store."""


class Location(NamedTuple):
    """Where one checkpoint lies, or will."""

    storage: Storage
    step: int | None
    """Its step in the store; None where the target is no store."""
    passed_over: tuple[str, ...] = ()
    """Higher steps that are damaged, each with path and reason."""


def destination(target: Target, step: int | None) -> Location:
    """Where a save goes: to the target itself, or with `step` to that step of the store at the target.

    Raises:
        UsageError: `target` is a store and there is no step, or `step` is not a number from 0.
    """
    if step is not None:
        return Location(_store(target).location(step), step)
    if isinstance(target, CheckpointStore):
        raise UsageError(f"which step of {target.address} is to be saved? Say save(..., step=N)")
    return Location(Storage.of(target), None)


def checkpoint_at(target: Target, step: int | None, *, fallback: bool = False) -> Location:
    """Where a load comes from: the step, the checkpoint at the target itself, or the latest step of the store there.

    Of the processes that load together, one asks and tells the others: another save may commit at any moment.

    Args:
        fallback: where the latest step is damaged, take the highest one that is good.

    Raises:
        CheckpointNotFoundError: the named step is not there, or no step was named and there is no committed checkpoint.
        FormatError: no step was named, and the latest is damaged; or another program has saved over it.
    """
    found = _found_at(target, step, lambda store: store.latest(fallback=fallback))
    refuse_overwritten(found.storage)
    if not fallback or step is not None or found.step is None:
        return found
    store = _store(target)
    damaged = {higher: store.damage(higher) for higher in store.steps() if higher > found.step}
    return found._replace(passed_over=tuple(f"step {higher}: {why}" for higher, why in damaged.items() if why))


@contextmanager
def held(find: Callable[[], Location]) -> Iterator[Location]:
    """What `find` finds. Where the storage can promise that (`Storage.held`), it stays whole within the block, also
    when it is deleted or replaced meanwhile."""
    while True:
        found = find()
        with found.storage.held() as storage:
            if storage is found.storage:
                yield found
                return
            if _is_there(storage):
                with _with_all_before(storage, found.storage) as whole:
                    yield found._replace(storage=whole)
                return
        # It has been deleted between the look and the hold, and is looked for once more.


@contextmanager
def _with_all_before(held: Storage, storage: Storage) -> Iterator[Storage]:
    """A held checkpoint; if it is a delta, with the whole store held, as it is read from other steps too."""
    above = storage.parent()
    if above is None or not _is_delta(held):
        yield held
        return
    store, name = above
    with store.held() as all_of_it:
        # What was removed between the two holds is seen by the first one alone, and missed by name.
        yield all_of_it.child(name)


def _is_delta(storage: Storage) -> bool:
    """Whether it is one. What cannot be read is none here: whoever reads it says why."""
    try:
        return storage.exists(MANIFEST_NAME) and link_of(read_record(storage, parse_and_keep)) is not None
    except (CheckpointError, StorageError):
        return False


def wait_before(
    target: Target, step: int | None, wait_for: int | None, wait_s: float, *, fallback: bool
) -> tuple[Target, Wait | None]:
    """Where to look for a checkpoint, and what to wait for before.

    Raises:
        UsageError: a step is named beside the one to wait for, or either of the numbers is none.
    """
    if wait_for is None:
        return target, None
    if step is not None:
        raise UsageError(f"step={step} loads this step, and wait_for={wait_for} the latest from there on: give one")
    store = _store(target)
    return store, Wait(store, wait_for, wait_s, fallback=fallback)


def committed_at(target: Target, step: int | None) -> Location:
    """As `checkpoint_at`, also where the latest step is damaged: for whoever wants to know what of it is.

    Raises:
        CheckpointNotFoundError: the named step is not there, or no step was named and there is no committed checkpoint.
    """
    return _found_at(target, step, lambda store: max(store.steps(), default=None))


def _found_at(target: Target, step: int | None, latest_of: Callable[[CheckpointStore], int | None]) -> Location:
    store = _store(target)
    if step is not None:
        named = store.holding(step)
        if not (_is_recorded(named) or is_foreign(named)):
            raise store.not_found(step)
        return Location(named, step)
    directory = None if isinstance(target, CheckpointStore) else Storage.of(target)
    if directory is not None and (_is_recorded(directory) or is_file(directory)):
        return Location(directory, None)
    latest = latest_of(store)
    if latest is not None:
        return Location(store.holding(latest), latest)
    if directory is None:
        raise CheckpointNotFoundError(f"no committed checkpoint at {store.address}, nor in a step-<N> below it")
    listing = list_target(directory)
    if kind_of(listing):
        return Location(directory, None)
    if found := _latest_of_others(directory, listing):
        return found
    raise CheckpointNotFoundError(
        f"no committed checkpoint at {store.address}, nor in a step-<N> below it; {in_directory(listing)}"
    )


def _latest_of_others(directory: Storage, listing: Listing) -> Location | None:
    """The highest `step-<N>` that another program finished, as in torchtitan's run folder: here or in `checkpoint/`."""
    for folder in (
        (directory, directory.child(RUN_CHECKPOINTS)) if RUN_CHECKPOINTS in listing.directories else (directory,)
    ):
        directories = listing.directories if folder is directory else folder.list_directories()
        for step in sorted(parse_steps(directories), reverse=True):
            named = folder.child(directory_of(step))
            found = list_target(named)
            is_dcp = STOCK_RECORD_NAME in found.files and not found.matching(DATA_FILE)
            if is_dcp or (STOCK_RECORD_NAME not in found.files and kind_of(found)):
                return Location(named, step)
    return None


def _is_there(directory: Storage) -> bool:
    return _is_recorded(directory) or is_file(directory) or is_foreign(directory)


def _is_recorded(directory: Storage) -> bool:
    return directory.exists(MANIFEST_NAME) or directory.exists(STOCK_RECORD_NAME)


def _store(target: Target) -> CheckpointStore:
    return target if isinstance(target, CheckpointStore) else CheckpointStore(target)
