"""A checkpoint over which another program has saved its own. Each has a record there; a load would take the older."""

from __future__ import annotations

from ray_ckpt.errors import CheckpointError, FormatError
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.publish import STOCK_RECORD_NAME

__all__ = ["refuse_overwritten"]


def refuse_overwritten(directory: Storage) -> None:
    """Refuse a directory in which stock DCP has saved after us.

    Looks only where files are local, in which stock DCP writes by itself: elsewhere two looks are two requests a load.
    A `.metadata` that is younger than our record may also be one of ours that was copied or restored, so its content
    decides; one that cannot be read decides nothing, as a load of ours does without it.

    Raises:
        FormatError: it holds two checkpoints.
    """
    if not directory.has_local_files:
        return
    found = directory.scan_files((MANIFEST_NAME, STOCK_RECORD_NAME))
    ours, stock = (found[name].modified_s if name in found else None for name in (MANIFEST_NAME, STOCK_RECORD_NAME))
    if ours is None or stock is None or stock <= ours:
        return
    from ray_ckpt.format import dcp_metadata  # it loads torch

    try:
        metadata = dcp_metadata.loads(directory.read_bytes(STOCK_RECORD_NAME))
    except CheckpointError:
        return
    if not dcp_metadata.is_ours(metadata):
        raise FormatError(
            f"{directory.address} holds two checkpoints: after ray_ckpt, another program has saved there. Remove the "
            f"record of the one that you do not want: {MANIFEST_NAME} is ray_ckpt's, {STOCK_RECORD_NAME} the other's, "
            "which is younger; and save each in a directory of its own"
        )
