"""Pieces of work of a check: consecutive bytes of one file, read once, hashed on the way, and counted if asked.

check_parts ── threads ─┬─ Stretch    bytes with what is known of each, through one buffer per thread
                        └─ Archive    another program's zip archive (archives.py)

Needs no torch, unless elements are counted or there are archives: a task of a cluster begins with this alone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ray_ckpt.errors import StorageError
from ray_ckpt.format.block_sums import BlockHasher, BlockSums
from ray_ckpt.progress import NOBODY, Meter
from ray_ckpt.report import Damage, NonFinite
from ray_ckpt.storage.files import InputFile, Storage
from ray_ckpt.storage.placed import Elements, Span, Stretch

if TYPE_CHECKING:
    from ray_ckpt.storage.archives import Archive
    from ray_ckpt.storage.nonfinite import Tally

PIECE_BYTES = 4 << 20
"""Size of a read, and of the one buffer that a thread holds."""


@dataclass
class Checked:
    """What was found in pieces of work."""

    damages: list[Damage] = field(default_factory=list)
    nonfinite: dict[str, NonFinite] = field(default_factory=dict)
    """Tensor -> its NaN and Inf, where it has some."""
    uncounted: dict[str, str] = field(default_factory=dict)
    """Tensor -> why its elements cannot be counted."""

    def add(self, other: Checked) -> None:
        """Take in what was found elsewhere."""
        self.damages += other.damages
        self.uncounted |= other.uncounted
        for name, found in other.nonfinite.items():
            self.count(name, found)

    def count(self, name: str, found: NonFinite) -> None:
        """Note the NaN and Inf of a part of a tensor."""
        if found.num_nan or found.num_inf:
            self.nonfinite[name] = self.nonfinite.get(name, NonFinite(0, 0)) + found


def check_parts(storage: Storage, parts: Iterable[Stretch | Archive], threads: int, meter: Meter = NOBODY) -> Checked:
    """Read and check all of these.

    Args:
        parts: asked for as they are read, and not kept.
        threads: number of parts that are read at the same time.
        meter: counts the bytes that are read.

    Raises:
        StorageError: the storage does not answer.
    """
    checked = Checked()
    running: deque[Future[Checked]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ray_ckpt-verify")
    try:
        for part in parts:
            running.append(pool.submit(_check, storage, part, meter))
            if len(running) > 2 * threads:
                checked.add(running.popleft().result())
        for found in running:
            checked.add(found.result())
    finally:
        pool.shutdown(cancel_futures=True)
    return checked


def _check(storage: Storage, part: Stretch | Archive, meter: Meter) -> Checked:
    with meter.part(part.num_bytes) as count:
        if isinstance(part, Stretch):
            return _check_stretch(storage, part, count)
        from ray_ckpt.storage.archives import check_archive  # it loads torch

        return check_archive(storage, part, count)


def _check_stretch(storage: Storage, stretch: Stretch, count: Callable[[int], None]) -> Checked:
    checked = Checked()
    read_to = stretch.start
    try:
        with storage.open_input(stretch.file) as file:
            window = _Window(file, stretch.end, count)
            for part in stretch.spans:
                tally = new_tally(part.elements)
                found = window.sums(part, tally)
                read_to = part.end
                if part.sums is not None:
                    checked.damages += _differences(stretch.file, part, part.sums, found)
                if tally is not None and part.elements is not None:
                    checked.count(part.elements.name, tally.found)
    except StorageError as error:
        if error.transient:
            raise
        for part in stretch.spans:
            if part.end > read_to:
                checked.damages += damages_of(
                    stretch.file, part, part.start, part.end, f"cannot be read: {error.cause}"
                )
    return checked


def new_tally(elements: Elements | None) -> Tally | None:
    """What counts the NaN and Inf of these elements; None where nothing is to be counted."""
    if elements is None:
        return None
    from ray_ckpt.storage.nonfinite import Tally  # it loads torch

    return Tally(elements.dtype)


_of_thread = threading.local()


def _buffer() -> memoryview:
    """The thread's own: to get fresh memory for each stretch takes a tenth of the time of reading it."""
    if not hasattr(_of_thread, "buffer"):
        _of_thread.buffer = memoryview(bytearray(PIECE_BYTES))
    buffer: memoryview = _of_thread.buffer
    return buffer


class _Window:
    """One buffer that slides over a file."""

    def __init__(self, file: InputFile, end: int, count: Callable[[int], None]) -> None:
        self._file = file
        self._end = end
        self._count = count
        self._memory = _buffer()
        self._held = range(0)

    def sums(self, part: Span, tally: Tally | None) -> BlockSums:
        """Read a part, and hash it in the blocks that it was hashed in when it was saved.

        Args:
            tally: counts its elements.
        """
        block = PIECE_BYTES if part.sums is None else part.sums.block_bytes
        hasher = BlockHasher(block)
        at = part.start
        while at < part.end:
            if at not in self._held:
                size = min(PIECE_BYTES, self._end - at)
                if at + size < part.end:  # a block that ends within the piece is hashed by one call
                    size -= (at + size - part.start) % block if block < size else 0
                self._held = range(0)
                self._file.read_into(at, self._memory[:size])
                self._held = range(at, at + size)
                self._count(size)
            until = min(part.end, self._held.stop)
            data = self._memory[at - self._held.start : until - self._held.start]
            if part.sums is not None:
                hasher.update(data)
            if tally is not None and part.elements is not None:
                tally.update(overlap(part.elements, at, data))
            at = until
        return hasher.finish()


def overlap(elements: Elements, at: int, data: memoryview) -> memoryview:
    """The part of these bytes, which begin at `at` in the file, that are such elements."""
    return data[max(0, elements.start - at) : max(0, elements.end - at)]


def _differences(file: str, part: Span, saved: BlockSums, found: BlockSums) -> Iterator[Damage]:
    """One for each run of blocks that differ."""
    if saved.sums == found.sums:
        return
    wrong = [block for block in range(len(saved)) if saved[block] != found[block]]
    first = wrong[0]
    for block, following in zip(wrong, [*wrong[1:], -1], strict=True):
        if following != block + 1:
            start = part.start + first * saved.block_bytes
            end = min(part.start + (block + 1) * saved.block_bytes, part.end)
            sums = f"checksum {found[first]:016x}, saved with {saved[first]:016x}"
            yield from damages_of(file, part, start, end, f"{part.what} differ: {sums}" if part.names else sums)
            first = following


def damages_of(file: str, part: Span, start: int, end: int, problem: str) -> Iterator[Damage]:
    """One for each name that lives there."""
    for name in part.names or ("",):
        yield Damage(file, start, end, name, problem)
