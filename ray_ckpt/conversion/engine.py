"""Writing a target file by file: here, or as tasks on a Ray cluster.

run(plan) ─┬─ open      refuse what is there, or go on from what an attempt before has finished
           ├─ write     write_file for every other one; each is noted once it is durable
           ├─ check     check_file for all: read back, compared with what was read from the source
           └─ commit    the index or record that makes it a whole, last; then the note goes
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import xxhash

from ray_ckpt.conversion.jobs import FileJob, Written
from ray_ckpt.conversion.remainder import SUFFIX, Remainder
from ray_ckpt.conversion.writing import check_file, write_file
from ray_ckpt.errors import CheckpointError, StorageError, WorkerError
from ray_ckpt.inspection.opening import Opened
from ray_ckpt.progress import Meter, Progress
from ray_ckpt.report import ConversionReport
from ray_ckpt.storage.files import Storage

__all__ = ["Plan", "identity_of", "run"]

_TASKS_TIMEOUT_S = 7 * 86400.0
"""Ends tasks that nobody waits for any more."""


@dataclass(frozen=True)
class Plan:
    """Everything that is to be done, before the first byte is written."""

    source: Storage
    """The directory of the source's files."""
    source_address: str
    target: Storage
    """The directory that is written to."""
    uri: str
    """What was asked to be written, without credentials and options."""
    files: Sequence[FileJob]
    identity: str
    what: str
    commit: Callable[[Mapping[str, Written]], None]
    """Makes the files a whole. It may have been done before."""
    taken: Callable[[], list[str]]
    """Names of files that are in the way."""
    records: Sequence[str] = ()
    """Names of the small files that the commit writes."""
    note: str = SUFFIX
    """Name of the record of an attempt."""
    final: Mapping[str, str] = field(default_factory=dict)
    """Name of a file -> the name that it has after the commit, where that is another one."""
    left_out: tuple[str, ...] = ()


def identity_of(opened: Opened, asked: Mapping[str, Any]) -> str:
    """Digest of a source, as far as its record and the times of its files tell, and of what is to be made of it."""
    found = opened.files.scan_files(sorted(opened.manifest.files))
    text = f"{opened.address}\n{opened.manifest.to_json()}\n{found}\n{sorted(asked.items())}"
    return xxhash.xxh3_128(text.encode("utf-8", "replace")).hexdigest()


def run(plan: Plan, progress: Progress | None, *, ray: bool, address: str | None) -> ConversionReport:
    """
    Raises:
        CheckpointExistsError: something is in the way.
        IntegrityError: the source is damaged, or the target reads back as something else; nothing was committed.
        WorkerError: tasks failed; names them by the numbers of their files.
        CheckpointError, StorageError: the source cannot be read, or the target not be written.
    """
    started = time.monotonic()
    names = [*(job.name for job in plan.files), *plan.records]
    remainder = Remainder(plan.target, plan.note, names, plan.identity, plan.what)
    remainder.open(plan.taken())
    meter = Meter(progress)
    try:
        kept = remainder.kept(plan.files, plan.final)
        written = _write_and_check(plan, dict(kept), remainder, meter, ray=ray, address=address)
    except BaseException:
        remainder.abandon()
        raise
    plan.commit(written)
    remainder.close()
    meter.end()
    return ConversionReport(
        uri=plan.uri,
        source=plan.source_address,
        files=tuple(plan.final.get(job.name, job.name) for job in plan.files),
        num_tensors=sum(len(job.tensors) for job in plan.files),
        total_bytes=sum(file.num_bytes for file in written.values()),
        cast=tuple(t.name for job in plan.files for t in job.tensors if t.dtype != t.source.dtype),
        kept=tuple(plan.final.get(name, name) for name in kept),
        left_out=plan.left_out,
        seconds=time.monotonic() - started,
    )


def _write_and_check(
    plan: Plan,
    written: dict[str, Written],
    remainder: Remainder,
    meter: Meter,
    *,
    ray: bool,
    address: str | None,
) -> dict[str, Written]:
    todo = [job for job in plan.files if job.name not in written]
    meter.expect(sum(job.num_bytes for job in (*todo, *plan.files)))

    def finished(number: int, file: Written) -> None:
        written[file.name] = file
        remainder.add(file)

    with _runner(ray, address) as call:
        call(write_file, [(job, plan.source, plan.target) for job in todo], finished, meter)
        ordered = {job.name: written[job.name] for job in plan.files}
        places = [_place(plan, job) for job in plan.files]
        checks = [(job, plan.target, file) for job, file in zip(places, ordered.values(), strict=True)]
        try:
            call(check_file, checks, lambda number, nothing: None, meter)
        except (CheckpointError, WorkerError):
            if len(plan.files) == 1:  # which may have the name of a whole already
                with contextlib.suppress(StorageError):
                    plan.target.delete(places[0].name)
            raise
    return ordered


def _place(plan: Plan, job: FileJob) -> FileJob:
    """The job under the name that its file has now, where a commit that was cut off has given it its own."""
    if job.name in plan.final and not plan.target.exists(job.name):
        return replace(job, name=plan.final[job.name])
    return job


_Call = Callable[..., None]


@contextmanager
def _runner(ray: bool, address: str | None) -> Iterator[_Call]:
    """Calls a function for each of several files, here or as tasks."""
    if not ray:
        yield _call_here
        return
    from ray_ckpt.cluster.connect import connected

    with connected(address):
        yield _call_as_tasks


def _call_here(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    finished: Callable[[int, Any], None],
    meter: Meter,
) -> None:
    for number, args in enumerate(arguments):
        finished(number, function(*args, meter))


def _call_as_tasks(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    finished: Callable[[int, Any], None],
    meter: Meter,
) -> None:
    from ray_ckpt.cluster.tasks import run_tasks

    run_tasks(function, dict(enumerate(arguments)), timeout_s=_TASKS_TIMEOUT_S, on_done=finished, meter=meter)
