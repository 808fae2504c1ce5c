"""ArrowStorageWriter: saves any DCP state dict to any file system, checked and committed once.

dcp.save ─┬─ every rank    set_up_storage_writer    a fresh attempt id; the coordinator looks for a checkpoint
          ├─ every rank    prepare_local_plan       remembers what this rank holds, before replicas are dropped
          ├─ coordinator   prepare_global_plan      numbers the ranks
          ├─ every rank    write_data               pack.pack_file, one file per thread; digests of dropped replicas
          └─ coordinator   finish                   commit.build_manifest, `.metadata`, `manifest.json`
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from ray_ckpt.collector import collector_paused
from ray_ckpt.errors import CheckpointError, CheckpointExistsError, UsageError
from ray_ckpt.format import dcp_metadata
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.dcp_metadata import METADATA_NAME
from ray_ckpt.format.manifest import MANIFEST_NAME, Chunk, Manifest, ObjectEntry
from ray_ckpt.storage.commit import Replica, Written, build_manifest
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.objects import read_object
from ray_ckpt.storage.pack import Part, digest, digest_tensors, pack_file

__all__ = ["ArrowStorageWriter"]

MAX_FILE_BYTES = 16 << 30
"""A rank starts another file before one grows past this; a single tensor may be larger."""


class ArrowStorageWriter(StorageWriter):
    """A DCP storage writer for `dcp.save` and `dcp.async_save`.

    The checkpoint is committed when `manifest.json` exists, which is written last and at once, after everything else
    is durable and the coordinator has checked it. Stock DCP reads the result as it reads its own.

    Args:
        target: Where to: a local path, a URI as `Storage` takes it, or a `Storage`. `checkpoint_id` of `dcp.save`
            replaces it.
        overwrite: Replace a committed checkpoint in the target. It stays valid until the new one is committed; its
            data files are deleted after that. Without it, an existing checkpoint is an error before a byte is written.
        threads: Files that a rank writes at the same time.
        max_file_bytes: Limit of a data file's size, see `MAX_FILE_BYTES`.
        layout: How the model lies across ranks, in the caller's words; kept in the manifest.
        fingerprints: `Fingerprint.digest` of tensors by name; kept in the manifest. Only the coordinator's count, and
            they may be assigned until `finish`, because a driver learns them from the ranks.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | Storage,
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
        self.storage = target if isinstance(target, Storage) else Storage(target)
        self.overwrite = overwrite
        self.threads = threads
        self.max_file_bytes = max_file_bytes
        self.layout = layout
        self.fingerprints = dict(fingerprints or {})
        self._attempt = ""
        self._held: list[WriteItem] = []

    @property
    def checkpoint_id(self) -> str:
        return self.storage.address

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return bool(os.fspath(checkpoint_id))

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self.storage.address, save_id=self._attempt)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id:
            self.storage = Storage(checkpoint_id, retry=self.storage.retry)

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
            self._refuse_if_taken()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if plan.usable:  # a planner that caches plans sends an empty one when nothing has changed
            self._held = list(plan.items)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items. All of it is durable on return, and every thread's failure has been raised."""
        numbers = itertools.count()

        def write(items: Sequence[WriteItem]) -> list[WriteResult]:
            # A retry takes another name: a broken upload may still finish in the background, over the new file.
            name = f"__{plan.storage_data}_{next(numbers)}-{self._attempt}.distcp"
            objects = ((item, read_object(planner, item)) for item in items if item.type == WriteItemType.BYTE_IO)
            packed = pack_file(self.storage, name, objects, _resolve_tensors(planner, items))
            results = [_object_result(item, entry) for item, entry in packed.objects]
            return results + [_tensor_result(item, chunk) for item, chunk in packed.tensors]

        batches = _assign(plan.items, self.threads, self.max_file_bytes)
        results = self._in_threads([functools.partial(write, items) for items in batches])
        written = {item.index for item in plan.items}
        results += _digest_replicas([item for item in self._held if item.index not in written], planner)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _in_threads(self, writes: Sequence[Callable[[], list[WriteResult]]]) -> list[WriteResult]:
        """Run the writes, each again after transient errors; every one's failure is raised here.

        A single thread is the caller's own, whose current CUDA stream has produced the tensors.
        """
        if self.threads == 1:
            return [result for write in writes for result in self.storage.retried(write)]
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="ray_ckpt-write") as pool:
            futures = [pool.submit(self.storage.retried, write) for write in writes]
            return [result for future in futures for result in future.result()]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Check, then commit.

        Raises:
            CommitError: what the ranks wrote is not what was planned; nothing is committed.
            CheckpointExistsError: another attempt has committed meanwhile.
        """
        with collector_paused():
            manifest = build_manifest(
                metadata,
                results,
                attempt=self._attempt,
                layout=self.layout,
                fingerprints=self.fingerprints,
            )
            records = dcp_metadata.dumps(metadata, manifest), manifest.to_json().encode()
        if not self.overwrite:
            self._refuse_if_taken()
        replaced = self._committed_files()
        self.storage.write_atomic(METADATA_NAME, records[0])
        self.storage.write_atomic(MANIFEST_NAME, records[1])
        for file in sorted(replaced - manifest.files.keys()):
            self.storage.delete(file)

    def _refuse_if_taken(self) -> None:
        taken = self.storage.exists(MANIFEST_NAME) or self._foreign_metadata() is not None
        if taken:
            raise CheckpointExistsError(
                f"{self.storage.address} already holds a committed checkpoint; save elsewhere, or pass overwrite=True"
            )

    def _foreign_metadata(self) -> Metadata | None:
        """The `.metadata` of a stock checkpoint in the target. Ours means nothing: it is written before the commit."""
        if not self.storage.exists(METADATA_NAME):
            return None
        try:
            metadata = dcp_metadata.loads(self.storage.read_bytes(METADATA_NAME))
        except CheckpointError:
            return Metadata({})  # somebody's, and not for us to judge
        return None if dcp_metadata.is_ours(metadata) else metadata

    def _committed_files(self) -> set[str]:
        """Data files of the checkpoint that is about to be replaced. A damaged one names none."""
        try:
            if self.storage.exists(MANIFEST_NAME):
                return set(Manifest.from_json(self.storage.read_bytes(MANIFEST_NAME)).files)
            foreign = self._foreign_metadata()
            return set(dcp_metadata.to_manifest(foreign).files) if foreign is not None else set()
        except CheckpointError:
            return set()


def _assign(items: Sequence[WriteItem], threads: int, max_file_bytes: int) -> list[list[WriteItem]]:
    """Items per file: the largest tensors first, each to the emptiest thread; a thread's share is cut into files."""
    shares: list[list[WriteItem]] = [[] for _ in range(threads)]
    loads = [0] * threads
    ordered = sorted(items, key=_item_bytes, reverse=True) if threads > 1 else items
    for item in ordered:
        emptiest = loads.index(min(loads))
        shares[emptiest].append(item)
        loads[emptiest] += _item_bytes(item)
    return [batch for share in shares for batch in _batches(share, max_file_bytes)]


