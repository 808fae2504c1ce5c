"""The coordinator's side of a save: who writes what, whether all of it was written, and the commit."""

from __future__ import annotations

import logging
import operator
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from ray_ckpt.errors import CommitError, UsageError
from ray_ckpt.format.boxes import Box, shared_box
from ray_ckpt.format.fingerprint import digest_of
from ray_ckpt.format.lost_ranks import with_lost
from ray_ckpt.format.manifest import Chunk, Manifest, ObjectEntry, TensorEntry
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.phase_clock import PhaseClock
from ray_ckpt.protocol import frozen
from ray_ckpt.protocol.merging import GlobalPlan, Key, key_of, merge
from ray_ckpt.protocol.messages import (
    REPLICA_DIGEST_BYTES,
    Assignment,
    FileRecord,
    Item,
    LocalPlan,
    RankRecord,
    TensorSpec,
    digest_object,
    digest_tensor,
    num_bytes,
    num_bytes_in_all,
)
from ray_ckpt.protocol.survivors import left_out, plans_of_lost
from ray_ckpt.report import Phase, SaveReport
from ray_ckpt.storage import room
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.publish import publish, refuse_if_taken
from ray_ckpt.text import listed

_logger = logging.getLogger(__name__)


class PlanCache:
    """The plans of the last save: while all ranks send the same tokens, they need not be merged again."""

    def __init__(self) -> None:
        self.merged: GlobalPlan | None = None
        self.left_out: tuple[str, ...] = ()
        """What is not saved, because the rank is lost that alone had it."""
        self._plans: list[LocalPlan] = []
        """Those of lost ranks are what they held."""
        self._lost: frozenset[int] = frozenset()

    def token_of(self, rank: int) -> frozenset[str]:
        """The token whose items are known of one rank; none before the first save."""
        return frozenset(plan.token for plan in self._plans[rank : rank + 1])

    @property
    def plans(self) -> list[LocalPlan]:
        """By rank, the plan of one whose state is unchanged and has no frozen tensors: a token instead of items."""
        return [LocalPlan(plan.token, None) for plan in self._plans]

    def update(self, plans: Sequence[LocalPlan | None], layout: str | None = None) -> GlobalPlan:
        """Merge these plans, or return the last result where no token has changed and no rank was lost.

        Args:
            plans: by rank; None of a rank that is lost, which then holds nothing.
            layout: how the state lies across the ranks, as the state itself says.

        Raises:
            CommitError: as `merge`; or the other ranks do not hold what a lost one held.
            UsageError: something is asked for by a name that no rank has.
        """
        known = {plan.token: plan for plan in self._plans}
        sent = [
            plan if plan is None or plan.items is not None else replace(known[plan.token], frozen=plan.frozen)
            for plan in plans
        ]
        of_lost = plans_of_lost(sent, self._plans, layout)
        held = [plan or of_lost[rank] for rank, plan in enumerate(sent)]
        is_new = [plan.token for plan in held] != [plan.token for plan in self._plans] or self._lost != frozenset(
            of_lost
        )
        self._plans, self._lost = held, frozenset(of_lost)
        if self.merged is None or is_new:
            self.merged = None
            there = [plan for plan in sent if plan is not None]
            if absent := frozenset.intersection(*(plan.absent for plan in there)):
                raise UsageError(f"no rank holds anything of {listed(sorted(absent))}; nothing was saved")
            items = [() if plan is None or plan.items is None else plan.items for plan in sent]
            merged = merge(items, frozenset().union(*(plan.buffers for plan in there)))
            self.left_out = left_out(of_lost, merged)
            self.merged = merged
        return self.merged


