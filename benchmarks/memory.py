"""Saves and loads through `ram://`, next to the machine's own shared memory, and between two nodes.

    PYTHONPATH=. python benchmarks/memory.py
    PYTHONPATH=. python benchmarks/memory.py --gib 1

One node: a process saves and loads in turn through `ram://` and through `/dev/shm`; medians of the rounds, after one
that warms up. Two nodes, as processes of this machine: a file that a worker of one writes gets a copy on the other
(`replicas=1`, less the same without a copy), and a worker of the other reads a file of which it holds no copy, in the
pieces of 4 MiB in which a load reads.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
import uuid

import torch

from ray_ckpt import WorkerContext, WorkerGroup, cluster, load, save
from ray_ckpt.storage.files import Storage

NUM_TENSORS = 16
PIECE_BYTES = 4 << 20


def _one_node(num_bytes: int, rounds: int) -> None:
    name = f"bench{uuid.uuid4().hex[:8]}"
    state = {f"layer{n}": torch.rand(num_bytes // NUM_TENSORS // 4) for n in range(NUM_TENSORS)}
    box = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    targets = {"/dev/shm": f"/dev/shm/{name}", "ram://": f"ram://{name}"}
    seconds: dict[str, list[tuple[float, float]]] = {target: [] for target in targets}
    try:
        for number in range(rounds + 1):
            for target, uri in targets.items():
                started = time.perf_counter()
                save(state, f"{uri}/{number}")
                saved = time.perf_counter()
                load(box, f"{uri}/{number}")
                loaded = time.perf_counter()
                _remove(f"{uri}/{number}")
                if number:
                    seconds[target].append((saved - started, loaded - saved))
    finally:
        shutil.rmtree(f"/dev/shm/{name}", ignore_errors=True)
        cluster.drop_memory(name)
    assert all(torch.equal(state[key], box[key]) for key in state)
    print("| one node | save s | load s |\n| --- | ---: | ---: |")
    medians = {
        target: [statistics.median(column) for column in zip(*of_target, strict=True)]
        for target, of_target in seconds.items()
    }
    for target, columns in medians.items():
        print(f"| {target} | " + " | ".join(f"{column:.3f}" for column in columns) + " |")
    ratios = [there / here for here, there in zip(*medians.values(), strict=True)]
    print("| ratio | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


def _remove(uri: str) -> None:
    storage = Storage(uri)
    for name in storage.list_files():
        storage.delete(name)


def write(ctx: WorkerContext, uri: str, num_bytes: int) -> float:
    """The first rank writes a file; the seconds until it has its name."""
    if ctx.rank:
        return 0.0
    data = memoryview(bytearray(PIECE_BYTES))
    started = time.perf_counter()
    with Storage(uri).create("file", num_bytes=num_bytes) as file:
        for _ in range(num_bytes // PIECE_BYTES):
            file.write(data)
    return time.perf_counter() - started


def read(ctx: WorkerContext, uri: str, num_bytes: int) -> float:
    """The last rank reads the file; the seconds."""
    if ctx.rank == 0:
        return 0.0
    memory = memoryview(bytearray(num_bytes))
    started = time.perf_counter()
    with Storage(uri).open_input("file") as file:
        for at in range(0, num_bytes, PIECE_BYTES):
            file.read_into(at, memory[at : at + PIECE_BYTES])
    return time.perf_counter() - started


def _two_nodes(num_bytes: int, rounds: int) -> None:
    alone, copied = (f"ram://bench{uuid.uuid4().hex[:8]}?replicas={replicas}" for replicas in (0, 1))
    copying, reading = [], []
    with WorkerGroup(2, start_timeout_s=120, call_timeout_s=600) as group:
        for number in range(rounds + 1):
            without, beside = (sum(group.run(write, uri, num_bytes)) for uri in (alone, copied))
            seconds = sum(group.run(read, alone, num_bytes))
            if number:
                copying.append(beside - without)
                reading.append(seconds)
    for uri in (alone, copied):
        cluster.drop_memory(uri.removeprefix("ram://").partition("?")[0])
    gib = num_bytes / 2**30
    print(f"\n| between two nodes | GiB/s |\n| --- | ---: |\n| a copy | {gib / statistics.median(copying):.2f} |")
    print(f"| a read in pieces | {gib / statistics.median(reading):.2f} |")


def main() -> None:
    # Here, as the workers import this module too.
    from tests.support.clusters import Sandbox, add_node, joined, start_head

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=0.5, help="size of what is saved, written and read")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    num_bytes = int(options.gib * 2**30) // PIECE_BYTES * PIECE_BYTES
    with Sandbox() as sandbox:
        head = start_head(sandbox, num_cpus=0)
        with joined(head):
            _one_node(num_bytes, options.rounds)
            for number in (2, 3):
                add_node(head, f"127.0.0.{number}")
            _two_nodes(num_bytes, options.rounds)


if __name__ == "__main__":
    from benchmarks import memory  # by a name that the workers know

    memory.main()
