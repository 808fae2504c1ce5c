"""CheckpointReader: any checkpoint, ours or somebody else's, reading only the bytes that are wanted.

read_manifest    `manifest.json`, else foreign.recognize
read_tensors     chunk_sources.locate where the elements start, ranged_reads.run exactly the wanted bytes;
                 what a delta stands for is rebuilt (delta_chain.py)
read_values      from the manifest, or the object's container read whole (objects.py)
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ray_ckpt.errors import FormatError, UsageError
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.deltas import REBUILT
from ray_ckpt.format.manifest import MANIFEST_NAME, Manifest, ObjectEntry
from ray_ckpt.format.torch_internals import ExtensionRegistry, narrow
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.progress import NOBODY, Meter
from ray_ckpt.storage.chunk_sources import SavedChunk, load_whole, locate
from ray_ckpt.storage.delta_chain import Chain, chain_at
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.foreign import recognize
from ray_ckpt.storage.member_sums import LongMember, check_members, long_members
from ray_ckpt.storage.objects import Decoder, decoded_containers, read_values
from ray_ckpt.storage.ranged_reads import Piece, Range, Tuning, cut, run, tuning_for
from ray_ckpt.storage.record_files import parse_or_take, read_record

__all__ = ["CheckpointReader", "TensorReads", "Wanted"]


BATCH_BYTES = 64 << 20
"""Bytes of chunks that are rebuilt together; a larger one is alone."""


class Wanted(NamedTuple):
    """A box of a saved chunk and the tensor of its shape that wants it."""

    saved: SavedChunk
    box: Box
    """The box in the chunk's own coordinates."""
    target: torch.Tensor

    def fill(self, whole: torch.Tensor, meter: Meter) -> None:
        """Give the target its part of all elements of the chunk."""
        self.target.copy_(narrow(whole, self.box.offsets, self.box.sizes))
        meter.add(self.saved.chunk.length)


