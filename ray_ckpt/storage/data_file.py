"""One data file: containers of tensors and objects, one after the other.

pack_file(storage, name, ...) ─┬─ objects: one container per distinct value
                                 └─ tensors: head, elements straight from their memory, tail; hashed on the way
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from ray_ckpt.format.block_sums import BlockHasher, block_size
from ray_ckpt.format.manifest import ObjectEntry, TensorColumns
from ray_ckpt.format.torch_container import ALIGNMENT, container
from ray_ckpt.progress import NOBODY
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.objects import INLINE_BLOB_BYTES, SavedObject
from ray_ckpt.storage.staging import Converted, host_pieces

MAX_FILE_BYTES = 16 << 30
"""A rank starts another file before one grows past this; a single tensor may be larger."""

_BUFFER_BYTES = 1 << 20
"""Small writes are collected up to this size."""

_DIRECT_BYTES = 128 << 10
"""Writes of at least this size go out as they are."""

K = TypeVar("K")
T = TypeVar("T")


class Sink(Protocol):
    """A file that is being written."""

    @property
    def name(self) -> str: ...

    def write(self, data: bytes | bytearray | memoryview) -> None: ...


@dataclass(frozen=True)
class Packed(Generic[K]):
    """The contents of one written file, in the order in which they were given."""

    tensors: TensorColumns
    keys: list[K]
    """The caller's names for the tensors."""
    objects: list[tuple[K, ObjectEntry]]
    checksum_s: float = 0.0
    """Seconds spent on checksums."""


def pack_file(
    storage: Storage,
    name: str,
    objects: Iterable[tuple[K, SavedObject]],
    tensors: Iterable[tuple[K, torch.Tensor | Converted]],
    count: Callable[[int], None] = NOBODY.add,
    *,
    num_bytes: int = 0,
) -> Packed[K]:
    """Write one file. It is durable on return.

    Args:
        count: called with the bytes of tensors that have been written, as often as some have.
        num_bytes: about how long the file will be, as far as that is known.
    """
    pieces = host_pieces((entry, entry[1]) for entry in tensors)
    return pack_pieces(storage, name, objects, pieces, count, num_bytes=num_bytes)


def pack_pieces(
    storage: Storage,
    name: str,
    objects: Iterable[tuple[K, SavedObject]],
    pieces: Iterable[tuple[tuple[K, torch.Tensor | Converted], memoryview]],
    count: Callable[[int], None] = NOBODY.add,
    *,
    num_bytes: int = 0,
) -> Packed[K]:
    """Write one file whose tensors come piece by piece, each one's bytes in row-major order. It is durable on return.

    Args:
        pieces: (key, tensor) and the bytes of a piece. All pieces of a tensor have the same pair, the same object. The
            tensor may be on the meta device: only its dtype and shape are used.
        count, num_bytes: as for `pack_file`.
    """
    with storage.create(name, num_bytes=num_bytes) as file:
        return pack_into(file, objects, pieces, count)


def pack_into(
    file: Sink,
    objects: Iterable[tuple[K, SavedObject]],
    pieces: Iterable[tuple[tuple[K, torch.Tensor | Converted], memoryview]],
    count: Callable[[int], None] = NOBODY.add,
) -> Packed[K]:
    """As `pack_pieces`, into a file that the caller has opened, and closes."""
    packer = _Packer[K](file, count)
    entries = [(key, packer.add_object(saved)) for key, saved in objects]
    packer.add_pieces(pieces)
    packer.flush()
    return packer.packed(entries)


def hash_tensors(
    tensors: Iterable[tuple[K, torch.Tensor | Converted]],
) -> Iterator[tuple[K, torch.Tensor | Converted, bytes]]:
    """Tensors with their block sums, as writing them would give."""
    opened: tuple[K, torch.Tensor | Converted] | None = None
    hasher = BlockHasher(1)
    for entry, piece in host_pieces((entry, entry[1]) for entry in tensors):
        if entry is not opened:
            if opened is not None:
                yield *opened, hasher.finish().sums
            opened, hasher = entry, BlockHasher(block_size(entry[1].nbytes))
        hasher.update(piece)
    if opened is not None:
        yield *opened, hasher.finish().sums


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
    """Run the writes, each again after transient errors, and raise their failures.

    With one thread they run on the caller's, whose current CUDA stream has produced the tensors.
    """
    if threads == 1:
        return [storage.retried(write) for write in writes]
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    with ThreadPoolExecutor(threads, thread_name_prefix="ray_ckpt-write") as pool:
        futures = [pool.submit(storage.retried, write) for write in writes]
        return [future.result() for future in futures]


class _Packer(Generic[K]):
    """Appends containers to an open file."""

    def __init__(self, file: Sink, count: Callable[[int], None]) -> None:
        self._file = file
        self._count = count
        self._position = 0
        self._buffer = bytearray()
        self._objects: dict[bytes, int] = {}
        self._keys: list[K] = []
        self._starts, self._lengths, self._data_starts, self._block_bytes = (array("q") for _ in range(4))
        self._sums = bytearray()
        self._checksum_s = 0.0

    def packed(self, objects: list[tuple[K, ObjectEntry]]) -> Packed[K]:
        columns = self._starts, self._lengths, self._data_starts, self._block_bytes
        written = TensorColumns(self._file.name, *columns, bytes(self._sums))
        return Packed(written, self._keys, objects, self._checksum_s)

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
            checksum=saved.checksum,
        )

    def add_pieces(self, pieces: Iterable[tuple[tuple[K, torch.Tensor | Converted], memoryview]]) -> None:
        """Append tensors, hashing their bytes on the way."""
        opened: tuple[K, torch.Tensor | Converted] | None = None
        tail, hasher = b"", BlockHasher(1)
        for entry, piece in pieces:
            if entry is not opened:
                if opened is not None:
                    self._finish_tensor(tail, hasher)
                opened = entry
                tail, hasher = self._start_tensor(*entry)
            began = time.perf_counter()
            hasher.update(piece)
            self._checksum_s += time.perf_counter() - began
            self._append(piece)
            self._count(len(piece))
        if opened is not None:
            self._finish_tensor(tail, hasher)

    def flush(self) -> None:
        if self._buffer:
            self._file.write(self._buffer)
            self._buffer = bytearray()

    def _start_tensor(self, key: K, tensor: torch.Tensor | Converted) -> tuple[bytes, BlockHasher]:
        """Write the part of the container before the elements, and return the part after them."""
        wrapping = container(tensor.dtype, tensor.shape)
        block_bytes = block_size(wrapping.data_bytes)
        self._align()
        self._keys.append(key)
        self._starts.append(self._position)
        self._lengths.append(wrapping.length)
        self._data_starts.append(self._position + len(wrapping.head))
        self._block_bytes.append(block_bytes)
        self._append(wrapping.head)
        return wrapping.tail, BlockHasher(block_bytes)

    def _finish_tensor(self, tail: bytes, hasher: BlockHasher) -> None:
        self._append(tail)
        self._sums += hasher.finish().sums

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
