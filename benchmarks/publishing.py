"""What it costs to publish weights, to fetch and to compare them, and to transfer them at once.

    PYTHONPATH=. python benchmarks/publishing.py
    PYTHONPATH=. python benchmarks/publishing.py --mib 512

Two trainers and two followers, as processes of this machine; each trainer holds every other tensor, each follower one
half of the tensors: each fetches from both, and holds whole checksum blocks. Medians of the rounds, after one that
warms up; times are the driver's, from call to return. "blocked" is a save with `blocking=False`. A fetch is
`cluster.load`, without a comparison; a transfer has its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
import torch

from ray_ckpt import CheckpointStore, WorkerContext, WorkerGroup, cluster, keep_last

NUM_TENSORS = 16


def make(ctx: WorkerContext, mib: int, dtype: str) -> None:
    """States of `mib` MiB on each rank."""
    elements = mib * (1 << 20) * 2 // NUM_TENSORS // getattr(torch, dtype).itemsize
    kind = getattr(torch, dtype)
    ctx.objects["trained"] = {
        f"t{number:02d}": torch.randn(elements).to(kind) for number in range(ctx.rank, NUM_TENSORS, 2)
    }
    half = NUM_TENSORS // 2
    ctx.objects["served"] = {
        f"t{number:02d}": torch.zeros(elements, dtype=kind) for number in range(half * ctx.rank, half * (ctx.rank + 1))
    }


def trained(ctx: WorkerContext) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = ctx.objects["trained"]
    return state


def served(ctx: WorkerContext) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = ctx.objects["served"]
    return state


def time_of(action: Callable[[], Any], rounds: int, after: Callable[[Any], object] = lambda _: None) -> float:
    """Median, after one round that is not counted.

    Args:
        after: takes what each round has returned, and is not timed.
    """
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        result = action()
        seconds.append(time.perf_counter() - started)
        after(result)
    return statistics.median(seconds[1:])


def measure(trainers: WorkerGroup, followers: WorkerGroup, rounds: int, *, casts: bool) -> list[float]:
    """Seconds: publish, blocked, blocked with a cast, fetch, compare, transfer, and the source's part of it."""
    store, steps = CheckpointStore("ram://bench?replicas=0&capacity_bytes=17179869184"), iter(range(1000))

    def save(**options: Any) -> Any:
        return cluster.save(trainers, trained, store, next(steps), **options)

    def settle(handle: Any) -> None:
        handle.result(120)
        store.prune(keep_last(1))

    found = [time_of(save, rounds, lambda _: store.prune(keep_last(1)))]
    found.append(time_of(partial(save, blocking=False), rounds, settle))
    found.append(time_of(partial(save, blocking=False, cast="bfloat16"), rounds, settle) if casts else float("nan"))
    save()
    found.append(time_of(lambda: cluster.load(followers, served, store), rounds))
    found.append(time_of(lambda: cluster.compare(followers, served, store), rounds))
    assert cluster.compare(followers, served, store).equal
    sources: list[float] = []
    transfer = partial(cluster.transfer, trainers, trained, followers, served)
    found.append(time_of(transfer, rounds, lambda report: sources.append(report.source_seconds)))
    found.append(statistics.median(sources[1:]))
    cluster.drop_memory("bench")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="on each of the two trainers")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=2 << 30)
    print(
        "| state of each rank | publish s | blocked s | with cast s | fetch s | compare s | of the fetch | transfer s |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with (
        WorkerGroup(2, cpus_per_worker=1, process_group=False) as trainers,
        WorkerGroup(2, cpus_per_worker=1, process_group=False) as followers,
    ):
        for dtype in ("float32", "bfloat16"):
            for group in (trainers, followers):
                group.run(make, options.mib, dtype)
            times = measure(trainers, followers, options.rounds, casts=dtype == "float32")
            publish, blocked, with_cast, fetch, compare, transfer, source = times
            print(
                f"| {options.mib} MiB, {dtype} | {publish:.2f} | {blocked:.2f} | {with_cast:.2f} | {fetch:.2f} | "
                f"{compare:.2f} | {compare / fetch:.1f}x | {transfer:.2f} (source {source:.2f}) |",
                flush=True,
            )
    ray.shutdown()


if __name__ == "__main__":
    main()
