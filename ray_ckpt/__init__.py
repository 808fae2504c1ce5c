"""Save a PyTorch training run from any parallel layout, load it into any other, and prove that nothing changed.

Public names are loaded when they are first used: importing `ray_ckpt` imports neither ray nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ray_ckpt.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CommitError,
    FormatError,
    GroupError,
    GroupTimeoutError,
    IntegrityError,
    PlacementError,
    RankFailure,
    RayCkptError,
    SavePendingError,
    StateMismatchError,
    StorageError,
    UnsafeCheckpointError,
    UsageError,
    WorkerError,
)

if TYPE_CHECKING:
    from ray_ckpt.checkpoint.loading import load
    from ray_ckpt.checkpoint.saving import save
    from ray_ckpt.checkpoint.verifying import verify
    from ray_ckpt.cluster.group import WorkerGroup
    from ray_ckpt.dcp.reader import ArrowStorageReader
    from ray_ckpt.dcp.writer import ArrowStorageWriter
    from ray_ckpt.format.fingerprinting import fingerprint
    from ray_ckpt.format.manifest import Manifest
    from ray_ckpt.parallel.layout import Layout
    from ray_ckpt.state.train_state import TrainState
    from ray_ckpt.storage.store import CheckpointStore

__all__ = [
    "ArrowStorageReader",
    "ArrowStorageWriter",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "CheckpointStore",
    "CommitError",
    "FormatError",
    "GroupError",
    "GroupTimeoutError",
    "IntegrityError",
    "Layout",
    "Manifest",
    "PlacementError",
    "RankFailure",
    "RayCkptError",
    "SavePendingError",
    "StateMismatchError",
    "StorageError",
    "TrainState",
    "UnsafeCheckpointError",
    "UsageError",
    "WorkerError",
    "WorkerGroup",
    "fingerprint",
    "load",
    "save",
    "verify",
]

_HOMES = {
    "ArrowStorageReader": "ray_ckpt.dcp.reader",
    "ArrowStorageWriter": "ray_ckpt.dcp.writer",
    "CheckpointStore": "ray_ckpt.storage.store",
    "Layout": "ray_ckpt.parallel.layout",
    "Manifest": "ray_ckpt.format.manifest",
    "TrainState": "ray_ckpt.state.train_state",
    "WorkerGroup": "ray_ckpt.cluster.group",
    "fingerprint": "ray_ckpt.format.fingerprinting",
    "load": "ray_ckpt.checkpoint.loading",
    "save": "ray_ckpt.checkpoint.saving",
    "verify": "ray_ckpt.checkpoint.verifying",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
