"""What a delta stands for: the elements of an anchor, and what every step since then has changed.

chain.manifest    the record of that: the anchor's chunks, with the delta's checksums
chain.rebuild     a chunk of it: the anchor's, each step's changes, and a comparison with those checksums
chain.changes     what the steps after some step have changed of a part
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

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

__all__ = ["Chain", "chain_at"]


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

    def rebuild(self, saved: SavedChunk) -> torch.Tensor:
        """A chunk of `manifest`.

        Raises:
            IntegrityError: it is not what was published.
            StorageError, FormatError: something cannot be read.
        """
        key = saved.name, saved.chunk.box.offsets
        stored = SavedChunk(saved.name, saved.dtype, self._chunks[key])
        whole = torch.empty(stored.chunk.box.sizes, dtype=stored.dtype)
        whole_at = [number for number, parts in enumerate(self._parts) if parts[key].coding == deltas.WHOLE]
        if not whole_at:
            self._read(self._anchor.storage, stored, Box.whole(tuple(whole.shape)), whole)
        memory = bytes_of(whole)
        for coding, data in self.changes(key, since=max(whole_at, default=0)):
            if coding == deltas.WHOLE:
                memory[:] = bytes_of(data)
            else:
                apply_delta(bytes_of(data), memory, whole.element_size())
        assert saved.chunk.checksums is not None, "every part has some"
        check_blocks(
            memory, saved.chunk.checksums, file=self._deltas[-1].storage.address, start=0, data_start=0, name=saved.name
        )
        return whole

    def changes(self, key: Key, since: int) -> Iterator[tuple[str, torch.Tensor]]:
        """How the steps code a part, and the bytes.

        Args:
            since: a position in `identities`: those of the steps after it.
        """
        for delta, parts in zip(self._deltas[since:], self._parts[since:], strict=True):
            part = parts[key]
            data = torch.empty(part.length, dtype=torch.uint8)
            if part.length:
                [chunk] = delta.manifest.tensors[part.holder].chunks
                saved = SavedChunk(part.holder, torch.uint8, chunk)
                self._read(delta.storage, saved, Box((part.start,), (part.length,)), data)
            yield part.coding, data

    def _read(self, storage: Storage, saved: SavedChunk, box: Box, target: torch.Tensor) -> None:
        sources = locate(storage, {0: saved}, self._tuning, verify=True)
        fetch(storage, [Piece(sources[0], box, target)], self._tuning)


def chain_at(storage: Storage, manifest: Manifest, tuning: Tuning) -> Chain | None:
    """The chain of a delta; None for a checkpoint that is whole.

    Raises:
        CheckpointNotFoundError, FormatError: it is broken.
    """
    if deltas.LINK not in manifest.objects:
        return None
    return Chain(links_of(storage, manifest), tuning)
