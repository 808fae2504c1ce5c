"""open_record(storage): what a checkpoint says that it holds. One of ours needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ray_ckpt.format.deltas import LINK
from ray_ckpt.format.manifest import MANIFEST_NAME, Manifest
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.record_files import read_record

__all__ = ["Opened", "open_record", "size_problem"]


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
    return Opened(reader.address, manifest, reader.files, reader.kind or "ray_ckpt", reader.notes)


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
