"""What an export costs next to a plain copy of the same bytes, each in a process of its own.

    python -m benchmarks.exporting --gib 4 --directory /dev/shm

Prints a table in Markdown: seconds until all is durable (and, for an export, read back and compared), the rate as a
part of the copy's, and the peak of the process's resident memory, torch included. Medians of the rounds, in which the
contestants take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TENSOR_BYTES = 64 << 20
BUFFER_BYTES = 8 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", default=tempfile.gettempdir())
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(_run(*options.run)))
        return
    directory = Path(tempfile.mkdtemp(dir=options.directory))
    try:
        _save(directory, options.gib)
        print("| what | seconds | of a copy's rate | peak memory MiB |\n| --- | ---: | ---: | ---: |")
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(options.rounds):
            for what in ("copy", "safetensors", "torch", "dcp", "safetensors, bf16", "import", "with fingerprints"):
                found.setdefault(what, []).append(_in_process(what, directory))
        copied = statistics.median(sample["seconds"] for sample in found["copy"])
        for what, samples in found.items():
            seconds = statistics.median(sample["seconds"] for sample in samples)
            memory = max(sample["memory_mib"] for sample in samples)
            print(f"| {what} | {seconds:.2f} | {copied / seconds:.2f}x | {memory:.0f} |")
    finally:
        shutil.rmtree(directory)


def _save(directory: Path, gib: float) -> None:
    import torch

    from ray_ckpt import save

    weight = torch.randn(TENSOR_BYTES // 4 // 1024, 1024)
    names = [f"layers.{number}.weight" for number in range(max(1, int(gib * 2**30) // TENSOR_BYTES))]
    save({"model": dict.fromkeys(names, weight)}, directory / "run")
    save({"model": dict.fromkeys(names, weight)}, directory / "printed", fingerprints=True)


def _in_process(what: str, directory: Path) -> dict[str, float]:
    source = directory / ("printed" if what == "with fingerprints" else "run")
    arguments = [sys.executable, "-m", "benchmarks.exporting", "--run", what, str(source), str(directory / "target")]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=3600)
    target = directory / "target"
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    return dict(json.loads(done.stdout))


def _run(what: str, source: str, target: str) -> dict[str, float]:
    options: dict[str, Any] = {"dtype": "bf16"} if "bf16" in what else {}
    if what != "copy":
        from ray_ckpt import convert, export

        started = time.perf_counter()
        if what == "import":
            convert(source, target)
        else:
            export(source, target, to=what if what in ("torch", "dcp") else "safetensors", **options)
    else:
        started = time.perf_counter()
        _copy(Path(source), Path(target))
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "memory_mib": _peak_mib()}


def _peak_mib() -> float:
    """Of this program alone: `ru_maxrss` begins with what the process was that started it."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def _copy(source: Path, target: Path) -> None:
    """By read and write, to durable files."""
    target.mkdir()
    buffer = memoryview(bytearray(BUFFER_BYTES))
    for path in source.iterdir():
        with path.open("rb", buffering=0) as given, (target / path.name).open("wb", buffering=0) as taken:
            while num_read := given.readinto(buffer):
                taken.write(buffer[:num_read])
            os.fsync(taken.fileno())


if __name__ == "__main__":
    main()
