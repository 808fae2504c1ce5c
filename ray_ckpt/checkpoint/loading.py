"""load(state, target): hyper-parameters -> match groups -> DCP plans, ranks read -> set (ArrowStorageReader)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from ray_ckpt.checkpoint.target import source
from ray_ckpt.checkpoint.together import alone_with_dcp, together
from ray_ckpt.errors import StateMismatchError
from ray_ckpt.format.manifest import Manifest
from ray_ckpt.parallel.load_plan import ShardLoadPlanner
from ray_ckpt.parallel.state import PARAM_GROUPS, TrainState
from ray_ckpt.storage.reader import ArrowStorageReader
from ray_ckpt.storage.target import Target


def load(state: TrainState, target: Target, step: int | None = None) -> None:
    """Load a checkpoint into the live model and optimizer, whatever layout saved it. All ranks call it.

    The optimizer's parameter groups are split where the checkpoint has different hyper-parameters for their members.
    Bytes go straight into the live tensors: after an error during the reading they hold parts of two states.

    Args:
        target: the checkpoint's directory, or a store: a local path, a URI, a `Storage` or a `CheckpointStore`.
        step: of the store; None for the checkpoint at `target` itself, or else the latest committed step.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint.
        StateMismatchError: names, shapes or dtypes differ, or the groups of a used optimizer would have to be split.
        CheckpointError: a rank failed; names each of them, on every rank.
    """
    reader = ArrowStorageReader(source("load", target, step))
    with together("load"):
        manifest = reader.read_manifest()
        state.match_hyperparameters(_read_hyperparameters(reader, manifest))
    wanted = state.state_dict()
    with together("load"):
        _check_same_tensors(manifest, wanted)
        # The manifest tells every rank where its bytes are: nobody has to be asked, or can keep others waiting.
        with alone_with_dcp():
            dcp.load(wanted, storage_reader=reader, planner=ShardLoadPlanner(), no_dist=True)
    state.load_state_dict(wanted)


def _read_hyperparameters(reader: ArrowStorageReader, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Parameter name -> hyper-parameter name -> value, as every rank that saved had them."""
    prefix = f"optim.{PARAM_GROUPS}"
    names = [name for name in manifest.objects if name.startswith(prefix)]
    found = {name: value for name, value in manifest.values().items() if name.startswith(prefix)}
    if len(found) < len(names):
        # A foreign checkpoint, whose values stand in its data files.
        found = dict.fromkeys(names)
        with alone_with_dcp():
            dcp.load(found, storage_reader=reader, no_dist=True)
    hyperparameters: dict[str, dict[str, Any]] = {}
    for name, value in found.items():
        parameter, _, key = name.removeprefix(prefix).rpartition(".")
        hyperparameters.setdefault(parameter, {})[key] = value
    return hyperparameters


def _check_same_tensors(manifest: Manifest, target: Mapping[str, Mapping[str, Any]]) -> None:
    """DCP casts dtypes silently and ignores what the target has no place for, so compare before it loads."""
    saved = {name: f"{entry.dtype}{list(entry.shape)}" for name, entry in manifest.tensors.items()}
    wanted = {
        f"{part}.{name}": f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        for part, entries in target.items()
        for name, value in entries.items()
        if isinstance(value, torch.Tensor)
    }
    differing = [
        f"{name}: saved {saved.get(name, 'not at all')}, wanted {wanted.get(name, 'not at all')}"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if differing:
        shown = "; ".join(differing[:8]) + (f"; and {len(differing) - 8} more" if len(differing) > 8 else "")
        raise StateMismatchError(f"the checkpoint does not fit the model and optimizer it is loaded into: {shown}")
