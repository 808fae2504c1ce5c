"""ArrowStorageReader: loads any checkpoint, ours or somebody else's, reading only the bytes that are wanted.

dcp.load ─┬─ every rank   read_metadata          read_manifest: `manifest.json`, else foreign.find
          ├─ every rank   set_up_storage_reader
          └─ every rank   read_data ─┬─ objects: from the manifest, or read whole (objects.py)
                                     └─ tensors: locate.locate where they start, fetch.fetch exactly the wanted bytes
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint._extension import ExtensionRegistry
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ray_ckpt.collector import collector_paused
from ray_ckpt.errors import FormatError, UsageError
from ray_ckpt.format import dcp_metadata
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.manifest import MANIFEST_NAME, Chunk, Manifest, ObjectEntry
from ray_ckpt.storage.fetch import Piece, Tuning, fetch, local_threads, tuning_for
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.foreign import find
from ray_ckpt.storage.locate import SavedChunk, load_whole, locate
from ray_ckpt.storage.objects import Decoder, read_objects, read_values

__all__ = ["ArrowStorageReader"]


class Wanted(NamedTuple):
    """A box of a saved chunk and the tensor of its shape that wants it."""

    saved: SavedChunk
    box: Box
    """In the chunk's own coordinates."""
    target: torch.Tensor


class ArrowStorageReader(StorageReader):
    """A DCP storage reader for `dcp.load`.

    Args:
        target: Where from: a checkpoint's directory, or a file by `torch.save` or safetensors; a local path, a URI as
            `Storage` takes it, or a `Storage`. `checkpoint_id` of `dcp.load` replaces it.
        verify_checksums: Check every byte that is read against the checksum recorded when it was saved. Checkpoints
            that stock DCP wrote have none.
        trusted: Let the checkpoint's pickles run whatever code they name. Only for a checkpoint whose author you trust.
        threads: Reads in flight; by default more over a network than on local files, where it is as many as this rank
            has cores, up to four.
        extensions: DCP stream extensions that decode what a stock writer encoded.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | Storage,
        *,
        verify_checksums: bool = True,
        trusted: bool = False,
        threads: int | None = None,
        extensions: ExtensionRegistry | None = None,
    ) -> None:
        super().__init__()
        if threads is not None and threads < 1:
            raise UsageError(f"threads={threads} must be at least 1")
        self.storage = target if isinstance(target, Storage) else Storage(target)
        self.verify_checksums = verify_checksums
        self.trusted = trusted
        self.threads = threads
        self.files = self.storage
        """Where the manifest's files are; for a target that is itself a file, its directory."""
        self.kind = ""
        """What `read_manifest` has recognised, in words; empty for a checkpoint of ours."""
        self.notes: tuple[str, ...] = ()
        """What of it `read_manifest` had to leave out, and why."""
        self._decoder = Decoder(extensions or ExtensionRegistry(), trusted=trusted)
        self._entries: Mapping[MetadataIndex, Chunk | ObjectEntry] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    @property
    def checkpoint_id(self) -> str:
        return self.storage.address

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return bool(os.fspath(checkpoint_id))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id:
            self.storage = self.files = Storage(checkpoint_id, retry=self.storage.retry)
        self._entries = {}

    def read_manifest(self) -> Manifest:
        """What the checkpoint holds, at the cost of one small read. Non-tensor values are in it: `Manifest.values()`.

        For what somebody else wrote (stock DCP, accelerate, Lightning, `torch.save`, safetensors) the manifest is
        derived from the headers there; it has no checksums, and values only where a header holds them.

        Raises:
            CheckpointNotFoundError: there is no committed checkpoint.
            FormatError, UnsafeCheckpointError: there is one, but it is damaged or not safe to read.
        """
        if self.storage.exists(MANIFEST_NAME):
            data = self.storage.read_bytes(MANIFEST_NAME)
            self.files = self.storage
            with collector_paused():
                return Manifest.from_json(data)
        found = find(self.storage, trusted=self.trusted)
        self.files, self.kind, self.notes = found.storage, found.kind, found.notes
        return found.manifest

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
        tensors = [item for item in plan.items if item.type != LoadItemType.BYTE_IO]
        filled = self._fill(tensors, planner)
        objects = [(item, self._object(item)) for item in plan.items if item.type == LoadItemType.BYTE_IO]
        read_objects(self.files, objects, planner, self._decoder, self._tuning, verify=self.verify_checksums)
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
                box, saved = Box(tuple(item.storage_offsets), tuple(item.lengths)), self._chunk(item)
                _check(item, box, target, saved)
                wanted.append(Wanted(saved, box, target))
        self.read_tensors(wanted)
        return targets

    def read_tensors(self, wanted: Sequence[Wanted]) -> None:
        """Fill targets with boxes of saved chunks, in few requests."""
        storage, tuning = self.files, self._tuning
        with collector_paused():
            chunks = {position: item.saved for position, item in enumerate(wanted)}
            sources = locate(storage, chunks, tuning, verify=self.verify_checksums)
        pieces: list[Piece] = []
        for position, (saved, box, target) in enumerate(wanted):
            if source := sources.get(position):
                pieces.append(Piece(source, box, target))
            else:
                whole = load_whole(storage, saved, self._decoder, tuning)
                target.copy_(narrow_tensor_by_index(whole, box.offsets, box.sizes))
        fetch(storage, pieces, tuning)

    def read_values(self, entries: Mapping[str, ObjectEntry]) -> dict[str, Any]:
        """Non-tensors by name."""
        return read_values(self.files, entries, self._decoder, self._tuning, verify=self.verify_checksums)

    @property
    def _tuning(self) -> Tuning:
        tuning = tuning_for(self.storage)
        threads = local_threads() if self.storage.is_local else tuning.threads
        return dataclasses.replace(tuning, threads=self.threads or threads)

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
