"""The main job on the driver.

    run(options)
      connected         ray                          the cluster that is there, or a local one
      train_and_save    group -> train -> save       a group of workers, one pipeline stage each; the driver commits
      load_and_verify   regroup -> load -> verify    fresh processes, FSDP; the driver compares fingerprints
      resume            resume -> reference          the same training, uninterrupted, gives the same losses

Each phase is one call on a `WorkerGroup`; what it proves comes back as the actors' return values.
"""

from __future__ import annotations

import math
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ray_ckpt import cluster
from ray_ckpt.cluster.connect import connect
from ray_ckpt.cluster.group import PlacementWait, WorkerGroup
from ray_ckpt.errors import CheckpointExistsError, StorageError, UsageError, WorkerError
from ray_ckpt.format.snapshot import Comparison, Mismatch, Snapshot, compare
from ray_ckpt.recipes.pipeline_to_fsdp import probe
from ray_ckpt.recipes.pipeline_to_fsdp.report import JobReport
from ray_ckpt.recipes.pipeline_to_fsdp.workload import Workload
from ray_ckpt.recipes.screen import Line, Screen, format_bytes
from ray_ckpt.storage.files import Storage

PIPELINE = "ray_ckpt.recipes.pipeline_to_fsdp.pipeline"
SHARDED = "ray_ckpt.recipes.pipeline_to_fsdp.sharded"
HELD = "ray_ckpt.recipes.pipeline_to_fsdp.held"
"""Modules of rank functions. By name, so that the driver loads neither torch nor what is built on it."""

LOSS_TOLERANCE = 1e-4
"""Largest relative difference per step between the resumed run and the uninterrupted one, in float32."""


@dataclass(frozen=True)
class Options:
    """What the command line says; the fields are its options."""

    workers: int = 4
    target: str = "fsdp2"
    steps: int = 20
    dim: int = 500
    layers: int = 4
    model: str | None = None
    storage: str | None = None
    overwrite: bool = False
    address: str | None = None
    backend: str | None = None
    cpus_per_worker: float | None = None
    gpus_per_worker: float | None = None
    start_timeout_s: float = 300.0
    timeout_s: float = 1800.0
    """For each phase."""
    verbose: bool = False

    @property
    def workload(self) -> Workload:
        return Workload(self.model, self.dim, self.layers, num_stages=self.workers)


@dataclass(frozen=True)
class Saved:
    """What the pipeline group left behind, beside the checkpoint itself."""

    uri: str
    """May hold credentials: shown to nobody. `Storage(uri).address` is what may be."""
    backend: str
    checkpoint_bytes: int
    snapshots: list[Snapshot]
    """What each rank held when it saved."""
    losses: list[float]


def check(options: Options) -> None:
    """Find out what cannot work before Ray is started.

    Raises:
        UsageError: the model cannot be imported or built, or has fewer layers than there are workers.
    """
    if options.model is None and options.layers >= options.workers:
        return
    # Only now, as it takes seconds to load.
    from ray_ckpt.parallel.stages import cut_evenly
    from ray_ckpt.recipes.pipeline_to_fsdp.model import build

    cut_evenly(build(options.workload), options.workers)


def run(options: Options, screen: Screen) -> JobReport:
    """Run all phases and return what they proved.

    Raises:
        UsageError: the options cannot work; nothing was saved.
        RayCkptError: a phase failed.
    """
    with connected(options, screen), storage_of(options) as uri:
        saved = train_and_save(options, screen, uri)
        with form_group(options, screen, "regroup", SHARDED) as group:
            comparison = load_and_verify(options, screen, group, saved)
            if comparison.mismatches:
                return make_report(options, screen, saved, comparison, [], [])
            resumed, reference = resume(options, screen, group)
    return make_report(options, screen, saved, comparison, resumed, reference)


