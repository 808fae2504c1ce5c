"""What fingerprints cost a save: the same state saved with and without, one process, no peers.

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
