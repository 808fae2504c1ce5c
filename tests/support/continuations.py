"""The main job's continuation, on ranks that need no Ray; and faults planted behind the back of the proof of bits.

continue_all(cases)     for each case: train, take the next step from a copy, save; load in another layout, plant
                        each fault in turn and take the next step from a copy; train on; train in one process
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ray_ckpt.checkpoint.loading import load
from ray_ckpt.checkpoint.saving import save
from ray_ckpt.cluster.worker import WorkerContext
from ray_ckpt.format.snapshot import Comparison, Snapshot, compare
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.recipes.pipeline_to_fsdp import ranks
from ray_ckpt.recipes.pipeline_to_fsdp.continuation import Continuation, ModelTrial, StepTrace, compare_runs
from ray_ckpt.recipes.training import parameters_of
from ray_ckpt.recipes.workload import Workload
from tests.support.ranks import run_ranks

NO_FAULT = ""


@dataclass(frozen=True)
class Case:
    """One run of the main job."""

    source: str
    target: str
    dim: int = 112
    seed: int = 0
    steps: int = 20
    model: str | None = None
    layers: int = 4

    @property
    def layouts(self) -> tuple[Layout, Layout]:
        return Layout.parse(self.source), Layout.parse(self.target)

    @property
    def workload(self) -> Workload:
        unseeded = Workload.of(self.model, self.dim, self.layers, self.layouts)
        return Workload(self.model, self.dim, self.layers, unseeded.batch_size, self.seed)


@dataclass(frozen=True)
class Trained:
    """What one rank saw before the save."""

    trial: ModelTrial
    losses: list[float]
    next_steps: list[StepTrace]
    snapshot: Snapshot


@dataclass(frozen=True)
class Resumed:
    """What one rank saw after the load."""

    losses: list[float]
    references: list[list[float]]
    next_steps: dict[str, StepTrace]
    """By the fault that had been planted; the step without one under `NO_FAULT`."""
    snapshots: dict[str, Snapshot]
    """As `next_steps`."""


@dataclass(frozen=True)
class Run:
    """What all ranks saw of one case."""

    case: Case
    trained: list[Trained]
    resumed: list[Resumed]

    def continuation(self, fault: str = NO_FAULT) -> Continuation:
        return compare_runs(
            self.trained[0].trial,
            self.case.steps,
            [rank.next_steps for rank in self.trained],
            [rank.next_steps[fault] for rank in self.resumed],
            self.losses,
            self.resumed[0].references,
        )

    def bits(self, fault: str = NO_FAULT) -> Comparison:
        return compare([rank.snapshot for rank in self.trained], [rank.snapshots[fault] for rank in self.resumed])

    @property
    def losses(self) -> list[float]:
        return self.trained[0].losses + self.resumed[0].losses


def context(rank: int) -> WorkerContext:
    return WorkerContext(rank, dist.get_world_size(), rank, torch.device("cpu"), "gloo")


def train_and_save(rank: int, cases: Sequence[tuple[int, Case]], root: Path) -> dict[int, Trained]:
    found = {}
    for number, case in cases:
        ctx, (layout, _), workload = context(rank), case.layouts, case.workload
        tried = [ranks.try_model(ctx, workload, case.layouts)]
        dist.broadcast_object_list(tried)
        [trial] = tried
        assert trial is not None
        losses = ranks.train(ctx, workload, layout, case.steps - 1)
        save(ranks.state_of(ctx), root / f"{number}-before")
        losses += ranks.resume(ctx, workload, case.steps - 1, 1)
        snapshot = ranks.take_snapshot(ctx)
        next_steps = ranks.next_steps(ctx, workload, case.steps, trial.in_double, trial.step_moves)
        save(ranks.state_of(ctx), root / str(number))
        assert ranks.take_snapshot(ctx) == snapshot, "the live state stays as it is"
        found[number] = Trained(trial, losses, next_steps, snapshot)
    return found


def load_and_continue(
    rank: int, cases: Sequence[tuple[int, Case, ModelTrial]], faults: Sequence[str], root: Path
) -> dict[int, Resumed]:
    found = {}
    for number, case, trial in cases:
        ctx, (source, layout), workload = context(rank), case.layouts, case.workload
        ranks.prepare(ctx, workload, layout)
        load(ranks.state_of(ctx), root / f"{number}-before")
        before = {name: local(p).clone() for name, p in parameters_of(ctx.objects["trainer"].parallel).items()}
        ranks.prepare(ctx, workload, layout)
        load(ranks.state_of(ctx), root / str(number))
        next_steps, snapshots = {}, {}
        for fault in (NO_FAULT, *faults):
            undo = FAULTS[fault](ctx, case, before)
            snapshots[fault] = ranks.take_snapshot(ctx)
            [next_steps[fault]] = ranks.next_steps(ctx, workload, case.steps, trial.in_double, [0.0])
            undo()
        losses = ranks.resume(ctx, workload, case.steps, case.steps)
        runs = [(source, case.steps), (layout, case.steps)]
        references = ranks.reference(ctx, workload, runs, trial.curve_moves)
        found[number] = Resumed(losses, references, next_steps, snapshots)
    return found


def run_cases(cases: Sequence[Case], faults: Sequence[str], directory: Path) -> Iterator[Run]:
    """Run all cases, and each next step once more for every fault. Cases of one number of ranks share processes."""
    numbered = list(enumerate(cases))
    trained: dict[int, list[Trained]] = {}
    for world_size, group in by_world(numbered, 0):
        each = run_ranks(train_and_save, world_size, directory, group, directory, timeout_s=3600)
        trained |= {number: [rank[number] for rank in each] for number, _ in group}
    for world_size, group in by_world(numbered, 1):
        tried = [(number, case, trained[number][0].trial) for number, case in group]
        each = run_ranks(load_and_continue, world_size, directory, tried, faults, directory, timeout_s=3600)
        for number, case in group:
            yield Run(case, trained[number], [rank[number] for rank in each])


def by_world(numbered: Sequence[tuple[int, Case]], which: int) -> Iterator[tuple[int, list[tuple[int, Case]]]]:
    def world_size(pair: tuple[int, Case]) -> int:
        return pair[1].layouts[which].world_size

    for size, group in itertools.groupby(sorted(numbered, key=world_size), key=world_size):
        yield size, list(group)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


Undo = Callable[[], Any]


def some_name(ctx: WorkerContext, case: Case) -> str:
    """The same on all ranks, another for each case."""
    held: list[Any] = [None] * ctx.world_size
    dist.all_gather_object(held, list(parameters_of(ctx.objects["trainer"].parallel)))
    names = sorted(set(itertools.chain.from_iterable(held)))
    return names[(case.seed * 5 + case.dim + len(case.source)) % len(names)]


def state_of_some(ctx: WorkerContext, case: Case) -> dict[str, Any]:
    """The optimizer's for that parameter, as far as this rank has it."""
    parameter = parameters_of(ctx.objects["trainer"].parallel).get(some_name(ctx, case))
    found: dict[Any, dict[str, Any]] = ctx.objects["trainer"].optimizer.state
    return found.get(parameter, {})


