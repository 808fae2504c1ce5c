"""Checkpoints of ray_ckpt in the training loop of a `ray.train.torch.TorchTrainer`.

Ray Train's own checkpoint is a note of a few bytes that names the step. What was trained is written once, to the store.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train
from ray.train import Checkpoint

import ray_ckpt
from ray_ckpt.checkpoint.saving import State
from ray_ckpt.errors import FormatError
from ray_ckpt.events import Events
from ray_ckpt.report import LoadReport, SaveReport
from ray_ckpt.storage.resolve import Target

_NOTE = "ray_ckpt.json"


def report(
    state: State, store: Target, step: int, metrics: Mapping[str, Any], *, events: Events | None = None
) -> SaveReport:
    """Save a step, then report it and the metrics to Ray Train. All workers call it.

    Replaces what the store has as this step: it was saved by a run that ended before Ray Train had noted it.

    Args:
        state: as for `ray_ckpt.save`.
        store: a `CheckpointStore`, or its path or URI, which all nodes share.
        step: number of the step in the store, from 0.
        metrics: this worker's, as for `ray.train.report`.
        events: as for `ray_ckpt.save`.

    Raises:
        CheckpointError: as `ray_ckpt.save` does; then nothing was reported.
    """
    saved = ray_ckpt.save(state, store, step, overwrite=True, events=events)
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, _NOTE).write_text(json.dumps({"step": step}))
        is_first = ray.train.get_context().get_world_rank() == 0
        ray.train.report(dict(metrics), checkpoint=Checkpoint.from_directory(directory) if is_first else None)
    return saved


def resume(state: State, store: Target, *, events: Events | None = None) -> LoadReport | None:
    """Load the step that Ray Train's checkpoint names, or else the store's latest one. All workers call it.

    The model may be laid out in any way, on any number of workers.

    Args:
        events: as for `ray_ckpt.load`.

    Returns:
        The report, whose `step` says which step it was, or None where there is none yet.

    Raises:
        FormatError: Ray Train's checkpoint was not written by `report`.
        CheckpointNotFoundError: the step that it names is not in the store.
    """
    noted = ray.train.get_checkpoint()
    if noted is None:
        return ray_ckpt.resume(state, store, events=events)
    with noted.as_directory() as directory:
        note = Path(directory, _NOTE)
        if not note.exists():
            raise FormatError(f"Ray Train's checkpoint {noted.path} has no {_NOTE}: ray_ckpt's report did not write it")
        step = json.loads(note.read_text())["step"]
    return ray_ckpt.load(state, store, step, events=events)
