"""Every byte that several ranks want is read by one of them, and sent to the others.

of each window   reads, some windows ahead, by a few threads
                 has anybody failed? ── ask_any ──> then all stop
                 what was read ── swap ──> those that want it
                 each rank fills its targets

A reader compares what it reads with the checksums, and a receiver what it receives: nothing is taken on trust. What is
wanted as one run of bytes is read, sent and received straight from and into the memory of tensors.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch

from ray_ckpt.progress import NOBODY, Meter
from ray_ckpt.protocol.messages import Outcome
from ray_ckpt.protocol.peers import Message, Peers
from ray_ckpt.protocol.share_plan import Extent, SharePlan, Wants
from ray_ckpt.storage.checkpoint_reader import TensorReads
from ray_ckpt.storage.ranged_reads import OpenFiles, Range, Read, Worker, deliver, verify
from ray_ckpt.storage.staging import bytes_of

READ_AHEAD_BYTES = 64 << 20
"""What a rank reads before others are ready to take it, apart from a window."""


def wants_of(reads: TensorReads) -> Wants:
    """What a rank would read by itself."""
    return Wants.of([(item.source.file, item.start, item.end) for item in reads.ranges], on_cuda=reads.on_cuda)


def read_shared(reads: TensorReads, plan: SharePlan, peers: Peers, meter: Meter = NOBODY) -> bool:
    """Fill all targets of a rank. All ranks call it together.

    It takes at most a window and `READ_AHEAD_BYTES` of memory, besides ranges that lie in several extents.

    Args:
        meter: counts the bytes that this rank reads.

    Returns:
        Whether it has: False where another rank has failed, which has to tell.

    Raises:
        IntegrityError, StorageError, FormatError: this rank could not read, or received what was not saved.
        CheckpointError: another rank is lost, or late.
    """
    placer = Placer(reads.ranges)
    windows = [
        [(n, e) for n, e in enumerate(window) if peers.rank in (e.reader, *e.receivers)] for window in plan.windows
    ]
    filled = Outcome.of(lambda: reads.read_undivided(meter))
    with OpenFiles(reads.storage) as files:
        reader = _Reader(files, placer, reads.tuning.threads, meter)
        reader.expect([[extent for _, extent in window if extent.reader == peers.rank] for window in windows])
        try:
            for window in windows:
                read = reader.next() if filled.failure is None else Outcome(failure=filled.failure)
                if peers.ask_any(read.failure is not None):
                    read.get()
                    return False
                memories = read.get() | {e: placer.memory_for(e) for _, e in window if e.reader != peers.rank}
                _swap(window, memories, peers, plan)
                filled = Outcome.of(partial(placer.fill_all, memories, peers.rank))
        finally:
            reader.stop()
    filled.get()
    reads.check()
    return True


def _swap(
    window: Sequence[tuple[int, Extent]], memories: Mapping[Extent, torch.Tensor], peers: Peers, plan: SharePlan
) -> None:
    own = [(number, extent) for number, extent in window if extent.reader == peers.rank]
    others = [(number, extent) for number, extent in window if extent.reader != peers.rank]
    peers.swap(
        [Message(receiver, number, memories[extent]) for number, extent in own for receiver in extent.receivers],
        [Message(extent.reader, number, memories[extent]) for number, extent in others],
        on_cuda=plan.on_cuda,
    )


class _Reader:
    """Reads what this rank is to read of each window, on a few threads, as far ahead as memory allows."""

    def __init__(self, files: OpenFiles, placer: Placer, threads: int, meter: Meter) -> None:
        self._files = files
        self._placer = placer
        self._meter = meter
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ray_ckpt-read")
        self._waiting: deque[list[Extent]] = deque()
        self._begun: deque[dict[Extent, Future[torch.Tensor]]] = deque()
        self._ahead_bytes = 0

    def expect(self, windows: Sequence[list[Extent]]) -> None:
        self._waiting.extend(windows)
        self._meter.expect(sum(extent.num_bytes for window in windows for extent in window))

    def next(self) -> Outcome[dict[Extent, torch.Tensor]]:
        """The extents of the next window, and their bytes."""
        self._begin()
        begun = self._begun.popleft()
        outcome = Outcome.of(lambda: {extent: future.result() for extent, future in begun.items()})
        self._ahead_bytes -= sum(extent.num_bytes for extent in begun)
        self._begin()
        return outcome

    def stop(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _begin(self) -> None:
        while self._waiting and (not self._begun or self._ahead_bytes < READ_AHEAD_BYTES):
            window = self._waiting.popleft()
            self._begun.append({extent: self._pool.submit(self._read, extent) for extent in window})
            self._ahead_bytes += sum(extent.num_bytes for extent in window)

    def _read(self, extent: Extent) -> torch.Tensor:
        memory = self._placer.memory_for(extent)
        with Worker(self._files, pinned=False) as worker:
            worker.run(Read(extent.file, extent.start, extent.end, self._placer.checks_of(extent), bytes_of(memory)))
        self._meter.add(extent.num_bytes)
        return memory


class Placer:
    """Puts the bytes of extents where this rank wants them.

    Args:
        found: the rank's ranges, in the order of the files.
    """

    def __init__(self, found: Sequence[Range]) -> None:
        self._of_file: dict[str, list[Range]] = {}
        for item in found:
            self._of_file.setdefault(item.source.file, []).append(item)
        self._starts = {file: [item.start for item in items] for file, items in self._of_file.items()}
        self._longest = {file: max(item.end - item.start for item in items) for file, items in self._of_file.items()}
        self._gathered: dict[int, tuple[memoryview, int]] = {}
        """`id` of a range that lies in several extents -> its bytes, and how many of them are still to come."""

    def memory_for(self, extent: Extent) -> torch.Tensor:
        """Memory for its bytes: a target's own where that takes all of them."""
        direct = self._direct(extent)
        if direct is None:
            return torch.empty(extent.num_bytes, dtype=torch.uint8)
        return torch.frombuffer(direct.target, dtype=torch.uint8)

    def checks_of(self, extent: Extent) -> list[Range]:
        """What of the extent can be compared with checksums before it is sent."""
        found = []
        for item in self._overlapping(extent):
            source, start, end = item.source, max(item.start, extent.start), min(item.end, extent.end)
            block = 1 if source.checksums is None else source.checksums.block_bytes
            is_whole = (start, end) == (item.start, item.end)
            ends_a_block = not (end - source.data_start) % block or end == source.data_start + source.data_bytes
            if is_whole or (not (start - source.data_start) % block and ends_a_block):
                found.append(Range(source, start, end))
        return found

    def fill_all(self, memories: Mapping[Extent, torch.Tensor], rank: int) -> None:
        """Fill the targets, or parts of them, by the bytes of a window.

        Args:
            rank: this one, which has checked what it has read.
        """
        for extent, memory in memories.items():
            self.fill(extent, bytes_of(memory), is_checked=extent.reader == rank, direct=self._direct(extent))

    def fill(self, extent: Extent, data: memoryview, *, is_checked: bool, direct: Range | None = None) -> int:
        """Fill the targets, or parts of them, by the bytes of an extent.

        Args:
            is_checked: whether these are known to be the bytes that were saved.
            direct: the range that has them already.

        Returns:
            How many bytes of ranges these are.
        """
        num_bytes = 0
        for item in self._overlapping(extent):
            start, end = max(item.start, extent.start), min(item.end, extent.end)
            num_bytes += end - start
            part = data[start - extent.start : end - extent.start]
            if (start, end) != (item.start, item.end):
                self._gather(item, start, part)
                continue
            if not is_checked:
                verify(item, part)
            if item is not direct:
                deliver(item._replace(is_direct=False), part)
        return num_bytes

    def _gather(self, item: Range, start: int, part: memoryview) -> None:
        if id(item) not in self._gathered:
            # What it takes as it is, it takes at once.
            whole = item.target if item.is_direct else memoryview(bytearray(item.end - item.start))
            assert isinstance(whole, memoryview)
            self._gathered[id(item)] = whole, len(whole)
        whole, left = self._gathered[id(item)]
        whole[start - item.start : start - item.start + len(part)] = part
        self._gathered[id(item)] = whole, left - len(part)
        if left == len(part):
            del self._gathered[id(item)]
            verify(item, whole)
            deliver(item, whole)

    def _direct(self, extent: Extent) -> Range | None:
        """The range that takes all of the extent as it is."""
        fitting = (item for item in self._overlapping(extent) if (item.start, item.end) == (extent.start, extent.end))
        return next((item for item in fitting if item.is_direct), None)

    def _overlapping(self, extent: Extent) -> Iterator[Range]:
        if extent.file not in self._of_file:
            return
        items, starts = self._of_file[extent.file], self._starts[extent.file]
        first = bisect.bisect_right(starts, extent.start - self._longest[extent.file])
        for item in items[first : bisect.bisect_left(starts, extent.end)]:
            if item.end > extent.start:
                yield item
