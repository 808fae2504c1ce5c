"""The verbs on an initialised process group, or on none: save and load a training state. No Ray in here.

save(state, uri)   state_dict -> DCP plans, ranks write, the coordinator commits        (ArrowStorageWriter)
load(state, uri)   hyper-parameters -> match groups -> DCP plans, ranks read -> set     (ArrowStorageReader)
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ray_ckpt.errors import CheckpointError, StateMismatchError
from ray_ckpt.format.manifest import MANIFEST_NAME, Manifest
from ray_ckpt.parallel.state import PARAM_GROUPS, TrainState
from ray_ckpt.report import SaveReport
from ray_ckpt.storage.reader import ArrowStorageReader
from ray_ckpt.storage.writer import ArrowStorageWriter


def save(state: TrainState, uri: str, *, overwrite: bool = False) -> SaveReport:
    """Save what every rank holds as one checkpoint at `uri`. Collective: all ranks call it.

    Raises:
        CheckpointExistsError: `uri` holds a committed checkpoint already and `overwrite` was not given.
        CheckpointError: a rank failed; names each of them. Nothing was committed.
    """
    writer = ArrowStorageWriter(uri, overwrite=overwrite)
    start = time.monotonic()
    with _dcp("save"):
        dcp.save(state.state_dict(), storage_writer=writer, no_dist=not dist.is_initialized())
    manifest = Manifest.from_json(writer.storage.read_bytes(MANIFEST_NAME))
    return SaveReport(writer.storage.address, manifest.total_bytes, len(manifest.files), time.monotonic() - start)


def load(state: TrainState, uri: str) -> None:
    """Load the checkpoint at `uri` into the live model and optimizer, whatever layout saved it. Collective.

    The optimizer's parameter groups are split where the checkpoint has different hyper-parameters for their members.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint at `uri`.
        StateMismatchError: names, shapes or dtypes differ, or the groups of a used optimizer would have to be split.
        CheckpointError: a rank failed; names each of them.
    """
    reader = ArrowStorageReader(uri)
    with _dcp("load"):
        manifest = reader.read_manifest()
        state.match_hyperparameters(_read_hyperparameters(reader, manifest))
        target = state.state_dict()
        _check_same_tensors(manifest, target)
        dcp.load(target, storage_reader=reader, no_dist=not dist.is_initialized())
    state.load_state_dict(target)


def _read_hyperparameters(reader: ArrowStorageReader, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Parameter name -> hyper-parameter name -> value, as every rank that saved had them."""
    prefix = f"optim.{PARAM_GROUPS}"
    names = [name for name in manifest.objects if name.startswith(prefix)]
    found = {name: value for name, value in manifest.values().items() if name.startswith(prefix)}
    if len(found) < len(names):
        # A foreign checkpoint, whose values stand in its data files.
        found = dict.fromkeys(names)
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


@contextmanager
def _dcp(operation: str) -> Iterator[None]:
    """Call DCP in here. Its exception, a BaseException, becomes ours: every failed rank is named, equal errors once."""
    try:
        with warnings.catch_warnings():
            # One process without a process group is as good as any other layout.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as error:
        ranks_of: dict[str, list[int]] = {}
        for rank, (cause, _) in error.failures.items():
            ranks_of.setdefault(f"{type(cause).__name__}: {cause}", []).append(rank)
        causes = "; ".join(
            f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {text}"
            for text, ranks in ranks_of.items()
        )
        raise CheckpointError(f"{operation} failed on {causes}") from error
