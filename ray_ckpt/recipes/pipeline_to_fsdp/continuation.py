"""Whether training goes on after the load as it would have without: what is compared, and how close it has to be.

Runs in different layouts add numbers up in different orders, so they round differently. Now and then a rounding
difference decides on which side of zero the input of a ReLU lies, and from there on two loss curves part although
nothing is wrong. No fixed tolerance tells that from a fault. Two comparisons do, and each measures what to allow:

    compare_steps     The step after the save, from a copy of the live state before the save and from a copy of the live
                      state after the load, both in double precision, where rounding is a billion times smaller than the
                      last bit of what is saved. Allowed is what the step changes by when its weights are moved by a few
                      units in the last place of a double.
    compare_curves    The losses of all steps, against those of one process that was never interrupted. Allowed is how
                      far that process departs from itself when its first weights are moved by more than the training
                      rounds: whatever rounding can tip over tips over there as well.

The first sees whatever the model and the optimizer hold, to the last element. The second sees what is wrong with the
run itself, such as an optimizer that steps other tensors than the model's.

Everything here is a pure function of what the ranks return.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ray_ckpt.format.boxes import Box
from ray_ckpt.format.snapshot import ABSENT, Mismatch

STEP_MOVED_BY = 2.0**-44
"""Relative change of the weights of a repeated step in double precision: 256 units in the last place."""

STEP_FLOOR = 2.0**-46
"""Difference that is always allowed to a step in double precision, relative to a norm: 64 units in the last place."""

STEP_MARGIN = 16.0
"""Factor by which a difference may exceed the largest one among the few that were measured."""

NUM_MOVED_STEPS = 3
"""Number of repetitions of the step with changed weights."""

CURVE_MOVED_BY = 2.0**-17
"""Relative change of the weights of a model that rounds to single precision: 64 units in the last place."""

CURVE_MARGIN = 4.0
"""The same factor for loss curves. Smaller, because a curve keeps the largest difference of all steps before."""

NUM_MOVED_CURVES = 2
"""Number of repetitions of the uninterrupted training with changed weights."""

_REPEAT_TOLERANCE = 1e-4
"""Losses of one batch that differ by no more than this, relatively, may differ by what a GPU's kernels do to them."""

_CUT_TOLERANCE = 1e-9
"""A loss that depends on how its batch is cut by no more than this, relatively, does not depend on it."""


@dataclass(frozen=True)
class ModelTrial:
    """How the model computes, as one process found out before anything was trained."""

    moved_by: float
    """Relative change of the weights that changes its results by more than its rounding does."""
    repeated_losses: tuple[float, float]
    """The loss of one batch, computed twice."""
    losses_by_cut: dict[int, float]
    """Number of parts that one batch was cut into -> mean of their losses."""
    epsilon: float
    """Spacing of numbers near 1 in the coarsest dtype of its parameters."""
    problem: str
    """Why it does not compute in double precision; empty when it does."""

    @property
    def in_double(self) -> bool:
        return not self.problem

    @property
    def step_moves(self) -> list[float]:
        """By how much to move the weights of each next step that is taken from the state before the save."""
        return [0.0, *[STEP_MOVED_BY if self.in_double else 4 * self.epsilon] * NUM_MOVED_STEPS]

    @property
    def step_floor(self) -> float:
        """What a step may differ by in any case, relative to a tensor's norm."""
        return STEP_FLOOR if self.in_double else 16 * self.epsilon

    @property
    def curve_moves(self) -> list[float]:
        """By how much to move the first weights of each uninterrupted training."""
        return [0.0, *[self.moved_by] * NUM_MOVED_CURVES]

    @property
    def is_repeatable(self) -> bool:
        first, second = self.repeated_losses
        return not abs(first - second) > max(_REPEAT_TOLERANCE, 4 * self.epsilon) * abs(first)

    @property
    def depends_on_cut(self) -> bool:
        least, most = min(self.losses_by_cut.values()), max(self.losses_by_cut.values())
        return most - least > (_CUT_TOLERANCE if self.in_double else self.moved_by) * abs(most)


