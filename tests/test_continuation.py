"""The main job's continuation: rounding is no fault, and a fault is no rounding.

Cases run on ranks without Ray. `make test` runs a few of them; `pytest -m slow -s tests/test_continuation.py` runs all
and prints the counts that docs/verdict.md has.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ray_ckpt.cluster.worker import WorkerContext
from ray_ckpt.format.boxes import Box
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.recipes.pipeline_to_fsdp.alone import reference, try_model
from ray_ckpt.recipes.pipeline_to_fsdp.continuation import (
    Closeness,
    ModelTrial,
    Projection,
    StepTrace,
    compare_curves,
    compare_runs,
    compare_steps,
)
from ray_ckpt.recipes.pipeline_to_fsdp.projecting import project
from ray_ckpt.recipes.pipeline_to_fsdp.report import JobReport
from ray_ckpt.recipes.workload import Workload
from tests.support.continuations import FAULTS, NO_FAULT, Case, Run, run_cases

REAL_FAULTS = [fault for fault in FAULTS if fault != NO_FAULT]

# In float32, a rounding difference tips a ReLU over in the resumed run, and seven losses differ by more than 1e-4.
CHAOTIC = Case("fsdp2x2.tp2", "fsdp2x3", dim=112)

PAIRS = [
    ("pp4", "fsdp2x4"),
    ("fsdp2x2.tp2", "fsdp2x3"),
    ("pp2.fsdp2x2", "tp2"),
    ("fsdp2x3", "pp2x2"),
    ("hsdp2x2", "fsdp1x3"),
    ("fsdp1x2", "pp3"),
    ("ddp3", "fsdp2x4"),
    ("single", "hsdp2x1.tp2"),
    ("tp2", "ddp2"),
    ("pp2.tp2", "single"),
]
CASES = [
    *(Case(*pair, dim, seed) for pair in PAIRS for dim in (37, 112) for seed in range(3)),
    *(Case("fsdp2x2.tp2", "fsdp2x3", dim, seed) for dim in (64, 113) for seed in (3, 4)),
    *(Case(*pair, 500, 0) for pair in PAIRS[:3]),
    Case("fsdp2x3", "single", model="tests.support.decoders:llama"),
    Case("pp2", "fsdp2x3", model="tests.support.decoders:llama"),
    Case("ep2", "fsdp2x3", model="tests.support.decoders:mixtral"),
    Case("pp2", "fsdp1x2", model="tests.support.models:Perceptron"),
    Case("pp2", "ddp2", model="tests.support.models:tied"),
    Case("fsdp2x3", "pp2", model="tests.support.models:Regularized"),
    Case("pp2", "fsdp2x3", model="tests.support.models:SinglePrecision"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Run]:
    """All from four ranks to three, so that they share their processes."""
    cases = [
        CHAOTIC,
        Case("pp2.fsdp2x2", "fsdp1x3", model="tests.support.models:tied", steps=3),
        Case("ddp4", "pp3", model="tests.support.models:Regularized", steps=3),
    ]
    return {run.case: run for run in run_cases(cases, REAL_FAULTS, tmp_path_factory.mktemp("runs"))}


def test_rounding_is_no_fault(runs: dict[Case, Run]) -> None:
    """Nor are dropout, batch norm, tied weights and shards that are cut elsewhere in double precision."""
    for case, run in runs.items():
        found = run.continuation()
        assert (found.mismatches, found.note) == ((), ""), case
        assert found.step is not None
        assert found.step.difference <= found.step.allowed < 1e-10
        assert found.losses is not None
        assert found.losses.difference <= found.losses.allowed < 0.05


def test_a_fault_is_no_rounding(runs: dict[Case, Run]) -> None:
    for case, run in runs.items():
        assert run.bits().mismatches == ()
        for fault in REAL_FAULTS:
            assert run.bits(fault).mismatches, f"{case}: the bits hide {fault}"
            assert run.continuation(fault).mismatches, f"{case}: the continuation hides {fault}"
    # The mismatches lead to the fault.
    first, *_ = runs[CHAOTIC].continuation("one element of exp_avg zeroed").mismatches
    assert first.name.startswith(("model.layer", "optim.state.layer"))
    assert first.name.endswith(" after step 20")
    assert "differs by " in first.found


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_no_false_alarm_and_no_miss_in_many_runs(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    nearest = {"step": Closeness(0.0, 1.0), "losses": Closeness(0.0, 1.0)}
    for run in run_cases(CASES, REAL_FAULTS, tmp_path):
        found = run.continuation()
        counts["runs"] += 1
        counts["false alarms"] += bool(found.mismatches or run.bits().mismatches)
        pairs = zip(run.losses, run.resumed[0].references[0], strict=True)
        counts["runs of which a loss differs by more than 1e-4"] += any(abs(a - b) > 1e-4 * abs(b) for a, b in pairs)
        for name in nearest:
            nearest[name] = max(nearest[name], getattr(found, name), key=lambda c: c.difference / c.allowed)
        for fault in REAL_FAULTS:
            counts["planted faults"] += 1
            counts[f"caught by the bits: {fault}"] += bool(run.bits(fault).mismatches)
            counts[f"caught by the continuation: {fault}"] += bool(run.continuation(fault).mismatches)
        print(run.case, found)
    for name, count in counts.items():
        print(f"{count:5} {name}")
    for name, closeness in nearest.items():
        print(f"nearest to an alarm, {name}: {closeness.difference:.1e} of {closeness.allowed:.1e}")
    assert counts["runs"] == len(CASES) >= 60
    assert counts["false alarms"] == 0
    for fault in REAL_FAULTS:
        assert counts[f"caught by the bits: {fault}"] == counts[f"caught by the continuation: {fault}"] == len(CASES)


def trace(loss: float, **tensors: dict[Box, float]) -> StepTrace:
    """One rank's, whose tensors are one number per part."""
    return StepTrace(
        loss,
        {name: {box: Projection((v,), v * v) for box, v in parts.items()} for name, parts in tensors.items()},
    )


