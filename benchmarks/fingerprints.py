"""What fingerprints cost: the same state saved with and without, and parts summed up by both formulas; one process.

PYTHONPATH=. .venv/bin/python benchmarks/fingerprints.py --directory /dev/shm
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable

import torch

import ray_ckpt
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.fingerprint import CURRENT, FIRST
from ray_ckpt.format.fingerprinting import sum_of_part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default="/dev/shm", help="where to save")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| state | save s | with fingerprints s | fingerprints alone MB/s |\n| --- | ---: | ---: | ---: |")
    for name, state in (
        ("8 x 64 MiB, float32", {f"t{number}": torch.randn(16 << 20) for number in range(8)}),
        ("8 x 64 MiB, bfloat16", {f"t{number}": torch.randn(32 << 20).bfloat16() for number in range(8)}),
        ("10 000 x 4 KB, float32", {f"t{number}": torch.randn(1000) for number in range(10_000)}),
    ):
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            seconds = [time_of(lambda: save(state, directory, False), options.repeats)]  # noqa: B023
            seconds.append(time_of(lambda: save(state, directory, True), options.repeats))  # noqa: B023
        alone = time_of(lambda: [ray_ckpt.fingerprint(value) for value in state.values()], options.repeats)  # noqa: B023
        rate = sum(value.nbytes for value in state.values()) / alone / 1e6
        print(f"| {name} | {seconds[0]:.2f} | {seconds[1]:.2f} | {rate:.0f} |", flush=True)
    print("\n| part | MB/s | by the first formula MB/s | of its time |\n| --- | ---: | ---: | ---: |")
    for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.float64):
        for columns in (None, 64, 1024, 3000):
            compare_formulas(dtype, columns, options.repeats)


def compare_formulas(dtype: torch.dtype, columns: int | None, repeats: int) -> None:
    """Processor time of both on a whole tensor of 16 MiB, or on a quarter of the columns of a matrix, so many of them:
    the least of the repeats, in which they take turns."""
    values = torch.randint(0, 256, (16 << 20,), dtype=torch.uint8).view(dtype)
    width = len(values) if columns is None else columns
    part = values[: len(values) // width * width].view(-1, width)
    shape = (len(part), width if columns is None else 4 * width)
    box = Box((0, shape[1] - width), tuple(part.shape))
    seconds: dict[int, list[float]] = {CURRENT: [], FIRST: []}
    for _ in range(repeats):
        for formula, found in seconds.items():
            started = time.thread_time()
            sum_of_part(part, box, shape, formula=formula)
            found.append(time.thread_time() - started)
    current, first = (min(found) for found in seconds.values())
    name = (
        f"{str(dtype).removeprefix('torch.')}, {'whole' if columns is None else f'{columns} columns of {4 * columns}'}"
    )
    print(f"| {name} | {part.nbytes / current / 1e6:.0f} | {part.nbytes / first / 1e6:.0f} | {current / first:.2f}x |")


def save(state: dict[str, torch.Tensor], directory: str, fingerprints: bool) -> None:
    target = os.path.join(directory, "at")
    shutil.rmtree(target, ignore_errors=True)
    ray_ckpt.save(state, target, fingerprints=fingerprints)


def time_of(action: Callable[[], object], repeats: int) -> float:
    """Median, after one round that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
