"""Checks on a cluster: on the workers of a group, or by tasks wherever there is room.

verify(group, target)     every worker checks its share; the driver merges their reports
verify_by_tasks(target)   the driver reads the record and says what there is to read ── pieces of work ──> tasks
                                                    and checks the records meanwhile <── what they have found ──
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray

from ray_ckpt.cluster import worker_side
from ray_ckpt.cluster.connect import connected
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.cluster.tasks import run_tasks
from ray_ckpt.errors import UsageError
from ray_ckpt.events import Events, Telling
from ray_ckpt.progress import NOBODY, Meter, Progress
from ray_ckpt.report import VerifyReport
from ray_ckpt.rounding import ceil_div
from ray_ckpt.storage.resolve import Target, committed_at, held

if TYPE_CHECKING:
    from ray_ckpt.storage.archives import Archive
    from ray_ckpt.storage.audit import Audit, Work
    from ray_ckpt.storage.files import Storage
    from ray_ckpt.storage.placed import Stretch
    from ray_ckpt.storage.stretches import Checked

TASKS_PER_CPU = 4
"""So that CPUs of different speed end at about the same time."""

LEAST_TASK_BYTES, MOST_TASK_BYTES = 1 << 30, 4 << 30
"""Size of what a task reads: enough that starting it costs little, where there are no more CPUs than such tasks, and no
more than can be read again after a loss."""

LOCAL_THREADS = 1
"""Reads of a task at the same time, where a read is a system call: there is a task per CPU."""


def verify(
    group: WorkerGroup,
    target: Target,
    step: int | None = None,
    *,
    scan_nan: bool = False,
    trusted: bool = False,
    timeout_s: float | None = None,
    progress: Progress | None = None,
    events: Events | None = None,
) -> VerifyReport:
    """Read and check every byte of a committed checkpoint on the workers, beside their other calls.

    Each worker reads a share of the files; otherwise as `ray_ckpt.verify`.

    Example:
        >>> import torch
        >>> from ray_ckpt import WorkerGroup, cluster
        >>> def state_of(ctx):
        ...     return ctx.objects.setdefault("stage", {f"stage{ctx.rank}": torch.ones(3)})
        >>> with WorkerGroup(2, process_group=False) as group:
        ...     report = cluster.save(group, state_of, "run/step-1")
        ...     cluster.verify(group, "run/step-1").verified
        True

    Args:
        target: the checkpoint's directory or file as every worker's node and the driver know it, or a store.
        step: number of the step in the store; None verifies the checkpoint at `target` itself, or else the latest
            committed step of the store there.
        scan_nan, trusted: as for `ray_ckpt.verify`.
        timeout_s: time limit; by default the group's `call_timeout_s`.
        progress: as for `save`, with the bytes that the workers have read and all that they will.
        events: as for `ray_ckpt.verify`.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint, or not that step.
        WorkerError: workers failed or died, or the storage does not answer them; names each.
        GroupTimeoutError: workers did not answer in time; names each.
    """
    telling = Telling(events, "verify")
    with telling.failing(), held(lambda: committed_at(target, step)) as found:
        telling.at(found.storage.address, found.step)
        args_of = dict.fromkeys(range(group.num_workers), (found.storage, group.num_workers, scan_nan, trusted))
        shares = group.call(worker_side.verify, args_of, timeout_s=timeout_s, beside=True, progress=progress)
    report = replace(VerifyReport.merge(list(shares.values())), step=found.step)
    telling.verified(report)
    return report


def verify_by_tasks(
    target: Target,
    step: int | None = None,
    *,
    scan_nan: bool = False,
    trusted: bool = False,
    address: str | None = None,
    timeout_s: float = 3600.0,
    progress: Progress | None = None,
    events: Events | None = None,
) -> VerifyReport:
    """Read and check every byte of a committed checkpoint by tasks, on all CPUs of a Ray cluster.

    No task needs the model or a GPU; one whose node is lost is done again elsewhere. The report is that of
    `ray_ckpt.verify`.

    Example:
        >>> import torch
        >>> from ray_ckpt import cluster, save
        >>> report = save({"weight": torch.ones(3)}, "run/step-1")
        >>> cluster.verify_by_tasks("run/step-1").verified
        True

    Args:
        target: the checkpoint's directory or file as every node and the driver know it, or a store.
        step: number of the step in the store; None verifies the checkpoint at `target` itself, or else the latest
            committed step of the store there.
        scan_nan, trusted: as for `ray_ckpt.verify`.
        address: of the cluster to join, where this process has joined none; by default as `WorkerGroup` finds or starts
            one.
        timeout_s: time limit of all tasks together.
        progress: called with the bytes that the tasks have read and all that will be. When it raises, the check
            goes on, without it and with a warning.
        events: as for `ray_ckpt.verify`.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint, or not that step.
        FormatError, UnsafeCheckpointError: its manifest or header is damaged, or not safe to read.
        WorkerError: tasks failed or died, or the storage does not answer them; names each by its number.
        GroupTimeoutError: the tasks were not done in time.
    """
    from ray_ckpt.storage.audit import Audit  # it loads torch
    from ray_ckpt.storage.ranged_reads import tuning_for
    from ray_ckpt.storage.stretches import Checked

    telling = Telling(events, "verify")
    with telling.failing(), contextlib.ExitStack() as held_until_done:
        found = held_until_done.enter_context(held(lambda: committed_at(target, step)))
        telling.at(found.storage.address, found.step)
        audit = Audit(found.storage, scan_nan=scan_nan, trusted=trusted)
        held_until_done.enter_context(connected(address))
        shares = _shares(audit.work, num_cpus=ray.cluster_resources().get("CPU", 1.0))
        total = sum(part.num_bytes for part in audit.work)
        meter = Meter(progress)
        meter.expect(total)
        threads = LOCAL_THREADS if audit.files.is_local else tuning_for(audit.files).threads

        whole = Checked()
        args_of = _Arguments(audit, shares, threads)
        with ThreadPoolExecutor(1, thread_name_prefix="ray_ckpt-records") as pool:
            records = pool.submit(audit.check_records)
            run_tasks(
                check_share,
                args_of,
                timeout_s=timeout_s,
                on_done=lambda number, checked: whole.add(checked),
                meter=meter,
            )
            whole.add(records.result())
    meter.end()
    report = replace(audit.report(whole, total), step=found.step)
    telling.verified(report)
    return report


class _Arguments(Mapping[int, tuple[Any, ...]]):
    """Number of a task -> arguments of `check_share`, which are made when they are asked for, and not kept."""

    def __init__(self, audit: Audit, shares: Sequence[Sequence[Work]], threads: int) -> None:
        self._audit, self._shares, self._threads = audit, shares, threads

    def __getitem__(self, number: int) -> tuple[Any, ...]:
        parts = [self._audit.described(work) for work in self._shares[number]]
        return self._audit.files, parts, self._threads

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self._shares)))

    def __len__(self) -> int:
        return len(self._shares)


def check_share(files: Storage, parts: Sequence[Stretch | Archive], threads: int, meter: Meter = NOBODY) -> Checked:
    """What a task does.

    Raises:
        UsageError: this node does not see a file that the driver has seen.
        StorageError: the storage does not answer.
    """
    from ray_ckpt.storage.stretches import check_parts

    names = {part.file for part in parts}
    if unseen := sorted(names - files.sizes(names).keys()):
        raise UsageError(
            f"{files.address}/{unseen[0]} is not there on this node, but on the driver's: give a directory that is "
            "mounted on every node, or an object store"
        )
    return check_parts(files, parts, threads, meter)


def _shares(work: Sequence[Work], num_cpus: float) -> list[Sequence[Work]]:
    """Pieces of work for each task, in their order, of about equal bytes."""
    total = sum(part.num_bytes for part in work)
    least = min(LEAST_TASK_BYTES, ceil_div(total, max(1, int(num_cpus))))
    size = min(max(least, ceil_div(total, max(1, int(num_cpus * TASKS_PER_CPU)))), MOST_TASK_BYTES)
    shares: list[list[Work]] = []
    taken = size
    for part in work:
        if taken >= size:
            shares.append([])
            taken = 0
        shares[-1].append(part)
        taken += part.num_bytes
    return list(shares)
