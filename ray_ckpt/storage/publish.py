"""Making a checkpoint exist: the last writes of a save, and the only place that makes them.

publish(storage, manifest, stock_record)     `.metadata`, then `manifest.json`, which is the commit
"""

from __future__ import annotations

import dataclasses

from ray_ckpt.errors import CheckpointError, CheckpointExistsError
from ray_ckpt.format.manifest import MANIFEST_NAME, Manifest
from ray_ckpt.format.record import digest
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.storage.files import Storage

STOCK_RECORD_NAME = ".metadata"
"""Where stock DCP keeps its record of a checkpoint."""


def refuse_if_taken(storage: Storage) -> None:
    """Raises CheckpointExistsError when a committed checkpoint, ours or stock DCP's, is there."""
    if storage.exists(MANIFEST_NAME) or _foreign_files(storage) is not None:
        raise CheckpointExistsError(
            f"{storage.address} already holds a committed checkpoint; save elsewhere, or pass overwrite=True"
        )


def publish(storage: Storage, manifest: Manifest, stock_record: bytes, *, overwrite: bool) -> None:
    """Commit. A checkpoint that is replaced stays valid until the last write; its data files are deleted after that.

    Args:
        stock_record: the `.metadata` that lets stock DCP read the same files.

    Raises:
        CheckpointExistsError: another attempt has committed meanwhile, and `overwrite` was not given.
        StorageError: a record could not be written. The commit may or may not have happened: look at the storage.
    """
    with collector_paused():
        manifest = dataclasses.replace(manifest, metadata_digest=digest(stock_record))
        record = manifest.to_json().encode()
    if not overwrite:
        refuse_if_taken(storage)
    replaced = _committed_files(storage) if overwrite else set()
    storage.write_atomic(STOCK_RECORD_NAME, stock_record)
    storage.write_atomic(MANIFEST_NAME, record)
    for file in sorted(replaced - manifest.files.keys()):
        storage.delete(file)


def _committed_files(storage: Storage) -> set[str]:
    """Data files of the checkpoint that is about to be replaced. A damaged one names none."""
    try:
        if storage.exists(MANIFEST_NAME):
            return set(Manifest.from_json(storage.read_bytes(MANIFEST_NAME)).files)
        return _foreign_files(storage) or set()
    except CheckpointError:
        return set()


def _foreign_files(storage: Storage) -> set[str] | None:
    """Data files of the stock checkpoint in the target; None when there is none.

    A `.metadata` of ours means nothing: it is written before the commit. One that cannot be read is somebody's, and
    not for us to judge: it names no file.
    """
    if not storage.exists(STOCK_RECORD_NAME):
        return None
    # Here, because it loads torch, which a coordinator on a driver goes without.
    from ray_ckpt.format import dcp_metadata

    try:
        metadata = dcp_metadata.loads(storage.read_bytes(STOCK_RECORD_NAME))
        return None if dcp_metadata.is_ours(metadata) else set(dcp_metadata.to_manifest(metadata).files)
    except CheckpointError:
        return set()
