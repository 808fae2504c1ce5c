"""Which checkpoint is meant, as all ranks of a process group agree on it."""

from __future__ import annotations

from ray_ckpt.checkpoint.carriers import carrier
from ray_ckpt.checkpoint.together import Exchange
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.target import Target, find


def source(operation: str, target: Target, step: int | None) -> Storage:
    """As `find`; all ranks call it, and get what the coordinator has found.

    Args:
        operation: for the message when it fails.

    Raises:
        CheckpointNotFoundError: no step was named, and there is no committed checkpoint.
    """
    return Exchange(operation, carrier()).broadcast(lambda: find(target, step))