@contextmanager
def connected(options: Options, screen: Screen) -> Iterator[None]:
    """Join a Ray cluster for the block, or start a local one with a CPU for every worker."""
    num_cpus = math.ceil(options.workers * (options.cpus_per_worker or 1))
    with ExitStack() as stack:
        with screen.phase("ray", "looking for a cluster, or starting a local one") as line:
            is_local = stack.enter_context(connect(options.address, num_cpus=num_cpus, verbose=options.verbose))
            line.result = "started a local Ray" if is_local else "joined a running cluster"
        yield


def train_and_save(options: Options, screen: Screen, uri: str) -> Saved:
    """Train the pipeline in a group of its own, and save it stage by stage."""
    with form_group(options, screen, "group", PIPELINE) as group:
        check_storage(group, uri, options.overwrite)
        with screen.phase("train", f"{options.steps} steps, 1F1B over {options.workers} stages") as line:
            results = group.run(f"{PIPELINE}:train", options.workload, options.steps, timeout_s=options.timeout_s)
            losses: list[float] = results[-1]
            line.result = f"{len(losses)} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}"
        with screen.phase("save", f"each stage to {Storage(uri).address}") as line:
            report = cluster.save(
                group, f"{HELD}:state_of", uri, overwrite=options.overwrite, timeout_s=options.timeout_s
            )
            snapshots: list[Snapshot] = group.run(f"{HELD}:take_snapshot", timeout_s=options.timeout_s)
            line.result = f"{format_bytes(report.total_bytes)} to {report.uri}"
        return Saved(uri, group.demand.backend, report.total_bytes, snapshots, losses)


def load_and_verify(options: Options, screen: Screen, group: WorkerGroup, saved: Saved) -> Comparison:
    """Load the checkpoint into FSDP on a fresh group, and compare what arrived with what was saved."""
    with screen.phase("load", f"into {options.target} on {options.workers} fresh workers") as line:
        group.run(f"{SHARDED}:shard_fresh_model", options.workload, options.target, timeout_s=options.timeout_s)
        cluster.load(group, f"{HELD}:state_of", saved.uri, timeout_s=options.timeout_s)
        line.result = f"{format_bytes(saved.checkpoint_bytes)} into {options.target}"
    with screen.phase("verify", "fingerprints of what was saved and of what was loaded") as line:
        loaded = group.run(f"{HELD}:take_snapshot", timeout_s=options.timeout_s)
        comparison = compare(saved.snapshots, loaded)
        line.result = (
            f"{comparison.tensors_compared} tensors and {comparison.objects_compared} objects compared, "
            f"{len(comparison.mismatches)} differ"
        )
    return comparison


def resume(options: Options, screen: Screen, group: WorkerGroup) -> tuple[list[float], list[float]]:
    """Train on under FSDP, and the whole way in one process. Returns both loss curves."""
    with screen.phase("resume", f"{options.steps} more steps under {options.target}") as line:
        losses: list[float] = group.run(
            f"{SHARDED}:resume", options.workload, options.steps, options.steps, timeout_s=options.timeout_s
        )[0]
        line.result = f"{len(losses)} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    with screen.phase("reference", f"{2 * options.steps} steps in one process") as line:
        reference: list[float] = group.run(
            f"{SHARDED}:reference", options.workload, options.steps, options.steps, timeout_s=options.timeout_s
        )[0]
        line.result = f"{len(reference)} uninterrupted steps, loss {reference[0]:.4f} -> {reference[-1]:.4f}"
    return losses, reference


def make_report(
    options: Options,
    screen: Screen,
    saved: Saved,
    comparison: Comparison,
    resumed: list[float],
    reference: list[float],
) -> JobReport:
    mismatches = comparison.mismatches
    if reference:
        mismatches += compare_losses(saved.losses + resumed, reference)
    return JobReport(
        # Nothing compared proves nothing.
        verified=not mismatches and comparison.tensors_compared > 0,
        workers=options.workers,
        backend=saved.backend,
        target=options.target,
        storage=Storage(saved.uri).address,
        checkpoint_bytes=saved.checkpoint_bytes,
        tensors_compared=comparison.tensors_compared,
        objects_compared=comparison.objects_compared,
        mismatches=list(mismatches),
        losses={"pipeline": saved.losses, "resumed": resumed, "reference": reference},
        phases=dict(screen.seconds),
    )


