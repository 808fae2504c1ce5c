"""Copying a checkpoint's bytes into a new file, box by box, in bounded memory.

    rewrite ─┬─ objects: their values, or their containers as they are
             └─ tensors, some MiB at a time ── reader, checked ──> buffer ── pack_pieces, hashed ──> file

What comes next is read while one piece is written. Held at any time: two buffers of `BATCH_BYTES`, what `fetch` reads
into on the way (4 MiB for local files, 48 MiB over a network), and the objects. A tensor that a DCP stream extension
has encoded is the exception: it must be decoded whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ray_ckpt.errors import UnsafeCheckpointError
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.manifest import Chunk, ObjectEntry
from ray_ckpt.format.torch_container import parse_dtype
from ray_ckpt.format.torch_internals import ExtensionRegistry, narrow
from ray_ckpt.progress import NOBODY
from ray_ckpt.rounding import round_up
from ray_ckpt.storage.checkpoint_reader import CheckpointReader, Wanted
from ray_ckpt.storage.chunk_sources import SavedChunk
from ray_ckpt.storage.data_file import Packed, pack_pieces
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.objects import Decoder, SavedObject, decoded_containers, saved_object
from ray_ckpt.storage.ranged_reads import tuning_for
from ray_ckpt.storage.staging import bytes_of

__all__ = ["BATCH_BYTES", "TensorPieces", "WantedTensor", "rewrite"]

BATCH_BYTES = 16 << 20
"""Size of a buffer: so many bytes of tensors are read at once, while as many are written."""

_ALIGNMENT = 16
"""Alignment of a tensor in the buffer, in bytes: the size of the widest element."""

Entry = tuple[int, torch.Tensor]
"""The caller's key of a tensor, and one of its dtype and shape on the meta device."""


@dataclass(frozen=True)
class WantedTensor:
    """A part of a tensor that goes into the new file."""

    name: str
    dtype: str
    box: Box
    chunks: tuple[Chunk, ...]
    """The saved chunks that hold its elements."""


def rewrite(
    source: Storage,
    target: Storage,
    file: str,
    objects: Mapping[int, tuple[str, ObjectEntry]],
    tensors: Mapping[int, WantedTensor],
    count: Callable[[int], None] = NOBODY.add,
) -> Packed[int]:
    """Write one file from the bytes of others. It is durable on return.

    Args:
        source: reader of the checkpoint that has the chunks and objects.
        file: name of the new file in `target`.
        objects: the caller's key -> name and entry.
        tensors: the caller's key -> parts of tensors.
        count: called with the bytes of tensors as they are written.

    Raises:
        IntegrityError: what was read differs from its checksum.
        CheckpointError, StorageError: something cannot be read, or not be written.
    """
    reading = TensorPieces(source)
    saved = reading.objects(objects)
    return pack_pieces(target, file, saved, reading.pieces(tensors), count)


