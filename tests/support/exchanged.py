"""Checkpoints that one version of Python, torch or Ray writes, and another reads.

python -m tests.support.exchanged write DIRECTORY       from two stages of a pipeline, and from two ranks of FSDP
python -m tests.support.exchanged read DIRECTORY        into one process; exit code 1 where anything differs
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ray_ckpt import TrainState, load, save, verify
from tests.support.ranks import run_ranks

NUM_LAYERS, SIZE = 4, 6


def model() -> torch.nn.Sequential:
    """Weights that no version's random generator has a say in."""
    layers = torch.nn.Sequential(*[torch.nn.Linear(SIZE, SIZE) for _ in range(NUM_LAYERS)])
    for number, parameter in enumerate(layers.parameters()):
        parameter.data.copy_(torch.arange(float(parameter.numel())).view(parameter.shape) / 7 + number)
    return layers


def trained(layers: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW after one step whose gradients are those weights."""
    optimizer = torch.optim.AdamW(layers.parameters(), lr=0.125, betas=(0.5, 0.75))
    for parameter in layers.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    return optimizer


def write_stage(rank: int, target: str) -> None:
    layers = model()
    half = NUM_LAYERS // 2
    stage = torch.nn.ModuleDict({str(n): layers[n] for n in range(rank * half, (rank + 1) * half)})
    save(TrainState(stage, trained(stage), step=3, extra={"name": "exchanged"}), target)


def write_sharded(rank: int, target: str) -> None:
    layers = model()
    fully_shard(layers, mesh=init_device_mesh("cpu", (2,)))
    save(TrainState(layers, trained(layers), step=3, extra={"name": "exchanged"}), target)


def write(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    run_ranks(write_stage, 2, directory, str(directory / "pipeline"), timeout_s=120)
    run_ranks(write_sharded, 2, directory, str(directory / "fsdp"), timeout_s=120)


def read(directory: Path) -> list[str]:
    """What is not as it was saved."""
    expected = model()
    moments = trained(expected)
    wrong = []
    for target in (directory / "pipeline", directory / "fsdp"):
        wrong += [f"{target.name}: {damage}" for damage in verify(target).damages]
        layers = torch.nn.Sequential(*[torch.nn.Linear(SIZE, SIZE) for _ in range(NUM_LAYERS)])
        optimizer = torch.optim.AdamW(layers.parameters())
        extra = {"name": ""}
        state = TrainState(layers, optimizer, step=0, extra=extra)
        load(state, target)
        if (state.step, extra["name"], optimizer.param_groups[0]["lr"]) != (3, "exchanged", 0.125):
            wrong.append(f"{target.name}: step, name or learning rate")
        for (name, found), wanted in zip(layers.named_parameters(), expected.parameters(), strict=True):
            pairs: list[tuple[Any, Any]] = [(found, wanted)]
            pairs += [
                (optimizer.state[found][key], moments.state[wanted][key]) for key in ("exp_avg", "exp_avg_sq", "step")
            ]
            if not all(torch.allclose(left, right, rtol=1e-6, atol=0) for left, right in pairs):
                wrong.append(f"{target.name}: {name}")
    return wrong


if __name__ == "__main__":
    verb, place = sys.argv[1], Path(sys.argv[2])
    if verb == "write":
        write(place)
    elif problems := read(place):
        sys.exit("\n".join(problems))
