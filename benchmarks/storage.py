"""Save four pipeline stages with Adam, load them as FSDP shards: ours beside stock DCP and the raw limit.

    python benchmarks/storage.py                                   three sizes and many small tensors, one table
    python benchmarks/storage.py --sizes 3 --repeats 5 --directory /dev/shm/bench
    python benchmarks/storage.py --cold --directory /data/bench    also with a cold page cache (a real disk)
    python benchmarks/storage.py --plot load.png                   load time over 1, 2, 4, 8 ranks, ours and stock

Every row is measured in one run: in each repeat every contestant saves and loads once, in turn, on the same ranks with
the same tensors, and the table shows medians. A time is that of the slowest rank, from barrier to barrier. "read" is
what the kernel handed to `read` calls of all ranks, per byte of tensors. "memory" is the peak of a rank's resident
memory over what it was before. A cold cache is one from which the checkpoint's files were dropped (`posix_fadvise`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, zeros

from benchmarks.measuring import Cost, Sample, drop_from_cache, measure, ratio, summarise
from benchmarks.plugins import PLUGINS, State
from tests.support.ranks import run_ranks

NUM_STAGES = 4
SMALL = "10 000 x 4 KB"


def _shapes(case: str, stage: int) -> dict[str, tuple[int, ...]]:
    """A stage's tensors: a weight and Adam's two moments of it, or its share of many small ones."""
    if case == SMALL:
        return {f"stage{stage}.tensor{number}": (256, 4) for number in range(10_000 // NUM_STAGES)}
    width = int((float(case.removesuffix(" GiB")) * 2**30 / (NUM_STAGES * 3 * 4)) ** 0.5)
    return {f"stage{stage}.{part}": (width, width) for part in ("weight", "exp_avg", "exp_avg_sq")}


def _save_all(rank: int, case: str, root: str, names: Sequence[str], repeats: int) -> list[tuple[str, Sample]]:
    """Rank r is stage r. Leaves each contestant's last checkpoint in its directory."""
    warnings.simplefilter("ignore")
    state: State = {name: torch.randn(shape) for name, shape in _shapes(case, rank).items()}
    samples = []
    for _ in range(repeats):
        for name in names:
            directory = _directory(root, name)
            if rank == 0:
                shutil.rmtree(directory, ignore_errors=True)
                os.makedirs(directory)
            dist.barrier()
            samples.append((name, measure(lambda name=name, to=directory: PLUGINS[name].save(state, to))))
    return samples


def _load_all(
    rank: int, case: str, root: str, names: Sequence[str], repeats: int, cold: bool
) -> list[tuple[str, Sample]]:
    """Every rank loads its rows of all tensors; the targets' memory is touched before."""
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shapes = {name: shape for stage in range(NUM_STAGES) for name, shape in _shapes(case, stage).items()}
    state: State = {name: zeros(*shape, device_mesh=mesh, placements=[Shard(0)]) for name, shape in shapes.items()}
    for tensor in state.values():
        tensor.to_local().fill_(1.0)
    samples = []
    for repeat in range(repeats + 1):
        for name in names:
            directory = _directory(root, name)
            if cold:
                drop_from_cache(directory)
            sample = measure(lambda name=name, source=directory: PLUGINS[name].load(dict(state), source))
            if repeat or cold:  # the first warm round warms up
                samples.append((name, sample))
    return samples


def _directory(root: str, plugin: str) -> str:
    return os.path.join(root, plugin.replace(" ", "-"))


def _run_case(case: str, root: str, names: Sequence[str], options: argparse.Namespace) -> None:
    save = run_ranks(_save_all, NUM_STAGES, Path(root), case, root, names, options.repeats, timeout_s=3600)
    _print_rows(case, "save", summarise(save))
    for operation in ("load", *(["load, cold"] if options.cold else [])):
        arguments = (case, root, names, options.repeats, operation == "load, cold")
        load = run_ranks(_load_all, options.ranks, Path(root), *arguments, timeout_s=3600)
        _print_rows(case, operation, summarise(load))


def _print_head() -> None:
    print("| case | operation | plug-in | seconds | than stock | of raw | CPU s | read | memory |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)


def _print_rows(case: str, operation: str, costs: Mapping[str, Cost]) -> None:
    total = sum(torch.Size(s).numel() * 4 for stage in range(NUM_STAGES) for s in _shapes(case, stage).values())
    stock, raw = (costs[name].seconds if name in costs else None for name in ("stock FileSystem", "raw"))
    for name, cost in costs.items():
        print(
            f"| {case} | {operation} | {name} | {cost.seconds:.3f} | {ratio(stock, cost.seconds)} faster "
            f"| {ratio(cost.seconds, raw)} | {cost.cpu_seconds:.2f} | {cost.read_bytes / total:.2f} "
            f"| {cost.memory_bytes / 2**20:.0f} MiB |",
            flush=True,
        )


def _plot(path: str, case: str, root: str, options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, counts = ["ours", "stock FileSystem"], [1, 2, 4, 8]
    run_ranks(_save_all, NUM_STAGES, Path(root), case, root, names, 1, timeout_s=3600)
    times: dict[str, list[float]] = {name: [] for name in names}
    for count in counts:
        load = run_ranks(_load_all, count, Path(root), case, root, names, options.repeats, False, timeout_s=3600)
        for name, cost in summarise(load).items():
            times[name].append(cost.seconds)
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name in names:
        axes.plot(counts, times[name], marker="o", label=name)
    axes.set(xlabel="ranks", ylabel="seconds", title=f"load of {case}", ylim=0, xticks=counts)
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(f"{path}: {times}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default=None, help="where to write; a temporary directory by default")
    parser.add_argument(
        "--sizes", type=float, nargs="*", default=[0.1, 0.75, 3.0], help="GiB, weights and moments together"
    )
    parser.add_argument("--no-small", action="store_true", help=f"leave out {SMALL}")
    parser.add_argument("--ranks", type=int, default=4, help="that load; four always save")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plugins", nargs="*", default=list(PLUGINS), choices=list(PLUGINS))
    parser.add_argument("--cold", action="store_true", help="also load with a cold page cache")
    parser.add_argument("--plot", help="write a PNG of load time over the number of ranks, and nothing else")
    options = parser.parse_args()
    root = tempfile.mkdtemp(dir=options.directory)
    try:
        cases = [f"{size:g} GiB" for size in options.sizes] + ([] if options.no_small else [SMALL])
        if options.plot:
            _plot(options.plot, cases[0], root, options)
        else:
            _print_head()
            for case in cases:
                _run_case(case, root, options.plugins, options)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