@dataclass(frozen=True)
class Projection:
    """What a part of a tensor adds to the numbers that stand for the tensor."""

    sums: tuple[float, ...]
    """Sums of the elements times random weights, for each set of weights. Sums over disjoint parts add up to those over
    the tensor; those of two tensors differ by about the norm of the tensors' difference."""
    square: float
    """Sum of the elements' squares."""

    def __add__(self, other: Projection) -> Projection:
        sums = tuple(a + b for a, b in zip(self.sums, other.sums, strict=True))
        return Projection(sums, self.square + other.square)

    def distance(self, other: Projection) -> float:
        """About the norm of the difference; NaN when there is one in either."""
        distances = [abs(a - b) for a, b in zip(self.sums, other.sums, strict=True)]
        return _largest(distances)


@dataclass(frozen=True)
class StepTrace:
    """One training step, as one rank saw it."""

    loss: float
    """Mean over the whole batch, before the optimizer's step: the same on every rank."""
    parts: dict[str, dict[Box, Projection]] = field(default_factory=dict)
    """Flat name of a tensor of the model or the optimizer -> what this rank holds of it after the step."""


@dataclass(frozen=True)
class Closeness:
    """How far two runs were apart, where that was most in proportion to what is allowed there."""

    difference: float
    """The difference relative to the norm of a tensor, or to a loss."""
    allowed: float
    """The largest allowed difference, relative to the same."""


@dataclass(frozen=True)
class Continuation:
    """How training went on after the load."""

    step: Closeness | None
    """How close the step after the load is; None when it could not be compared."""
    losses: Closeness | None
    """How close the losses of all steps are; None when they could not be compared."""
    note: str
    """What could not be compared, or less precisely, and why; empty when all could."""
    mismatches: tuple[Mismatch, ...]


@dataclass(frozen=True)
class _Row:
    """One comparison."""

    name: str
    distance: float
    allowed: float
    norm: float
    """The norm that both are relative to."""
    texts: tuple[str, str] | None = None
    """Expected and found, when there is more to say than by how much they differ."""

    @property
    def closeness(self) -> Closeness:
        return Closeness(*(value / self.norm if self.norm else value for value in (self.distance, self.allowed)))

    @property
    def excess(self) -> float:
        """What `distance` is in proportion to `allowed`."""
        if math.isnan(self.distance):
            return math.inf
        return self.distance / self.allowed if self.allowed else math.inf if self.distance else 0.0

    @property
    def mismatch(self) -> Mismatch | None:
        if self.distance <= self.allowed:
            return None
        found = self.closeness
        expected, text = self.texts or ("the same step without a save", f"differs by {found.difference:.1e}")
        limit = f", to {found.allowed:.1e}" if self.allowed else ""
        return Mismatch(self.name, expected + limit, text, ())


def compare_runs(
    trial: ModelTrial,
    step: int,
    unsaved: Sequence[Sequence[StepTrace]],
    resumed: Sequence[StepTrace],
    losses: Sequence[float],
    references: Sequence[Sequence[float]],
) -> Continuation:
    """Judge by both comparisons, as far as the model allows them.

    Args:
        step: number of the step after the save.
        unsaved: per rank, that step from the state before the save: as it was, then with moved weights.
        resumed: per rank, that step from the state after the load.
        losses: of every step, before the save and after the load.
        references: of the same steps in one process: as they were, then with moved weights.
    """
    first, second = trial.repeated_losses
    if not trial.is_repeatable:
        note = "nothing was compared, as the model gave two losses for one batch: its forward must be deterministic"
        return Continuation(
            None, None, note, (Mismatch("loss of step 0, computed twice", repr(first), repr(second), ()),)
        )
    curve, mismatches = compare_curves(losses, references[0], references[1:], trial.moved_by)
    if trial.depends_on_cut:
        cuts = ", ".join(f"{loss:.9g} in {count}" for count, loss in trial.losses_by_cut.items())
        note = f"the next step was not compared, as the loss depends on how many parts a batch is cut into: {cuts}"
        return Continuation(None, curve, note, mismatches)
    plain, *moved = ([traces[number] for traces in unsaved] for number in range(len(unsaved[0])))
    closeness, differing = compare_steps(step, plain, moved, resumed, trial.step_floor)
    note = f"in the model's own precision, as it fails in float64: {trial.problem}" if trial.problem else ""
    return Continuation(closeness, curve, note, differing + mismatches)


