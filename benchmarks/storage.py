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
import resource
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, zeros

from benchmarks.plugins import PLUGINS, State
from tests.ranks import run_ranks

NUM_STAGES = 4
SMALL = "10 000 x 4 KB"


@dataclass(frozen=True)
class Sample:
    """What one operation cost one rank."""

    seconds: float
    cpu_seconds: float
    read_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class Row:
    """Medians over the repeats; the memory is the most that any rank took in any of them."""

    case: str
    operation: str
    plugin: str
    seconds: float
    cpu_seconds: float
    read_ratio: float
    memory_bytes: int


def _shapes(case: str, stage: int) -> dict[str, tuple[int, ...]]:
    """A stage's tensors: a weight and Adam's two moments of it, or its share of many small ones."""
    if case == SMALL:
        return {f"stage{stage}.tensor{number}": (256, 4) for number in range(10_000 // NUM_STAGES)}
    width = int((float(case.removesuffix(" GiB")) * 2**30 / (NUM_STAGES * 3 * 4)) ** 0.5)
    return {f"stage{stage}.{part}": (width, width) for part in ("weight", "exp_avg", "exp_avg_sq")}


def _measure(action: Callable[[], None]) -> Sample:
    _reset_peak_memory()
    before, read, usage = _memory("VmRSS"), _bytes_read(), resource.getrusage(resource.RUSAGE_SELF)
    dist.barrier()
    started = time.perf_counter()
    action()
    dist.barrier()
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
    return Sample(seconds, cpu, _bytes_read() - read, max(0, _memory("VmHWM") - before))


def _reset_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise LookupError(field)


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def _drop_from_cache(directory: str) -> None:
    if dist.get_rank() == 0:
        for path in Path(directory).iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    dist.barrier()


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
            samples.append((name, _measure(lambda name=name, to=directory: PLUGINS[name].save(state, to))))
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
                _drop_from_cache(directory)
            sample = _measure(lambda name=name, source=directory: PLUGINS[name].load(dict(state), source))
            if repeat or cold:  # the first warm round warms up
                samples.append((name, sample))
    return samples


def _directory(root: str, plugin: str) -> str:
    return os.path.join(root, plugin.replace(" ", "-"))


def _summarise(case: str, operation: str, by_rank: Sequence[Sequence[tuple[str, Sample]]]) -> list[Row]:
    total = sum(torch.Size(s).numel() * 4 for stage in range(NUM_STAGES) for s in _shapes(case, stage).values())
    rounds: dict[str, list[list[Sample]]] = {}
    for entries in zip(*by_rank, strict=True):
        rounds.setdefault(entries[0][0], []).append([sample for _, sample in entries])
    return [
        Row(
            case,
            operation,
            name,
            seconds=statistics.median(max(s.seconds for s in ranks) for ranks in of_plugin),
            cpu_seconds=statistics.median(sum(s.cpu_seconds for s in ranks) for ranks in of_plugin),
            read_ratio=statistics.median(sum(s.read_bytes for s in ranks) for ranks in of_plugin) / total,
            memory_bytes=max(sample.memory_bytes for ranks in of_plugin for sample in ranks),
        )
        for name, of_plugin in rounds.items()
    ]


def _run_case(case: str, root: str, names: Sequence[str], options: argparse.Namespace) -> list[Row]:
    scratch = Path(root)
    save = run_ranks(_save_all, NUM_STAGES, scratch, case, root, names, options.repeats, timeout_s=3600)
    rows = _summarise(case, "save", save)
    for operation in ("load", *(["load, cold"] if options.cold else [])):
        arguments = (case, root, names, options.repeats, operation == "load, cold")
        load = run_ranks(_load_all, options.ranks, scratch, *arguments, timeout_s=3600)
        rows += _summarise(case, operation, load)
    return rows


def _print_head() -> None:
    print("| case | operation | plug-in | seconds | than stock | of raw | CPU s | read | memory |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)


def _print_rows(rows: Sequence[Row]) -> None:
    seconds = {(row.case, row.operation, row.plugin): row.seconds for row in rows}
    for row in rows:
        stock, raw = (seconds.get((row.case, row.operation, name)) for name in ("stock FileSystem", "raw"))
        print(
            f"| {row.case} | {row.operation} | {row.plugin} | {row.seconds:.3f} | {_ratio(stock, row.seconds)} faster "
            f"| {_ratio(row.seconds, raw)} | {row.cpu_seconds:.2f} | {row.read_ratio:.2f} "
            f"| {row.memory_bytes / 2**20:.0f} MiB |",
            flush=True,
        )


def _ratio(seconds: float | None, base: float | None) -> str:
    return f"{seconds / base:.2f}x" if seconds and base else "-"


def _plot(path: str, case: str, root: str, options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, counts = ["ours", "stock FileSystem"], [1, 2, 4, 8]
    run_ranks(_save_all, NUM_STAGES, Path(root), case, root, names, 1, timeout_s=3600)
    times: dict[str, list[float]] = {name: [] for name in names}
    for count in counts:
        load = run_ranks(_load_all, count, Path(root), case, root, names, options.repeats, False, timeout_s=3600)
        for row in _summarise(case, "load", load):
            times[row.plugin].append(row.seconds)
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
                _print_rows(_run_case(case, root, options.plugins, options))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
