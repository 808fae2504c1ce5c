"""The steps that a delta is built on, by their records alone. Needs no torch."""

from __future__ import annotations

from typing import NamedTuple

from ray_ckpt.errors import CheckpointNotFoundError, FormatError, StorageError
from ray_ckpt.format.deltas import Link, identity, link_of
from ray_ckpt.format.manifest import Manifest
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.record_files import read_record
from ray_ckpt.storage.step_names import directory_of

__all__ = ["Linked", "built_on", "links_of"]


class Linked(NamedTuple):
    """A checkpoint of a chain."""

    storage: Storage
    manifest: Manifest
    """As it is stored."""


def links_of(storage: Storage, manifest: Manifest) -> list[Linked]:
    """All that a checkpoint is built on, the anchor first, and itself last. Of one that is whole, itself alone.

    Raises:
        CheckpointNotFoundError: a step of the chain is not there.
        FormatError: another one has its number, or the chain leads nowhere.
    """
    chain = [Linked(storage, manifest)]
    number: int | None = None
    while (link := link_of(chain[-1].manifest)) is not None:
        if number is not None and link.step >= number:
            raise FormatError(f"{chain[-1].storage.address} is built on step {link.step}, which is not before it")
        chain.append(_before(chain[-1].storage, link))
        number = link.step
    return chain[::-1]


def _before(storage: Storage, link: Link) -> Linked:
    found = storage.parent()
    if found is None:
        raise CheckpointNotFoundError(f"{storage.address} is built on step {link.step}, and lies in no store")
    store, _ = found
    before = store.child(directory_of(link.step))
    before.durable = before.tier = None  # they are those of the step that led here
    advice = "load a step that is whole, or publish one"
    try:
        manifest = read_record(before)
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise CheckpointNotFoundError(
            f"{storage.address} is built on step {link.step} of {store.address}, which is not there: it was removed, "
            f"or has never been; {advice}"
        ) from error
    if (held := identity(manifest)) != link.identity:
        raise FormatError(
            f"{storage.address} is built on a step {link.step} that held {link.identity}; the one in {store.address} "
            f"holds {held}: it was saved again; {advice}"
        )
    return Linked(before, manifest)


def built_on(storage: Storage, manifest: Manifest) -> tuple[tuple[int, ...], str]:
    """Numbers of the steps that a checkpoint is built on, none where it is whole; or why it cannot be rebuilt, as far
    as records tell."""
    try:
        links = [link_of(linked.manifest) for linked in links_of(storage, manifest)]
    except (CheckpointNotFoundError, FormatError) as error:
        return (), str(error)
    return tuple(link.step for link in links if link is not None), ""
