"""Whether another program's checkpoint is at a target, as far as names tell. Needs no torch: a driver asks too."""

from __future__ import annotations

from ray_ckpt.format import safetensors
from ray_ckpt.storage.files import Storage

__all__ = ["ACCELERATE_MODEL", "ACCELERATE_OPTIMIZER", "is_file", "is_foreign"]

ACCELERATE_MODEL, ACCELERATE_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
"""Directories that accelerate's `save_state` makes for FSDP: `FSDP_MODEL_NAME` and `OPTIMIZER_NAME` of its constants,
with the number of the model or optimizer."""


def is_file(storage: Storage) -> bool:
    """Whether the target is a file rather than a directory."""
    parent = storage.parent()
    return parent is not None and parent[0].exists(parent[1])


def is_foreign(storage: Storage) -> bool:
    """Whether a directory without a manifest holds what `foreign.recognize` may know."""
    return any(name.endswith((safetensors.SUFFIX, safetensors.INDEX_SUFFIX)) for name in storage.list_files()) or not {
        ACCELERATE_MODEL,
        ACCELERATE_OPTIMIZER,
    }.isdisjoint(storage.list_directories())