def learning_rate_off(ctx: WorkerContext, case: Case, before: dict[str, torch.Tensor]) -> Undo:
    """One group's, by one percent."""
    parameter = parameters_of(ctx.objects["trainer"].parallel).get(some_name(ctx, case))
    groups = [
        group
        for group in ctx.objects["trainer"].optimizer.param_groups
        if any(parameter is member for member in group["params"])
    ]
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] *= 1.01

    def undo() -> None:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    return undo


def element_zeroed(ctx: WorkerContext, case: Case, before: dict[str, torch.Tensor]) -> Undo:
    """One element of `exp_avg`, on the first rank that holds some of it."""
    average = local(state_of_some(ctx, case).get("exp_avg", torch.zeros(0)))
    held: list[Any] = [None] * ctx.world_size
    dist.all_gather_object(held, bool(average.count_nonzero()))
    if ctx.rank != held.index(True):
        return list
    flat = average.view(-1)
    places = flat.nonzero().view(-1)
    place = places[torch.randint(len(places), (), generator=torch.Generator().manual_seed(case.seed))]
    value = float(flat[place])
    flat[place] = 0.0

    def undo() -> None:
        flat[place] = value

    return undo


def step_off(ctx: WorkerContext, case: Case, before: dict[str, torch.Tensor]) -> Undo:
    """One parameter's, by one, wherever it is kept."""
    state = state_of_some(ctx, case)
    if "step" not in state:
        return list
    step = local(state["step"])
    step.sub_(1)
    return lambda: step.add_(1)


def weights_of_the_step_before(ctx: WorkerContext, case: Case, before: dict[str, torch.Tensor]) -> Undo:
    """Of one part of the model."""
    part = some_name(ctx, case).rpartition(".")[0]
    parameters = parameters_of(ctx.objects["trainer"].parallel)
    chosen = [(local(parameters[name]), old) for name, old in before.items() if name.startswith(part + ".")]
    now = [tensor.clone() for tensor, _ in chosen]
    for tensor, old in chosen:
        tensor.copy_(old)

    def undo() -> None:
        for (tensor, _), value in zip(chosen, now, strict=True):
            tensor.copy_(value)

    return undo


Plant = Callable[[WorkerContext, Case, dict[str, torch.Tensor]], Undo]

FAULTS: dict[str, Plant] = {
    NO_FAULT: lambda ctx, case, before: list,
    "one learning rate off by 1 %": learning_rate_off,
    "one element of exp_avg zeroed": element_zeroed,
    "one step off by one": step_off,
    "one layer's weights of the step before": weights_of_the_step_before,
}
"""What was planted in the live state after the load -> how: a function of the case and of the weights a step before."""
