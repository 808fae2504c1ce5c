"""The main job on the driver.

    run(options)
      connected         ray                          the cluster that is there, or a local one
      train_and_save    group -> train -> save       workers in the first layout; the driver commits
      load_and_verify   regroup -> load -> verify    fresh processes in the second; the driver compares fingerprints
      resume            resume -> reference          train on, and the whole training uninterrupted in one process
      draw              report                       where asked for: all of it as one page

Each phase is one call on a `WorkerGroup`; what it proves comes back as the actors' return values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from ray_ckpt import cluster
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.format.snapshot import Comparison, Snapshot, compare
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.pictures.page import write_report
from ray_ckpt.recipes import probe
from ray_ckpt.recipes.pipeline_to_fsdp.continuation import Continuation, ModelTrial, StepTrace, compare_runs
from ray_ckpt.recipes.pipeline_to_fsdp.report import JobReport
from ray_ckpt.recipes.screen import Screen
from ray_ckpt.recipes.setting import check_storage, connected, describe_group, show_wait, storage_of
from ray_ckpt.recipes.workload import Workload
from ray_ckpt.report import LoadReport, SaveReport
from ray_ckpt.storage.files import Storage
from ray_ckpt.text_units import format_bytes

RANKS = "ray_ckpt.recipes.pipeline_to_fsdp.ranks"
"""Module of the rank functions. By name, so that the driver loads neither torch nor what is built on it."""


@dataclass(frozen=True)
class Options:
    """What the command line says; the fields are its options."""

    source: Layout
    """Layout to train and save in."""
    target: Layout
    """Layout to load into."""
    steps: int = 20
    dim: int = 500
    layers: int = 4
    model: str | None = None
    storage: str | None = None
    overwrite: bool = False
    report: str | None = None
    """Where to draw the run as an HTML page."""
    address: str | None = None
    backend: str | None = None
    cpus_per_worker: float | None = None
    gpus_per_worker: float | None = None
    start_timeout_s: float = 300.0
    timeout_s: float = 1800.0
    """Time limit of each phase."""
    verbose: bool = False

    @property
    def workload(self) -> Workload:
        return Workload.of(self.model, self.dim, self.layers, (self.source, self.target))


@dataclass(frozen=True)
class Saved:
    """What the pipeline group left behind, beside the checkpoint itself."""

    uri: str
    """The storage, with its credentials: never shown. `Storage(uri).address` may be."""
    backend: str
    report: SaveReport
    snapshots: list[Snapshot]
    """Fingerprints and values that each rank held when it saved."""
    losses: list[float]
    """The loss of every step so far."""
    trial: ModelTrial
    next_steps: list[list[StepTrace]]
    """Per rank: the step after the last one, from copies of the state before the save."""


class Loaded(NamedTuple):
    """What the second group has loaded."""

    reports: list[LoadReport]
    comparison: Comparison


@dataclass(frozen=True)
class Resumed:
    """What the second group computed after the load."""

    losses: list[float]
    """The loss of every step since the load."""
    reference: list[float]
    """The loss of every step of the uninterrupted training."""
    continuation: Continuation


def run(options: Options, screen: Screen) -> JobReport:
    """Run all phases and return what they proved.

    Raises:
        UsageError: the options cannot work; nothing was saved.
        RayCkptError: a phase failed.
    """
    num_workers = max(options.source.world_size, options.target.world_size)
    num_cpus = math.ceil(num_workers * (options.cpus_per_worker or 1))
    with (
        connected(screen, options.address, num_cpus=num_cpus, verbose=options.verbose),
        storage_of(options.storage) as uri,
    ):
        saved = train_and_save(options, screen, uri)
        with form_group(options, screen, "regroup", options.target) as group:
            loaded = load_and_verify(options, screen, group, saved)
            resumed = None if loaded.comparison.mismatches else resume(options, screen, group, saved)
            report = make_report(options, screen, saved, loaded.comparison, resumed)
            if options.report is not None:
                draw(options.report, options, screen, group, saved, loaded, report)
    return report


def train_and_save(options: Options, screen: Screen, uri: str) -> Saved:
    """Train in a group of its own, and save what each rank holds."""
    with form_group(options, screen, "group", options.source) as group:
        check_storage(group, uri, options.overwrite)
        with screen.phase("train", f"{options.steps} steps as {options.source}") as line:
            call = partial(group.run, timeout_s=options.timeout_s)
            layouts = (options.source, options.target)
            trial: ModelTrial = call(f"{RANKS}:try_model", options.workload, layouts)[0]
            losses: list[float] = call(f"{RANKS}:train", options.workload, options.source, options.steps)[0]
            next_steps: list[list[StepTrace]] = call(
                f"{RANKS}:next_steps", options.workload, options.steps, trial.in_double, trial.step_moves
            )
            line.result = f"{len(losses)} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}"
        with screen.phase("save", f"what each rank holds to {Storage(uri).address}") as line:
            report = cluster.save(
                group,
                f"{RANKS}:state_of",
                uri,
                overwrite=options.overwrite,
                layout=str(options.source),
                timeout_s=options.timeout_s,
                progress=line.progress,
                events=screen.events,
            )
            snapshots: list[Snapshot] = group.run(f"{RANKS}:take_snapshot", timeout_s=options.timeout_s)
            line.result = f"{format_bytes(report.total_bytes)} to {report.uri}"
        return Saved(uri, group.demand.backend, report, snapshots, losses, trial, next_steps)


def load_and_verify(options: Options, screen: Screen, group: WorkerGroup, saved: Saved) -> Loaded:
    """Load the checkpoint in the second layout on a fresh group, and compare what arrived with what was saved."""
    with screen.phase("load", f"into {options.target} on {options.target.world_size} fresh workers") as line:
        group.run(f"{RANKS}:prepare", options.workload, options.target, timeout_s=options.timeout_s)
        reports = cluster.load(
            group,
            f"{RANKS}:state_of",
            saved.uri,
            timeout_s=options.timeout_s,
            progress=line.progress,
            events=screen.events,
        )
        line.result = f"{format_bytes(saved.report.total_bytes)} into {options.target}"
    with screen.phase("verify", "fingerprints of what was saved and of what was loaded") as line:
        loaded = group.run(f"{RANKS}:take_snapshot", timeout_s=options.timeout_s)
        comparison = compare(saved.snapshots, loaded)
        line.result = (
            f"{comparison.tensors_compared} tensors and {comparison.objects_compared} objects compared, "
            f"{len(comparison.mismatches)} differ"
        )
    return Loaded(reports, comparison)


def resume(options: Options, screen: Screen, group: WorkerGroup, saved: Saved) -> Resumed:
    """Train on in the second layout, and the whole way in one process, and compare the two."""
    workload, steps, trial = options.workload, options.steps, saved.trial
    call = partial(group.run, timeout_s=options.timeout_s)
    with screen.phase("resume", f"{steps} more steps as {options.target}") as line:
        next_steps: list[list[StepTrace]] = call(f"{RANKS}:next_steps", workload, steps, trial.in_double, [0.0])
        losses: list[float] = call(f"{RANKS}:resume", workload, steps, steps)[0]
        line.result = f"{len(losses)} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    with screen.phase("reference", f"{2 * steps} steps in one process") as line:
        runs = [(options.source, steps), (options.target, steps)]
        references: list[list[float]] = call(f"{RANKS}:reference", workload, runs, trial.curve_moves)[0]
        reference = references[0]
        line.result = f"{len(reference)} uninterrupted steps, loss {reference[0]:.4f} -> {reference[-1]:.4f}"
    resumed = [traces[0] for traces in next_steps]
    continuation = compare_runs(trial, steps, saved.next_steps, resumed, saved.losses + losses, references)
    return Resumed(losses, reference, continuation)


def make_report(
    options: Options, screen: Screen, saved: Saved, comparison: Comparison, resumed: Resumed | None
) -> JobReport:
    """Put together what was proved.

    Args:
        resumed: None when other bits arrived than were saved, so that nothing was trained on.
    """
    continuation = resumed.continuation if resumed else None
    return JobReport(
        # Nothing compared proves nothing.
        bits_verified=not comparison.mismatches and comparison.tensors_compared > 0,
        continuation=continuation,
        workers=options.source.world_size,
        backend=saved.backend,
        source=str(options.source),
        target=str(options.target),
        storage=Storage(saved.uri).address,
        checkpoint_bytes=saved.report.total_bytes,
        tensors_compared=comparison.tensors_compared,
        objects_compared=comparison.objects_compared,
        mismatches=[*comparison.mismatches, *(continuation.mismatches if continuation else ())],
        losses={
            "pipeline": saved.losses,
            "resumed": resumed.losses if resumed else [],
            "reference": resumed.reference if resumed else [],
        },
        phases=dict(screen.seconds),
    )


def draw(
    path: str,
    options: Options,
    screen: Screen,
    group: WorkerGroup,
    saved: Saved,
    loaded: Loaded,
    report: JobReport,
) -> None:
    """Draw the checkpoint and the run as one page."""
    with screen.phase("report", f"every byte of the checkpoint, and {path}") as line:
        first, later = len(report.losses["pipeline"]), report.losses["resumed"]
        page = write_report(
            saved.uri,
            path,
            layout=options.target,
            verify=cluster.verify(group, saved.uri, timeout_s=options.timeout_s),
            saves=[saved.report],
            loads=[loaded.reports],
            losses={
                f"saved as {options.source}": dict(enumerate(report.losses["pipeline"])),
                f"resumed as {options.target}": dict(enumerate(later, start=first)),
                "uninterrupted": dict(enumerate(report.losses["reference"])),
            },
            events=report.verdicts,
        )
        line.result = f"{page.num_tensors} tensors in {path}"


def form_group(options: Options, screen: Screen, phase: str, layout: Layout) -> WorkerGroup:
    """A fresh group whose workers have loaded their rank functions, so that later phases show their own time only."""
    num_workers = layout.world_size
    with screen.phase(phase, f"starting {num_workers} workers") as line:
        group = WorkerGroup(
            num_workers,
            cpus_per_worker=options.cpus_per_worker,
            gpus_per_worker=options.gpus_per_worker,
            backend=options.backend,
            start_timeout_s=options.start_timeout_s,
            call_timeout_s=options.timeout_s,
            on_wait=lambda wait: show_wait(line, wait, options.start_timeout_s),
        )
        group.run(probe.load_code, RANKS)
        line.result = describe_group(group, line)
    return group
