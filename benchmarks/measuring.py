"""What one operation costs each of several ranks: time, processor time, bytes read, memory."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist


@dataclass(frozen=True)
class Sample:
    """What one operation cost one rank."""

    seconds: float
    """From barrier to barrier: the slowest rank's."""
    cpu_seconds: float
    read_bytes: int
    """What the kernel handed to its `read` calls."""
    memory_bytes: int
    """Peak of the resident memory over what it was before."""


@dataclass(frozen=True)
class Cost:
    """All ranks together: medians over the rounds; the memory is the most that any rank took in any of them."""

    seconds: float
    cpu_seconds: float
    read_bytes: float
    memory_bytes: int


def measure(action: Callable[[], None]) -> Sample:
    """Run on every rank at once."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, read, usage = _memory("VmRSS"), _bytes_read(), resource.getrusage(resource.RUSAGE_SELF)
    dist.barrier()
    started = time.perf_counter()
    action()
    dist.barrier()
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
    return Sample(seconds, cpu, _bytes_read() - read, max(0, _memory("VmHWM") - before))


def summarise(by_rank: Sequence[Sequence[tuple[str, Sample]]]) -> dict[str, Cost]:
    """Contestant -> its cost, of what each rank measured in the same order."""
    rounds: dict[str, list[list[Sample]]] = {}
    for entries in zip(*by_rank, strict=True):
        rounds.setdefault(entries[0][0], []).append([sample for _, sample in entries])
    return {
        name: Cost(
            seconds=statistics.median(max(s.seconds for s in ranks) for ranks in of_contestant),
            cpu_seconds=statistics.median(sum(s.cpu_seconds for s in ranks) for ranks in of_contestant),
            read_bytes=statistics.median(sum(s.read_bytes for s in ranks) for ranks in of_contestant),
            memory_bytes=max(sample.memory_bytes for ranks in of_contestant for sample in ranks),
        )
        for name, of_contestant in rounds.items()
    }


def drop_from_cache(directory: str) -> None:
    """Take a checkpoint's files out of the page cache, for all ranks. Does nothing on tmpfs."""
    if dist.get_rank() == 0:
        for path in Path(directory).iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    dist.barrier()


def ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}x" if value and base else "-"


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise LookupError(field)


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])
