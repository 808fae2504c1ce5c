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

from ray_ckpt.errors import CheckpointError, RayCkptError, StateMismatchError, UsageError
from ray_ckpt.format.manifest import MANIFEST_NAME, Manifest
from ray_ckpt.parallel.load_plan import ShardLoadPlanner
from ray_ckpt.parallel.state import PARAM_GROUPS, TrainState
from ray_ckpt.report import SaveReport
from ray_ckpt.storage.reader import ArrowStorageReader
from ray_ckpt.storage.writer import ArrowStorageWriter


def save(state: TrainState, uri: str, *, overwrite: bool = False) -> SaveReport:
    """Save what every rank holds as one checkpoint at `uri`. All ranks call it.

    Raises:
        CheckpointExistsError: `uri` holds a committed checkpoint already and `overwrite` was not given.
        CheckpointError: a rank failed; names each of them, on every rank. Nothing was committed.
    """
    writer = ArrowStorageWriter(uri, overwrite=overwrite)
    start = time.monotonic()
    with _together("save"):
        held = state.state_dict()
    with _with_dcp("save"):
        dcp.save(held, storage_writer=writer, no_dist=not dist.is_initialized())
    manifest = Manifest.from_json(writer.storage.read_bytes(MANIFEST_NAME))
    return SaveReport(writer.storage.address, manifest.total_bytes, len(manifest.files), time.monotonic() - start)


def load(state: TrainState, uri: str) -> None:
    """Load the checkpoint at `uri` into the live model and optimizer, whatever layout saved it. All ranks call it.

    The optimizer's parameter groups are split where the checkpoint has different hyper-parameters for their members.
    Bytes go straight into the live tensors: after an error during the reading they hold parts of two states.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint at `uri`.
        StateMismatchError: names, shapes or dtypes differ, or the groups of a used optimizer would have to be split.
        CheckpointError: a rank failed; names each of them, on every rank.
    """
    reader = ArrowStorageReader(uri)
    with _together("load"):
        manifest = reader.read_manifest()
        state.match_hyperparameters(_read_hyperparameters(reader, manifest))
    target = state.state_dict()
    with _together("load"):
        _check_same_tensors(manifest, target)
        # The manifest tells every rank where its bytes are: nobody has to be asked, or can keep others waiting.
        with _alone_with_dcp():
            dcp.load(target, storage_reader=reader, planner=ShardLoadPlanner(), no_dist=True)
    state.load_state_dict(target)


def _read_hyperparameters(reader: ArrowStorageReader, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Parameter name -> hyper-parameter name -> value, as every rank that saved had them."""
    prefix = f"optim.{PARAM_GROUPS}"
    names = [name for name in manifest.objects if name.startswith(prefix)]
    found = {name: value for name, value in manifest.values().items() if name.startswith(prefix)}
    if len(found) < len(names):
        # A foreign checkpoint, whose values stand in its data files.
        found = dict.fromkeys(names)
        with _alone_with_dcp():
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
def _together(operation: str) -> Iterator[None]:
    """Run the block on every rank, then exchange failures: all ranks go on, or all raise, with every failure named."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    text = None if failure is None else _describe(failure)
    texts: list[str | None] = [text]
    if dist.is_initialized():
        texts *= dist.get_world_size()
        dist.all_gather_object(texts, text)
    if failures := {rank: text for rank, text in enumerate(texts) if text is not None}:
        raise _combine(operation, failures, len(texts), failure) from failure


@contextmanager
def _with_dcp(operation: str) -> Iterator[None]:
    """Call DCP on all ranks. Its exception, which is a BaseException and the same on all of them, becomes ours."""
    try:
        with _as_one_process():
            yield
    except CheckpointException as error:
        failures = {rank: _describe(cause) for rank, (cause, _) in error.failures.items()}
        num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        first = next((cause for cause, _ in error.failures.values()), None)
        raise _combine(operation, failures, num_ranks, first) from error


@contextmanager
def _alone_with_dcp() -> Iterator[None]:
    """Call DCP on this rank alone, with `no_dist=True`: what failed is raised as it is."""
    try:
        with _as_one_process():
            yield
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            raise cause from error
        raise CheckpointError(str(error)) from error


@contextmanager
def _as_one_process() -> Iterator[None]:
    """Without a process group DCP warns that it assumes one process. That is as good as any other layout."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _combine(
    operation: str, failures: Mapping[int, str], num_ranks: int, example: BaseException | None
) -> RayCkptError:
    """What a rank raises: the failure itself where it is everybody's, else an error that names who failed."""
    is_everybodys = isinstance(example, UsageError) or len(failures) == num_ranks
    if isinstance(example, RayCkptError) and is_everybodys and len(set(failures.values())) == 1:
        return example
    ranks_of: dict[str, list[str]] = {}
    for rank, text in failures.items():
        ranks_of.setdefault(text, []).append(str(rank))
    causes = "; ".join(f"rank {', '.join(ranks)}: {text}" for text, ranks in ranks_of.items())
    return CheckpointError(f"{operation} failed on {causes}")
