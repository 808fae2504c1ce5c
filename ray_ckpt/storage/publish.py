"""Making a checkpoint exist: the last writes of a save, and the only place that makes them.

    publish ─┬─ write `.metadata` and `manifest.json` under temporary names      all that needs room
             ├─ nothing is there yet   `.metadata`, then `manifest.json`         the manifest is the commit
             └─ something is replaced  `manifest.json`, then `.metadata`, then the signature and data files of before go

Ours and stock DCP find a whole checkpoint between any two of these steps. The last one that is cut off leaves a
`.metadata` of the replaced checkpoint, which `restore_stock_record` mends before anybody removes that one's files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re

from ray_ckpt.errors import CheckpointError, CheckpointExistsError, StorageError
from ray_ckpt.format.manifest import MANIFEST_NAME, Manifest
from ray_ckpt.format.record import digest
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.storage.file_objects import PreparedFile
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.front import FrontStorage
from ray_ckpt.storage.record_files import read_if_there

STOCK_RECORD_NAME = ".metadata"
"""Where stock DCP keeps its record of a checkpoint."""

SIGNATURE_NAME = "model.sig"
"""Where a checkpoint's signature is, which goes with what it signs."""

DATA_FILE = re.compile(r"__[0-9]+_[0-9]+-([0-9a-f]{12})\.distcp")
"""Name of a data file of ours, with the attempt that wrote it."""

_REPLACEABLE = re.compile(rf"{DATA_FILE.pattern}|__[0-9]+_[0-9]+\.distcp")
"""Names of data files of ours and of stock DCP. No record can make us remove any other."""


def refuse_if_taken(storage: Storage) -> None:
    """Raises CheckpointExistsError when a committed checkpoint, ours or stock DCP's, is there."""
    if storage.exists(MANIFEST_NAME) or _foreign_files(storage) is not None:
        raise _exists(storage)


def is_of_attempt(storage: Storage, attempt: str) -> bool:
    """Whether the committed checkpoint is this attempt's, as far as its record tells."""
    record = read_if_there(storage, MANIFEST_NAME)
    return record is not None and attempt.encode() in record


def publish(storage: Storage, manifest: Manifest, stock_record: bytes, *, overwrite: bool) -> tuple[str, ...]:
    """Commit. What was there stays valid until the manifest has its name; its data files are deleted after that.

    Without `overwrite` one of several writers wins, and the others raise. On local files the kernel decides. Elsewhere,
    where pyarrow offers no conditional put, the manifest is looked for just before the commit and read back just after
    it: two commits within the time between may both return, and the later one stands.

    Args:
        stock_record: the `.metadata` that lets stock DCP read the same files.

    Returns:
        Where it is the front of a store that was written to: what could not be copied to the durable tier so far.

    Raises:
        CheckpointExistsError: another attempt has committed meanwhile, and `overwrite` was not given.
        StorageError: a record could not be written. The commit may or may not have happened; look at `store.steps()`.
    """
    _publish(storage, manifest, stock_record, overwrite=overwrite)
    return storage.order_copy(overwrite=overwrite) if isinstance(storage, FrontStorage) else ()


def _publish(storage: Storage, manifest: Manifest, stock_record: bytes, *, overwrite: bool) -> None:
    if not overwrite:
        refuse_if_taken(storage)
    replaced = _committed_files(storage) if overwrite else None
    before = None if replaced is None else _digest_of_stock_record(storage)
    with collector_paused():
        manifest = dataclasses.replace(manifest, metadata_digest=digest(stock_record), replaced_metadata=before)
        record = manifest.to_bytes()
    stock = storage.prepare(STOCK_RECORD_NAME, stock_record)
    try:
        own = storage.prepare(MANIFEST_NAME, record)
    except StorageError:
        stock.abandon()
        raise
    if replaced is None:
        _publish_first(storage, stock, own, stock_record, overwrite=overwrite)
        return
    try:
        own.publish()
    except StorageError:
        stock.abandon()
        raise
    stock.publish()
    storage.delete(SIGNATURE_NAME)
    for file in sorted(replaced - manifest.files.keys()):
        if _REPLACEABLE.fullmatch(file):
            storage.delete(file)


