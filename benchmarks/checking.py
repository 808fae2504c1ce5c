"""How fast a checkpoint is checked, beside reading the same files plain; and what it costs to tell the progress.

    python benchmarks/checking.py                             2 GiB, medians of five rounds
    python benchmarks/checking.py --gib 4 --directory /dev/shm/bench

In every round each contestant runs once, in turn, on the same files in the page cache. "plain" reads them into one
buffer per process, a process per core, and does nothing with the bytes. "by tasks" is `cluster.verify_by_tasks` on a
local Ray whose processes have started. The progress is told to a callable that counts its calls.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ray_ckpt import cluster, load, save, verify
from ray_ckpt.cluster.connect import connect

PIECE_BYTES = 4 << 20


def read_plain(task: tuple[str, int, int]) -> int:
    """Read bytes `[start, end)` of a file into one buffer."""
    path, start, end = task
    memory = memoryview(bytearray(PIECE_BYTES))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while start < end:
            start += file.readinto(memory[: min(PIECE_BYTES, end - start)])
    return end


def parts_of(directory: Path, count: int) -> list[tuple[str, int, int]]:
    parts = []
    for path in directory.glob("*.distcp"):
        size = path.stat().st_size
        cuts = [size * i // count for i in range(count + 1)]
        parts += [(str(path), start, end) for start, end in itertools.pairwise(cuts)]
    return parts


def state_of(num_bytes: int, value: float) -> dict[str, Any]:
    """Tensors of 64 MiB and of 1 MiB."""
    large, small = num_bytes * 3 // 4 // (64 << 20), num_bytes // 4 // (1 << 20)
    return {
        "large": {str(i): torch.full((16 << 20,), value) for i in range(large)},
        "small": {str(i): torch.full((256 << 10,), value) for i in range(small)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    directory = Path(tempfile.mkdtemp(prefix="checking-", dir=options.directory))
    state = state_of(int(options.gib * 2**30), 1.0)
    target = state_of(int(options.gib * 2**30), 0.0)
    calls = []

    def show(done: int, total: int) -> None:
        calls.append(done)

    try:
        size = save(state, directory / "c").total_bytes
        parts = parts_of(directory / "c", cores)
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(cores))
            stack.enter_context(connect("local", num_cpus=cores))
            contestants: dict[str, Callable[[], Any]] = {
                f"plain, {cores} processes": lambda: pool.map(read_plain, parts, chunksize=1),
                "verify, one process": lambda: verify(directory / "c"),
                "verify, one process, progress": lambda: verify(directory / "c", progress=show),
                "verify, one process, scan_nan": lambda: verify(directory / "c", scan_nan=True),
                "verify_by_tasks": lambda: cluster.verify_by_tasks(directory / "c"),
                "verify_by_tasks, scan_nan": lambda: cluster.verify_by_tasks(directory / "c", scan_nan=True),
                "save": lambda: save(state, directory / "s", overwrite=True),
                "save, progress": lambda: save(state, directory / "s", overwrite=True, progress=show),
                "load": lambda: load(target, directory / "c"),
                "load, progress": lambda: load(target, directory / "c", progress=show),
            }
            seconds: dict[str, list[float]] = {name: [] for name in contestants}
            for number in range(options.rounds + 1):  # the first loads code and fills caches
                for name, contestant in contestants.items():
                    began = time.monotonic()
                    contestant()
                    if number:
                        seconds[name].append(time.monotonic() - began)
    finally:
        shutil.rmtree(directory)
    plain = statistics.median(next(iter(seconds.values())))
    print(f"{size / 2**30:.2f} GiB, {options.rounds} rounds, {len(calls)} calls of progress")
    print("| what | s | GiB/s | of plain | fastest s |\n| --- | ---: | ---: | ---: | ---: |")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"| {name} | {median:.3f} | {size / 2**30 / median:.2f} | {plain / median:.2f}x | {min(times):.3f} |")


if __name__ == "__main__":
    main()
