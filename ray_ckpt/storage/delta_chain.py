"""What a delta stands for: the elements of an anchor, and what every step since then has changed.

chain.manifest    the record of that: the anchor's chunks, with the delta's checksums
chain.rebuild     chunks of it: the anchor's, each step's changes, and a comparison with those checksums
chain.changes     what the steps after some step have changed of parts; carry_out changes it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ray_ckpt.format import deltas
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.deltas import Key, Part
from ray_ckpt.format.manifest import Manifest
from ray_ckpt.storage.chunk_sources import SavedChunk, locate
from ray_ckpt.storage.delta_codec import apply_delta
from ray_ckpt.storage.delta_links import Linked, links_of
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.good_reads import check_blocks
from ray_ckpt.storage.ranged_reads import Piece, Tuning, fetch
from ray_ckpt.storage.staging import bytes_of

__all__ = ["Chain", "carry_out", "chain_at"]


class Chain:
    """A delta and all that it is built on.

    Args:
        links: the anchor, then the deltas.

    Raises:
        FormatError: they were not cut alike.
    """

    def __init__(self, links: Sequence[Linked], tuning: Tuning) -> None:
        self._tuning = tuning
        self._anchor, self._deltas = links[0], links[1:]
        self._parts: list[Mapping[Key, Part]] = []
        for delta in self._deltas:
            self._parts.append(deltas.parts_of(delta.manifest))
            deltas.check_parts(self._anchor.manifest, self._parts[-1])
        self._chunks = {key: chunk for key, (_, chunk) in deltas.keyed_chunks(self._anchor.manifest)}
        self.manifest = deltas.rebuilt(self._anchor.manifest, links[-1].manifest, self._parts[-1])
        """The record of what it stands for."""
        self.identities = [deltas.identity(linked.manifest) for linked in links]
        """What the anchor and each delta hold."""

    def rebuild(self, chunks: Sequence[SavedChunk]) -> list[torch.Tensor]:
        """Chunks of `manifest`. All of them are in memory at once, and what has changed in them.

        Raises:
            IntegrityError: one is not what was published.
            StorageError, FormatError: something cannot be read.
        """
        keys = [(saved.name, saved.chunk.box.offsets) for saved in chunks]
        wholes = [torch.empty(saved.chunk.box.sizes, dtype=saved.dtype) for saved in chunks]
        since = {key: self._whole_since(key) for key in keys}
        self._read(
            self._anchor.storage,
            [
                (SavedChunk(saved.name, saved.dtype, self._chunks[key]), Box.whole(tuple(whole.shape)), whole)
                for key, saved, whole in zip(keys, chunks, wholes, strict=True)
                if since[key] is None
            ],
        )
        changes = self.changes({key: start or 0 for key, start in since.items()})
        for key, saved, whole in zip(keys, chunks, wholes, strict=True):
            memory = bytes_of(whole)
            carry_out(changes[key], memory, whole.element_size())
            assert saved.chunk.checksums is not None, "every part has some"
            where = self._deltas[-1].storage.address
            check_blocks(memory, saved.chunk.checksums, file=where, start=0, data_start=0, name=saved.name)
        return wholes

    def _whole_since(self, key: Key) -> int | None:
        """The last delta that has a part as it is; None where all of them build on the anchor's."""
        whole = [number for number, parts in enumerate(self._parts) if parts[key].coding == deltas.WHOLE]
        return max(whole, default=None)

    def changes(self, since: Mapping[Key, int]) -> dict[Key, list[tuple[str, torch.Tensor]]]:
        """How the steps code parts, and the bytes.

        Args:
            since: for each part a position in `identities`: the steps after it are wanted.
        """
        found: dict[Key, list[tuple[str, torch.Tensor]]] = {key: [] for key in since}
        for number, (delta, parts) in enumerate(zip(self._deltas, self._parts, strict=True)):
            reads = []
            for key, start in since.items():
                if start > number:
                    continue
                part = parts[key]
                data = torch.empty(part.length, dtype=torch.uint8)
                found[key].append((part.coding, data))
                if part.length:
                    [chunk] = delta.manifest.tensors[part.holder].chunks
                    saved = SavedChunk(part.holder, torch.uint8, chunk)
                    reads.append((saved, Box((part.start,), (part.length,)), data))
            self._read(delta.storage, reads)
        return found

    def _read(self, storage: Storage, reads: Sequence[tuple[SavedChunk, Box, torch.Tensor]]) -> None:
        saved = {number: read[0] for number, read in enumerate(reads)}
        sources = locate(storage, saved, self._tuning, verify=True)
        fetch(storage, [Piece(sources[number], box, data) for number, (_, box, data) in enumerate(reads)], self._tuning)


def chain_at(storage: Storage, manifest: Manifest, tuning: Tuning) -> Chain | None:
    """The chain of a delta; None for a checkpoint that is whole.

    Raises:
        CheckpointNotFoundError, FormatError: it is broken.
    """
    if deltas.LINK not in manifest.objects:
        return None
    return Chain(links_of(storage, manifest), tuning)


def carry_out(changes: Sequence[tuple[str, torch.Tensor]], memory: memoryview, element_bytes: int) -> bool:
    """Make of a part what it is after some steps, in place.

    Args:
        changes: as `Chain.changes` gives them.

    Returns:
        Whether one of the steps has it whole, so that what it was before makes no difference.

    Raises:
        FormatError: one of them is no delta of this part. The memory may then be of two steps.
    """
    has_whole = False
    for coding, data in changes:
        if coding == deltas.WHOLE:
            memory[:], has_whole = bytes_of(data), True
        else:
            apply_delta(bytes_of(data), memory, element_bytes)
    return has_whole
