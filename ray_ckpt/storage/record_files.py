"""Reading the commit record of a checkpoint.

Who picks the latest step of a store parses its record, and who loads it does so again right after. For a model of ten
thousand tensors that is a quarter of a second, so that the first hands what it has parsed to the second.
"""

from __future__ import annotations

from ray_ckpt.errors import StorageError
from ray_ckpt.format.manifest import Manifest
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.storage.files import Storage

__all__ = ["parse_and_keep", "parse_or_take", "read_if_there"]

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
