"""Rank functions for loads in which ranks want the same bytes."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, zeros
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import ray_ckpt
from ray_ckpt.errors import RayCkptError
from ray_ckpt.protocol.peers import Peers
from ray_ckpt.protocol.share_plan import Share
from ray_ckpt.storage.files import Storage
from tests.support.faulty import wait_until

T = TypeVar("T")
NUM_RANKS = 4
KINDS = ("ddp", "hsdp2x2", "columns", "mixed", "stages", "cast")
WIDTH = 1100
NUM_WEIGHTS = 4


def whole() -> dict[str, torch.Tensor]:
    """What is saved: four weights that are read in several requests, and many small tensors."""
    weights = {f"w{n}": torch.arange(float(WIDTH * WIDTH)).reshape(WIDTH, WIDTH) + n for n in range(NUM_WEIGHTS)}
    return weights | {f"small{n}": torch.arange(100.0 + n) for n in range(20)}


def num_bytes() -> int:
    return sum(tensor.nbytes for tensor in whole().values())


class LateOnRank1(Storage):
    """There, no data is read before a gate is opened."""

    def __init__(self, target: str, gate: Path) -> None:
        super().__init__(target)
        self.gate = gate

    def perform(self, operation: str, name: str, action: Callable[[], T]) -> T:
        if dist.get_rank() == 1 and operation == "read" and name.endswith(".distcp"):
            wait_until(self.gate.exists)
        return super().perform(operation, name, action)


def save_rows(rank: int, *targets: str) -> None:
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    rows = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in whole().items()}
    for target in targets:
        ray_ckpt.save(rows, target)


def empty_of(kind: str, rank: int) -> dict[str, Any]:
    """What a rank wants, by layout."""
    state = {name: torch.full_like(value, -1) for name, value in whole().items()}
    if kind == "cast":
        return {name: value.to(torch.float64) for name, value in state.items()}
    if kind == "stages":  # the first and the last have a weight in common, as tied ones do
        return {n: v for n, v in state.items() if n == f"w{rank}" or (n in ("w0", "small0") and rank in (0, 3))} | {
            n: v for n, v in state.items() if n.startswith("small") and rank == 1
        }
    placements: dict[str, list[Any]] = {"hsdp2x2": [Replicate(), Shard(0)], "columns": [Shard(1)]}
    if kind in placements:
        mesh = init_device_mesh("cpu", (2, 2) if kind == "hsdp2x2" else (NUM_RANKS,))
        weights = {name: value for name, value in state.items() if value.dim() == 2}
        return state | {n: zeros(v.shape, device_mesh=mesh, placements=placements[kind]) for n, v in weights.items()}
    if kind == "mixed":  # two ranks want everything, two of them rows
        rows = DeviceMesh("cpu", [2, 3])
        if rank >= 2:
            return {name: zeros(v.shape, device_mesh=rows, placements=[Shard(0)]) for name, v in state.items()}
    return state


def check(state: dict[str, Any]) -> None:
    saved = whole()
    for name, value in state.items():
        wanted, held = saved[name], value
        if isinstance(value, DTensor):
            sizes, offsets = compute_local_shape_and_global_offset(wanted.shape, value.device_mesh, value.placements)
            wanted = wanted[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]
            held = value.to_local()
        assert torch.equal(held, wanted.to(held.dtype)), name


def load_all(rank: int, targets: dict[tuple[str, Share], str]) -> None:
    """Load each into its layout, which holds something else before."""
    for (kind, share), target in targets.items():
        state = empty_of(kind, rank)
        with pytest.raises(AssertionError):
            check(state)
        report = ray_ckpt.load(state, target, cast=kind == "cast", share=share)
        check(state)
        assert report.num_bytes == sum(
            (v.to_local() if isinstance(v, DTensor) else v).numel() * 4 for v in state.values()
        )


def load_damaged(rank: int, target: str) -> str:
    with pytest.raises(RayCkptError) as caught:
        ray_ckpt.load(empty_of("ddp", rank), target, share=True)
    dist.barrier()  # the group is as good as before
    return f"{type(caught.value).__name__}: {caught.value}"


def load_flipped(rank: int, target: str, count: int) -> list[str]:
    """Load with one bit of a file flipped, `count` times: what each load ended in on this rank."""
    generator, outcomes = random.Random(0), []
    files = sorted(Path(target).iterdir())
    for _ in range(count):
        file = generator.choice(files)
        data = bytearray(file.read_bytes())
        place, bit = generator.randrange(len(data)), generator.randrange(8)
        dist.barrier()
        if rank == 0:
            data[place] ^= 1 << bit
            file.write_bytes(data)
        dist.barrier()
        state = empty_of("ddp", rank)
        try:
            ray_ckpt.load(state, target, share=True)
            check(state)
            outcomes.append("right")
        except RayCkptError as error:
            outcomes.append(type(error).__name__)
        except AssertionError:
            outcomes.append(f"wrong: bit {bit} of byte {place} of {file.name}")
        dist.barrier()
        if rank == 0:
            data[place] ^= 1 << bit
            file.write_bytes(data)
        dist.barrier()
    return outcomes


def load_beside_one_that_does_not_read(rank: int, target: str, gate: str) -> str:
    storage = LateOnRank1(target, Path(gate))
    with pytest.raises(RayCkptError) as caught:
        ray_ckpt.load(empty_of("ddp", rank), storage, share=True, timeout_s=6.0)
    Path(gate).touch()
    dist.barrier()
    return str(caught.value)


def load_beside_one_that_sends_nothing(rank: int, target: str, done: str) -> None:
    """Rank 1 leaves the others alone amid a window; they must not wait longer than they were told to."""
    if rank == 1:

        def leave(*args: Any, **options: Any) -> None:
            deadline = time.monotonic() + 20
            while len(list(Path(done).iterdir())) < NUM_RANKS - 1 and time.monotonic() < deadline:
                time.sleep(0.05)
            os._exit(0)

        Peers.swap = leave  # type: ignore[method-assign]
    start = time.monotonic()
    with pytest.raises((RayCkptError, RuntimeError)) as caught:
        ray_ckpt.load(empty_of("ddp", rank), target, share=True, timeout_s=6.0)
    assert time.monotonic() - start < 15
    (Path(done) / str(rank)).write_text(f"{type(caught.value).__name__}: {caught.value}")
    while True:  # the harness stops whoever is left when one has died
        time.sleep(1)