class TensorPieces:
    """The bytes of a checkpoint's tensors and objects, for whoever writes or compares them.

    Args:
        source: the directory of the checkpoint's files.
    """

    def __init__(self, source: Storage) -> None:
        self._storage = source
        self._reader = CheckpointReader(source)
        self._tuning = tuning_for(source)
        self._decoder = Decoder(ExtensionRegistry(), trusted=False)

    # ------------------------------------------------------------------------------------------------- objects

    def objects(self, entries: Mapping[int, tuple[str, ObjectEntry]]) -> list[tuple[int, SavedObject]]:
        """Values that the manifest holds are written anew; everything else keeps its bytes."""
        containers = decoded_containers(self._storage, dict(entries.values()), self._decoder, self._tuning, verify=True)
        return [(key, self._object(name, entry, containers)) for key, (name, entry) in entries.items()]

    def _object(self, name: str, entry: ObjectEntry, containers: Mapping[str, bytes]) -> SavedObject:
        if entry.inline is not None:
            return saved_object(entry.inline.value)
        data = containers[name]
        try:
            value = self._decoder.load(data, name)
        except UnsafeCheckpointError:
            return SavedObject(data, None)  # what it is, is for whoever loads it with trusted=True
        return SavedObject(data, saved_object(value).inline)

    # ------------------------------------------------------------------------------------------------- tensors

    def pieces(self, tensors: Mapping[int, WantedTensor]) -> Iterator[tuple[Entry, memoryview]]:
        """The bytes of the tensors, in order. A piece is valid until the next one is asked for."""
        buffers = itertools.cycle([torch.empty(BATCH_BYTES, dtype=torch.uint8) for _ in range(2)])
        ahead: Future[list[tuple[Entry, memoryview]]] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="ray_ckpt-ahead") as pool:
            for batch in _batches(tensors):
                following = pool.submit(self._read, batch, next(buffers))
                if ahead is not None:
                    yield from ahead.result()
                ahead = following
            if ahead is not None:
                yield from ahead.result()

    def _read(self, batch: Sequence[_Fragment], buffer: torch.Tensor) -> list[tuple[Entry, memoryview]]:
        views: list[torch.Tensor] = []
        position = 0
        for fragment in batch:
            end = position + fragment.num_bytes
            views.append(buffer[position:end].view(fragment.entry[1].dtype).view(fragment.box.sizes))
            position = round_up(end, _ALIGNMENT)
        self._fill(batch, views)
        return [(fragment.entry, bytes_of(view)) for fragment, view in zip(batch, views, strict=True)]

    def _fill(self, batch: Sequence[_Fragment], views: Sequence[torch.Tensor]) -> None:
        wanted = []
        for fragment, view in zip(batch, views, strict=True):
            for chunk in fragment.tensor.chunks:
                common = chunk.box.intersect(fragment.box)
                if common is not None:
                    saved = SavedChunk(fragment.tensor.name, view.dtype, chunk)
                    place = common.within(fragment.box)
                    target = narrow(view, place.offsets, place.sizes)
                    wanted.append(Wanted(saved, common.within(chunk.box), target))
        self._reader.read_tensors(wanted)


@dataclass(frozen=True)
class _Fragment:
    """Consecutive elements of a part, few enough for the buffer."""

    tensor: WantedTensor
    entry: Entry
    box: Box

    @property
    def num_bytes(self) -> int:
        return self.box.num_elements * self.entry[1].dtype.itemsize


def _batches(tensors: Mapping[int, WantedTensor]) -> Iterator[list[_Fragment]]:
    """Fragments that fill the buffer, in order."""
    batch: list[_Fragment] = []
    position = 0
    for key, tensor in tensors.items():
        entry = key, torch.empty(tensor.box.sizes, dtype=parse_dtype(tensor.dtype), device="meta")
        for box in _row_major(tensor.box, BATCH_BYTES // entry[1].dtype.itemsize):
            fragment = _Fragment(tensor, entry, box)
            if position + fragment.num_bytes > BATCH_BYTES:
                yield batch
                batch, position = [], 0
            batch.append(fragment)
            position = round_up(position + fragment.num_bytes, _ALIGNMENT)
    if batch:
        yield batch


def _row_major(box: Box, max_elements: int) -> Iterator[Box]:
    """Cut a box into boxes of at most `max_elements` whose elements follow each other in row-major order."""
    if box.num_elements <= max_elements:
        yield box
        return
    dim = next(d for d, size in enumerate(box.sizes) if size > 1)
    inner = box.num_elements // box.sizes[dim]
    step = max(1, max_elements // inner)
    for start in range(0, box.sizes[dim], step):
        size = min(step, box.sizes[dim] - start)
        offsets = tuple(offset + start if d == dim else offset for d, offset in enumerate(box.offsets))
        yield from _row_major(
            Box(offsets, tuple(size if d == dim else s for d, s in enumerate(box.sizes))), max_elements
        )