class Coordinator:
    """One attempt to save one checkpoint: `merge` or `adopt`, then `check`, then `publish`.

    Args:
        storage: the checkpoint's directory.
        layout: how the model lies across ranks, in the caller's words; kept in the manifest. May be set until `check`.
        saved_by: name -> version of the software, kept in the manifest.
        fingerprints: tensor name -> `Fingerprint.digest`, kept in the manifest.
        cache: the plans of earlier attempts; keep one per group of ranks.
        attempt: id of this attempt; no other attempt may have the same.
        step: the checkpoint's step in its store, for the report; None where it is in none.
        called: what messages call the process that this runs in.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        overwrite: bool = False,
        layout: str | None = None,
        saved_by: Mapping[str, str] | None = None,
        fingerprints: Mapping[str, str] | None = None,
        cache: PlanCache | None = None,
        attempt: str | None = None,
        step: int | None = None,
        called: str = "rank 0",
    ) -> None:
        self._start = time.monotonic()
        self._storage = storage
        self._overwrite = overwrite
        self.layout = layout
        self._saved_by = dict(saved_by or {})
        self._fingerprints = dict(fingerprints or {})
        self._cache = cache or PlanCache()
        self._step = step
        self._called = called
        self._plan: GlobalPlan | None = None
        self._manifest: Manifest | None = None
        self._differing: tuple[str, ...] = ()
        self._clock = PhaseClock()
        self._phases: tuple[Phase, ...] = ()
        """What the ranks have measured."""
        self._num_retries = 0
        self._unsaved: tuple[str, ...] = ()
        self.num_failed_before = 0
        """What the report says of saves before this one. May be set until `publish`."""
        self._frozen: Mapping[str, str] = {}
        self._lost: tuple[int, ...] = ()
        self.attempt = attempt or uuid.uuid4().hex[:12]

    def merge(self, plans: Sequence[LocalPlan | None], layout: str | None = None) -> list[Assignment]:
        """Decide who writes what, by rank. A part that several ranks hold is written by the least loaded of them.

        Args:
            plans: by rank; None of a rank that is lost. What it held, others have to hold too.
            layout: how the state lies across the ranks, as the state itself says: tells what a lost rank held.

        Raises:
            CheckpointExistsError: the storage holds a committed checkpoint and `overwrite` was not given.
            CommitError: the ranks' parts do not cover a tensor exactly once, or contradict each other, or the others do
                not hold what a lost rank held.
            UsageError: something is asked for by a name that no rank has.
        """
        with self._measured("plan"), collector_paused():
            self._frozen = frozen.digests([plan.frozen for plan in plans if plan is not None])
            if not self._overwrite:
                refuse_if_taken(self._storage)
            is_first = self._cache.merged is None
            self._plan = self._cache.update(plans, layout)
            self._lost = tuple(rank for rank, plan in enumerate(plans) if plan is None)
        if is_first:
            self._look_for_room(self._plan)
        return [
            Assignment(self.attempt, rank, tuple(skipped))
            for rank, skipped in enumerate(self._plan.skipped)
            if rank not in self._lost
        ]

    def begin_again(self) -> None:
        """Give up the attempt, of which nothing is committed, for another one. `merge` comes next."""
        self.attempt = uuid.uuid4().hex[:12]

    def _look_for_room(self, plan: GlobalPlan) -> None:
        """Warn of a disk that is about to be full. The next checkpoint is committed before one is removed."""
        specs = [spec for _, spec in plan.names.values() if spec is not None]
        if shortage := room.shortage(self._storage, sum(map(num_bytes_in_all, specs))):
            _logger.warning("%s", shortage)

    def merge_again(self) -> None:
        """Decide as in the attempt before: every rank holds the same as then.

        Raises:
            CheckpointExistsError: as `merge`.
        """
        self.merge(self._cache.plans)

    def keep_frozen(self, manifest: Manifest) -> None:
        """Keep another record's fingerprints of tensors that were not saved with it."""
        self._frozen = {name: digest for name, digest in manifest.fingerprints.items() if name not in manifest.tensors}

    def adopt(self, plan: GlobalPlan) -> None:
        """Instead of `merge`, where somebody else has decided who writes what."""
        self._plan = plan

    def check(self, records: Sequence[RankRecord]) -> None:
        """Check by the records of all ranks, and by a look at the storage, that everything was written.

        Args:
            records: by rank; that of a lost one is empty.

        Raises:
            CommitError: something was not written, or replicas differ, or the storage does not show the files.
            StorageError: the storage cannot be listed.
        """
        self._phases = tuple(replace(p, rank=rank) for rank, record in enumerate(records) for p in record.phases)
        self._num_retries += sum(record.num_retries for record in records)
        self._unsaved = tuple(dict.fromkeys(name for record in records for name in record.unsaved))
        with self._measured("check"):
            manifest = self.describe(records)
            self._check_files(manifest.files)
        self._manifest = manifest

    def describe(self, records: Sequence[RankRecord]) -> Manifest:
        """The manifest of what the ranks say that they have written. Touches no storage.

        Raises:
            CommitError: something was not written, or replicas differ.
        """
        assert self._plan is not None, "merge or adopt comes first"
        with collector_paused():
            return self._describe(self._plan, records)

    @property
    def manifest(self) -> Manifest:
        """What was checked, and will be committed."""
        assert self._manifest is not None, "check comes first"
        return self._manifest

    def publish(self, stock_record: bytes) -> SaveReport:
        """Commit what was checked. Once this has begun, no file of the attempt may be removed.

        Args:
            stock_record: the manifest as the `.metadata` that lets stock DCP read the same files.

        Raises:
            CheckpointExistsError: another attempt has committed meanwhile.
            StorageError: a record could not be written. The commit may or may not have happened.
        """
        manifest = self.manifest
        with self._measured("commit"):
            not_durable = publish(self._storage, manifest, stock_record, overwrite=self._overwrite)
        report = SaveReport(
            uri=self._storage.address,
            total_bytes=manifest.total_bytes,
            num_files=len(manifest.files),
            seconds=time.monotonic() - self._start,
            step=self._step,
            differing_buffers=self._differing,
            phases=(*self._phases, *self._clock.phases),
            num_retries=self._num_retries,
            num_failed_before=self.num_failed_before,
            not_durable=not_durable,
            lost_ranks=self._lost,
            left_out=self._cache.left_out if self._lost else (),
            unsaved=self._unsaved,
        )
        if self._lost:
            _logger.warning("%s", _loss(report))
        if self._unsaved:
            _logger.warning("%s", _unshown(report))
        _logger.info(
            "committed %s: %d bytes in %d files, %.1f s",
            report.uri,
            report.total_bytes,
            report.num_files,
            report.seconds,
        )
        return report

    @contextmanager
    def _measured(self, phase: str) -> Iterator[None]:
        """Of the block: its time, and its retries. Elsewhere a rank of this process may use the same storage."""
        before = self._storage.num_retries
        with self._clock.phase(phase):
            yield
        self._num_retries += self._storage.num_retries - before

    def _describe(self, plan: GlobalPlan, records: Sequence[RankRecord]) -> Manifest:
        for rank, record in enumerate(records):
            _check_reported(plan, rank, record)
        written = _collect(plan, records)
        self._differing = _check_replicas(plan, records, written.digests)
        tensors = {
            name: TensorEntry(spec.dtype, spec.shape, _sorted(written.chunks[name]), path)
            for name, (path, spec) in plan.names.items()
            if spec is not None
        }
        objects = {name: written.objects[name] for name, (_, spec) in plan.names.items() if spec is None}
        taken = {
            name: digest_of(tensors[name].dtype, tensors[name].shape, sums)
            for name, sums in written.sums.items()
            if len(sums) == len(tensors[name].chunks)
        }
        if strangers := sorted(self._fingerprints.keys() - tensors.keys()):
            raise CommitError(f"refusing to commit: fingerprints of tensors that were not saved: {listed(strangers)}")
        fingerprints = {**taken, **self._fingerprints, **self._frozen}
        layout = with_lost(self.layout, self._lost)
        return Manifest(tensors, objects, written.files, self.attempt, layout, self._saved_by, fingerprints)

    def _check_files(self, files: Mapping[str, int]) -> None:
        """Refuse to commit unless this process sees the files that the ranks report, with their sizes.

        It does not see them when a write claimed success and lost bytes, or when the ranks' directory is another one
        of the same path.
        """
        found: dict[str, int | None] = {**self._storage.sizes(files)}
        for name, size in files.items():
            if found.get(name) != size:
                # A listing may be stale, as on NFS; a look at the file itself is not.
                found[name] = self._storage.size(name)
        wrong = {name: size for name, size in sorted(files.items()) if found[name] != size}
        if not wrong:
            return
        written = listed([f"{name} of {size} bytes" for name, size in wrong.items()])
        if any(found[name] is not None for name in wrong):
            seen = listed([f"{name} of {found[name] or 0} bytes" for name in wrong])
            advice = "the storage has lost what was written to it"
        else:
            seen = "no such file"
            advice = f"give a directory that is mounted on {self._called}'s node too, or an object store"
        raise CommitError(
            f"refusing to commit: the ranks have written {written} to {self._storage.address}, where {self._called} "
            f"sees {seen}; {advice}"
        )


