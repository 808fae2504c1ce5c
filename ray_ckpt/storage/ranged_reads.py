"""Getting byte ranges of files into tensors: coalesced, concurrent, checked, without a needless copy.

    pieces (chunk, wanted box, target) ── cut ──> ranges ── group ──> reads of one file each ── run ──> targets filled

Where a wanted box is one run of bytes in the file and in the target's CPU memory, its whole checksum blocks are read
straight into that memory. Everything else (edges of such runs, column slices, other dtypes, CUDA targets, small
tensors) passes through one scratch buffer per thread, several ranges to a read when they lie near each other.
"""

from __future__ import annotations

import binascii
import contextlib
import operator
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ray_ckpt.errors import CheckpointError, IntegrityError, StorageError
from ray_ckpt.format import ranges
from ray_ckpt.format.block_sums import BlockSums
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.torch_container import DESCRIPTOR_BYTES, descriptor_crc
from ray_ckpt.format.torch_internals import narrow
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.progress import NOBODY, Meter
from ray_ckpt.rounding import round_up
from ray_ckpt.storage.cuts import cuts_of, deliver_cuts, size_of
from ray_ckpt.storage.files import InputFile, Storage
from ray_ckpt.storage.good_reads import check_blocks, read_good
from ray_ckpt.storage.registered import RegisteredFileSystem
from ray_ckpt.storage.staging import bytes_of


@dataclass(frozen=True)
class Tuning:
    """How reads are cut, grouped and overlapped. What is cheap differs between a disk and a network."""

    threads: int
    """Number of reads at the same time."""
    max_gap_bytes: int
    """Largest gap of unwanted bytes that is read over rather than split into two requests."""
    max_read_bytes: int
    """Size of a read, and of a scratch buffer, apart from a checksum block at either end."""
    edge_bytes: int
    """How much of a run goes through scratch, besides the block at its edge, so that no request fetches a few bytes."""
    min_direct_bytes: int
    """Least size of a run that is read directly into the target; shorter ones share reads through scratch."""


LOCAL = Tuning(threads=4, max_gap_bytes=16 << 10, max_read_bytes=1 << 20, edge_bytes=0, min_direct_bytes=256 << 10)
"""Reads are as large as the largest checksum block, so that their bytes are still in the cache when they are hashed."""

REMOTE = Tuning(
    threads=12, max_gap_bytes=512 << 10, max_read_bytes=4 << 20, edge_bytes=1 << 20, min_direct_bytes=4 << 20
)


def tuning_for(storage: Storage) -> Tuning:
    return replace(LOCAL, threads=local_threads()) if storage.is_local else REMOTE


def local_threads() -> int:
    """Number of reads of local files at the same time: no more than this rank has cores.

    Ranks that share cores (`LOCAL_WORLD_SIZE`, as torchrun and Ray Train set it) slow each other down: with four
    threads on half a core a load took a tenth longer than with one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(max(1, cores // max(1, int(ranks) if ranks.isdecimal() else 1)), LOCAL.threads)


class Source(NamedTuple):
    """A saved chunk as its bytes lie in a file."""

    name: str
    """Name of the tensor, for messages."""
    file: str
    data_start: int
    """Byte offset of the first element in `file`."""
    strides: tuple[int, ...]
    """Strides in elements."""
    dtype: torch.dtype
    data_bytes: int
    checksums: BlockSums | None
    """Checksums of `[data_start, data_start + data_bytes)`; None when there are none or they are not to be checked."""
    crc: int = 0
    """CRC-32 of `[data_start, data_start + data_bytes)`; 0 when it is not known."""
    container_end: int = 0
    """End of the zip archive in which the CRC-32 may stand behind the data; 0 when none is to be looked for."""

    @property
    def has_crc(self) -> bool:
        """Whether a CRC-32 is known, or may stand behind the data."""
        return bool(self.crc or self.container_end)


class Piece(NamedTuple):
    """A box of a saved chunk and the tensor of its shape that wants it."""

    source: Source
    box: Box
    """The box in the chunk's own coordinates."""
    target: torch.Tensor


