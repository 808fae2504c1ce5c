"""What it costs to publish weights, to fetch and to compare them, and to transfer them at once.

    PYTHONPATH=. python benchmarks/publishing.py
    PYTHONPATH=. python benchmarks/publishing.py --mib 512
    PYTHONPATH=. python benchmarks/publishing.py --only fetches   (or publishing, or bytes)

Two trainers and two followers, as processes of this machine; each trainer holds every other tensor, each follower one
half of the tensors: each fetches from both, and holds whole checksum blocks. Medians of the rounds, after one that
warms up; times are the driver's, from call to return. "blocked" is a save with `blocking=False`. A fetch is
`cluster.load`, without a comparison; a transfer has its own.

Fetches from elsewhere: trainers on one node, followers on the same and on another one, as processes of this machine,
and the same by way of the tests' S3 server (moto) on loopback, which is one Python process. Next to each its
comparison.

Bytes: four trainers with `fsdp2x4`, two followers on another node with `tp2`: what their connections to the keepers
have brought, as the kernel counts it, next to what they hold; cut along dim 0 and along dim 1.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
import torch

from ray_ckpt import CheckpointStore, WorkerContext, WorkerGroup, cluster, keep_last
from ray_ckpt.cluster.ram.client import open_files
from ray_ckpt.storage.address import parse

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


def _publishing(options: argparse.Namespace) -> None:
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


# ------------------------------------------------------------------------------------------------- from elsewhere


SHAPES = {
    "attention [4096, 4096]": (4096, 4096),
    "down [4096, 14336]": (4096, 14336),
    "wide [8192, 28672]": (8192, 28672),
}


def make_sharded(ctx: WorkerContext, name: str, dim: int, is_trainer: bool) -> None:
    """A matrix in bfloat16: rows of it on a trainer, along `dim` on a follower."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    shape, ranks = SHAPES[name], dist.get_world_size()
    local = [size // ranks if d == dim else size for d, size in enumerate(shape)]
    part = torch.zeros(local, dtype=torch.bfloat16)
    if is_trainer:
        first = ctx.rank * local[0]
        part = _pattern(range(first, first + local[0]), range(local[1]))
    mesh = init_device_mesh("cpu", (ranks,))
    matrix = DTensor.from_local(
        part, mesh, [Shard(dim)], run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
    )
    ctx.objects["trained" if is_trainer else "served"] = {"matrix": matrix}


def received(ctx: WorkerContext, uri: str) -> int:
    """Bytes that this process has received from keepers."""
    from tests.support.sockets import bytes_received_from

    files = open_files(parse(uri))
    found = files.find([path for path, _ in files.list("")])
    doors = [place.door.location for file in found if file is not None for place in file.copies.values()]
    return bytes_received_from({int(location.rpartition(":")[2]) for location in doors})


def is_right(ctx: WorkerContext, name: str, dim: int) -> bool:
    """Whether a follower holds what the trainers held, bit for bit."""
    part = served(ctx)["matrix"].to_local()  # type: ignore[attr-defined]
    starts = [ctx.rank * size if d == dim else 0 for d, size in enumerate(part.shape)]
    rows, columns = (range(start, start + size) for start, size in zip(starts, part.shape, strict=True))
    return torch.equal(part, _pattern(rows, columns))


def _pattern(rows: range, columns: range) -> torch.Tensor:
    """Elements by which each tells its place, as far as bfloat16 has numbers."""
    of_rows, of_columns = (torch.tensor(places, dtype=torch.int32) % 241 for places in (rows, columns))
    return ((of_rows * 31 % 241).to(torch.int16)[:, None] + of_columns.to(torch.int16)).remainder_(241).bfloat16()


def _bytes(rounds: int) -> None:
    from tests.support.clusters import add_node, joined_head  # here, as the workers import this module too

    with joined_head() as head:
        add_node(head, "127.0.0.2", num_cpus=4)
        # Each group fills what has room, so that it is known which one is on which node.
        with WorkerGroup(4, cpus_per_worker=1, start_timeout_s=120) as trainers:
            add_node(head, "127.0.0.3", num_cpus=2)
            with WorkerGroup(2, cpus_per_worker=1, start_timeout_s=120) as followers:
                _move(trainers, followers, rounds)


def _move(trainers: WorkerGroup, followers: WorkerGroup, rounds: int) -> None:
    store, step = (f"ram://bytes{path}?replicas=0&capacity_bytes=17179869184" for path in ("", "/step-1"))
    assert {w.node_id for w in trainers.workers}.isdisjoint(w.node_id for w in followers.workers)
    print("\n| `fsdp2x4` to `tp2`, bfloat16 | cut along | bytes held | bytes moved | of what is held | fetch s |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name in SHAPES:
        for dim in (0, 1):
            trainers.run(make_sharded, name, 0, True)
            followers.run(make_sharded, name, dim, False)
            assert not any(followers.run(is_right, name, dim)), "the control"
            cluster.save(trainers, trained, step)
            cluster.load(followers, served, step)
            assert all(followers.run(is_right, name, dim))
            # Only now: of connections that threads open at the same time, all but one are closed after their first use.
            before = sum(followers.run(received, store))
            cluster.load(followers, served, step)
            moved = sum(followers.run(received, store)) - before
            held = 2 * SHAPES[name][0] * SHAPES[name][1]
            seconds = time_of(lambda: cluster.load(followers, served, step), rounds)
            print(f"| {name} | dim {dim} | {held} | {moved} | {moved / held:.2f} | {seconds:.2f} |", flush=True)
            cluster.drop_memory("bytes")


def _fetches(options: argparse.Namespace) -> None:
    from tests.support.clusters import add_node, joined_head
    from tests.support.s3 import run_s3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with run_s3() as s3, joined_head() as head:
        add_node(head, "127.0.0.2", num_cpus=4)
        group = partial(WorkerGroup, 2, cpus_per_worker=1, process_group=False, start_timeout_s=120)
        with group() as trainers, group() as neighbors:
            add_node(head, "127.0.0.3", num_cpus=2)
            with group() as others:
                _compare(trainers, neighbors, others, s3.uri("weights"), options)


def _compare(
    trainers: WorkerGroup, neighbors: WorkerGroup, others: WorkerGroup, s3: str, options: argparse.Namespace
) -> None:
    assert {w.node_id for w in trainers.workers} == {w.node_id for w in neighbors.workers}
    assert {w.node_id for w in trainers.workers}.isdisjoint(w.node_id for w in others.workers)
    print("\n| state of each rank | fetched from | fetch s | compare s | of the fetch |")
    print("| --- | --- | ---: | ---: | ---: |")
    memory = "ram://fetched/step-1?replicas=0&capacity_bytes=17179869184"
    places = {
        "memory of the own node": (neighbors, memory),
        "memory of another node": (others, memory),
        "S3 on loopback": (others, s3),
    }
    for dtype in ("float32", "bfloat16"):
        for group in (trainers, neighbors, others):
            group.run(make, options.mib, dtype)
        for uri in (memory, s3):
            cluster.save(trainers, trained, uri, overwrite=True)
        for place, (group, uri) in places.items():
            # The server on loopback takes its time.
            fetch = time_of(lambda: cluster.load(group, served, uri), 1 if uri == s3 else options.rounds)  # noqa: B023
            compare = time_of(lambda: cluster.compare(group, served, uri), options.rounds)  # noqa: B023
            assert cluster.compare(group, served, uri).equal
            print(
                f"| {options.mib} MiB, {dtype} | {place} | {fetch:.2f} | {compare:.3f} | {compare / fetch:.2f}x |",
                flush=True,
            )
    cluster.drop_memory("fetched")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="on each of the two trainers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("publishing", "fetches", "bytes"), help="one part alone")
    options = parser.parse_args()
    if options.only in (None, "publishing"):
        _publishing(options)
    if options.only in (None, "fetches"):
        _fetches(options)
    if options.only in (None, "bytes"):
        _bytes(options.rounds)


if __name__ == "__main__":
    from benchmarks import publishing  # by a name that the workers know

    publishing.main()