def _loss(report: SaveReport) -> str:
    """What was lost in a save, in a sentence."""
    ranks = listed(report.lost_ranks, at_most=8)
    also = f"; not saved, as they alone had it: {listed(report.left_out, at_most=8)}" if report.left_out else ""
    return f"{report.uri} is saved by the other ranks, as rank{'s' * (len(report.lost_ranks) > 1)} {ranks} died{also}"


def _unshown(report: SaveReport) -> str:
    """What optimizers have not shown, in a sentence."""
    return (
        f"{report.uri} is saved without {listed(report.unsaved, at_most=8)}: tensors for the parameters that no "
        "state_dict shows, and that begin anew after a load. Show them by state_dict and load_state_dict, or give them "
        "in TrainState(extra=...)"
    )


@dataclass(frozen=True)
class _Reported:
    """What all ranks together report to have written."""

    chunks: Mapping[str, list[Chunk]]
    """Tensor name -> its chunks, in no order."""
    objects: dict[str, ObjectEntry] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    """Name -> bytes."""
    sums: dict[str, list[int]] = field(default_factory=dict)
    """Tensor name -> fingerprints' sums of the chunks of which they were taken."""
    digests: dict[Key, tuple[TensorSpec | None, bytes]] = field(default_factory=dict)
    """Part that several ranks hold -> its spec, and the digest that `RankRecord.replicas` has for an equal one."""