def _batches(items: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    """Items whose chunks are rebuilt together."""
    batch: list[Wanted] = []
    num_bytes = 0
    for item in items:
        num_bytes += item.saved.chunk.length
        if batch and num_bytes > BATCH_BYTES:
            yield batch
            batch, num_bytes = [], item.saved.chunk.length
        batch.append(item)
    if batch:
        yield batch


@dataclasses.dataclass(frozen=True)
class TensorReads:
    """What has to be read to fill tensors."""

    storage: Storage
    tuning: Tuning
    ranges: Sequence[Range]
    """Sorted as they lie in the files."""
    undivided: Sequence[Wanted]
    """Elements whose chunks can only be read and decoded whole."""
    members: Sequence[LongMember]
    decoder: Decoder
    on_cuda: bool
    """Whether the ranges are read for a CUDA device."""
    rebuild: Callable[[Sequence[SavedChunk]], Sequence[torch.Tensor]]
    """Gives chunks of which only changes are stored."""

    def run(self, meter: Meter = NOBODY) -> None:
        """Read all of it."""
        self.read_undivided(meter)
        run(self.storage, self.ranges, self.tuning, meter, pinned=self.on_cuda)
        self.check()

    def read_undivided(self, meter: Meter = NOBODY) -> None:
        meter.expect(sum(item.saved.chunk.length for item in self.undivided))
        rebuilt: list[Wanted] = []
        for item in self.undivided:
            if REBUILT in item.saved.chunk.transforms:
                rebuilt.append(item)
            else:
                whole = load_whole(self.storage, item.saved, self.decoder, self.tuning)
                item.fill(whole, meter)
        for batch in _batches(rebuilt):
            for item, whole in zip(batch, self.rebuild([item.saved for item in batch]), strict=True):
                item.fill(whole, meter)

    def check(self) -> None:
        """Compare what can only be compared when all ranges have been read."""
        check_members(self.members, self.tuning.threads)


class CheckpointReader:
    """Reads one checkpoint.

    Args:
        target: a checkpoint's directory, or a file by `torch.save` or safetensors; a local path, a URI as `Storage`
            takes it, or a `Storage`.
        verify_checksums: check every byte that is read against the checksum recorded when it was saved. Other
            programs' checkpoints have at most the CRC-32 of zip members, which is compared where one is read whole.
        trusted: let the checkpoint's pickles run whatever code they name. Only for a checkpoint whose author you trust.
        threads: number of reads at the same time; by default 12 over a network, and on local files as many as this rank
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
        if threads is not None and threads < 1:
            raise UsageError(f"threads={threads} must be at least 1")
        self.storage = Storage.of(target)
        self.verify_checksums = verify_checksums
        self.trusted = trusted
        self.threads = threads
        self.files = self.storage
        """Where the manifest's files are; for a target that is itself a file, its directory."""
        self.kind = ""
        """Kind of checkpoint that `read_manifest` has recognized, in words; empty for one of ours."""
        self.notes: tuple[str, ...] = ()
        """What `read_manifest` had to leave out, and why."""
        self.decoder = Decoder(extensions or ExtensionRegistry(), trusted=trusted)
        self.chain: Chain | None = None
        """What it is built on, where it is a delta and its record has been read."""

    @property
    def address(self) -> str:
        return self.storage.address

    def read_manifest(self, record: bytes | Manifest | None = None) -> Manifest:
        """What the checkpoint holds, at the cost of one small read. Non-tensor values are in it: `Manifest.values()`.

        Of a delta it is what that stands for, at the cost of a small read for each step that it is built on.

        For another program's checkpoint (stock DCP, accelerate, Lightning, `torch.save`, safetensors) the manifest is
        derived from the headers there; it has no checksums of ours, and values only where a header holds them.

        Args:
            record: the bytes of its `manifest.json`, where somebody has read them already, or what they say.

        Raises:
            CheckpointNotFoundError: there is no committed checkpoint, or none of a step that it is built on.
            FormatError, UnsafeCheckpointError: there is one, but it is damaged or not safe to read.
        """
        manifest = self.read_stored(record)
        self.chain = chain_at(self.storage, manifest, self._tuning)
        return manifest if self.chain is None else self.chain.manifest

    def read_stored(self, record: bytes | Manifest | None = None) -> Manifest:
        """As `read_manifest`, but of a delta what it consists of."""
        if record is not None:
            self.files = self.storage
            if isinstance(record, Manifest):
                return record
            return parse_or_take(record, f"{self.storage.address}/{MANIFEST_NAME}")
        if self.storage.exists(MANIFEST_NAME):
            self.files = self.storage
            return read_record(self.storage)
        found = recognize(self.storage, trusted=self.trusted)
        self.files, self.kind, self.notes = found.storage, found.kind, found.notes
        return found.manifest

    def read_tensors(self, wanted: Sequence[Wanted], meter: Meter = NOBODY) -> None:
        """Fill targets with boxes of saved chunks, in few requests.

        Args:
            meter: counts the bytes that are read; of what must be decoded whole, when it has been.
        """
        if wanted:
            self.plan_tensors(wanted).run(meter)

    def plan_tensors(self, wanted: Sequence[Wanted]) -> TensorReads:
        """What has to be read to fill these targets. Of another program's file it may have to be looked for."""
        storage, tuning = self.files, self._tuning
        with collector_paused():
            chunks = {position: item.saved for position, item in enumerate(wanted)}
            sources = locate(storage, chunks, tuning, verify=self.verify_checksums)
            pieces = [Piece(source, *wanted[position][1:]) for position, source in sources.items()]
            members = long_members(pieces, tuning) if self.verify_checksums else []
            pieces += [member.descriptor for member in members if member.descriptor is not None]
            undivided = [item for position, item in enumerate(wanted) if position not in sources]
            on_cuda = any(piece.target.is_cuda for piece in pieces)
            ranges = cut(pieces, tuning)
            return TensorReads(storage, tuning, ranges, undivided, members, self.decoder, on_cuda, self._rebuild)

    def _rebuild(self, chunks: Sequence[SavedChunk]) -> Sequence[torch.Tensor]:
        if self.chain is None:  # somebody else has read the record
            self.read_manifest()
        if self.chain is None:
            raise FormatError(f"{self.address} is no delta any more: it was saved again while it was read")
        return self.chain.rebuild(chunks)

    def read_values(self, entries: Mapping[str, ObjectEntry]) -> dict[str, Any]:
        """Non-tensors by name."""
        if not entries:
            return {}
        return read_values(self.files, entries, self.decoder, self._tuning, verify=self.verify_checksums)

    def read_containers(self, entries: Mapping[str, ObjectEntry]) -> dict[str, bytes]:
        """The containers of those objects whose value is not in the manifest, without the transforms."""
        return decoded_containers(self.files, entries, self.decoder, self._tuning, verify=self.verify_checksums)

    @property
    def _tuning(self) -> Tuning:
        tuning = tuning_for(self.storage)
        return dataclasses.replace(tuning, threads=self.threads or tuning.threads)