def _batches(items: Sequence[WriteItem], max_bytes: int) -> list[list[WriteItem]]:
    batches: list[list[WriteItem]] = []
    size = max_bytes
    for item in items:
        size += _item_bytes(item)
        if size > max_bytes:
            batches.append([])
            size = _item_bytes(item)
        batches[-1].append(item)
    return batches


def _item_bytes(item: WriteItem) -> int:
    if item.tensor_data is None:
        return 1
    part = _part(item)
    return max(1, part.box.num_elements * part.dtype.itemsize)


def _part(item: WriteItem) -> Part[WriteItem]:
    data = item.tensor_data
    if data is None:
        raise UsageError(f"the plan's item {item.index} is a tensor without `tensor_data`")
    return Part(item, data.properties.dtype, Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes)))


def _resolve_tensors(
    planner: SavePlanner, items: Iterable[WriteItem]
) -> Iterator[tuple[Part[WriteItem], torch.Tensor]]:
    """The tensors among these items, each resolved when its turn comes, because that may allocate memory.

    Raises:
        UsageError: a tensor is not what the plan says.
    """
    for item in items:
        if item.type == WriteItemType.BYTE_IO:
            continue
        part = _part(item)
        tensor = planner.resolve_data(item)
        if not isinstance(tensor, torch.Tensor) or (tensor.dtype, tuple(tensor.shape)) != (part.dtype, part.box.sizes):
            raise UsageError(
                f"{item.index.fqn!r} was planned as {part.dtype} of shape {part.box.sizes} but is now "
                f"{getattr(tensor, 'dtype', type(tensor))} of shape {tuple(getattr(tensor, 'shape', ()))}; "
                "do not change the state dict during a save"
            )
        yield part, tensor


def _object_result(item: WriteItem, entry: ObjectEntry) -> WriteResult:
    return WriteResult(item.index, entry.length, Written(entry, f"{entry.checksum:016x}"))


def _tensor_result(item: WriteItem, chunk: Chunk) -> WriteResult:
    return WriteResult(item.index, chunk.length, Written(chunk, digest(_part(item), chunk.checksums)))


def _digest_replicas(items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
    """Digests of what this rank holds and another rank writes: the coordinator compares (see `commit`)."""
    digests = digest_tensors(_resolve_tensors(planner, items))
    digests += [
        (item, f"{xxhash.xxh3_64_intdigest(read_object(planner, item).container):016x}")
        for item in items
        if item.type == WriteItemType.BYTE_IO
    ]
    return [WriteResult(item.index, 0, Replica(text)) for item, text in digests]