class Range(NamedTuple):
    """Bytes `[start, end)` of a file, on whole blocks, and who wants what of them."""

    source: Source
    start: int
    end: int
    lead: int = 0
    """Number of bytes in front of the wanted ones."""
    target: memoryview | Scatter | None = None
    """Takes the wanted bytes; None where they are only checked."""
    is_direct: bool = False
    """Whether the target takes all of the bytes as they are, so that they are best read into it."""


class Read(NamedTuple):
    """One request: a run of a file that serves these ranges."""

    file: str
    start: int
    end: int
    ranges: Sequence[Range]
    memory: memoryview | None = None
    """Memory that the bytes are read into; None for scratch."""


def fetch(storage: Storage, pieces: Sequence[Piece], tuning: Tuning, meter: Meter = NOBODY) -> None:
    """Fill the targets of all pieces.

    Args:
        meter: counts the bytes that are read, with those around the wanted ones.

    Raises:
        IntegrityError: a block differs from its checksum.
        StorageError, FormatError: a file cannot be read, or is too short.
    """
    with collector_paused():
        ranges = cut(pieces, tuning)
    run(storage, ranges, tuning, meter, pinned=any(piece.target.is_cuda for piece in pieces))


def cut(pieces: Iterable[Piece], tuning: Tuning) -> list[Range]:
    """Cut pieces into ranges, in the order of the files. None is much longer than a read."""
    found: list[Range] = []
    for piece in pieces:
        if piece.box.num_elements:
            found += _cut_direct(piece, tuning) if is_direct(piece, tuning) else _cut_scattered(piece, tuning)
    found.sort(key=lambda item: (item.source.file, item.start, item.end))
    return found


def group(found: Iterable[Range], tuning: Tuning) -> list[Read]:
    """Reads that serve these ranges, in the order of the files."""
    reads: list[Read] = []
    scattered: dict[str, list[Range]] = {}
    for item in found:
        if item.is_direct:
            assert isinstance(item.target, memoryview)
            reads.append(Read(item.source.file, item.start, item.end, (item,), item.target))
        else:
            scattered.setdefault(item.source.file, []).append(item)
    for file, items in scattered.items():
        extents = [(item.start, item.end) for item in items]
        for members in ranges.group(extents, max_gap=tuning.max_gap_bytes, max_bytes=tuning.max_read_bytes):
            of_read = [items[position] for position in members]
            reads.append(Read(file, of_read[0].start, max(item.end for item in of_read), of_read))
    reads.sort(key=lambda read: (read.file, read.start))
    return reads


def is_direct(piece: Piece, tuning: Tuning) -> bool:
    return (
        piece.target.nbytes >= tuning.min_direct_bytes
        and is_plain_copy(piece)
        and ranges.is_dense(piece.box.sizes, piece.source.strides)
    )


def is_plain_copy(piece: Piece) -> bool:
    """Whether the target is CPU memory that takes the saved bytes as they are."""
    target = piece.target
    return (
        target.device.type == "cpu"
        and target.dtype == piece.source.dtype
        and target.is_contiguous()
        and not target.is_conj()
        and not target.is_neg()
    )


