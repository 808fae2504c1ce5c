"""Any layout to any layout: what was trained and saved in one arrives in every other, bit for bit, and trains on.

    for every layout A     train two steps, save, take fingerprints, train a third step
    for every layout B     for every A: other weights and a fresh optimizer, load A's checkpoint, take fingerprints,
                           train the third step

`make test` runs pairs that bring every kind of layout to be saved and to be loaded; `make test-slow` every layout, and
`make test-matrix` all pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ckpt.checkpoint.loading import load
from ray_ckpt.checkpoint.saving import save
from ray_ckpt.format.snapshot import Snapshot, compare
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.parallel.parallelize import parallelize
from ray_ckpt.parallel.stages import build_on_meta, parts_of
from ray_ckpt.recipes.model import learning_rates, loss_function
from ray_ckpt.recipes.training import Trainer, grouped_by_part, parameters_of
from ray_ckpt.state.train_state import TrainState
from tests.support.decoders import MODELS, Quantized
from tests.support.ranks import run_ranks
from tests.support.subclasses import HalvesSGD

pytestmark = pytest.mark.timeout(300)

CPU = torch.device("cpu")
STEPS = 2
BATCH = 24
NUM_MICROBATCHES = 4


@dataclass(frozen=True)
class Case:
    """A layout, with the parts of the model that each stage gets when that is not left to `cut_evenly`."""

    text: str
    uneven: bool = False

    @property
    def layout(self) -> Layout:
        return Layout.parse(self.text)

    def stages(self, model: torch.nn.Module) -> list[list[str]] | None:
        """All but one part for the first stages, one each for the others."""
        if not self.uneven:
            return None
        parts, rest = parts_of(model), self.layout.num_stages - 1
        return [parts[:-rest], *([part] for part in parts[-rest:])]

    def __str__(self) -> str:
        return f"{self.text}-uneven" if self.uneven else self.text


PLAIN = "single ddp2 fsdp1x4 fsdp2x4 fsdp2x3 hsdp2x2 tp2 tp4 fsdp2x2.tp2 pp2 pp4 pp2x2 pp2.fsdp2x2 pp2.tp2 hsdp2x1.tp2"
WITH_EXPERTS = "ep2 fsdp2x2.ep2"
CASES = [*map(Case, PLAIN.split()), Case("pp4", uneven=True), *map(Case, WITH_EXPERTS.split())]


ODD_ONES = "single ddp2 fsdp2x4 fsdp2x3 hsdp2x2 tp2 fsdp2x2.tp2 pp2 pp2.fsdp2x2"
"""For models whose state is not what FSDP1 flattens: tensor subclasses, and entries that hooks make."""


def cases_of(model: str) -> list[Case]:
    if model in ("quantized", "hooked"):
        return [Case(text) for text in ODD_ONES.split()]
    return [case for case in CASES if case.layout.ep == 1 or model == "mixtral"]


@dataclass(frozen=True)
class Saved:
    """What one rank saw of a training run."""

    snapshot: Snapshot
    """At the save."""
    losses: list[float]
    """Of the steps before the save, and of one after it."""


@dataclass(frozen=True)
class Loaded:
    before: Snapshot
    after: Snapshot
    loss: float
    """Of the step after the load."""


class Run:
    """One rank's model and trainer in a layout; its optimizer is made anew for every load."""

    def __init__(self, name: str, case: Case, seed: int) -> None:
        self.model = build_on_meta(MODELS[name])
        self.case = case
        stages = case.stages(self.model)
        self.parallel = parallelize(build_on_meta(MODELS[name]), case.layout, CPU, seed=seed, stages=stages)
        num_microbatches = NUM_MICROBATCHES if case.layout.pp > 1 else 1
        loss = loss_function(self.model)
        self.trainer = Trainer(self.parallel, self.optimizer(), loss, num_microbatches=num_microbatches)
        self.start(self.trainer.optimizer)

    def optimizer(self, rates: dict[str, float] | None = None) -> torch.optim.Optimizer:
        groups: Any = list(parameters_of(self.parallel).values())
        if rates is not None:
            groups = grouped_by_part(self.parallel, rates)
        kind = HalvesSGD if isinstance(self.model, Quantized) else torch.optim.AdamW
        return kind(groups, lr=1e-4, weight_decay=0.1)

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        self.trainer.optimizer = optimizer
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        self.counters = {"tokens": 0}
        self.state = TrainState(
            self.parallel.chunks,
            optimizer,
            schedulers=self.scheduler,
            step=0,
            counters=self.counters,
            tied=self.parallel.tied,
            layout=self.case,
        )

    @torch.no_grad()
    def spoil(self) -> None:
        """Change all that is saved of the model."""
        for module in itertools.chain.from_iterable(chunk.modules() for chunk in self.parallel.chunks):
            for tensor in module.parameters(recurse=False):
                tensor.add_(0.25)
            for name, tensor in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    tensor.add_(0.25)

    def train(self, step: int) -> float:
        generator = torch.Generator().manual_seed(step)
        loss = self.trainer.step(*self.model.sample_batch(BATCH, generator))
        self.scheduler.step()
        self.counters["tokens"] += BATCH
        self.state.step = step + 1
        return loss


