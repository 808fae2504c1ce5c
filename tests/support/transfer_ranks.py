"""What the ranks of two groups hold in tests of transfers. Importable by the workers."""

from __future__ import annotations

import os
from typing import Any

import torch

from ray_ckpt.cluster.worker import WorkerContext
from ray_ckpt.format.fingerprint import Fingerprint
from ray_ckpt.format.fingerprinting import fingerprint
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.parallel.parallelize import parallelize
from ray_ckpt.parallel.stages import build_on_meta
from ray_ckpt.recipes.model import PipelineModel
from ray_ckpt.state.train_state import TrainState

BIG = 5_000_003
"""Elements of a tensor that takes several windows, and does not end with one."""


def _values(rank: int, value: float) -> dict[str, Any]:
    own = {
        f"big{rank}": torch.arange(BIG, dtype=torch.float32) + value,
        f"strided{rank}": (torch.arange(600_000.0).reshape(600, 1000) + value).t(),
        f"half{rank}": torch.full((7, 3), value).to(torch.bfloat16),
        f"bytes{rank}": torch.arange(5, dtype=torch.uint8) + int(value),
        f"empty{rank}": torch.empty(0, 3),
        f"scalar{rank}": torch.tensor(value, dtype=torch.float64),
    }
    return {**own, "common": torch.full((11,), value), "version": int(value), "name": "policy"}


def source_of(ctx: WorkerContext) -> dict[str, Any]:
    state: dict[str, Any] = ctx.objects.setdefault("source", _values(ctx.rank, 5.0))
    return state


def target_of(ctx: WorkerContext) -> dict[str, Any]:
    """All of two ranks' on each rank."""
    if "target" not in ctx.objects:
        ctx.objects["target"] = {**_values(0, 0.0), **_values(1, 0.0)}
    state: dict[str, Any] = ctx.objects["target"]
    return state


def differing_replicas_of(ctx: WorkerContext) -> dict[str, Any]:
    return {"common": torch.full((11,), float(ctx.rank))}


def common_of(ctx: WorkerContext) -> dict[str, Any]:
    state: dict[str, Any] = ctx.objects.setdefault("common", {"common": torch.zeros(11)})
    return state


def with_an_object_of(ctx: WorkerContext) -> dict[str, Any]:
    return {"common": torch.ones(11), "records": [os.urandom(10_000) for _ in range(3)]}


def parts_of(ctx: WorkerContext) -> dict[str, Any]:
    """A rank has all of what is joined: weights of two projections."""
    return {"q": torch.arange(6.0).reshape(2, 3), "k": -torch.arange(3.0).reshape(1, 3)}


def partly_of(ctx: WorkerContext) -> dict[str, Any]:
    state: dict[str, Any] = ctx.objects.setdefault("partly", {"q": torch.zeros(2, 3), "z": torch.zeros(1)})
    return state


def growing_parts_of(ctx: WorkerContext) -> dict[str, Any]:
    """The same, which training changes, and something that is not published."""
    state: dict[str, Any] = ctx.objects.setdefault("growing", {**parts_of(ctx), f"own{ctx.rank}": torch.ones(3)})
    return state


def grow(ctx: WorkerContext) -> None:
    for value in growing_parts_of(ctx).values():
        value += 1


def joined_of(ctx: WorkerContext) -> dict[str, Any]:
    state: dict[str, Any] = ctx.objects.setdefault("joined", {"qk": torch.zeros(3, 3, dtype=torch.bfloat16)})
    return state


def joined(ctx: WorkerContext) -> list[float]:
    return [float(value) for value in joined_of(ctx)["qk"].flatten()]


def reset(ctx: WorkerContext) -> None:
    ctx.objects.clear()


def change_source(ctx: WorkerContext) -> None:
    for value in source_of(ctx).values():
        if isinstance(value, torch.Tensor):
            value.zero_()


def source_values(ctx: WorkerContext) -> bool:
    return _equal(source_of(ctx), _values(ctx.rank, 5.0))


def how_new(ctx: WorkerContext) -> str:
    """Of the big tensors of the target: all, none or some of the elements are the source's."""
    new, old, found = 0, 0, target_of(ctx)
    for rank in range(2):
        new += int((found[f"big{rank}"] == torch.arange(BIG) + 5).sum())
        old += int((found[f"big{rank}"] == torch.arange(BIG)).sum())
    return "new" if new == 2 * BIG else "old" if old == 2 * BIG else "both" if new + old == 2 * BIG else "neither"


def has_all(ctx: WorkerContext) -> bool:
    return _equal(target_of(ctx), {**_values(0, 5.0), **_values(1, 5.0)})


def left_behind(ctx: WorkerContext) -> list[str]:
    return [name for name, value in ctx.objects.items() if name.startswith("ray_ckpt.") and value]


def _equal(state: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return state.keys() == wanted.keys() and all(
        torch.equal(state[name], value) if isinstance(value, torch.Tensor) else state[name] == value
        for name, value in wanted.items()
    )


def lay_out(ctx: WorkerContext, layout: str, seed: int) -> None:
    """Build a model in a layout; its weights depend on the seed alone."""
    parallel = parallelize(
        build_on_meta(lambda: PipelineModel(dim=12, layers=4)), Layout.parse(layout), ctx.device, seed=seed
    )
    ctx.objects["laid out"] = TrainState(parallel.chunks, tied=parallel.tied, layout=layout)


def laid_out(ctx: WorkerContext) -> TrainState:
    state: TrainState = ctx.objects["laid out"]
    return state


def held_of(ctx: WorkerContext) -> dict[str, Fingerprint]:
    return {name: fingerprint(tensor) for name, tensor in laid_out(ctx).state_dict()["model"].items()}


def spoil(ctx: WorkerContext) -> None:
    with torch.no_grad():
        for chunk in laid_out(ctx).model if isinstance(laid_out(ctx).model, list) else [laid_out(ctx).model]:
            for parameter in chunk.parameters():
                parameter.add_(1)