LEFT, RIGHT = Box((0,), (1,)), Box((1,), (1,))


def test_parts_add_up_and_every_replica_counts() -> None:
    unsaved = [trace(1.0, w={LEFT: 3.0}), trace(1.0, w={RIGHT: 4.0})]
    whole = [trace(1.0, w={Box((0,), (2,)): 7.0})]
    closeness, mismatches = compare_steps(5, unsaved, [unsaved], whole)
    assert (closeness.difference, mismatches) == (0.0, ())
    replicas = [trace(1.0, w={LEFT: 3.0}), trace(1.0, w={RIGHT: 4.0}), trace(1.0, w={RIGHT: 4.0 + 1e-9})]
    _, [mismatch] = compare_steps(5, unsaved, [unsaved], replicas)
    assert mismatch.name == "w after step 5"
    _, [mismatch] = compare_steps(5, replicas, [unsaved], whole)
    assert mismatch.name == "w after step 5"
    # One rank's loss alone is found too.
    _, [mismatch] = compare_steps(5, unsaved, [unsaved], [*whole, trace(1.1)])
    assert mismatch.name == "loss of step 5"


def test_what_the_moved_steps_show_is_allowed_and_no_more() -> None:
    unsaved, moved = [trace(1.0, w={LEFT: 2.0}, v={LEFT: 2.0})], [trace(1.0, w={LEFT: 2.0 + 1e-6}, v={LEFT: 2.0})]
    resumed = [trace(1.0, w={LEFT: 2.0 + 5e-6}, v={LEFT: 2.0 + 5e-6})]
    closeness, [mismatch] = compare_steps(1, unsaved, [moved], resumed)
    assert mismatch.name == "v after step 1"
    assert closeness.difference == pytest.approx(2.5e-6)
    assert not compare_steps(1, unsaved, [moved, resumed], resumed)[1]


@pytest.mark.parametrize(
    ("resumed", "expected", "found"),
    [
        (trace(1.0), "there", "absent"),
        (trace(1.0, w={LEFT: 2.0}, extra={LEFT: 1.0}), "absent", "there"),
        (trace(1.0, w={LEFT: math.nan}), "the same step without a save, to 1.4e-14", "differs by nan"),
        (trace(math.nan, w={LEFT: 2.0}), "the same step without a save, to 1.4e-14", "differs by nan"),
    ],
)
def test_what_is_absent_or_not_a_number_is_a_mismatch(resumed: StepTrace, expected: str, found: str) -> None:
    unsaved = [trace(1.0, w={LEFT: 2.0})]
    _, [mismatch] = compare_steps(1, unsaved, [unsaved], [resumed])
    assert (mismatch.expected, mismatch.found) == (expected, found)


def test_a_curve_may_depart_as_far_as_the_uninterrupted_run_departs_from_itself() -> None:
    reference, moved = [1.0, 0.5, 0.25, 0.0], [[1.0, 0.5 + 1e-4, 0.25, 1e-6]]
    assert compare_curves([1.0, 0.5 + 3e-4, 0.25 + 1e-4, 2e-6], reference, moved, 2.0**-17)[1] == ()
    # Before the uninterrupted run departs from itself, nothing else may.
    _, [mismatch] = compare_curves([1.0 + 3e-4, 0.5, 0.25, 0.0], reference, moved, 2.0**-17)
    assert (mismatch.name, mismatch.found) == ("loss of step 0", "1.0003")
    closeness, [mismatch] = compare_curves([1.0, 0.5, 0.26, 0.0], reference, moved, 2.0**-17)
    assert mismatch.name == "loss of step 2"
    assert closeness.difference == pytest.approx(0.04)
    _, [mismatch] = compare_curves([1.0, math.nan, 0.25, 0.0], reference, moved, 2.0**-17)
    assert mismatch.found == "nan"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.complex64], ids=str)
def test_projections_of_parts_add_up_to_that_of_the_whole(dtype: torch.dtype) -> None:
    tensor = torch.arange(60).reshape(5, 4, 3).to(dtype)
    whole = project(tensor, (0, 0, 0), tensor.shape)
    parts = [
        project(tensor[rows, :, columns], (rows.start, 0, columns.start), tensor.shape)
        for rows in (slice(0, 2), slice(2, 5))
        for columns in (slice(0, 1), slice(1, 3))
    ]
    total = sum(parts[1:], parts[0])
    assert total.distance(whole) < 1e-12 * math.sqrt(whole.square)
    assert total.square == pytest.approx(float(tensor.abs().double().square().sum()))


