"""save(state, uri): state_dict -> DCP plans, ranks write, the coordinator commits (ArrowStorageWriter)."""

from __future__ import annotations

import time

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from ray_ckpt.checkpoint.together import together, with_dcp
from ray_ckpt.format.manifest import MANIFEST_NAME, Manifest
from ray_ckpt.parallel.state import TrainState
from ray_ckpt.report import SaveReport
from ray_ckpt.storage.writer import ArrowStorageWriter


def save(state: TrainState, uri: str, *, overwrite: bool = False) -> SaveReport:
    """Save what every rank holds as one checkpoint at `uri`. All ranks call it.

    Raises:
        CheckpointExistsError: `uri` holds a committed checkpoint already and `overwrite` was not given.
        CheckpointError: a rank failed; names each of them, on every rank. Nothing was committed.
    """
    writer = ArrowStorageWriter(uri, overwrite=overwrite)
    start = time.monotonic()
    with together("save"):
        held = state.state_dict()
    with with_dcp("save"):
        dcp.save(held, storage_writer=writer, no_dist=not dist.is_initialized())
    manifest = Manifest.from_json(writer.storage.read_bytes(MANIFEST_NAME))
    return SaveReport(writer.storage.address, manifest.total_bytes, len(manifest.files), time.monotonic() - start)
