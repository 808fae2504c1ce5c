"""ArrowStorageWriter: saves any DCP state dict to any file system, checked and committed once.

dcp.save ─┬─ every rank    set_up_storage_writer    a fresh attempt id; the coordinator looks for a checkpoint
          ├─ every rank    prepare_local_plan       remembers what this rank holds, before replicas are dropped
          ├─ coordinator   prepare_global_plan      numbers the ranks
          ├─ every rank    write_data               data_file.pack_file, a file per thread; digests of dropped replicas
          └─ coordinator   finish                   results.py, then Coordinator.check and .publish
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from ray_ckpt.dcp.planner_objects import read_object
from ray_ckpt.dcp.results import Replica, Written, files_of, global_plan, rank_record
from ray_ckpt.dcp.scattered import refuse_scattered
from ray_ckpt.errors import CheckpointExistsError, StorageError, UsageError
from ray_ckpt.format import dcp_metadata
from ray_ckpt.format.boxes import shared_box
from ray_ckpt.format.manifest import ObjectEntry
from ray_ckpt.format.memory import fault
from ray_ckpt.format.torch_container import dtype_name
from ray_ckpt.format.wrappers import is_made_of_others
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.protocol.coordinator import Coordinator
from ray_ckpt.protocol.messages import TensorSpec, digest_object, digest_tensor
from ray_ckpt.storage.data_file import MAX_FILE_BYTES, Packed, hash_tensors, pack_file, share_out, write_in_threads
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.publish import is_of_attempt, refuse_if_taken

__all__ = ["ArrowStorageWriter"]


class ArrowStorageWriter(StorageWriter):
    """A DCP storage writer for `dcp.save` and `dcp.async_save`.

    The checkpoint is committed when `manifest.json` exists. That file is written last and atomically, after everything
    else is durable and the coordinator has checked it. Stock DCP reads the result as it reads its own checkpoints.

    Example:
        >>> import torch
        >>> import torch.distributed.checkpoint as dcp
        >>> from ray_ckpt import ArrowStorageWriter
        >>> state = {"weight": torch.ones(3)}
        >>> metadata = dcp.save(state, storage_writer=ArrowStorageWriter("run/step-1"), no_dist=True)
        >>> state["weight"].zero_().tolist()
        [0.0, 0.0, 0.0]
        >>> dcp.load(state, checkpoint_id="run/step-1", no_dist=True)  # stock DCP's own reader
        >>> state["weight"].tolist()
        [1.0, 1.0, 1.0]

    Args:
        target: the checkpoint's directory: a local path, a URI as `Storage` takes it, or a `Storage`. `checkpoint_id`
            of `dcp.save` replaces it; None waits for that.
        overwrite: replace a committed checkpoint at the target. It stays valid until the new one is committed; its
            data files are deleted after that. Without it, an existing checkpoint is refused before a byte is written.
        threads: number of files that a rank writes at the same time.
        max_file_bytes: size at which a rank starts another data file; a single tensor may be larger.
        layout: how the model lies across ranks, in the caller's words; kept in the manifest.
        fingerprints: `Fingerprint.digest` of tensors by name, kept in the manifest. Only those of the coordinator
            count; they may be assigned until `finish`, because a driver learns them from the ranks.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | Storage | None = None,
        *,
        overwrite: bool = False,
        threads: int = 1,
        max_file_bytes: int = MAX_FILE_BYTES,
        layout: str | None = None,
        fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        if threads < 1 or max_file_bytes < 1:
            raise UsageError(f"threads={threads} and max_file_bytes={max_file_bytes} must be at least 1")
        self._storage = Storage(target) if isinstance(target, str | os.PathLike) else target
        self.overwrite = overwrite
        self.threads = threads
        self.max_file_bytes = max_file_bytes
        self.layout = layout
        self.fingerprints = dict(fingerprints or {})
        self._attempt = ""
        self._held: list[WriteItem] = []

    @property
    def storage(self) -> Storage:
        """The checkpoint's directory.

        Raises:
            UsageError: nobody has said where it is.
        """
        if self._storage is None:
            raise UsageError(
                "where is the checkpoint to be saved? Say ArrowStorageWriter(path) or dcp.save(..., checkpoint_id=path)"
            )
        return self._storage

    @property
    def checkpoint_id(self) -> str:
        """Where the checkpoint is, without credentials and options."""
        return self.storage.address

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return bool(os.fspath(checkpoint_id))

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self.storage.address, save_id=self._attempt)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id:
            self._storage = Storage(checkpoint_id, retry=None if self._storage is None else self._storage.retry)
        _ = self.storage  # DCP calls this first, on every rank: the time to say that there is none

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Begin an attempt. DCP passes `rank` and `use_collectives` only to a parameter named `kwargs`.

        Raises:
            CheckpointExistsError: the target is taken and `overwrite` was not given.
        """
        if not kwargs.get("use_collectives", True):
            raise UsageError(
                "use_collectives=False would commit one checkpoint per rank in one place; save with collectives, "
                "or with no_dist=True into one target per process"
            )
        self._attempt = uuid.uuid4().hex[:12]
        if is_coordinator and not self.overwrite:
            refuse_if_taken(self.storage)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if plan.usable:  # a planner that caches plans sends an empty one when nothing has changed
            self._held = list(plan.items)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items. All of it is durable on return, and every thread's failure has been raised."""
        refuse_scattered(planner)
        numbers = itertools.count()

        def write(items: Sequence[WriteItem]) -> list[WriteResult]:
            # A retry takes another name: a broken upload may still finish in the background, over the new file.
            name = f"__{plan.storage_data}_{next(numbers)}-{self._attempt}.distcp"
            objects = ((item, read_object(planner, item)) for item in items if item.type == WriteItemType.BYTE_IO)
            packed = pack_file(self.storage, name, objects, _resolve_tensors(planner, items))
            return [_object_result(item, entry) for item, entry in packed.objects] + _tensor_results(packed)

        shares = share_out([_item_bytes(item) for item in plan.items], self.threads, self.max_file_bytes)
        writes = [functools.partial(write, [plan.items[index] for index in share]) for share in shares]
        results = list(itertools.chain.from_iterable(write_in_threads(self.storage, writes, self.threads)))
        written = {item.index for item in plan.items}
        results += _digest_replicas([item for item in self._held if item.index not in written], planner)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Check, then commit.

        Raises:
            CommitError: what the ranks wrote is not what was planned, or not what the storage shows; nothing is
                committed.
            CheckpointExistsError: another attempt has committed meanwhile; the files of this one are removed.
        """
        try:
            self._commit(metadata, results)
        except CheckpointExistsError:
            self._discard(results)
            raise

    def _discard(self, results: list[list[WriteResult]]) -> None:
        """Remove the files of this attempt, unless it has been committed after all. Those that cannot be stay."""
        with contextlib.suppress(StorageError):
            if not is_of_attempt(self.storage, self._attempt):
                for file in files_of(results):
                    self.storage.delete(file)

    def _commit(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        coordinator = Coordinator(
            self.storage,
            overwrite=self.overwrite,
            layout=self.layout,
            saved_by={"torch": torch.__version__},
            fingerprints=self.fingerprints,
            attempt=self._attempt,
            called="the coordinator",
        )
        with collector_paused():
            coordinator.adopt(global_plan(metadata, results))
            coordinator.check([rank_record(of_rank) for of_rank in results])
            stock_record = dcp_metadata.dumps(coordinator.manifest)
        coordinator.publish(stock_record)


_ADVICE = ": ray_ckpt.save and a TrainState save them by their names"


def _item_bytes(item: WriteItem) -> int:
    if item.tensor_data is None:
        return 1
    return max(1, item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize)


def _tensor_data(item: WriteItem) -> TensorWriteData:
    if item.tensor_data is None:
        raise UsageError(f"the plan's item {item.index} is a tensor without `tensor_data`")
    return item.tensor_data


def _resolve_tensors(planner: SavePlanner, items: Iterable[WriteItem]) -> Iterator[tuple[WriteItem, torch.Tensor]]:
    """The tensors among these items, each resolved when its turn comes, because that may allocate memory.

    Raises:
        UsageError: a tensor is not what the plan says.
    """
    for item in items:
        if item.type == WriteItemType.BYTE_IO:
            continue
        planned = _tensor_data(item)
        dtype, sizes = planned.properties.dtype, planned.chunk.sizes
        tensor = planner.resolve_data(item)
        if not isinstance(tensor, torch.Tensor) or (tensor.dtype, tensor.shape) != (dtype, sizes):
            raise UsageError(
                f"{item.index.fqn!r} was planned as {dtype} of shape {tuple(sizes)} but is now "
                f"{getattr(tensor, 'dtype', type(tensor))} of shape {tuple(getattr(tensor, 'shape', ()))}; "
                "do not change the state dict during a save"
            )
        if wrong := fault(tensor):
            raise UsageError(f"{item.index.fqn!r} {wrong}{_ADVICE if is_made_of_others(tensor) else ''}")
        yield item, tensor


def _object_result(item: WriteItem, entry: ObjectEntry) -> WriteResult:
    return WriteResult(item.index, entry.length, Written(entry))


def _tensor_results(packed: Packed[WriteItem]) -> list[WriteResult]:
    parts = []
    for item in packed.keys:
        data = _tensor_data(item)
        box = shared_box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
        parts.append((box, data.chunk.sizes.numel() * data.properties.dtype.itemsize))
    chunks = packed.tensors.chunks(parts)
    return [
        WriteResult(item.index, chunk.length, Written(chunk)) for item, chunk in zip(packed.keys, chunks, strict=True)
    ]


def _digest_replicas(items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
    """Digests of what this rank holds and another rank writes: the coordinator compares."""
    tensors = hash_tensors(_resolve_tensors(planner, items))
    results = [WriteResult(item.index, 0, Replica(_spec(item), digest_tensor(sums))) for item, _, sums in tensors]
    for item in items:
        if item.type == WriteItemType.BYTE_IO:
            digest = digest_object(read_object(planner, item).checksum)
            results.append(WriteResult(item.index, 0, Replica(None, digest)))
    return results


def _spec(item: WriteItem) -> TensorSpec:
    data = _tensor_data(item)
    chunk, dtype = data.chunk, dtype_name(data.properties.dtype)
    return TensorSpec(dtype, tuple(data.size), tuple(chunk.offsets), tuple(chunk.sizes))
