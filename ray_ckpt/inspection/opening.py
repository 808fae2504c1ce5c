"""open_record(storage): what a checkpoint says that it holds. One of ours needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ray_ckpt.format.deltas import LINK
from ray_ckpt.format.manifest import MANIFEST_NAME, Manifest
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.record_files import read_record
from ray_ckpt.storage.resolve import Target, committed_at, held

__all__ = ["Opened", "open_record", "opened_at", "size_problem"]


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose record has been read."""

    address: str
    """The checkpoint, without credentials and options."""
    manifest: Manifest
    files: Storage
    """Where the manifest's files are."""
    kind: str
    """`ray_ckpt`, or what program wrote it."""
    notes: tuple[str, ...] = ()
    """What had to be left out, and why."""
    is_delta: bool = False
    """Whether the manifest is that of what a delta stands for."""


def open_record(storage: Storage, *, trusted: bool = False) -> Opened:
    """Read the record of one checkpoint, whoever wrote it. Of a delta it is that of what it stands for.

    Args:
        trusted: as for `load`.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointError, StorageError: it is damaged, not safe to read, or the storage does not answer.
    """
    if storage.exists(MANIFEST_NAME):  # also where the target is a file, in which nothing can be looked for
        stored = read_record(storage)
        if LINK not in stored.objects:
            return Opened(storage.address, stored, storage, "ray_ckpt")
    from ray_ckpt.storage.checkpoint_reader import CheckpointReader  # it loads torch

    reader = CheckpointReader(storage, trusted=trusted)
    manifest = reader.read_manifest()
    is_delta, kind = reader.chain is not None, reader.kind or "ray_ckpt"
    return Opened(reader.address, manifest, reader.files, kind, reader.notes, is_delta)


@contextmanager
def opened_at(target: Target, step: int | None, *, trusted: bool = False) -> Iterator[tuple[Opened, int | None]]:
    """The record of a checkpoint that was committed, damaged or not, and its step in the store. Within the block what
    is in memory stays whole, also when it is deleted or replaced.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointError, StorageError: as `open_record`.
    """
    with held(lambda: committed_at(target, step)) as found:
        yield open_record(found.storage, trusted=trusted), found.step


def size_problem(opened: Opened) -> str:
    """The first file that is gone, or is not as long as recorded; empty when there is none.

    Of files of other programs only so many bytes are recorded as are known to be used.
    """
    sizes = opened.files.sizes(opened.manifest.files)
    for name, size in opened.manifest.files.items():
        if name not in sizes:
            return f"{name} is gone"
        if sizes[name] < size or (opened.manifest.attempt and sizes[name] != size):
            return f"{name} has {sizes[name]} bytes, and {size} are recorded"
    return ""
