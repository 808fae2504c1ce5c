"""Save a PyTorch training run from any parallel layout, load it into any other, and prove that nothing changed.

The names in `__all__`, and in that of `ray_ckpt.cluster`, are the public interface; everything else is internal and may
change in any version. Names are loaded when they are first used: importing `ray_ckpt` imports neither ray, torch nor
pyarrow.
"""

from __future__ import annotations

import importlib
import logging
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
    SignatureError,
    StateMismatchError,
    StorageError,
    UnsafeCheckpointError,
    UsageError,
    WorkerError,
)

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ray_ckpt import cluster
    from ray_ckpt.checkpoint.comparing import compare
    from ray_ckpt.checkpoint.following import WeightFollower
    from ray_ckpt.checkpoint.loading import load, resume
    from ray_ckpt.checkpoint.publishing import WeightPublisher
    from ray_ckpt.checkpoint.saving import save
    from ray_ckpt.checkpoint.verifying import verify
    from ray_ckpt.cluster.doctor import doctor
    from ray_ckpt.cluster.group import WorkerGroup
    from ray_ckpt.cluster.worker import WorkerContext
    from ray_ckpt.conversion.exporting import export
    from ray_ckpt.conversion.importing import convert
    from ray_ckpt.conversion.weights import Weight, Weights, open_weights
    from ray_ckpt.dcp.reader import ArrowStorageReader
    from ray_ckpt.dcp.writer import ArrowStorageWriter
    from ray_ckpt.events import Event, EventFile
    from ray_ckpt.format.fingerprint import Fingerprint
    from ray_ckpt.format.fingerprinting import fingerprint
    from ray_ckpt.format.manifest import Manifest
    from ray_ckpt.format.saved import Saved
    from ray_ckpt.inspection.contents import CheckpointContents, inspect
    from ray_ckpt.inspection.diagnosis import DoctorReport, Finding, NodeFacts
    from ray_ckpt.inspection.differing import DiffReport, TensorDifference, diff
    from ray_ckpt.inspection.listing import StoreListing, list_steps
    from ray_ckpt.inspection.statistics import TensorStatistics, scan_nonfinite, tensor_statistics
    from ray_ckpt.parallel.layout import Layout
    from ray_ckpt.pictures.contents import PageReport
    from ray_ckpt.pictures.page import write_report
    from ray_ckpt.protocol.save_handle import SaveHandle
    from ray_ckpt.report import (
        CompareReport,
        ConversionReport,
        CopyReport,
        Damage,
        LoadReport,
        NonFinite,
        Phase,
        RemovalReport,
        SaveReport,
        SignatureReport,
        TransferReport,
        VerifyReport,
    )
    from ray_ckpt.signing import sign, verify_signature
    from ray_ckpt.state.train_state import TrainState
    from ray_ckpt.storage.files import RetryPolicy, Storage
    from ray_ckpt.storage.retention import Policy, keep, keep_every, keep_last
    from ray_ckpt.storage.store import CheckpointStore

__all__ = [
    "ArrowStorageReader",
    "ArrowStorageWriter",
    "CheckpointContents",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "CheckpointStore",
    "CommitError",
    "CompareReport",
    "ConversionReport",
    "CopyReport",
    "Damage",
    "DiffReport",
    "DoctorReport",
    "Event",
    "EventFile",
    "Finding",
    "Fingerprint",
    "FormatError",
    "GroupError",
    "GroupTimeoutError",
    "IntegrityError",
    "Layout",
    "LoadReport",
    "Manifest",
    "NodeFacts",
    "NonFinite",
    "PageReport",
    "Phase",
    "PlacementError",
    "Policy",
    "RankFailure",
    "RayCkptError",
    "RemovalReport",
    "RetryPolicy",
    "SaveHandle",
    "SavePendingError",
    "SaveReport",
    "Saved",
    "SignatureError",
    "SignatureReport",
    "StateMismatchError",
    "Storage",
    "StorageError",
    "StoreListing",
    "TensorDifference",
    "TensorStatistics",
    "TrainState",
    "TransferReport",
    "UnsafeCheckpointError",
    "UsageError",
    "VerifyReport",
    "Weight",
    "WeightFollower",
    "WeightPublisher",
    "Weights",
    "WorkerContext",
    "WorkerError",
    "WorkerGroup",
    "__version__",
    "cluster",
    "compare",
    "convert",
    "diff",
    "doctor",
    "export",
    "fingerprint",
    "inspect",
    "keep",
    "keep_every",
    "keep_last",
    "list_steps",
    "load",
    "open_weights",
    "resume",
    "save",
    "scan_nonfinite",
    "sign",
    "tensor_statistics",
    "verify",
    "verify_signature",
    "write_report",
]

