"""What it takes to write and to open the manifest of very many parts, each in a process of its own.

    PYTHONPATH=. python benchmarks/large_records.py                  a million parts, three rounds
    PYTHONPATH=. python benchmarks/large_records.py --parts 10000

"shards": 4 096 ranks have a row of every tensor. "cells": the same as 512 x 8 cells. "stages": every part is a tensor
of its own, on one of 64 ranks. Seconds are of processor time, the least of the rounds; memory is the peak of the
process above what it had with the modules loaded, the text of the manifest among it.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ray_ckpt.format.block_sums import BlockSums
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.manifest import Chunk, Manifest, TensorEntry
from ray_ckpt.gc_pause import collector_paused

KINDS = ("shards", "cells", "stages")
WIDTH = 4
"""Elements of a row."""


def manifest_of(kind: str, num_parts: int) -> Manifest:
    num_ranks = min(64 if kind == "stages" else 4096, num_parts)
    num_tensors = num_parts if kind == "stages" else max(1, num_parts // num_ranks)
    files = [f"__{rank}_0-0123456789ab.distcp" for rank in range(num_ranks)]
    columns = 8 if kind == "cells" and not num_ranks % 8 else 1
    boxes = [Box((rank // columns, rank % columns * WIDTH), (1, WIDTH)) for rank in range(num_ranks)]
    shape = (1, WIDTH) if kind == "stages" else (num_ranks // columns, columns * WIDTH)
    tensors = {}
    for number in range(num_tensors):
        ranks = [number % num_ranks] if kind == "stages" else range(num_ranks)
        start = 2048 * (number // num_ranks if kind == "stages" else number)
        sums = (number * 0x9E3779B97F4A7C15 % (1 << 64)).to_bytes(8, "little")
        chunks = [
            Chunk(boxes[0 if kind == "stages" else rank], files[rank], start, 1500, start + 1024, BlockSums(4096, sums))
            for rank in ranks
        ]
        rest = f"layers.{number // 9}.block{number % 9}.weight"
        tensors[f"model.{rest}"] = TensorEntry("float32", shape, tuple(chunks), ("model", rest))
    return Manifest(tensors, {}, dict.fromkeys(files, 2048 * (num_tensors + 1)), "0123456789ab")


def _memory(field: str) -> float:
    """MiB."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def _write(kind: str, num_parts: int, path: Path) -> dict[str, float]:
    with collector_paused():
        manifest = manifest_of(kind, num_parts)
        gc.collect()
        before, started = _memory("VmRSS"), time.process_time()
        text = manifest.to_json().encode()
        seconds = time.process_time() - started
    path.write_bytes(text)
    return {"seconds": seconds, "memory_mib": _memory("VmHWM") - before, "text_mib": len(text) / 2**20}


def _open(path: Path) -> dict[str, float]:
    before, started = _memory("VmRSS"), time.process_time()
    with collector_paused():
        manifest = Manifest.from_json(path.read_bytes())
    seconds = time.process_time() - started
    assert len(manifest.tensors)
    return {"seconds": seconds, "memory_mib": _memory("VmHWM") - before}


def _run(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--run", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=3600)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--directory", default=tempfile.gettempdir())
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        what, kind, num_parts, path = options.run
        print(json.dumps(_write(kind, int(num_parts), Path(path)) if what == "write" else _open(Path(path))))
        return
    print("| parts | manifest MiB | write s | MiB | open s | MiB |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for kind in options.kinds:
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            arguments = kind, str(options.parts), str(Path(directory, "manifest.json"))
            written = [_run("write", *arguments) for _ in range(options.rounds)]
            opened = [_run("open", *arguments) for _ in range(options.rounds)]
        figures = [f"| {options.parts} {kind} | {written[0]['text_mib']:.0f} |"]
        for found in (written, opened):
            figures.append(f" {min(f['seconds'] for f in found):.2f} | {max(f['memory_mib'] for f in found):.0f} |")
        print("".join(figures), flush=True)


if __name__ == "__main__":
    main()
