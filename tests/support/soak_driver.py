"""A run that saves, loads and compares, step after step, and begins a group anew whenever one is lost.

    python -m tests.support.soak_driver ADDRESS STORE FRONT STEPS GATE

Goes on from the store's latest step, and waits where the file GATE names no higher one. Prints a line of JSON per step:
what this process holds open, and the group's processes by rank. Ends at the first thing that is not as it was saved.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import ray
import torch

from ray_ckpt import CheckpointStore, RayCkptError, WorkerContext, WorkerGroup, cluster, keep_last

NUM_RANKS = 2
GATE_S = 300.0


def state_of(ctx: WorkerContext) -> dict[str, Any]:
    state: dict[str, Any] = ctx.objects["state"]
    return state


def fill(ctx: WorkerContext, value: float) -> int:
    """Hold a stage of this rank's own. Returns the process id."""
    ctx.objects["state"] = {f"stage{ctx.rank}": torch.full((1 << 18,), value + ctx.rank), "step": int(value)}
    return os.getpid()


def holds(ctx: WorkerContext, value: float) -> bool:
    state = state_of(ctx)
    return bool((state[f"stage{ctx.rank}"] == value + ctx.rank).all()) and state["step"] == int(value)


def wait_for(gate: Path, step: int) -> None:
    deadline = time.monotonic() + GATE_S
    while int(gate.read_text() or 0) < step:
        assert time.monotonic() < deadline, f"nobody lets this run go on to step {step}"
        time.sleep(0.02)


def go_on(store: CheckpointStore, steps: int, gate: Path) -> None:
    with WorkerGroup(NUM_RANKS, start_timeout_s=90, call_timeout_s=60) as group:
        step = store.latest(fallback=True) or 0
        if step:
            group.run(fill, -1.0)
            cluster.load(group, state_of, store, fallback=True)
            assert all(group.run(holds, float(step))), f"what was resumed is not step {step}"
        while step < steps:
            step += 1
            wait_for(gate, step)
            workers = group.run(fill, float(step))
            cluster.save(group, state_of, store, step, overwrite=True)
            group.run(fill, -1.0)
            cluster.load(group, state_of, store, step)
            assert all(group.run(holds, float(step))), f"what was loaded is not step {step}"
            store.prune(keep_last(2))
            me = psutil.Process()
            held = {"step": step, "pid": me.pid, "files": me.num_fds(), "threads": threading.active_count()}
            print(json.dumps({**held, "workers": workers}), flush=True)


def main() -> None:
    address, target, front, steps, gate = sys.argv[1:]
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    store = CheckpointStore(target, front)
    while True:
        try:
            go_on(store, int(steps), Path(gate))
        except RayCkptError as error:
            print(f"begins anew: {error}".partition("\n")[0], file=sys.stderr, flush=True)
        else:
            break
    store.make_durable(timeout_s=60)


if __name__ == "__main__":
    main()
