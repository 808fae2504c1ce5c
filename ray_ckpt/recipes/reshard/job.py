"""The reshard job on the driver.

run(options)
  read      the source's manifest, whoever wrote it
  plan      partition(manifest, layout): who holds what; Coordinator.merge checks it
  ray       the cluster that is there, or a local one
  rewrite   a task per rank ── write_rank ──> its file, and a record of it; every failure names its rank
  commit    Coordinator.check, then publish; before that nothing exists, and a failure leaves no file
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from ray_ckpt.cluster.tasks import run_tasks
from ray_ckpt.errors import StorageError
from ray_ckpt.events import save_events
from ray_ckpt.format import dcp_metadata
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.manifest import Manifest
from ray_ckpt.format.translate import origin_of
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.parallel.partition import partition
from ray_ckpt.pictures.page import write_report
from ray_ckpt.progress import Meter
from ray_ckpt.protocol.coordinator import Coordinator
from ray_ckpt.protocol.messages import Item, LocalPlan, RankRecord, TensorSpec
from ray_ckpt.recipes.reshard.task import RankFile
from ray_ckpt.recipes.screen import Screen
from ray_ckpt.recipes.setting import connected, unshared
from ray_ckpt.report import SaveReport
from ray_ckpt.storage.checkpoint_reader import CheckpointReader
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.publish import refuse_if_taken
from ray_ckpt.storage.resolve import checkpoint_at, held
from ray_ckpt.storage.rewrite import WantedTensor
from ray_ckpt.text_units import format_bytes

WRITE_RANK = "ray_ckpt.recipes.reshard.task:write_rank"


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    source: str
    to: str
    target: str
    overwrite: bool = False
    report: str | None = None
    """Where to draw who wrote and who reads what."""
    address: str | None = None
    timeout_s: float = 3600.0
    """Seconds for all tasks together."""
    verbose: bool = False


@dataclass(frozen=True)
class Prepared:
    """The plan, before the first task is started."""

    layout: Layout
    found: Storage
    """The source."""
    source: Storage
    """The directory of the source's files."""
    target: Storage
    coordinator: Coordinator
    files: Mapping[int, RankFile]
    """The file to write, by rank."""


def run(options: Options, screen: Screen) -> SaveReport:
    """Rewrite the checkpoint.

    Raises:
        UsageError: the options cannot work; nothing was touched.
        RayCkptError: the source cannot be read, or a task failed; nothing was committed.
    """
    with contextlib.ExitStack() as holds:
        prepared = prepare(options, screen, holds)
        with connected(screen, options.address, num_cpus=1, verbose=options.verbose):
            rewrite(prepared, options.timeout_s, screen)
        report = commit(prepared, screen)
        if options.report is not None:
            draw(options.report, prepared, report, screen)
        return report


def draw(path: str, prepared: Prepared, report: SaveReport, screen: Screen) -> None:
    """Draw the source, who wrote it, and who reads it in the new layout."""
    told = f"rewritten as {prepared.layout}: {report.total_bytes} bytes in {report.num_files} files at {report.uri}"
    with screen.phase("report", path) as line:
        # Every byte was compared with its checksum on the way.
        page = write_report(prepared.found, path, layout=prepared.layout, verify=False, saves=[report], events=[told])
        line.result = f"{page.num_tensors} tensors in {path}"


def prepare(options: Options, screen: Screen, holds: contextlib.ExitStack) -> Prepared:
    """Read the source's manifest, and decide who holds what.

    Args:
        holds: a source in memory stays whole until it is closed.

    Raises:
        UsageError: there is no such layout, or the target is taken.
        CheckpointNotFoundError: there is no checkpoint at the source, nor a step of a store.
        CheckpointError, StorageError: the source cannot be read.
    """
    layout = Layout.parse(options.to)
    target = Storage(options.target)
    if not options.overwrite:
        refuse_if_taken(target)
    source = holds.enter_context(held(lambda: checkpoint_at(options.source, None))).storage
    with screen.phase("read", f"what {source.address} holds") as line:
        reader = CheckpointReader(source)
        manifest = reader.read_manifest()
        line.result = f"{len(manifest.tensors)} tensors, {format_bytes(manifest.total_bytes)}"
    coordinator = Coordinator(
        target,
        overwrite=options.overwrite,
        layout=str(layout),
        saved_by={"torch": importlib.metadata.version("torch"), **origin_of(manifest, reader.kind)},
        fingerprints={name: digest for name, digest in manifest.fingerprints.items() if name in manifest.tensors},
    )
    plans = _plans(manifest, partition(manifest, layout))
    coordinator.merge([LocalPlan(uuid.uuid4().hex, items) for items in plans.values()])
    coordinator.keep_frozen(manifest)
    files = {rank: _rank_file(manifest, coordinator.attempt, rank, items) for rank, items in plans.items()}
    return Prepared(layout, source, reader.files, target, coordinator, files)


