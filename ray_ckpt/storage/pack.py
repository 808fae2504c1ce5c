"""One data file: containers of tensors and objects, one after the other.

pack_file(storage, name, ...) ─┬─ objects: one container per distinct value
                                 └─ tensors: head, elements straight from their memory, tail; hashed on the way
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import xxhash

from ray_ckpt.format.blob import ALIGNMENT, Container, container
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.manifest import BlockSums, Chunk, ObjectEntry
from ray_ckpt.storage.files import OutputFile, Storage
from ray_ckpt.storage.objects import INLINE_BLOB_BYTES, SavedObject
from ray_ckpt.storage.staging import BlockHasher, block_size, host_pieces

MAX_FILE_BYTES = 16 << 30
"""A rank starts another file before one grows past this; a single tensor may be larger."""

_BUFFER_BYTES = 1 << 20
"""Small writes are collected up to this size."""

_DIRECT_BYTES = 128 << 10
"""Writes of at least this size go out as they are."""

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Part(Generic[K]):
    """A box of a tensor that is about to be written."""

    key: K
    """The caller's name for it."""
    dtype: torch.dtype
    box: Box


@dataclass(frozen=True)
class Packed(Generic[K]):
    """What went into one file, by the caller's keys, in the order given."""

    tensors: list[tuple[K, Chunk]]
    objects: list[tuple[K, ObjectEntry]]


def pack_file(
    storage: Storage,
    name: str,
    objects: Iterable[tuple[K, SavedObject]],
    tensors: Iterable[tuple[Part[K], torch.Tensor]],
) -> Packed[K]:
    """Write one file. It is durable on return. Each tensor has the dtype and the sizes of its part."""
    return pack_pieces(storage, name, objects, host_pieces(tensors))


def pack_pieces(
    storage: Storage,
    name: str,
    objects: Iterable[tuple[K, SavedObject]],
    pieces: Iterable[tuple[Part[K], memoryview]],
) -> Packed[K]:
    """Write one file whose tensors come piece by piece, each one's in row-major order. It is durable on return."""
    with storage.create(name) as file:
        packer = _Packer(file)
        packed = Packed(
            objects=[(key, packer.add_object(saved)) for key, saved in objects], tensors=packer.add_pieces(pieces)
        )
        packer.flush()
    return packed


def digest(part: Part[K], sums: BlockSums | None) -> str:
    """Of a part's dtype, shape and bytes: equal things have equal digests.

    Args:
        sums: block sums of its bytes; None where there are none, as in an empty part.
    """
    return f"{part.dtype}{list(part.box.sizes)}:{xxhash.xxh3_128_hexdigest(b'' if sums is None else sums.sums)}"


def hash_tensors(tensors: Iterable[tuple[Part[K], torch.Tensor]]) -> list[tuple[Part[K], BlockSums]]:
    """Block sums of parts, as writing them would give."""
    hashed: list[tuple[Part[K], BlockSums]] = []
    opened: tuple[Part[K], BlockHasher] | None = None
    for part, piece in host_pieces(tensors):
        if opened is None or part is not opened[0]:
            if opened is not None:
                hashed.append((opened[0], opened[1].finish()))
            opened = part, BlockHasher(block_size(part.box.num_elements * part.dtype.itemsize))
        opened[1].update(piece)
    if opened is not None:
        hashed.append((opened[0], opened[1].finish()))
    return hashed


def share_out(sizes: Sequence[int], threads: int, max_file_bytes: int) -> list[list[int]]:
    """Indices of items per file: the largest first, each to the emptiest thread; a thread's share is cut into files.

    Args:
        sizes: bytes of each item.
    """
    shares: list[list[int]] = [[] for _ in range(threads)]
    loads = [0] * threads
    order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True) if threads > 1 else range(len(sizes))
    for index in order:
        emptiest = loads.index(min(loads))
        shares[emptiest].append(index)
        loads[emptiest] += sizes[index]
    return [batch for share in shares for batch in _batches(share, sizes, max_file_bytes)]


def _batches(share: Sequence[int], sizes: Sequence[int], max_bytes: int) -> list[list[int]]:
    batches: list[list[int]] = []
    size = max_bytes
    for index in share:
        size += sizes[index]
        if size > max_bytes:
            batches.append([])
            size = sizes[index]
        batches[-1].append(index)
    return batches


def write_in_threads(storage: Storage, writes: Sequence[Callable[[], T]], threads: int) -> list[T]:
    """Run the writes, each again after transient errors; every one's failure is raised here.

    A single thread is the caller's own, whose current CUDA stream has produced the tensors.
    """
    if threads == 1:
        return [storage.retried(write) for write in writes]
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    with ThreadPoolExecutor(threads, thread_name_prefix="ray_ckpt-write") as pool:
        futures = [pool.submit(storage.retried, write) for write in writes]
        return [future.result() for future in futures]


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

    def add_pieces(self, pieces: Iterable[tuple[Part[K], memoryview]]) -> list[tuple[K, Chunk]]:
        """Append tensors, hashing their bytes on the way."""
        packed: list[tuple[K, Chunk]] = []
        opened: _OpenTensor[K] | None = None
        for part, piece in pieces:
            if opened is None or part is not opened.part:
                if opened is not None:
                    packed.append(self._finish_tensor(opened))
                opened = self._start_tensor(part)
            opened.hasher.update(piece)
            self._append(piece)
        if opened is not None:
            packed.append(self._finish_tensor(opened))
        return packed

    def flush(self) -> None:
        if self._buffer:
            self._file.write(self._buffer)
            self._buffer = bytearray()

    def _start_tensor(self, part: Part[K]) -> _OpenTensor[K]:
        wrapping = container(part.dtype, part.box.sizes)
        self._align()
        opened = _OpenTensor(part, wrapping, self._position, BlockHasher(block_size(wrapping.data_bytes)))
        self._append(wrapping.head)
        return opened

    def _finish_tensor(self, opened: _OpenTensor[K]) -> tuple[K, Chunk]:
        self._append(opened.container.tail)
        return opened.part.key, Chunk(
            box=opened.part.box,
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
class _OpenTensor(Generic[K]):
    """A tensor whose head is written and whose elements are on their way."""

    part: Part[K]
    container: Container
    start: int
    hasher: BlockHasher
