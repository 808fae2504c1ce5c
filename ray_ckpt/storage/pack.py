"""One data file: containers of tensors and objects, one after the other.

pack_file(storage, name, items) ─┬─ objects: one container per distinct value
                                 └─ tensors: head, elements straight from their memory, tail; hashed on the way
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType

from ray_ckpt.errors import UsageError
from ray_ckpt.format.blob import ALIGNMENT, Container, container
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.manifest import Chunk, ObjectEntry
from ray_ckpt.storage.files import OutputFile, Storage
from ray_ckpt.storage.objects import INLINE_BLOB_BYTES, SavedObject, read_object
from ray_ckpt.storage.staging import BlockHasher, block_size, host_pieces

_BUFFER_BYTES = 1 << 20
"""Small writes are collected up to this size."""

_DIRECT_BYTES = 128 << 10
"""Writes of at least this size go out as they are."""


def pack_file(
    storage: Storage, name: str, items: Sequence[WriteItem], planner: SavePlanner
) -> list[tuple[WriteItem, Chunk | ObjectEntry]]:
    """Write one file with these items. It is durable on return."""
    objects = [item for item in items if item.type == WriteItemType.BYTE_IO]
    tensors = [item for item in items if item.type != WriteItemType.BYTE_IO]
    with storage.create(name) as file:
        packer = _Packer(file)
        packed: list[tuple[WriteItem, Chunk | ObjectEntry]] = [
            (item, packer.add_object(read_object(planner, item))) for item in objects
        ]
        packed += packer.add_tensors(tensors, planner)
        packer.flush()
    return packed


def planned_chunk(item: WriteItem) -> tuple[torch.dtype, Box]:
    """Dtype and box of a planned tensor write."""
    data = item.tensor_data
    if data is None:
        raise UsageError(f"the plan's item {item.index} is a tensor without `tensor_data`")
    return data.properties.dtype, Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))


def resolve_tensors(planner: SavePlanner, items: Iterable[WriteItem]) -> Iterator[tuple[WriteItem, torch.Tensor]]:
    """The tensors of these items, each resolved when its turn comes, because that may allocate memory.

    Raises:
        UsageError: a tensor is not what the plan says.
    """
    for item in items:
        tensor = planner.resolve_data(item)
        dtype, box = planned_chunk(item)
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tuple(tensor.shape) != box.sizes:
            raise UsageError(
                f"{item.index.fqn!r} was planned as {dtype} of shape {box.sizes} but is now "
                f"{getattr(tensor, 'dtype', type(tensor))} of shape {tuple(getattr(tensor, 'shape', ()))}; "
                "do not change the state dict during a save"
            )
        yield item, tensor


class _Packer:
    """Appends containers to an open file."""

    def __init__(self, file: OutputFile) -> None:
        self._file = file
        self._position = 0
        self._buffer = bytearray()
        self._objects: dict[bytes, int] = {}

    def add_object(self, saved: SavedObject) -> ObjectEntry:
        """Append an object, or point to an equal one that is already in this file."""
        data = saved.container
        if data not in self._objects:
            self._align()
            self._objects[data] = self._position
            self._append(data)
        small = saved.inline is None and len(data) <= INLINE_BLOB_BYTES
        return ObjectEntry(
            file=self._file.name,
            start=self._objects[data],
            length=len(data),
            inline=saved.inline,
            blob=data if small else None,
            checksum=xxhash.xxh3_64_intdigest(data),
        )

    def add_tensors(self, items: Sequence[WriteItem], planner: SavePlanner) -> list[tuple[WriteItem, Chunk]]:
        """Append tensors, hashing their bytes on the way."""
        packed: list[tuple[WriteItem, Chunk]] = []
        opened: _OpenTensor | None = None
        for item, piece in host_pieces(resolve_tensors(planner, items)):
            if opened is None or item is not opened.item:
                if opened is not None:
                    packed.append(self._finish_tensor(opened))
                opened = self._start_tensor(item)
            opened.hasher.update(piece)
            self._append(piece)
        if opened is not None:
            packed.append(self._finish_tensor(opened))
        return packed

    def flush(self) -> None:
        if self._buffer:
            self._file.write(self._buffer)
            self._buffer = bytearray()

    def _start_tensor(self, item: WriteItem) -> _OpenTensor:
        dtype, box = planned_chunk(item)
        wrapping = container(dtype, box.sizes)
        self._align()
        opened = _OpenTensor(item, box, wrapping, self._position, BlockHasher(block_size(wrapping.data_bytes)))
        self._append(wrapping.head)
        return opened

    def _finish_tensor(self, opened: _OpenTensor) -> tuple[WriteItem, Chunk]:
        self._append(opened.container.tail)
        return opened.item, Chunk(
            box=opened.box,
            file=self._file.name,
            start=opened.start,
            length=opened.container.length,
            data_start=opened.start + len(opened.container.head),
            checksums=opened.hasher.finish(),
        )

    def _align(self) -> None:
        if padding := -self._position % ALIGNMENT:
            self._append(bytes(padding))

    def _append(self, data: bytes | memoryview) -> None:
        self._position += len(data)
        if len(data) >= _DIRECT_BYTES:
            self.flush()
            self._file.write(data)
            return
        self._buffer += data
        if len(self._buffer) >= _BUFFER_BYTES:
            self.flush()


@dataclass
class _OpenTensor:
    """A tensor whose head is written and whose elements are on their way."""

    item: WriteItem
    box: Box
    container: Container
    start: int
    hasher: BlockHasher
