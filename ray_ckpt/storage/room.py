"""Whether checkpoints will find room where they are to be saved."""

from __future__ import annotations

import contextlib
import os
import shutil

from ray_ckpt.storage.files import Storage
from ray_ckpt.text_units import format_bytes

__all__ = ["free_bytes", "shortage"]


def free_bytes(storage: Storage) -> int | None:
    """What is free there, as this process sees it; None where that cannot be asked, as of an object store."""
    if not storage.has_local_files:
        return None
    directory = os.path.dirname(storage.path("x"))
    while not os.path.isdir(directory) and os.path.dirname(directory) != directory:
        directory = os.path.dirname(directory)  # which a save makes
    with contextlib.suppress(OSError):
        return shutil.disk_usage(directory).free
    return None


def shortage(storage: Storage, checkpoint_bytes: int) -> str:
    """What is wrong where two checkpoints of that size do not fit; empty when nothing is.

    Two, because none is removed before the next one is committed.
    """
    free = free_bytes(storage)
    if free is None or free >= 2 * checkpoint_bytes:
        return ""
    return (
        f"{format_bytes(free)} free at {storage.address}, and one checkpoint takes {format_bytes(checkpoint_bytes)}: "
        "two must fit, as none is removed before the next one is committed; free some, or save elsewhere"
    )