def _publish_first(
    storage: Storage, stock: PreparedFile, own: PreparedFile, stock_record: bytes, *, overwrite: bool
) -> None:
    """Commit where nothing was committed when it was looked for."""
    try:
        if overwrite:
            stock.publish()
        else:
            _publish_stock_record(storage, stock, stock_record)
    except (StorageError, CheckpointExistsError):
        stock.abandon()
        own.abandon()
        raise
    try:
        own.publish(replace=overwrite)
    except StorageError as error:
        if not isinstance(error.__cause__, FileExistsError):
            raise
        with contextlib.suppress(StorageError):  # `clean` restores it as well
            restore_stock_record(storage)  # the winner's, which ours has replaced
        raise _exists(storage) from error


def _publish_stock_record(storage: Storage, stock: PreparedFile, stock_record: bytes) -> None:
    """Give `.metadata` its name, in place of what an attempt of ours has left, but of nobody's who has committed."""
    if storage.exists(MANIFEST_NAME):
        raise _exists(storage)
    try:
        stock.publish(replace=not storage.has_local_files)
    except StorageError as error:
        if not isinstance(error.__cause__, FileExistsError):
            raise
        refuse_if_taken(storage)
        storage.write_atomic(STOCK_RECORD_NAME, stock_record)


def restore_stock_record(storage: Storage) -> bool:
    """Write the committed manifest's `.metadata` where there is none, one that another attempt of ours has left, or
    that of the checkpoint which it has replaced.

    Returns:
        Whether it had to be done.
    """
    try:
        record, stock = read_if_there(storage, MANIFEST_NAME), read_if_there(storage, STOCK_RECORD_NAME)
        if record is None:
            return False
        manifest = Manifest.from_json(record)
    except CheckpointError:
        return False  # a damaged record says nothing, and a `.metadata` that no save writes is somebody's
    if not manifest.attempt or (stock is not None and not _is_left_behind(stock, manifest)):
        return False
    from ray_ckpt.format import dcp_metadata

    storage.write_atomic(STOCK_RECORD_NAME, dcp_metadata.dumps(manifest))
    return True


def _is_left_behind(stock_record: bytes, manifest: Manifest) -> bool:
    if names_attempt(stock_record, manifest.attempt):
        return False
    return digest(stock_record) == manifest.replaced_metadata or is_ours(stock_record)


def names_attempt(stock_record: bytes, attempt: str) -> bool:
    """Whether a `.metadata` is of this attempt of ours."""
    return bool(attempt) and attempt.encode() in stock_record


def is_ours(stock_record: bytes) -> bool:
    """Whether ray_ckpt wrote a `.metadata`. One that cannot be read counts as another program's."""
    # Here, because it loads torch, which a coordinator on a driver goes without.
    from ray_ckpt.format import dcp_metadata

    try:
        return dcp_metadata.is_ours(dcp_metadata.loads(stock_record))
    except CheckpointError:
        return False


def _exists(storage: Storage) -> CheckpointExistsError:
    return CheckpointExistsError(
        f"{storage.address} already holds a committed checkpoint; save elsewhere, or pass overwrite=True"
    )


def _committed_files(storage: Storage) -> set[str] | None:
    """Data files of the checkpoint that is about to be replaced; None when there is none. A damaged one names none."""
    try:
        if storage.exists(MANIFEST_NAME):
            return set(Manifest.from_json(storage.read_bytes(MANIFEST_NAME)).files)
        return _foreign_files(storage)
    except CheckpointError:
        return set()


def _digest_of_stock_record(storage: Storage) -> str | None:
    """None when there is none, or none that can be read."""
    try:
        data = read_if_there(storage, STOCK_RECORD_NAME)
    except CheckpointError:
        return None
    return None if data is None else digest(data)


def _foreign_files(storage: Storage) -> set[str] | None:
    """Data files of the stock checkpoint in the target; None when there is none.

    A `.metadata` of ours means nothing: it is written before the commit. One that cannot be read counts as another
    program's, and names no file.
    """
    if not storage.exists(STOCK_RECORD_NAME):
        return None
    from ray_ckpt.format import dcp_metadata  # here, as above

    try:
        metadata = dcp_metadata.loads(storage.read_bytes(STOCK_RECORD_NAME))
        return None if dcp_metadata.is_ours(metadata) else set(dcp_metadata.to_manifest(metadata).files)
    except CheckpointError:
        return set()