def test_projections_show_every_element_and_its_place() -> None:
    tensor = torch.linspace(-1, 1, 300, dtype=torch.float64).reshape(20, 15)
    whole = project(tensor, (0, 0), tensor.shape)
    for row, column in ((0, 0), (7, 3), (19, 14)):
        changed = tensor.clone()
        changed[row, column] += 1e-9
        assert 1e-9 <= project(changed, (0, 0), tensor.shape).distance(whole) < 1e-8
    for moved in (tensor.roll(1, 0), tensor.roll(1, 1), tensor.flip(0)):
        assert project(moved, (0, 0), tensor.shape).distance(whole) > 0.1


ALONE = WorkerContext(0, 1, 0, torch.device("cpu"), "")


def trial_of(model: str, *layouts: str) -> ModelTrial:
    parsed = [Layout.parse(layout) for layout in layouts]
    workload = Workload.of(f"tests.support.models:{model}", 8, 2, parsed)
    trial = try_model(ALONE, workload, parsed)
    assert trial is not None
    return trial


def test_parameters_of_integers_are_neither_moved_nor_asked_for_their_precision() -> None:
    assert trial_of("Coded", "pp2", "fsdp2x2").in_double
    layout = Layout.parse("pp2")
    workload = Workload.of("tests.support.models:Coded", 24, 2, [layout])
    plain, moved = reference(ALONE, workload, [(layout, 2)], [0.0, 1e-3])
    assert plain != moved
    assert plain == pytest.approx(moved, rel=0.05)


def steps_of(*losses: float) -> list[list[StepTrace]]:
    return [[StepTrace(loss) for loss in losses]]


def test_a_random_model_is_told_from_a_fault() -> None:
    trial = trial_of("Noisy", "pp2", "fsdp2x2")
    assert not trial.is_repeatable
    found = compare_runs(trial, 1, steps_of(1.0, 1.0, 1.0), [StepTrace(1.0)], [1.0], [[1.0], [1.0]])
    assert [mismatch.name for mismatch in found.mismatches] == ["loss of step 0, computed twice"]
    assert found.note.endswith("the model gave two losses for one batch: its forward must be deterministic")
    losses = {"pipeline": [], "resumed": [], "reference": []}
    report = JobReport(True, found, 2, "gloo", "pp2", "fsdp2x2", "/run", 1, 16, 1, [*found.mismatches], losses, {})
    report.show(Console(file=(shown := io.StringIO()), width=100))
    assert "\nverified: 16 tensors and 1 objects compared bit for bit, 0 mismatches\n" in shown.getvalue()
    assert f"\nNOT VERIFIED: continuation: {found.note}\n" in shown.getvalue()
    assert report.to_json()["continuation"] == {"step": None, "losses": None, "note": found.note}


def test_a_loss_that_depends_on_the_cut_leaves_the_curves_to_compare() -> None:
    trial = trial_of("Contrastive", "pp2", "fsdp2x3")
    assert trial.depends_on_cut
    assert not trial_of("Contrastive", "pp2", "fsdp2x4").depends_on_cut
    found = compare_runs(trial, 1, steps_of(1.0, 1.0, 1.0), [StepTrace(2.0)], [1.0], [[1.0], [1.0]])
    assert (found.step, found.mismatches) == (None, ())
    first, second = trial.losses_by_cut.values()
    assert f"depends on how many parts a batch is cut into: {first:.9g} in 4, {second:.9g} in 3" in found.note
    assert compare_runs(trial, 1, steps_of(1.0, 1.0, 1.0), [StepTrace(2.0)], [1.1], [[1.0], [1.0]]).mismatches


def test_a_model_that_cannot_compute_in_double_is_compared_in_its_own_precision() -> None:
    trial = trial_of("SinglePrecision", "pp2", "fsdp2x3")
    assert not trial.in_double
    found = compare_runs(trial, 1, steps_of(1.0, 1.0, 1.0), [StepTrace(1 + 1e-6)], [1.0], [[1.0], [1.0]])
    assert found.mismatches == ()
    assert "fails in float64: RuntimeError: expected m1 and m2 to have the same dtype" in found.note
    assert compare_runs(trial, 1, steps_of(1.0, 1.0, 1.0), [StepTrace(1.0001)], [1.0], [[1.0], [1.0]]).mismatches


def test_a_double_step_is_judged_by_doubles() -> None:
    trial = trial_of("Perceptron", "pp2", "fsdp2x3")
    assert (trial.in_double, trial.is_repeatable, trial.depends_on_cut) == (True, True, False)
    assert trial.moved_by == 2.0**-17
    assert compare_runs(trial, 1, steps_of(1.0, 1.0, 1.0), [StepTrace(1 + 1e-12)], [1.0], [[1.0], [1.0]]).mismatches
