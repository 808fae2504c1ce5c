"""What rank 0 computes alone, in one process: how precisely the model computes, and the uninterrupted training."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from ray_ckpt.cluster.worker import WorkerContext
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.parallel.materialize import materialize
from ray_ckpt.parallel.stages import parts_of
from ray_ckpt.recipes.model import batch, build, learning_rates, loss_function
from ray_ckpt.recipes.pipeline_to_fsdp.continuation import CURVE_MOVED_BY, ModelTrial
from ray_ckpt.recipes.pipeline_to_fsdp.projecting import move
from ray_ckpt.recipes.workload import Workload, num_parts

T = TypeVar("T", torch.Tensor, nn.Module)


def try_model(ctx: WorkerContext, workload: Workload, layouts: Sequence[Layout]) -> ModelTrial | None:
    """Compute the first loss and its gradients in several ways, on rank 0. Other ranks return None.

    Args:
        layouts: whose ways to cut a batch are tried.
    """
    if ctx.rank != 0:
        return None
    model = build(workload)
    materialize(model, ctx.device, workload.seed)
    inputs, targets = (tensor.to(ctx.device) for tensor in batch(workload, model, 0))
    fewest, *others = sorted({num_parts(layout) for layout in layouts})
    losses = [_differentiate(model, inputs, targets, fewest) for _ in range(2)]
    epsilon = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    wide, problem = model, ""
    try:
        with computing_in_double():
            wide = in_double(copy.deepcopy(model))
            by_cut = [_differentiate(wide, in_double(inputs), in_double(targets), cut) for cut in (*others, fewest)]
    except Exception as error:  # a user's model may raise anything when its numbers are wider than it expects
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        by_cut = [_differentiate(model, inputs, targets, cut) for cut in (*others, fewest)]
        rounding = epsilon
    else:
        rounding = _relative_difference(model, wide)
    losses_by_cut = dict(zip((*others, fewest), by_cut, strict=True))
    return ModelTrial(max(CURVE_MOVED_BY, rounding), (losses[0], losses[1]), losses_by_cut, epsilon, problem)


def reference(
    ctx: WorkerContext, workload: Workload, runs: Sequence[tuple[Layout, int]], moved_by: Sequence[float]
) -> list[list[float]]:
    """The same training in one process, uninterrupted, on rank 0. Other ranks return nothing.

    Each batch runs in the parts that it is compared with: a layout's shares of a batch, and their micro-batches.

    Args:
        runs: layouts, and how many steps were trained in each.
        moved_by: the training is repeated for each of these, with first weights that differ by this fraction of
            themselves.

    Returns:
        The losses of every step, for each training.
    """
    if ctx.rank != 0:
        return []
    cuts = [num_parts(layout) for layout, steps in runs for _ in range(steps)]
    model = build(workload)
    begin_anew = materialize(model, ctx.device, workload.seed)
    losses = []
    for number, by in enumerate(moved_by):
        begin_anew()
        losses.append(_train_alone(ctx, workload, model, cuts, by, number))
    return losses


@contextmanager
def computing_in_double() -> Iterator[None]:
    """Meanwhile the tensors that a model makes by itself are doubles too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def in_double(value: T) -> T:
    """Numbers with a fraction as doubles, others as they are. A module is changed, a tensor is not."""
    return value.double() if isinstance(value, nn.Module) or value.is_floating_point() else value


def _train_alone(
    ctx: WorkerContext, workload: Workload, model: nn.Module, cuts: Sequence[int], moved_by: float, number: int
) -> list[float]:
    with torch.no_grad():
        for parameter in filter(torch.is_floating_point, model.parameters()):
            move(parameter, [0] * parameter.dim(), parameter.shape, moved_by, number)
    optimizer = torch.optim.Adam(
        {"params": [p for name, p in model.named_parameters() if name.startswith(f"{part}.")], "lr": rate}
        for part, rate in learning_rates(parts_of(model)).items()
    )
    losses = []
    for step, cut in enumerate(cuts):
        inputs, targets = (tensor.to(ctx.device) for tensor in batch(workload, model, step))
        losses.append(_differentiate(model, inputs, targets, cut))
        optimizer.step()
    return losses


def _differentiate(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, num_parts: int) -> float:
    """Leave the mean of the parts' gradients on the parameters. Returns the mean of their losses."""
    model.zero_grad()
    losses = []
    for part, part_targets in zip(inputs.chunk(num_parts), targets.chunk(num_parts), strict=True):
        loss = loss_function(model)(model(part), part_targets)
        loss.backward()
        losses.append(loss.detach())
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(num_parts)
    return float(torch.stack(losses).mean())


def _relative_difference(model: nn.Module, wide: nn.Module) -> float:
    """Norm of the difference of the two models' gradients, relative to the norm of the second's."""
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), wide.parameters(), strict=True)]
    squares = [
        (float((ours - theirs).square().sum()), float(theirs.square().sum()))
        for ours, theirs in pairs
        if ours is not None and theirs is not None
    ]
    difference, norm = map(sum, zip(*squares, strict=True))
    return (difference / norm) ** 0.5 if norm else 0.0