def compare_steps(
    step: int,
    unsaved: Sequence[StepTrace],
    moved: Sequence[Sequence[StepTrace]],
    resumed: Sequence[StepTrace],
    floor: float = STEP_FLOOR,
) -> tuple[Closeness, tuple[Mismatch, ...]]:
    """Compare a step from the state before the save with the same step from the state after the load.

    Args:
        step: its number, for messages.
        unsaved: from the state before the save, one trace per rank.
        moved: as `unsaved`, for each time that the weights were moved first.
        resumed: from the state after the load, one trace per rank of the other layout.
        floor: what is allowed in any case, relative to a tensor's norm.
    """
    base, *replicas = _put_together(unsaved)
    samples = [_put_together(ranks)[0] for ranks in moved]
    found = [*replicas, *_put_together(resumed)]
    names = sorted(base.keys() | {name for tensors in found for name in tensors})
    return _judge([_compare_tensors(name, step, base, samples, found, floor) for name in names])


def compare_curves(
    found: Sequence[float], reference: Sequence[float], moved: Sequence[Sequence[float]], moved_by: float
) -> tuple[Closeness, tuple[Mismatch, ...]]:
    """Compare the losses of a run with those of the uninterrupted one, step by step.

    Args:
        found: of every step, before the save and after the load.
        reference: of the same steps in one process.
        moved: as `reference`, for each time that the first weights were moved.
        moved_by: how much they were moved, relatively. A loss may differ by so much in any case.
    """
    rows, widest = [], moved_by / CURVE_MARGIN
    for step, (loss, expected) in enumerate(zip(found, reference, strict=True)):
        apart = _largest([abs(curve[step] - expected) for curve in moved])
        widest = max(widest, apart / abs(expected)) if expected else widest
        allowed = CURVE_MARGIN * max(widest * abs(expected), apart)
        rows.append(
            _Row(f"loss of step {step}", abs(loss - expected), allowed, abs(expected), (repr(expected), repr(loss)))
        )
    return _judge(rows)


_LOSS = ""
"""Stands for the loss among the names of tensors."""

_Tensors = dict[str, Projection]
"""Name -> what stands for a whole tensor."""


def _put_together(ranks: Sequence[StepTrace]) -> list[_Tensors]:
    """The whole tensors. Several times where ranks hold replicas of parts, so that every replica is in one of them."""
    held: dict[str, dict[Box, list[Projection]]] = {}
    for trace in ranks:
        held.setdefault(_LOSS, {}).setdefault(Box((), ()), []).append(Projection((trace.loss,), trace.loss**2))
        for name, parts in trace.parts.items():
            for box, projection in parts.items():
                held.setdefault(name, {}).setdefault(box, []).append(projection)
    most = max(len(replicas) for boxes in held.values() for replicas in boxes.values())
    return [{name: _sum(boxes, number) for name, boxes in held.items()} for number in range(most)]


def _sum(boxes: dict[Box, list[Projection]], number: int) -> Projection:
    first, *others = (replicas[number % len(replicas)] for replicas in boxes.values())
    return sum(others, first)


def _compare_tensors(
    name: str, step: int, base: _Tensors, samples: Sequence[_Tensors], found: Sequence[_Tensors], floor: float
) -> _Row:
    title = f"loss of step {step}" if name == _LOSS else f"{name} after step {step}"
    if name not in base or any(name not in tensors for tensors in found):
        texts = ("there" if name in base else ABSENT, "there" if any(name in each for each in found) else ABSENT)
        return _Row(title, math.inf, 0.0, 1.0, texts)
    norm = math.sqrt(base[name].square)
    noise = _largest([sample[name].distance(base[name]) for sample in samples])
    distance = _largest([tensors[name].distance(base[name]) for tensors in found])
    return _Row(title, distance, max(STEP_MARGIN * noise, floor * norm), norm)


def _judge(rows: Sequence[_Row]) -> tuple[Closeness, tuple[Mismatch, ...]]:
    worst = max(rows, key=lambda row: row.excess)
    return worst.closeness, tuple(row.mismatch for row in rows if row.mismatch is not None)


def _largest(numbers: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)
