"""How long a save beside training holds up the trainer: ours, stock DCP's `async_save`, and a plain copy of the state.

    PYTHONPATH=. python benchmarks/async_save.py
    PYTHONPATH=. python benchmarks/async_save.py --sizes 0.1 --repeats 3

Four gloo ranks, each with a pipeline stage's weights and Adam's two moments. In each repeat every contestant saves
once, in turn, and is waited for. "blocked" is from the call to its return, on the slowest rank; "until committed" from
the call to the commit. "copy" copies every tensor into memory that is there already. Medians; the first round warms up.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import ray_ckpt
from tests.support.ranks import run_ranks

NUM_RANKS = 4
SMALL = "10 000 x 4 KB"
State = dict[str, torch.Tensor]


def _state(case: str, rank: int) -> State:
    if case == SMALL:
        return {f"stage{rank}.tensor{n}": torch.full((256, 4), float(n)) for n in range(10_000 // NUM_RANKS)}
    numel = int(float(case.removesuffix(" GiB")) * 2**30 / (NUM_RANKS * 3 * 8 * 4))
    names = [f"stage{rank}.layer{n}.{part}" for n in range(8) for part in ("weight", "exp_avg", "exp_avg_sq")]
    return {name: torch.full((numel,), float(n)) for n, name in enumerate(names)}


def _begin_copy(state: State, memory: State, target: str) -> Callable[[], Any]:
    for name, tensor in state.items():
        memory[name].copy_(tensor)
    return lambda: None


def _begin_ours(state: State, memory: State, target: str) -> Callable[[], Any]:
    return ray_ckpt.save(state, target, blocking=False).result


def _begin_stock(state: State, memory: State, target: str) -> Callable[[], Any]:
    future: Any = dcp.async_save(state, storage_writer=dcp.FileSystemWriter(target))
    return future.result  # type: ignore[no-any-return]


CONTESTANTS = {"copy": _begin_copy, "ours": _begin_ours, "dcp.async_save": _begin_stock}


def _save_all(rank: int, case: str, root: str, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Contestant -> (blocked, until committed) of every repeat, in seconds."""
    warnings.simplefilter("ignore")
    state = _state(case, rank)
    memory = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTESTANTS}
    for repeat in range(repeats + 1):
        for name, begin in CONTESTANTS.items():
            target = f"{root}/{name}"
            if rank == 0:
                shutil.rmtree(target, ignore_errors=True)
            dist.barrier()
            start = time.perf_counter()
            wait = begin(state, memory, target)
            blocked = time.perf_counter() - start
            wait()
            if repeat:
                samples[name].append((blocked, time.perf_counter() - start))
            del wait  # here, as taking down what it holds is not part of what the next one takes
            dist.barrier()
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default=None, help="where to write; a temporary directory by default")
    parser.add_argument("--sizes", type=float, nargs="*", default=[0.1, 0.5], help="GiB, of all ranks together")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print("| case | who | blocked s | of a copy | until committed s |")
    print("| --- | --- | ---: | ---: | ---: |", flush=True)
    for case in [*(f"{size:g} GiB" for size in options.sizes), SMALL]:
        root = tempfile.mkdtemp(dir=options.directory)
        try:
            by_rank = run_ranks(_save_all, NUM_RANKS, Path(root), case, root, options.repeats, timeout_s=3600)
        finally:
            shutil.rmtree(root)
        copy = 0.0
        for name in CONTESTANTS:
            rounds = list(zip(*(samples[name] for samples in by_rank), strict=True))
            blocked = statistics.median(max(b for b, _ in ranks) for ranks in rounds)
            committed = statistics.median(max(c for _, c in ranks) for ranks in rounds)
            copy = copy or blocked
            print(f"| {case} | {name} | {blocked:.4f} | {blocked / copy:.2f}x | {committed:.3f} |", flush=True)


if __name__ == "__main__":
    main()
