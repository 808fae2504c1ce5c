"""Train a model under any layout: the same batches, the same order of everything, the same losses.

    parallel = parallelize(model, layout, device, seed=0)
    trainer = Trainer(parallel, Adam(grouped_by_part(parallel, rates)), model.loss)
    loss = trainer.step(inputs, targets)        the same on every rank: the mean over the whole batch

The whole batch is given to every rank, which takes its own part: its rows under data parallelism, micro-batches in a
pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor

from ray_ckpt.parallel.parallelize import Parallelized
from ray_ckpt.parallel.stages import stages_that_share

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Trainer:
    """One rank's side of a training run.

    Args:
        parallel: this rank's part of the model.
        optimizer: the optimizer of this rank's parameters.
        loss: `(outputs, targets) -> scalar`, a mean over the batch.
        num_microbatches: number of micro-batches that a pipeline cuts its part of each batch into.
    """

    def __init__(
        self,
        parallel: Parallelized,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        *,
        num_microbatches: int = 1,
    ) -> None:
        self.parallel = parallel
        self.optimizer = optimizer
        self._loss = loss
        self._layout = parallel.layout
        self._rank = dist.get_rank()
        self._pipeline = _pipeline(parallel, loss, num_microbatches) if self._layout.num_stages > 1 else None
        self._shared = stages_that_share(parallel.cut, parallel.tied)

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        """Train on one batch. Returns its loss, before the optimizer's step, on every rank.

        Args:
            inputs, targets: the whole batch, `[batch, ...]`; its size is a multiple of the parts it is cut into.
        """
        part, num_parts = self._layout.batch_part_of(self._rank), self._layout.num_batch_parts
        device = next(self.parallel.chunks[0].parameters()).device
        inputs, targets = (tensor.chunk(num_parts)[part].to(device) for tensor in (inputs, targets))
        self.optimizer.zero_grad()
        loss = self._run(inputs, targets) if self._pipeline is None else self._run_pipeline(inputs, targets)
        self.optimizer.step()
        return self._mean(loss)

    def _run(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = self._loss(self.parallel.chunks[0](inputs), targets)
        loss.backward()
        return loss

    def _run_pipeline(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor | None:
        assert self._pipeline is not None
        stages = self._layout.stages_of(self._rank)
        is_first, is_last = stages[0] == 0, stages[-1] == self._layout.num_stages - 1
        losses: list[torch.Tensor] = []
        self._pipeline.step(
            *([inputs] if is_first else []),
            target=targets if is_last else None,
            losses=losses if is_last else None,
        )
        self._add_shared_gradients()
        return torch.stack(losses).mean() if is_last else None

    def _add_shared_gradients(self) -> None:
        """Weights that two stages share are trained as one: each adds the other's gradient to its own."""
        stages = self._layout.stages_of(self._rank)
        for alias, (alias_stage, home_stage) in self._shared.items():
            for mine, other, name in (
                (alias_stage, home_stage, alias),
                (home_stage, alias_stage, self.parallel.tied[alias]),
            ):
                if mine in stages and other in stages:
                    self._add_within(alias, alias_stage, home_stage)
                    break
                if mine in stages:
                    gradient = _gradient(self.parallel.chunks[stages.index(mine)].get_parameter(name))
                    self._add_from(gradient, self._rank_of_stage(other))

    def _add_within(self, alias: str, alias_stage: int, home_stage: int) -> None:
        """Both stages are on this rank."""
        stages = self._layout.stages_of(self._rank)
        ours = _gradient(self.parallel.chunks[stages.index(alias_stage)].get_parameter(alias))
        theirs = _gradient(self.parallel.chunks[stages.index(home_stage)].get_parameter(self.parallel.tied[alias]))
        total = ours + theirs
        ours.copy_(total)
        theirs.copy_(total)

    def _add_from(self, gradient: torch.Tensor, peer: int) -> None:
        received = torch.empty_like(gradient)
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, gradient.clone(), peer), dist.P2POp(dist.irecv, received, peer)]
        )
        for work in works:
            work.wait()
        gradient.add_(received)

    def _rank_of_stage(self, stage: int) -> int:
        """The rank that holds another stage, and otherwise lies as this one does."""
        return self._layout.rank(self._layout.coordinate(self._rank) | {"pp": stage % self._layout.pp})

    def _mean(self, loss: torch.Tensor | None) -> float:
        """Over all ranks that have a loss: those of the last stage, of which each part of the batch has as many."""
        device = next(self.parallel.chunks[0].parameters()).device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        total = zero if loss is None else loss.detach().to(torch.float64)
        dist.all_reduce(total)
        return float(total) * self._layout.pp / self._layout.world_size


def parameters_of(parallel: Parallelized) -> dict[str, nn.Parameter]:
    """This rank's parameters by the name that each has in the whole model; of tied ones, the first."""
    named: dict[str, nn.Parameter] = {}
    for chunk in parallel.chunks:
        for name, parameter in chunk.named_parameters():
            plain = _plain(name)
            named.setdefault(parallel.tied.get(plain, plain), parameter)
    return named


def grouped_by_part(parallel: Parallelized, learning_rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """This rank's parameters as groups for an optimizer: one for each part of the model, with its own learning rate."""
    parts = [part for stage in parallel.cut for part in stage]
    members: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters_of(parallel).items():
        part = next(part for part in parts if name.startswith(f"{part}."))
        members.setdefault(part, []).append(parameter)
    return [{"params": parameters, "lr": learning_rates[part]} for part, parameters in members.items()]


def _plain(name: str) -> str:
    """A parameter's name in the model as it was before FSDP1 or DDP wrapped it."""
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")


def _pipeline(parallel: Parallelized, loss: Loss, num_microbatches: int) -> Schedule1F1B | ScheduleInterleaved1F1B:
    layout = parallel.layout
    device = next(parallel.chunks[0].parameters()).device
    numbers = layout.stages_of(dist.get_rank())
    stages = [
        PipelineStage(chunk, number, layout.num_stages, device, group=parallel.mesh.get_group("pp"))
        for chunk, number in zip(parallel.chunks, numbers, strict=True)
    ]
    if len(stages) == 1:
        return Schedule1F1B(stages[0], num_microbatches, loss_fn=loss)
    return ScheduleInterleaved1F1B([*stages], num_microbatches, loss_fn=loss)


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    """What this rank holds of it, as it holds the parameter."""
    gradient = parameter.grad
    assert gradient is not None, "the schedule has run backwards through every stage"
    if not isinstance(gradient, DTensor):
        return gradient
    assert isinstance(parameter, DTensor), "a gradient is what its parameter is"
    if gradient.placements != parameter.placements:
        gradient = parameter.grad = gradient.redistribute(parameter.device_mesh, parameter.placements)
    return gradient.to_local()
