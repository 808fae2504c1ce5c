"""Directories that stock DCP wrote, and Lightning's and Megatron-core's, which have DCP inside and a file beside it."""

from __future__ import annotations

from ray_ckpt.errors import CheckpointError, CheckpointNotFoundError
from ray_ckpt.format import dcp_metadata
from ray_ckpt.format.dcp_metadata import METADATA_NAME
from ray_ckpt.format.manifest import MANIFEST_NAME, Manifest
from ray_ckpt.storage import torch_files
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.foreign_parts import Found, join, prefixed

__all__ = ["open_directory"]

LIGHTNING_EXTRA = "meta.pt"
"""Beside `.metadata`: what Lightning's FSDP strategy keeps outside of DCP (`_METADATA_FILENAME` in its source)."""


MEGATRON_EXTRA = "common.pt"
"""Beside `.metadata`: what Megatron-core's `torch_dist` keeps outside of DCP (`COMMON_STATE_FNAME` in its source)."""


def open_directory(storage: Storage, *, trusted: bool) -> Found:
    """
    Args:
        trusted: unpickle `.metadata` without a guard.

    Raises:
        CheckpointNotFoundError: it is what an interrupted save of ours has left.
        FormatError, UnsafeCheckpointError: `.metadata` is damaged, or not safe to read.
    """
    metadata = dcp_metadata.loads(storage.read_bytes(METADATA_NAME), trusted=trusted)
    if dcp_metadata.is_ours(metadata):
        raise CheckpointNotFoundError(
            f"no committed checkpoint in {storage.address}: a save by ray_ckpt was interrupted just before it "
            f"wrote {MANIFEST_NAME}; load an earlier step"
        )
    manifest = dcp_metadata.to_manifest(metadata)
    megatron_bytes = storage.size(MEGATRON_EXTRA)
    if megatron_bytes is not None:
        return _megatron(storage, manifest, megatron_bytes)
    extra_bytes = storage.size(LIGHTNING_EXTRA)
    if extra_bytes is None:
        return Found("a checkpoint of stock DCP", storage, manifest)
    kind = "Lightning's sharded FSDP checkpoint"
    try:
        extra = torch_files.open_file(storage, LIGHTNING_EXTRA, extra_bytes)
    except CheckpointError as error:
        # The model and the optimizer can be had without it.
        return Found(kind, storage, manifest, (f"{LIGHTNING_EXTRA} is left out: {error}",))
    return Found(kind, storage, join([manifest, extra], storage))


def _megatron(storage: Storage, manifest: Manifest, num_bytes: int) -> Found:
    """Megatron-core's: its common part (iteration, arguments, schedulers) is below `common`, as nobody else's is."""
    kind = "Megatron-core's torch_dist checkpoint"
    try:
        common = prefixed("common", torch_files.open_file(storage, MEGATRON_EXTRA, num_bytes))
    except CheckpointError as error:
        return Found(kind, storage, manifest, (f"{MEGATRON_EXTRA} is left out: {error}",))
    return Found(kind, storage, join([manifest, common], storage))