def _cut_direct(piece: Piece, tuning: Tuning) -> Iterator[Range]:
    """A run of bytes: its whole blocks go straight to the target, its edges through scratch."""
    source, memory = piece.source, bytes_of(piece.target)
    first = _first_byte(source, piece.box)
    start, end = first, first + len(memory)  # narrowed below to what goes straight to the target
    step = tuning.max_read_bytes
    if source.checksums is not None:
        block = source.checksums.block_bytes
        if start % block:
            # The block that the run begins in holds bytes of others too: it cannot be read into the target.
            start = min(round_up(start + tuning.edge_bytes, block), end)
            yield _widened(source, first, start, memory[: start - first])
        # Likewise the block that it ends in, unless that is the last one, which is short; or no whole block is left.
        if end % block and end != source.data_bytes and start < end:
            end = max((end - tuning.edge_bytes) // block * block, start)
            yield _widened(source, end, first + len(memory), memory[end - first :])
        step = max(block, step // block * block)
    for at, until in ranges.cut(start, end, step):
        target = memory[at - first : until - first]
        yield Range(source, source.data_start + at, source.data_start + until, 0, target, is_direct=True)


def _cut_scattered(piece: Piece, tuning: Tuning) -> Iterator[Range]:
    source = piece.source
    if source.has_crc and source.data_bytes <= tuning.max_read_bytes and is_whole(piece):
        yield _whole_member(piece)
        return
    is_small = piece.target.nbytes <= tuning.max_read_bytes
    if is_small and is_plain_copy(piece) and ranges.is_dense(piece.box.sizes, source.strides):
        start, memory = _first_byte(source, piece.box), bytes_of(piece.target)
        yield _widened(source, start, start + len(memory), memory)
        return
    # A gap within a checksum block is read over in any case: parts of one block would only have it hashed again.
    block_bytes = 0 if source.checksums is None else source.checksums.block_bytes
    parts = ranges.split(
        piece.box,
        source.strides,
        source.dtype.itemsize,
        max_bytes=tuning.max_read_bytes,
        max_gap=max(tuning.max_gap_bytes, min(block_bytes, REMOTE.max_gap_bytes)),
    )
    for part in parts:
        target = narrow(piece.target, part.box.within(piece.box).offsets, part.box.sizes)
        scatter = Scatter(target, source.dtype, source.strides, part.end - part.start)
        yield _widened(source, part.start, part.end, scatter)


def is_whole(piece: Piece) -> bool:
    """Whether all bytes of the source are wanted."""
    return piece.box.num_elements * piece.source.dtype.itemsize == piece.source.data_bytes


def _whole_member(piece: Piece) -> Range:
    """All of a member, and behind it the descriptor where its CRC-32 stands."""
    source = piece.source
    end = source.data_start + source.data_bytes
    if not source.crc:
        end = min(end + DESCRIPTOR_BYTES, source.container_end)
    if is_plain_copy(piece) and ranges.is_dense(piece.box.sizes, source.strides):
        return Range(source, source.data_start, end, 0, bytes_of(piece.target))
    scatter = Scatter(piece.target, source.dtype, source.strides, source.data_bytes)
    return Range(source, source.data_start, end, 0, scatter)


class Scatter(NamedTuple):
    """Copies elements out of the bytes that enclose them."""

    target: torch.Tensor
    dtype: torch.dtype
    strides: tuple[int, ...]
    num_bytes: int

    def deliver(self, data: memoryview) -> None:
        raw = torch.frombuffer(data, dtype=torch.uint8)
        if raw.data_ptr() % self.dtype.itemsize:
            raw = raw.clone()
        elements = raw.view(self.dtype)
        self.target.copy_(elements.as_strided(self.target.shape, self.strides))


def _first_byte(source: Source, box: Box) -> int:
    first: int = sum(map(operator.mul, box.offsets, source.strides))
    return first * source.dtype.itemsize


def _widened(source: Source, start: int, end: int, target: memoryview | Scatter) -> Range:
    """The range on whole blocks; the target gets the bytes that were asked for."""
    if source.checksums is None:
        return Range(source, source.data_start + start, source.data_start + end, 0, target)
    wide_start, wide_end = ranges.widen(start, end, source.checksums.block_bytes, source.data_bytes)
    return Range(source, source.data_start + wide_start, source.data_start + wide_end, start - wide_start, target)


# ----------------------------------------------------------------------------------------------------- doing it


def run(
    storage: Storage, found: Sequence[Range], tuning: Tuning, meter: Meter = NOBODY, *, pinned: bool = False
) -> None:
    """Fill the targets of ranges on a few threads; the first failure stops the others and is raised.

    Args:
        pinned: whether scratch is pinned memory, because a target is on CUDA.
    """
    with collector_paused():
        reads = group(found, tuning)
    meter.expect(sum(read.end - read.start for read in reads))
    threads = min(tuning.threads, len(reads))
    todo: queue.SimpleQueue[Read] = queue.SimpleQueue()
    for read in reads:
        todo.put(read)

    def work() -> None:
        with Worker(files, pinned=pinned) as worker:
            while True:
                try:
                    read = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    worker.run(read)
                    meter.add(read.end - read.start)
                except BaseException:
                    _clear(todo)
                    raise

    with OpenFiles(storage) as files:
        if threads <= 1:
            work()
            return
        with ThreadPoolExecutor(threads, thread_name_prefix="ray_ckpt-read") as pool:
            workers = [pool.submit(work) for _ in range(threads)]
        for future in workers:
            future.result()


def _clear(todo: queue.SimpleQueue[Read]) -> None:
    while True:
        try:
            todo.get_nowait()
        except queue.Empty:
            return


class OpenFiles:
    """Files that stay open for all threads of a fetch, where several may read one at a time."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._lock = threading.Lock()
        self._files: dict[str, InputFile] = {}
        self._closing = ExitStack()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def get(self, name: str) -> InputFile:
        with self._lock:
            if name not in self._files:
                self._files[name] = self._closing.enter_context(self.storage.open_input(name))
            return self._files[name]


class Worker:
    """One thread's open file and scratch buffer.

    The buffer is pinned when a target is on CUDA: one thread's copy to the device then runs while others read.
    """

    def __init__(self, files: OpenFiles, *, pinned: bool) -> None:
        self._shared = files
        self._pinned = pinned
        self._own = ExitStack()
        self._open: tuple[str, InputFile] | None = None
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._own.close()

    def run(self, read: Read) -> None:
        if read.memory is None and self._read_cuts(read):
            return
        size = read.end - read.start
        memory = self._scratch_of(size) if read.memory is None else read.memory

        def check(data: memoryview) -> None:
            for wanted in read.ranges:
                verify(wanted, data[wanted.start - read.start : wanted.end - read.start])

        read_good(
            self._shared.storage, read.file, read.start, memory, opened=lambda: self._input(read.file), check=check
        )
        for wanted in read.ranges:
            deliver(wanted, memory[wanted.start - read.start : wanted.end - read.start])

    def _read_cuts(self, read: Read) -> bool:
        """Have only what is wanted sent, by whoever keeps the file. Returns whether that could be done."""
        if not isinstance(self._shared.storage.filesystem, RegisteredFileSystem):
            return False  # a file that cannot be opened would be tried twice as often
        with contextlib.suppress(StorageError, CheckpointError):  # what is wrong is found again and told by `read_good`
            file = self._input(read.file)
            cuts = cuts_of(read.ranges, read.end - read.start) if file.makes_cuts else []
            memory = self._scratch_of(size_of(cuts))
            if cuts and file.read_cuts(cuts, memory):
                deliver_cuts(read.ranges, memory)
                return True
        return False

    def _input(self, file: str) -> InputFile:
        storage = self._shared.storage
        if storage.opening_costs_a_request:
            return self._shared.get(file)
        # Reads come in the order of the files: one open file at a time will do.
        if self._open is None or self._open[0] != file:
            self._own.close()
            self._open = (file, self._own.enter_context(storage.open_input(file)))
        return self._open[1]

    def _scratch_of(self, size: int) -> memoryview:
        if len(self._scratch) < size:
            self._scratch = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        return bytes_of(self._scratch[:size])


def deliver(wanted: Range, data: memoryview) -> None:
    lead, target = wanted.lead, wanted.target
    if wanted.is_direct:
        return  # they are there
    if isinstance(target, memoryview):
        target[:] = data[lead : lead + len(target)]
    elif target is not None:
        target.deliver(data[lead : lead + target.num_bytes])


def verify(wanted: Range, data: memoryview) -> None:
    source, checksums = wanted.source, wanted.source.checksums
    if checksums is None:
        if source.has_crc and wanted.start == source.data_start and len(data) >= source.data_bytes:
            check_crc(source, data[: source.data_bytes], data[source.data_bytes :])
        return
    check_blocks(data, checksums, file=source.file, start=wanted.start, data_start=source.data_start, name=source.name)


def check_crc(source: Source, data: memoryview, behind: memoryview) -> None:
    """Compare all bytes of a zip member with its CRC-32, where the archive tells one.

    Args:
        behind: what stands behind the member, as far as it was read.

    Raises:
        IntegrityError: they differ.
    """
    told = source.crc or descriptor_crc(bytes(behind[:DESCRIPTOR_BYTES]), source.data_bytes)
    if told and told != (found := binascii.crc32(data)):
        raise IntegrityError(
            file=source.file,
            start=source.data_start,
            end=source.data_start + source.data_bytes,
            tensor=source.name,
            expected=f"{told:08x}",
            found=f"{found:08x}",
            hint="the checksum is the CRC-32 of the zip archive; restore the file from a copy, or load an earlier step",
        )
