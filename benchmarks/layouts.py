"""Loads between other layouts than the main job's: ours beside stock DCP, and how much is read for what is needed.

    PYTHONPATH=. python benchmarks/layouts.py
    PYTHONPATH=. python benchmarks/layouts.py --size 0.1 --repeats 3 --directory /dev/shm

Eight square layers, each a weight and Adam's two moments. `fsdp` holds rows of every tensor; `tp` holds rows of the
even layers ("row shards": what `ColwiseParallel` keeps of `nn.Linear`) and columns of the odd ones ("column shards":
`RowwiseParallel`); `pp` holds layers whole. In each round every contestant loads once, in turn, on the same ranks, from
a warm cache; medians. "read" is what all ranks' `read` calls got per byte that they hold in the end.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from benchmarks.measuring import Sample, measure, ratio, summarise
from benchmarks.plugins import PLUGINS, State
from tests.support.ranks import run_ranks

LAYERS = range(8)
CONTESTANTS = ("ours, our verbs", "ours", "stock FileSystem")


@dataclass(frozen=True)
class Pair:
    """Saved on so many ranks as one kind of layout, loaded on so many as another."""

    source: tuple[str, int]
    target: tuple[str, int]
    layers: Sequence[int] = LAYERS
    remark: str = ""

    def __str__(self) -> str:
        (source, source_ranks), (target, target_ranks) = self.source, self.target
        return f"{source}{source_ranks} -> {target}{target_ranks}{self.remark}"


PAIRS = (
    Pair(("fsdp", 4), ("tp", 4), LAYERS[0::2], ", row shards"),
    Pair(("fsdp", 4), ("tp", 4), LAYERS[1::2], ", column shards"),
    Pair(("tp", 4), ("fsdp", 3)),
    Pair(("fsdp", 4), ("pp", 4)),
)


def _state(kind: str, layers: Sequence[int], width: int, fill: float | None = None) -> State:
    """What this rank holds: values that follow from the name, or one value everywhere."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state: State = {}
    for layer in layers:
        if kind == "pp" and layer * dist.get_world_size() // len(LAYERS) != dist.get_rank():
            continue
        for number, part in enumerate(("weight", "exp_avg", "exp_avg_sq")):
            whole = torch.arange(float(width * width)).view(width, width) + (3 * layer + number)
            if fill is not None:
                whole.fill_(fill)
            placement = {"fsdp": Shard(0), "tp": Shard(layer % 2)}.get(kind, Replicate())
            value = whole if kind == "pp" else distribute_tensor(whole, mesh, [placement], src_data_rank=None)
            state[f"layer{layer}.{part}"] = value
    return state


def _save(rank: int, pair: Pair, width: int, root: str) -> None:
    warnings.simplefilter("ignore")
    state = _state(pair.source[0], pair.layers, width)
    for name in CONTESTANTS:
        PLUGINS[name].save(state, f"{root}/{name}")


def _load(rank: int, pair: Pair, width: int, root: str, repeats: int) -> tuple[int, list[tuple[str, Sample]]]:
    """The bytes that this rank holds, and the contestants' samples."""
    warnings.simplefilter("ignore")
    kind = pair.target[0]
    expected = _state(kind, pair.layers, width)
    samples = []
    for repeat in range(repeats + 1):
        for name in CONTESTANTS:
            state = _state(kind, pair.layers, width, fill=-1.0)
            sample = measure(lambda name=name, state=state: PLUGINS[name].load(state, f"{root}/{name}"))
            if repeat:
                samples.append((name, sample))
            elif not all(torch.equal(_local(state[key]), _local(value)) for key, value in expected.items()):
                raise AssertionError(f"{pair}: {name} loaded something else than was saved")
    return sum(_local(tensor).nbytes for tensor in expected.values()), samples


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default=None, help="where to write; a temporary directory by default")
    parser.add_argument("--size", type=float, default=0.75, help="GiB, all eight layers together")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    width = int((options.size * 2**30 / (len(LAYERS) * 3 * 4)) ** 0.5) // 12 * 12
    print("| layouts | who | seconds | than stock | CPU s | read | memory |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for pair in PAIRS:
        root = tempfile.mkdtemp(dir=options.directory)
        try:
            run_ranks(_save, pair.source[1], Path(root), pair, width, root, timeout_s=3600)
            arguments = (pair, width, root, options.repeats)
            by_rank = run_ranks(_load, pair.target[1], Path(root), *arguments, timeout_s=3600)
        finally:
            shutil.rmtree(root)
        needed = sum(num_bytes for num_bytes, _ in by_rank)
        costs = summarise([samples for _, samples in by_rank])
        for name, cost in costs.items():
            faster = ratio(costs["stock FileSystem"].seconds, cost.seconds)
            print(
                f"| {pair} | {name} | {cost.seconds:.3f} | {faster} faster | {cost.cpu_seconds:.2f} "
                f"| {cost.read_bytes / needed:.2f} | {cost.memory_bytes / 2**20:.0f} MiB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