def rewrite(prepared: Prepared, timeout_s: float, screen: Screen) -> None:
    """Write all files, and check them. After a failure none is left.

    Raises:
        WorkerError: tasks failed; names their ranks.
        GroupTimeoutError: they were not done in time.
        UsageError: the target is not shared with the tasks' nodes.
    """
    try:
        records = _run_tasks(prepared, timeout_s, screen)
        _check_shared(prepared.target, records)
        prepared.coordinator.check(list(records.values()))
    except BaseException:
        _discard(prepared.target, prepared.coordinator.attempt)
        raise


def commit(prepared: Prepared, screen: Screen) -> SaveReport:
    """Publish what was written and checked."""
    with screen.phase("commit", f"to {prepared.target.address}") as line:
        report = prepared.coordinator.publish(dcp_metadata.dumps(prepared.coordinator.manifest))
        ranks = list(prepared.files)  # the coordinator numbers those that write
        phases = (p if p.rank is None else dataclasses.replace(p, rank=ranks[p.rank]) for p in report.phases)
        report = dataclasses.replace(report, phases=tuple(phases))
        line.result = f"{format_bytes(report.total_bytes)} in {report.num_files} files at {report.uri}"
    for event in save_events(report):
        screen.events(event)
    return report


def _plans(manifest: Manifest, parts: Mapping[int, Mapping[str, Box]]) -> dict[int, tuple[Item, ...]]:
    """The items of each rank that writes. Everything that is not a tensor is rank 0's."""
    objects = tuple(Item(name, entry.path, None) for name, entry in manifest.objects.items())
    plans = {}
    for rank, boxes in parts.items():
        tensors = tuple(_item(manifest, name, box) for name, box in boxes.items())
        plans[rank] = (*objects, *tensors) if rank == 0 else tensors
    return plans


def _item(manifest: Manifest, name: str, box: Box) -> Item:
    entry = manifest.tensors[name]
    return Item(name, entry.path, TensorSpec(entry.dtype, entry.shape, box.offsets, box.sizes))


def _rank_file(manifest: Manifest, attempt: str, rank: int, items: tuple[Item, ...]) -> RankFile:
    objects = {
        position: (item.name, manifest.objects[item.name]) for position, item in enumerate(items) if item.spec is None
    }
    tensors = {
        position: _wanted(manifest, item.name, Box(item.spec.offsets, item.spec.sizes))
        for position, item in enumerate(items)
        if item.spec is not None
    }
    return RankFile(rank, attempt, objects, tensors)


def _wanted(manifest: Manifest, name: str, box: Box) -> WantedTensor:
    entry = manifest.tensors[name]
    chunks = tuple(chunk for chunk in entry.chunks if chunk.box.intersect(box) is not None)
    return WantedTensor(name, entry.dtype, box, chunks)


def _run_tasks(prepared: Prepared, timeout_s: float, screen: Screen) -> dict[int, RankRecord]:
    files = prepared.files
    with screen.phase("rewrite", f"{len(files)} tasks, one per rank of {prepared.layout} that writes") as line:
        written: list[int] = []
        meter = Meter(lambda done, total: line.progress(done, total, f"{len(written)} of {len(files)} ranks written"))
        meter.expect(sum(file.num_bytes for file in files.values()))
        records: dict[int, RankRecord] = run_tasks(
            WRITE_RANK,
            {rank: (prepared.source, prepared.target, file) for rank, file in files.items()},
            timeout_s=timeout_s,
            on_done=lambda rank, record: written.append(rank),
            meter=meter,
        )
        line.result = f"{len(records)} ranks written"
    return records


def _check_shared(target: Storage, records: Mapping[int, RankRecord]) -> None:
    """Whether this process sees what the tasks have written.

    Raises:
        UsageError: a task wrote to a directory that is not the one here.
    """
    seen = target.list_files()
    for rank, record in records.items():
        if record.files[0].name not in seen:
            raise unshared(f"--target {target.address}", f"the file that the task of rank {rank} wrote is not there")


def _discard(target: Storage, attempt: str) -> None:
    """Remove what the attempt has written, as far as it can be removed."""
    with contextlib.suppress(StorageError):
        for name in target.list_files():
            if name.endswith(f"-{attempt}.distcp"):
                target.delete(name)
