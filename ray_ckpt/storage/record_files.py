"""Reading the commit record of a checkpoint.

Who picks the latest step of a store parses its record, and who loads it does so again right after. For a model of ten
thousand tensors that is a quarter of a second, so that the first hands what it has parsed to the second.
"""

from __future__ import annotations

from collections.abc import Callable

from ray_ckpt.errors import CheckpointError, StorageError
from ray_ckpt.format.manifest import MANIFEST_NAME, Manifest
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.good_reads import Reread, note, other_copies

__all__ = ["parse_and_keep", "parse_or_take", "read_for_all", "read_if_there", "read_record"]

_kept: dict[bytes, Manifest] = {}
"""The record that was parsed last, until it is taken."""


def read_if_there(storage: Storage, name: str) -> bytes | None:
    """A file's bytes; None when there is none."""
    try:
        return storage.read_bytes(name)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def read_for_all(storage: Storage) -> bytes | None:
    """The record of a checkpoint, for one process to send to all that load it, where each reading costs requests.

    None where every process had better read it by itself: it is in local files, or another program's checkpoint.
    """
    return None if storage.is_local else read_if_there(storage, MANIFEST_NAME)


def read_record(storage: Storage, parse: Callable[[bytes, str], Manifest] | None = None) -> Manifest:
    """The commit record, parsed; where it is damaged and there are other copies of it, the first of those that is not.

    Args:
        parse: `parse_and_keep`, or `parse_or_take`, which is the default.

    Raises:
        StorageError: it cannot be read; `FileNotFoundError` is its cause when there is none.
        FormatError, UnsafeCheckpointError: it is damaged, and so are its copies.
    """
    parse, where = parse or parse_or_take, f"{storage.address}/{MANIFEST_NAME}"
    data = storage.read_bytes(MANIFEST_NAME)
    try:
        return parse(data, where)
    except CheckpointError as error:
        damage = error
    for copy in other_copies(storage, MANIFEST_NAME):
        if copy.is_durable:
            continue  # what the durable tier has under the same name may be another attempt's
        other = memoryview(bytearray(len(data)))
        try:
            with copy.open() as file:
                file.read_into(0, other)
            manifest = parse(bytes(other), where)
        except (CheckpointError, StorageError):
            continue
        note(storage, Reread(str(damage), copy.place, len(other), copy.is_durable))
        return manifest
    raise damage


def parse_and_keep(data: bytes, where: str) -> Manifest:
    """As `Manifest.from_json`, and keep the result for a `parse_or_take` of the same bytes."""
    manifest = parse_or_take(data, where)
    _kept.clear()
    _kept[data] = manifest
    return manifest


def parse_or_take(data: bytes, where: str) -> Manifest:
    """As `Manifest.from_json`, or what is kept of the same bytes, which is kept no longer."""
    manifest = _kept.pop(data, None)
    if manifest is not None:
        return manifest
    with collector_paused():
        return Manifest.from_json(data, where)