def compare_losses(found: list[float], reference: list[float]) -> tuple[Mismatch, ...]:
    """The steps whose loss differs from the uninterrupted run's by more than `LOSS_TOLERANCE`, relatively."""
    return tuple(
        Mismatch(f"loss of step {step}", repr(expected), repr(loss), ())
        for step, (loss, expected) in enumerate(zip(found, reference, strict=True))
        if not abs(loss - expected) <= LOSS_TOLERANCE * abs(expected)
    )


def form_group(options: Options, screen: Screen, phase: str, module: str) -> WorkerGroup:
    """A fresh group whose workers have loaded their rank functions, so that later phases show their own time only."""
    with screen.phase(phase, f"starting {options.workers} workers") as line:
        group = WorkerGroup(
            options.workers,
            cpus_per_worker=options.cpus_per_worker,
            gpus_per_worker=options.gpus_per_worker,
            backend=options.backend,
            start_timeout_s=options.start_timeout_s,
            call_timeout_s=options.timeout_s,
            on_wait=lambda wait: _show_wait(line, wait, options.start_timeout_s),
        )
        group.run(probe.load_module, module)
        nodes = len({worker.node_id for worker in group.workers})
        line.result = f"{options.workers} workers on {nodes} node{'s' if nodes > 1 else ''}, {group.demand.backend}"
        if group.demand.note:
            line.note(group.demand.note)
    return group


def _show_wait(line: Line, wait: PlacementWait, timeout_s: float) -> None:
    line.update(f"waiting for {wait.asked}; up: {wait.nodes}; {wait.waited_s:.0f} of {timeout_s:.0f} s")


@contextmanager
def storage_of(options: Options) -> Iterator[str]:
    """Where to save: as asked, or a temporary directory that goes away with the job."""
    if options.storage is not None:
        # A relative path would mean another directory on every worker.
        yield options.storage if "://" in options.storage else str(Path(options.storage).absolute())
        return
    directory = str(Path(tempfile.gettempdir()) / f"ray-ckpt-{secrets.token_hex(6)}")
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def check_storage(group: WorkerGroup, uri: str, overwrite: bool) -> None:
    """Find out, before the first byte is saved, whether all workers can write there, and all and we see their files.

    Raises:
        UsageError: a worker cannot write there, or the workers' nodes and ours do not share it.
        CheckpointExistsError: it holds a committed checkpoint already.
    """
    token, place = secrets.token_hex(6), f"--storage {Storage(uri).address}"
    try:
        group.run(probe.write_probe, uri, token)
        views: list[probe.StorageView] = group.run(probe.view_storage, uri, token)
        here = probe.look(uri, token, group.num_workers)
        group.run(probe.remove_probe, uri, token)
    except WorkerError as error:
        if any(failure.error_type.endswith(StorageError.__qualname__) for failure in error.failures):
            raise UsageError(f"the workers cannot write to {place}: {error}") from error
        raise
    except StorageError as error:
        raise UsageError(f"this driver, which commits, cannot read {place}: {error}") from error
    places = [f"rank {rank} on {worker.node}" for rank, worker in enumerate(group.workers)]
    for who, view in [*zip(places, views, strict=True), ("this driver, which commits,", here)]:
        if unseen := sorted(set(range(group.num_workers)) - set(view.probes)):
            raise UsageError(
                f"{place} is not shared: {who} does not see the file that {places[unseen[0]]} wrote there. Give a "
                "directory that is mounted on every node, or an object store such as s3://bucket/path"
            )
    if views[0].has_checkpoint and not overwrite:
        raise CheckpointExistsError(f"{place} already holds a committed checkpoint: give another place, or --overwrite")