def _collect(plan: GlobalPlan, records: Sequence[RankRecord]) -> _Reported:
    written = _Reported({name: [] for name, (_, spec) in plan.names.items() if spec is not None})
    for rank, record in enumerate(records):
        items = plan.items[rank]
        for file in record.files:
            written.files[file.name] = _end(file)
            for position, part_sum in zip(file.positions if file.sums else (), file.sums, strict=True):
                written.sums.setdefault(items[position].name, []).append(part_sum)
            for item, chunk in _chunks(file, items):
                written.chunks[item.name].append(chunk)
                if plan.writers and (key := key_of(item)) in plan.writers and chunk.checksums is not None:
                    written.digests[key] = item.spec, digest_tensor(chunk.checksums.sums)
            for position, entry in file.objects.items():
                item = items[position]
                written.objects[item.name] = entry if item.path is None else entry._replace(path=item.path)
                if plan.writers and (key := key_of(item)) in plan.writers and entry.checksum is not None:
                    written.digests[key] = None, digest_object(entry.checksum)
    return written


def _check_reported(plan: GlobalPlan, rank: int, record: RankRecord) -> None:
    """Whether a rank reports to have written exactly what it was to write."""
    items = plan.items[rank]
    reported = [position for file in record.files for position in (*file.positions, *file.objects)]
    expected = set(range(len(items))) - set(plan.skipped[rank])
    if len(reported) == len(expected) and expected == set(reported):
        return
    missing = sorted(items[position].name for position in expected - set(reported))
    found = f"lacks {listed(missing)}" if missing else "has items twice, or items that nobody planned"
    raise CommitError(f"refusing to commit: what rank {rank} reports to have written {found}")


def _check_replicas(
    plan: GlobalPlan, records: Sequence[RankRecord], digests: Mapping[Key, tuple[TensorSpec | None, bytes]]
) -> tuple[str, ...]:
    """Replicas are saved once; here each of the others proves that nothing else was lost with it.

    Returns:
        Names of the buffers in which ranks differ.
    """
    size, conflicts, buffers = REPLICA_DIGEST_BYTES, [], set()
    for rank, record in enumerate(records):
        for number, position in enumerate(plan.skipped[rank]):
            item = plan.items[rank][position]
            found, writer = record.replicas[size * number : size * (number + 1)], plan.writers.get(key_of(item))
            # Without a writer it is no part of the checkpoint: a planner of DCP's may leave something out.
            if writer is not None and digests.get(key_of(item)) != (item.spec, found):
                if item.name in plan.buffers:
                    buffers.add(item.name)
                else:
                    conflicts.append(f"{item.name!r} on ranks {writer} and {rank}")
    if conflicts:
        raise CommitError(
            "refusing to commit: ranks hold different things under one name, of which only one would survive: "
            f"{listed(conflicts)}; give them different names, or make the ranks agree{_stepped_alike(conflicts)}"
        )
    return tuple(sorted(buffers))


def _stepped_alike(conflicts: Iterable[str]) -> str:
    """What makes the optimizers of ranks differ, where it is a number of steps."""
    if not any(conflict.startswith("'optim.state.") and ".step' on" in conflict for conflict in conflicts):
        return ""
    return (
        ". An optimizer counts no step of a parameter without a gradient: give the parameter one on every rank before "
        "each step (zeros will do)"
    )


def _chunks(file: FileRecord, items: Sequence[Item]) -> Iterator[tuple[Item, Chunk]]:
    written = [items[position] for position in file.positions]
    return zip(written, file.tensors.chunks(map(_extent, written)), strict=True)


def _extent(item: Item) -> tuple[Box, int]:
    assert item.spec is not None, "the writer puts only tensors into these columns"
    return shared_box(item.spec.offsets, item.spec.sizes), num_bytes(item.spec)


def _end(file: FileRecord) -> int:
    """Bytes in the file: up to the end of the last container."""
    return max(
        max(map(operator.add, file.tensors.starts, file.tensors.lengths), default=0),
        max((entry.start + entry.length for entry in file.objects.values()), default=0),
    )


def _sorted(chunks: list[Chunk]) -> tuple[Chunk, ...]:
    return tuple(chunks if len(chunks) == 1 else sorted(chunks, key=lambda chunk: chunk.box.offsets))
