"""ArrowStorageReader: loads any checkpoint through `dcp.load`, reading only the bytes that are wanted.

dcp.load ─┬─ every rank   read_metadata          CheckpointReader.read_manifest, as a load planner wants it
          ├─ every rank   set_up_storage_reader
          └─ every rank   read_data ─┬─ tensors: CheckpointReader.read_tensors into what the planner resolves
                                     └─ objects: from the manifest, or read whole (planner_objects.py)
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ray_ckpt.dcp.planner_objects import read_objects
from ray_ckpt.dcp.scattered import refuse_scattered
from ray_ckpt.errors import FormatError, UsageError
from ray_ckpt.format import dcp_metadata
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.manifest import Chunk, Manifest, ObjectEntry
from ray_ckpt.format.memory import fault, overlapping
from ray_ckpt.format.torch_internals import ExtensionRegistry
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.storage.checkpoint_reader import CheckpointReader, Wanted
from ray_ckpt.storage.chunk_sources import SavedChunk
from ray_ckpt.storage.files import Storage

__all__ = ["ArrowStorageReader"]


class ArrowStorageReader(StorageReader):
    """A DCP storage reader for `dcp.load`, which reads only the bytes that this rank wants.

    Example:
        >>> import torch
        >>> import torch.distributed.checkpoint as dcp
        >>> from ray_ckpt import ArrowStorageReader
        >>> metadata = dcp.save({"weight": torch.ones(3)}, checkpoint_id="stock", no_dist=True)  # stock DCP's writer
        >>> state = {"weight": torch.zeros(3)}
        >>> dcp.load(state, storage_reader=ArrowStorageReader("stock"), no_dist=True)
        >>> state["weight"].tolist()
        [1.0, 1.0, 1.0]

    Args:
        target: a checkpoint's directory, or a file by `torch.save` or safetensors: a local path, a URI as `Storage`
            takes it, or a `Storage`. `checkpoint_id` of `dcp.load` replaces it; None waits for that.
        verify_checksums: check every byte that is read against the checksum recorded when it was saved. Other
            programs' checkpoints have at most the CRC-32 of zip members, which is compared where one is read whole.
        trusted: let the checkpoint's pickles run whatever code they name. Only for a checkpoint whose author you trust.
        threads: number of reads at the same time; by default 12 over a network, and on local files as many as this rank
            has cores, up to four.
        extensions: DCP stream extensions that decode what a stock writer encoded.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | Storage | None = None,
        *,
        verify_checksums: bool = True,
        trusted: bool = False,
        threads: int | None = None,
        extensions: ExtensionRegistry | None = None,
    ) -> None:
        super().__init__()
        self._open = functools.partial(
            CheckpointReader,
            verify_checksums=verify_checksums,
            trusted=trusted,
            threads=threads,
            extensions=extensions,
        )
        self._opened = None if target is None else self._open(target)
        self._entries: Mapping[MetadataIndex, Chunk | ObjectEntry] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    @property
    def _reader(self) -> CheckpointReader:
        if self._opened is None:
            raise UsageError(
                "where is the checkpoint? Say ArrowStorageReader(path) or dcp.load(..., checkpoint_id=path)"
            )
        return self._opened

    @property
    def checkpoint_id(self) -> str:
        """Where the checkpoint is, without credentials and options."""
        return self._reader.address

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return bool(os.fspath(checkpoint_id))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id:
            retry = None if self._opened is None else self._opened.storage.retry
            self._opened = self._open(Storage(checkpoint_id, retry=retry))
        _ = self._reader  # DCP calls this first, on every rank: the time to say that there is none
        self._entries = {}

    def read_manifest(self) -> Manifest:
        """What the checkpoint holds, at the cost of one small read; as `CheckpointReader.read_manifest`."""
        return self._reader.read_manifest()

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """The manifest as a load planner wants it.

        The catch-all must not be called `kwargs`: DCP would take that as an offer of rank-local metadata, and a rank
        that meets a passing error would leave the collectives while the others wait in them.
        """
        manifest = self.read_manifest()
        with collector_paused():
            return dcp_metadata.to_metadata(manifest)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if metadata.storage_data is None:
            raise UsageError("set_up_storage_reader needs the Metadata that read_metadata of this class returned")
        self._entries = metadata.storage_data
        self._dtypes = {
            name: entry.properties.dtype
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's tensors and hand it its objects. Nothing is committed before all of it is checked."""
        refuse_scattered(planner)
        tensors = [item for item in plan.items if item.type != LoadItemType.BYTE_IO]
        filled = self._fill(tensors, planner)
        objects = [(item, self._object(item)) for item in plan.items if item.type == LoadItemType.BYTE_IO]
        read_objects(self._reader, objects, planner)
        for item, target in zip(tensors, filled, strict=True):
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _fill(self, items: Sequence[ReadItem], planner: LoadPlanner) -> list[torch.Tensor]:
        """Resolve the items' targets and read into them."""
        with collector_paused():
            targets = [planner.resolve_tensor(item).detach() for item in items]
            wanted = []
            for item, target in zip(items, targets, strict=True):
                if wrong := fault(target) or overlapping(target):
                    raise UsageError(f"{item.dest_index.fqn!r} {wrong}")
                box, saved = Box(tuple(item.storage_offsets), tuple(item.lengths)), self._chunk(item)
                _check(item, box, target, saved)
                wanted.append(Wanted(saved, box, target))
        self._reader.read_tensors(wanted)
        return targets

    def _chunk(self, item: ReadItem) -> SavedChunk:
        entry = self._entries.get(item.storage_index)
        if not isinstance(entry, Chunk):
            raise FormatError(f"the plan wants the tensor {item.storage_index}, which the checkpoint does not hold")
        name = item.storage_index.fqn
        return SavedChunk(name, self._dtypes[name], entry)

    def _object(self, item: ReadItem) -> ObjectEntry:
        entry = self._entries.get(item.storage_index)
        if not isinstance(entry, ObjectEntry):
            raise FormatError(f"the plan wants the object {item.storage_index}, which the checkpoint does not hold")
        return entry


def _check(item: ReadItem, box: Box, target: torch.Tensor, saved: SavedChunk) -> None:
    if not box.fits(saved.chunk.box.sizes):
        raise FormatError(f"the plan wants {box} of {item.storage_index.fqn!r}, whose chunk is {saved.chunk.box.sizes}")
    if tuple(target.shape) != box.sizes:
        raise UsageError(
            f"the load planner gave a target of shape {tuple(target.shape)} for {box.sizes} of {item.dest_index.fqn!r}"
        )
