"""One training step from a copy of the live state, in double precision and in the same layout.

    copy = _Copy(trainer, ...)     the model laid out once more: memory for twice what this rank holds
    copy.reset()                   parameters, buffers, optimizer state and hyper-parameters as they are live
    copy.move(...)                 to measure what rounding can do
    copy.step(...)                 -> StepTrace

The live state stays as it is. Values are copied from tensor to tensor and from group to group. `TrainState`, which is
under examination, only names the results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ray_ckpt.cluster.worker import WorkerContext
from ray_ckpt.format.boxes import Box
from ray_ckpt.parallel.parallelize import parallelize
from ray_ckpt.protocol.holdings import hold
from ray_ckpt.recipes.model import batch, blueprint, build, loss_function
from ray_ckpt.recipes.pipeline_to_fsdp.alone import computing_in_double, in_double
from ray_ckpt.recipes.pipeline_to_fsdp.continuation import StepTrace
from ray_ckpt.recipes.pipeline_to_fsdp.projecting import move, project
from ray_ckpt.recipes.training import Trainer
from ray_ckpt.recipes.workload import Workload, num_microbatches
from ray_ckpt.state.train_state import TrainState


def next_steps(
    ctx: WorkerContext, workload: Workload, step: int, double: bool, moved_by: Sequence[float]
) -> list[StepTrace]:
    """Take this step from copies of the live state. All ranks call it.

    Args:
        step: its number, which chooses the batch.
        double: whether in double precision; else in the model's own.
        moved_by: a step for each of these, with weights that differ by this fraction of themselves.
    """
    inputs, targets = batch(workload, blueprint(workload), step)
    traces = []
    with computing_in_double() if double else nullcontext():
        copy = _Copy(ctx, workload, ctx.objects["trainer"], double)
        for number, by in enumerate(moved_by):
            copy.reset()
            copy.move(by, number)
            traces.append(copy.step(inputs, targets, unit=1 + number / 3))
    return traces


class _Copy:
    """A training state beside the live one, on every rank."""

    def __init__(self, ctx: WorkerContext, workload: Workload, live: Trainer, double: bool) -> None:
        self._live, self._double = live, double
        layout = live.parallel.layout
        model = in_double(build(workload)) if double else build(workload)
        self._parallel = parallelize(model, layout, ctx.device, seed=None)
        chunks = list(zip(live.parallel.chunks, self._parallel.chunks, strict=True))
        self._parameters = {
            theirs: ours for a, b in chunks for theirs, ours in zip(a.parameters(), b.parameters(), strict=True)
        }
        self._buffers = [pair for a, b in chunks for pair in zip(a.buffers(), b.buffers(), strict=True)]
        self._loss, self._unit = loss_function(model), 1.0
        self._trainer = Trainer(
            self._parallel, self._new_optimizer(), self._loss_in_unit, num_microbatches=num_microbatches(layout)
        )

    @torch.no_grad()
    def reset(self) -> None:
        """Make it what the live state is."""
        for theirs, ours in self._buffers:
            _local(ours).copy_(_local(theirs))
        optimizer = self._trainer.optimizer = self._new_optimizer()
        for parameter, ours in self._parameters.items():
            value: torch.Tensor = parameter
            state = self._live.optimizer.state.get(parameter, {})
            if self._parallel.layout.dp == "fsdp1":
                value, state = _cut_anew(parameter, state, ours.numel())
            _local(ours).copy_(_local(value))
            if state:
                optimizer.state[ours] = {key: self._copy_of(entry) for key, entry in state.items()}

    @torch.no_grad()
    def move(self, by: float, number: int) -> None:
        """Change all weights by this fraction of themselves, in another way for every number."""
        for name, box, shape, part in self._held():
            if by and name.startswith("model.") and part.is_floating_point():
                move(part, box.offsets, shape, by, number)

    def step(self, inputs: torch.Tensor, targets: torch.Tensor, unit: float) -> StepTrace:
        """Train on one batch, with a loss that is measured in this unit until the gradients are there."""
        if self._double:
            inputs, targets = in_double(inputs), in_double(targets)
        self._unit = unit
        trace = StepTrace(self._trainer.step(inputs, targets) * unit)
        for name, box, shape, part in self._held():
            trace.parts.setdefault(name, {})[box] = project(part.detach(), box.offsets, shape)
        return trace

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """With the groups and hyper-parameters of the live one, and no state."""
        live = self._live.optimizer
        make: Any = type(live)
        optimizer: torch.optim.Optimizer = make(
            {**group, "params": [self._parameters[parameter] for parameter in group["params"]]}
            for group in live.param_groups
        )
        optimizer.register_step_pre_hook(self._undo_unit)
        return optimizer

    def _loss_in_unit(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self._loss(outputs, targets) / self._unit

    def _undo_unit(self, *args: object) -> None:
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(self._unit)

    def _copy_of(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return (in_double(value) if self._double else value).clone()

    def _held(self) -> Iterator[tuple[str, Box, tuple[int, ...], torch.Tensor]]:
        """Name, place, shape of the whole, and the part itself, of all tensors of the model and the optimizer here."""
        parallel = self._parallel
        state = TrainState(parallel.chunks, self._trainer.optimizer, tied=parallel.tied, layout=parallel.layout)
        holdings = hold(state.state_dict())
        for item, part in zip(holdings.items, holdings.values, strict=True):
            if item.spec is not None:
                yield item.name, Box(item.spec.offsets, item.spec.sizes), item.spec.shape, part


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _cut_anew(parameter: nn.Parameter, state: Mapping[str, Any], length: int) -> tuple[torch.Tensor, Mapping[str, Any]]:
    """A parameter's piece and its optimizer state as FSDP1 cuts them in another dtype.

    It cuts one row of all parameters, and rounds up where each begins by a number of bytes. So the pieces of a
    parameter are those of its elements in a row, in the order of the ranks, and how long each is depends on the dtype.

    Args:
        length: of this rank's piece, as it is to be.
    """
    all_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_ranks, (parameter.detach(), dict(state), length))
    start = sum(length for *_, length in all_ranks[: dist.get_rank()])

    def join(pieces: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([piece.flatten().to(parameter.device) for piece in pieces])[start : start + length]

    states = [held for _, held, _ in all_ranks if held]
    joined = {
        key: join([held[key] for held in states])
        if isinstance(value, torch.Tensor) and value.dim()
        else state.get(key, value)
        for key, value in (states[0] if states else {}).items()
    }
    return join([piece for piece, *_ in all_ranks]), joined
