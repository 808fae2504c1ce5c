"""What a front in memory does for a save, and for the recovery after a node's death.

    PYTHONPATH=. python benchmarks/tiers.py
    PYTHONPATH=. python benchmarks/tiers.py --gib 1 --recovery

Three nodes as processes of this machine, one worker each, with a state of rows of tensors. The durable store is a
directory whose bytes pass at 200 MiB/s per process, so that each node has such a wire of its own. "blocked" is from the
call to its return, on the driver; medians of the rounds, after one that warms up. Then one node is killed, and the two
that are left load everything in the layout of two, once from memory and once from the durable store: the slowest
worker's load, in which no process starts. With `--recovery` one save comes before, and is not timed: 12 GiB of memory
will do for 1 GiB a node, where the saves take 20.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from ray_ckpt import CheckpointStore, WorkerContext, WorkerGroup, cluster
from ray_ckpt.storage.file_objects import InputFile, OutputFile
from ray_ckpt.storage.files import Storage

NUM_TENSORS, NUM_NODES = 24, 3
BYTES_PER_S = 200 << 20

_lock = threading.Lock()
_free_at = 0.0
"""When this process' disk has done what it was asked for, by `time.monotonic()`."""


def _wait_for(num_bytes: int) -> None:
    global _free_at
    with _lock:
        _free_at = max(_free_at, time.monotonic()) + num_bytes / BYTES_PER_S
        until = _free_at
    time.sleep(max(0.0, until - time.monotonic()))


class LimitedStorage(Storage):
    """A directory behind a slow wire."""

    @contextlib.contextmanager
    def open_input(self, name: str) -> Iterator[InputFile]:
        with super().open_input(name) as file:
            read = file.read_into

            def read_into(offset: int, memory: memoryview) -> None:
                read(offset, memory)
                _wait_for(len(memory))

            file.read_into = read_into  # type: ignore[method-assign]
            yield file

    def create(self, name: str, *, num_bytes: int = 0) -> OutputFile:
        file = super().create(name, num_bytes=num_bytes)
        into = file.write

        def write(data: Any) -> None:
            into(data)
            _wait_for(memoryview(data).nbytes)

        file.write = write  # type: ignore[method-assign]
        return file


def fill(ctx: WorkerContext, num_rows: int, value: float) -> None:
    """Hold this rank's rows of every tensor."""
    mesh = init_device_mesh("cpu", (ctx.world_size,))
    whole = torch.empty(num_rows, 1024, device="meta").chunk(ctx.world_size)
    local = [torch.full(whole[ctx.rank].shape, value + n) for n in range(NUM_TENSORS)]
    shape, stride = torch.Size((num_rows, 1024)), (1024, 1)
    ctx.objects["state"] = {
        f"layer{n}": DTensor.from_local(part, mesh, [Shard(0)], shape=shape, stride=stride)
        for n, part in enumerate(local)
    }


def state_of(ctx: WorkerContext) -> dict[str, Any]:
    state: dict[str, Any] = ctx.objects["state"]
    return state


def differing(ctx: WorkerContext) -> int:
    """How many tensors are not what was saved."""
    return sum(not bool((part.to_local() == 1.0 + n).all()) for n, part in enumerate(state_of(ctx).values()))


def _saves(group: WorkerGroup, stores: dict[str, CheckpointStore], rounds: int) -> None:
    print("| save | blocked s | in the background: blocked s | until committed s |\n| --- | ---: | ---: | ---: |")
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in stores}
    for number in range(rounds + 1):
        for name, store in stores.items():
            started = time.perf_counter()
            cluster.save(group, state_of, store, 2 * number)
            blocked = time.perf_counter() - started
            store.make_durable(timeout_s=600)
            started = time.perf_counter()
            handle = cluster.save(group, state_of, store, 2 * number + 1, blocking=False)
            beside = time.perf_counter() - started
            handle.result()
            committed = time.perf_counter() - started
            store.make_durable(timeout_s=600)
            for old in store.steps()[:-1]:
                store.delete(old)
            if number:
                samples[name].append((blocked, beside, committed))
    for name, of_store in samples.items():
        print(
            f"| {name} | "
            + " | ".join(f"{statistics.median(column):.3f}" for column in zip(*of_store, strict=True))
            + " |"
        )


def _recoveries(group: WorkerGroup, stores: dict[str, CheckpointStore], num_rows: int, rounds: int) -> None:
    print("\n| recovery from | seconds | bytes from the durable store | wrong tensors |\n| --- | ---: | ---: | ---: |")
    for name, store in stores.items():
        seconds, num_bytes, wrong = [], 0, 0
        for _ in range(rounds):
            group.run(fill, num_rows, -1.0)
            reports = cluster.load(group, state_of, store)
            seconds.append(max(report.seconds for report in reports))
            num_bytes = sum(report.durable_bytes if report.tier else report.num_bytes for report in reports)
            wrong += sum(group.run(differing))
        print(f"| {name} | {statistics.median(seconds):.3f} | {num_bytes} | {wrong} |", flush=True)


def main() -> None:
    # Here, as the workers import this module too.
    from tests.support.clusters import Sandbox, add_node, joined, start_head

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=0.25, help="GiB of state on each of the three nodes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recovery", action="store_true", help="leave out the times of the saves")
    options = parser.parse_args()
    num_rows = int(options.gib * NUM_NODES * 2**30 / (NUM_TENSORS * 1024 * 4)) // 6 * 6
    with Sandbox() as sandbox:
        head = start_head(sandbox, num_cpus=0)
        with joined(head):
            nodes = [add_node(head, f"127.0.0.{number}") for number in (2, 3, 4)]
            front = f"ram://bench{uuid.uuid4().hex[:8]}?replicas=1"
            roots = [Path(sandbox.tmp) / name for name in ("alone", "behind")]
            alone, behind = (CheckpointStore(LimitedStorage(root)) for root in roots)
            tiered = CheckpointStore(LimitedStorage(roots[1]), front)
            with WorkerGroup(NUM_NODES, start_timeout_s=120, call_timeout_s=600) as group:
                group.run(fill, num_rows, 1.0)
                if options.recovery:
                    cluster.save(group, state_of, tiered, 0)
                    tiered.make_durable(timeout_s=600)
                else:
                    _saves(group, {"durable alone": alone, "with a front": tiered}, options.rounds)
            sandbox.kill(nodes[0])
            with WorkerGroup(NUM_NODES - 1, start_timeout_s=120, call_timeout_s=600) as group:
                _recoveries(group, {"memory": tiered, "durable": behind}, num_rows, options.rounds)


if __name__ == "__main__":
    from benchmarks import tiers  # by a name that the workers know

    tiers.main()
