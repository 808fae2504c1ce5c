"""What saves and loads took, by rank, out of their reports; and the losses of a job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ray_ckpt.pictures.contents import LossPoint, Operation, PhaseOfRank
from ray_ckpt.report import LoadReport, Phase, SaveReport
from ray_ckpt.rounding import ceil_div

__all__ = ["losses_of", "operations_of", "phases_of"]

MAX_RANKS = 32
"""Ranks of one operation whose times are shown."""

MAX_OPERATIONS = 12
"""Operations whose times by rank are shown: the last ones."""

MAX_LISTED = 100
"""Operations that are listed: the last ones."""

MAX_POINTS = 2000
"""Losses of one run that are shown."""


def operations_of(saves: Sequence[SaveReport], loads: Sequence[Sequence[LoadReport]]) -> tuple[Operation, ...]:
    """One line for each save and load, in the order in which they began; of many the last ones."""
    return tuple(operation for operation, _ in _in_order(saves, loads))[-MAX_LISTED:]


def phases_of(
    saves: Sequence[SaveReport], loads: Sequence[Sequence[LoadReport]]
) -> tuple[tuple[PhaseOfRank, ...], str]:
    """Times by rank, and what was left out."""
    told = [(operation, phases) for operation, phases in _in_order(saves, loads) if phases]
    found: list[PhaseOfRank] = []
    left_out = [f"of {len(told)} saves and loads the last {MAX_OPERATIONS}"] if len(told) > MAX_OPERATIONS else []
    for operation, phases in told[-MAX_OPERATIONS:]:
        ends: dict[int, float] = {}
        for phase in phases:
            if phase.rank is not None:
                ends[phase.rank] = max(ends.get(phase.rank, 0.0), phase.start_s + phase.seconds)
        slowest = sorted(ends, key=lambda rank: -ends[rank])[:MAX_RANKS]
        if len(ends) > MAX_RANKS:
            left_out.append(f"of the {len(ends)} ranks of {operation.name} the {MAX_RANKS} that ended last")
        began = min(phase.start_s for phase in phases)
        found += [
            PhaseOfRank(
                operation=operation.name,
                rank="coordinator" if phase.rank is None else f"rank {phase.rank}",
                phase=phase.name,
                start_s=round(phase.start_s - began, 6),
                seconds=round(phase.seconds, 6),
                num_bytes=phase.num_bytes,
            )
            for phase in sorted(phases, key=lambda phase: (-1 if phase.rank is None else phase.rank, phase.start_s))
            if phase.rank is None or phase.rank in slowest
        ]
    return tuple(found), "; ".join(left_out) and f"shown are {'; '.join(left_out)}"


def losses_of(losses: Mapping[str, Mapping[int, float]]) -> tuple[tuple[LossPoint, ...], str]:
    """Every loss, or evenly many of a long run, its last one among them; and what was left out."""
    found: list[LossPoint] = []
    thinned = []
    for run, by_step in losses.items():
        steps = sorted(by_step)
        every = ceil_div(len(steps), MAX_POINTS)
        if every > 1:
            thinned.append(f"every {every}th of {len(steps)} steps of {run!r}")
            steps = [*steps[:-1:every], steps[-1]]
        found += [LossPoint(run, step, by_step[step]) for step in steps]
    return tuple(found), "; ".join(thinned) and f"shown is {'; '.join(thinned)}"


def _in_order(
    saves: Sequence[SaveReport], loads: Sequence[Sequence[LoadReport]]
) -> list[tuple[Operation, tuple[Phase, ...]]]:
    told = [*map(_of_save, saves), *(_of_load(by_rank) for by_rank in loads if by_rank)]
    return list(_numbered(sorted(told, key=lambda one: min((phase.start_s for phase in one[1]), default=0.0))))


def _numbered(
    told: Sequence[tuple[Operation, tuple[Phase, ...]]],
) -> Iterator[tuple[Operation, tuple[Phase, ...]]]:
    """Operations under names that differ."""
    times: dict[str, int] = {}
    for operation, phases in told:
        times[operation.name] = times.get(operation.name, 0) + 1
        again = f" ({times[operation.name]})" if times[operation.name] > 1 else ""
        yield replace(operation, name=operation.name + again), phases


def _of_save(report: SaveReport) -> tuple[Operation, tuple[Phase, ...]]:
    ranks = {phase.rank for phase in report.phases if phase.rank is not None}
    name = _named("save", report.step)
    rate = _rate(report.total_bytes, report.seconds)
    operation = Operation(name, report.total_bytes, report.seconds, rate, report.num_retries, len(ranks))
    return operation, report.phases


def _of_load(by_rank: Sequence[LoadReport]) -> tuple[Operation, tuple[Phase, ...]]:
    num_bytes, seconds = sum(report.num_bytes for report in by_rank), max(report.seconds for report in by_rank)
    phases = tuple(replace(phase, rank=rank) for rank, report in enumerate(by_rank) for phase in report.phases)
    operation = Operation(
        name=_named("load", by_rank[0].step),
        num_bytes=num_bytes,
        seconds=seconds,
        bytes_per_s=_rate(num_bytes, seconds),
        num_retries=sum(report.num_retries for report in by_rank),
        num_ranks=len(by_rank),
    )
    return operation, phases


def _named(verb: str, step: int | None) -> str:
    return verb if step is None else f"{verb} of step {step}"


def _rate(num_bytes: int, seconds: float) -> float | None:
    return num_bytes / seconds if seconds > 0 else None