def train_and_save(rank: int, name: str, cases: Sequence[Case], root: Path) -> dict[Case, Saved]:
    found = {}
    for case in cases:
        run = Run(name, case, seed=0)
        run.start(run.optimizer(learning_rates(parts_of(run.model))))
        losses = [run.train(step) for step in range(STEPS)]
        save(run.state, root / str(case))
        snapshot = run.state.snapshot(rank)
        found[case] = Saved(snapshot, [*losses, run.train(STEPS)])
    return found


def load_and_train(rank: int, name: str, pairs: dict[Case, list[Case]], root: Path) -> dict[Case, dict[Case, Loaded]]:
    found: dict[Case, dict[Case, Loaded]] = {}
    for target, sources in pairs.items():
        run = Run(name, target, seed=1)
        for source in sources:
            run.spoil()
            run.start(run.optimizer())
            before = run.state.snapshot(rank)
            load(run.state, root / str(source))
            after = run.state.snapshot(rank)
            assert (run.state.step, run.counters) == (STEPS, {"tokens": STEPS * BATCH})
            found.setdefault(target, {})[source] = Loaded(before, after, run.train(STEPS))
    return found


def by_world(cases: Sequence[Case]) -> Iterator[tuple[int, list[Case]]]:
    ordered = sorted(cases, key=lambda case: case.layout.world_size)
    for world_size, group in itertools.groupby(ordered, key=lambda case: case.layout.world_size):
        yield world_size, list(group)


def run_matrix(name: str, cases: Sequence[Case], pairs: dict[Case, list[Case]], directory: Path) -> int:
    """Check these pairs, target -> sources. Returns how many there were."""
    saved: dict[Case, list[Saved]] = {}
    for world_size, group in by_world(cases):
        ranks = run_ranks(train_and_save, world_size, directory, name, group, directory, timeout_s=600)
        saved |= {case: [rank[case] for rank in ranks] for case in group}
    first = saved[cases[0]][0].losses
    for case, ranks in saved.items():
        for rank in ranks:
            assert rank.losses == pytest.approx(first, rel=1e-4), f"{case} trains otherwise than {cases[0]}"
    count = 0
    for world_size, group in by_world(list(pairs)):
        wanted = {target: pairs[target] for target in group}
        ranks = run_ranks(load_and_train, world_size, directory, name, wanted, directory, timeout_s=1200)
        for target, sources in wanted.items():
            for source in sources:
                check_pair(f"{name}: {source} -> {target}", saved[source], [rank[target][source] for rank in ranks])
                count += 1
    return count


def check_pair(pair: str, saved: Sequence[Saved], loaded: Sequence[Loaded]) -> None:
    snapshots = [rank.snapshot for rank in saved]
    control = compare(snapshots, [rank.before for rank in loaded])
    assert len(control.mismatches) > control.tensors_compared // 2, f"{pair}: the target held it all before the load"
    comparison = compare(snapshots, [rank.after for rank in loaded])
    assert comparison.mismatches == (), pair
    assert comparison.tensors_compared > 40
    for rank in loaded:
        assert rank.loss == pytest.approx(saved[0].losses[-1], rel=1e-5), pair


def some_pairs(cases: Sequence[Case], shift: int) -> dict[Case, list[Case]]:
    """Every case once as a source and once as a target."""
    return {target: [cases[(number + shift) % len(cases)]] for number, target in enumerate(cases)}


def test_every_kind_of_layout_is_saved_and_loaded(tmp_path: Path) -> None:
    cases = [*map(Case, ["single", "fsdp1x4", "hsdp2x2", "fsdp2x2.tp2", "pp2", "fsdp2x3"]), Case("pp4", uneven=True)]
    assert run_matrix("perceptron", cases, some_pairs(cases, 2), tmp_path) == len(cases)


@pytest.mark.slow
def test_every_layout_is_saved_and_loaded(tmp_path: Path) -> None:
    cases = cases_of("perceptron")
    assert run_matrix("perceptron", cases, some_pairs(cases, 5), tmp_path) == len(cases)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        pytest.param("llama", ["pp2", "fsdp2x3", "pp2.fsdp2x2", "fsdp2x2.tp2"], marks=pytest.mark.slow),
        ("mixtral", ["ep2", "fsdp2x3"]),
        pytest.param("quantized", ["fsdp2x3", "pp2"], marks=pytest.mark.slow),
        pytest.param("hooked", ["fsdp2x3", "pp2"], marks=pytest.mark.slow),
    ],
)
def test_other_models_arrive_in_other_layouts(tmp_path: Path, name: str, texts: list[str]) -> None:
    cases = [Case(text) for text in texts]
    assert run_matrix(name, cases, some_pairs(cases, 1), tmp_path) == len(cases)


@pytest.mark.matrix
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", list(MODELS))
def test_every_layout_to_every_layout(tmp_path: Path, name: str) -> None:
    cases = cases_of(name)
    assert run_matrix(name, cases, dict.fromkeys(cases, cases), tmp_path) == len(cases) ** 2