_HOMES = {
    "ArrowStorageReader": "ray_ckpt.dcp.reader",
    "ArrowStorageWriter": "ray_ckpt.dcp.writer",
    "CheckpointContents": "ray_ckpt.inspection.contents",
    "CheckpointStore": "ray_ckpt.storage.store",
    "CompareReport": "ray_ckpt.report",
    "ConversionReport": "ray_ckpt.report",
    "CopyReport": "ray_ckpt.report",
    "Damage": "ray_ckpt.report",
    "DiffReport": "ray_ckpt.inspection.differing",
    "DoctorReport": "ray_ckpt.inspection.diagnosis",
    "Event": "ray_ckpt.events",
    "EventFile": "ray_ckpt.events",
    "Finding": "ray_ckpt.inspection.diagnosis",
    "Fingerprint": "ray_ckpt.format.fingerprint",
    "Layout": "ray_ckpt.parallel.layout",
    "LoadReport": "ray_ckpt.report",
    "Manifest": "ray_ckpt.format.manifest",
    "NodeFacts": "ray_ckpt.inspection.diagnosis",
    "NonFinite": "ray_ckpt.report",
    "PageReport": "ray_ckpt.pictures.contents",
    "Phase": "ray_ckpt.report",
    "Policy": "ray_ckpt.storage.retention",
    "RemovalReport": "ray_ckpt.report",
    "RetryPolicy": "ray_ckpt.storage.files",
    "SaveHandle": "ray_ckpt.protocol.save_handle",
    "SaveReport": "ray_ckpt.report",
    "Saved": "ray_ckpt.format.saved",
    "SignatureReport": "ray_ckpt.report",
    "Storage": "ray_ckpt.storage.files",
    "StoreListing": "ray_ckpt.inspection.listing",
    "TensorDifference": "ray_ckpt.inspection.differing",
    "TensorStatistics": "ray_ckpt.inspection.statistics",
    "TrainState": "ray_ckpt.state.train_state",
    "TransferReport": "ray_ckpt.report",
    "VerifyReport": "ray_ckpt.report",
    "Weight": "ray_ckpt.conversion.weights",
    "WeightFollower": "ray_ckpt.checkpoint.following",
    "WeightPublisher": "ray_ckpt.checkpoint.publishing",
    "Weights": "ray_ckpt.conversion.weights",
    "WorkerContext": "ray_ckpt.cluster.worker",
    "WorkerGroup": "ray_ckpt.cluster.group",
    "cluster": "ray_ckpt",
    "compare": "ray_ckpt.checkpoint.comparing",
    "convert": "ray_ckpt.conversion.importing",
    "diff": "ray_ckpt.inspection.differing",
    "doctor": "ray_ckpt.cluster.doctor",
    "export": "ray_ckpt.conversion.exporting",
    "fingerprint": "ray_ckpt.format.fingerprinting",
    "inspect": "ray_ckpt.inspection.contents",
    "keep": "ray_ckpt.storage.retention",
    "keep_every": "ray_ckpt.storage.retention",
    "keep_last": "ray_ckpt.storage.retention",
    "list_steps": "ray_ckpt.inspection.listing",
    "load": "ray_ckpt.checkpoint.loading",
    "open_weights": "ray_ckpt.conversion.weights",
    "resume": "ray_ckpt.checkpoint.loading",
    "save": "ray_ckpt.checkpoint.saving",
    "scan_nonfinite": "ray_ckpt.inspection.statistics",
    "sign": "ray_ckpt.signing",
    "tensor_statistics": "ray_ckpt.inspection.statistics",
    "verify": "ray_ckpt.checkpoint.verifying",
    "verify_signature": "ray_ckpt.signing",
    "write_report": "ray_ckpt.pictures.page",
}
"""Public name -> module, as the imports above say it to type checkers; `tests/test_public_face.py` compares the two."""


logging.getLogger(__name__).addHandler(logging.NullHandler())  # else Python prints warnings of its own accord

if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name == "cluster":  # a room of its own rather than a name in one
            return importlib.import_module("ray_ckpt.cluster")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
