"""What a job looks at before it starts: whether the model can be laid out so, the cluster, the shared storage."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

from ray_ckpt.cluster.connect import connect
from ray_ckpt.cluster.group import PlacementWait, WorkerGroup
from ray_ckpt.cluster.metrics import Metrics
from ray_ckpt.errors import CheckpointExistsError, StorageError, UsageError, WorkerError
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.recipes import probe
from ray_ckpt.recipes.screen import Line, Screen
from ray_ckpt.recipes.temporary import temporary_directory
from ray_ckpt.recipes.workload import Workload
from ray_ckpt.storage.files import Storage


@contextmanager
def connected(screen: Screen, address: str | None, *, num_cpus: int, verbose: bool) -> Iterator[None]:
    """Join a Ray cluster for the block, or start a local one with that many CPUs."""
    with ExitStack() as stack:
        with screen.phase("ray", "looking for a cluster, or starting a local one") as line:
            is_local = stack.enter_context(connect(address, num_cpus=num_cpus, verbose=verbose))
            line.result = "started a local Ray" if is_local else "joined a running cluster"
            screen.events.add(Metrics())
        yield


def check_layouts(workload: Workload, layouts: Sequence[Layout], screen: Screen) -> None:
    """Find out what cannot work before Ray is started.

    Raises:
        UsageError: a layout is not supported, or the model cannot be imported or built, or laid out so.
    """
    for layout in layouts:
        layout.check_supported()
    if workload.model is None and all(layout.num_stages <= workload.layers and layout.ep == 1 for layout in layouts):
        return  # the default model, which all others fit
    # Only now, as it takes seconds to load.
    from ray_ckpt.parallel.parallelize import check_fits
    from ray_ckpt.recipes.model import blueprint

    here = os.getcwd()
    try:
        own = workload.model is not None
        with screen.phase("model", f"calling {workload.model}, as every worker will") if own else nullcontext():
            model = blueprint(workload)
        for layout in layouts:
            check_fits(model, layout)
    finally:
        os.chdir(here)  # paths on the command line mean this one, wherever the model has gone


def show_wait(line: Line, wait: PlacementWait, timeout_s: float) -> None:
    line.update(f"waiting for {wait.asked}; up: {wait.nodes}; {wait.waited_s:.0f} of {timeout_s:.0f} s")


def describe_group(group: WorkerGroup, line: Line) -> str:
    if group.demand.note:
        line.note(group.demand.note)
    nodes = len({worker.node_id for worker in group.workers})
    return f"{group.num_workers} workers on {nodes} node{'s' if nodes > 1 else ''}, {group.demand.backend}"


@contextmanager
def storage_of(storage: str | None) -> Iterator[str]:
    """Where to save: as asked, or a temporary directory that goes away with the job."""
    if storage is not None:
        yield Storage(storage).uri  # absolute, as a relative path would mean another directory on every worker
        return
    with temporary_directory() as directory:
        yield directory


def unshared(place: str, seen: str) -> UsageError:
    """The refusal of a storage that is not one and the same everywhere.

    Args:
        seen: who does not see whose file.
    """
    return UsageError(
        f"{place} is not shared: {seen}. Give a directory that is mounted on every node, or an object store such as "
        "s3://bucket/path"
    )


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
            raise unshared(place, f"{who} does not see the file that {places[unseen[0]]} wrote there")
    if views[0].has_checkpoint and not overwrite:
        raise CheckpointExistsError(f"{place} already holds a committed checkpoint: give another place, or --overwrite")
