"""The coordinator's side of a save: who writes what, and whether all of it was written."""

from __future__ import annotations

import operator
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import xxhash

from ray_ckpt.errors import CommitError
from ray_ckpt.format.boxes import Box, check_cover, shared_box
from ray_ckpt.format.manifest import Chunk, Manifest, ObjectEntry, Path, TensorEntry
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.protocol.messages import Assignment, FileRecord, Item, LocalPlan, RankRecord, TensorSpec, num_bytes
from ray_ckpt.report import SaveReport
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.publish import publish, refuse_if_taken
from ray_ckpt.text import listed

Key = tuple[str, tuple[int, ...] | None]
"""Name and offsets of a part: what is saved once, however many ranks hold it. Offsets are None for an object."""


@dataclass(frozen=True)
class _Merged:
    """What the plans of all ranks add up to."""

    skipped: tuple[tuple[int, ...], ...]
    """By rank: positions that another rank writes."""
    writers: Mapping[Key, int]
    """Who writes each part that several ranks hold."""
    names: Mapping[str, tuple[Path | None, TensorSpec | None]]
    """Every name, with its path and one of its specs."""


class PlanCache:
    """The plans of the last save: when all ranks send the same tokens again, nothing is merged again."""

    def __init__(self) -> None:
        self.items: list[tuple[Item, ...]] = []
        self.merged: _Merged | None = None
        self._tokens: list[str] = []

    @property
    def tokens(self) -> frozenset[str]:
        """Tokens whose items are known: ranks need not send these again."""
        return frozenset(self._tokens)

    @property
    def plans(self) -> list[LocalPlan]:
        """What ranks send that hold the same again, by rank."""
        return [LocalPlan(token, None) for token in self._tokens]

    def update(self, plans: Sequence[LocalPlan]) -> _Merged:
        """What these plans add up to, from memory where nothing has changed."""
        tokens = [plan.token for plan in plans]
        if self.merged is None or tokens != self._tokens:
            known = dict(zip(self._tokens, self.items, strict=True))
            self.items = [known[plan.token] if plan.items is None else plan.items for plan in plans]
            self._tokens = tokens
            self.merged = None
            self.merged = _merge(self.items)
        return self.merged


class Coordinator:
    """One attempt to save one checkpoint.

    Args:
        storage: of the checkpoint.
        layout: how the model lies across ranks, in the caller's words; kept in the manifest. May be set until `check`.
        saved_by: name -> version of the software, kept in the manifest.
        fingerprints: `Fingerprint.digest` of tensors by name, kept in the manifest.
        cache: of the attempts before; keep one per group of ranks.
        attempt: names this one; no other may have the same.
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
    ) -> None:
        self._start = time.monotonic()
        self._storage = storage
        self._overwrite = overwrite
        self.layout = layout
        self._saved_by = dict(saved_by or {})
        self._fingerprints = dict(fingerprints or {})
        self._cache = cache or PlanCache()
        self._merged: _Merged | None = None
        self._manifest: Manifest | None = None
        self.attempt = attempt or uuid.uuid4().hex[:12]

    def merge(self, plans: Sequence[LocalPlan]) -> list[Assignment]:
        """Decide who writes what, by rank. A part that several ranks hold is written by the least loaded of them.

        Raises:
            CheckpointExistsError: the storage holds a committed checkpoint and `overwrite` was not given.
            CommitError: the ranks' parts do not cover a tensor exactly once, or contradict each other.
        """
        if not self._overwrite:
            refuse_if_taken(self._storage)
        with collector_paused():
            self._merged = self._cache.update(plans)
        return [Assignment(self.attempt, rank, skipped) for rank, skipped in enumerate(self._merged.skipped)]

    def merge_again(self) -> None:
        """Decide as for the attempt before, as every rank holds what it held then.

        Raises:
            CheckpointExistsError: as `merge`.
        """
        self.merge(self._cache.plans)

    def check(self, records: Sequence[RankRecord]) -> None:
        """Check that all of it was written, by the records of all ranks, by rank.

        Raises:
            CommitError: something was not written, or replicas differ.
        """
        assert self._merged is not None, "merge comes first"
        with collector_paused():
            self._manifest = self._describe(self._merged, records)

    @property
    def manifest(self) -> Manifest:
        """What was checked, and will be committed."""
        assert self._manifest is not None, "check comes first"
        return self._manifest

    def publish(self, stock_record: bytes) -> SaveReport:
        """Commit what was checked. Once this has begun, no file of the attempt may be removed.

        Args:
            stock_record: of the manifest: the `.metadata` that lets stock DCP read the same files.

        Raises:
            CheckpointExistsError: another attempt has committed meanwhile.
            StorageError: a record could not be written. The checkpoint may be committed all the same.
        """
        manifest = self.manifest
        publish(self._storage, manifest, stock_record, overwrite=self._overwrite)
        seconds = time.monotonic() - self._start
        return SaveReport(self._storage.address, manifest.total_bytes, len(manifest.files), seconds)

    def _describe(self, merged: _Merged, records: Sequence[RankRecord]) -> Manifest:
        chunks: dict[str, list[Chunk]] = {name: [] for name, (_, spec) in merged.names.items() if spec is not None}
        objects: dict[str, ObjectEntry] = {}
        files: dict[str, int] = {}
        digests: dict[Key, bytes] = {}
        for rank, record in enumerate(records):
            items = self._cache.items[rank]
            self._check_written(rank, items, record)
            for file in record.files:
                files[file.name] = _end(file)
                for item, chunk in _chunks(file, items):
                    chunks[item.name].append(chunk)
                    if merged.writers and _key(item) in merged.writers and chunk.checksums is not None:
                        digests[_key(item)] = xxhash.xxh3_128_digest(chunk.checksums.sums)
                for position, entry in file.objects.items():
                    item = items[position]
                    objects[item.name] = entry if item.path is None else replace(entry, path=item.path)
        self._check_replicas(merged, records, digests, objects)
        tensors = {
            name: TensorEntry(spec.dtype, spec.shape, _sorted(chunks[name]), path)
            for name, (path, spec) in merged.names.items()
            if spec is not None
        }
        ordered = {name: objects[name] for name, (_, spec) in merged.names.items() if spec is None}
        return Manifest(tensors, ordered, files, self.attempt, self.layout, self._saved_by, self._fingerprints)

    def _check_written(self, rank: int, items: Sequence[Item], record: RankRecord) -> None:
        assert self._merged is not None
        written = [position for file in record.files for position in (*file.positions, *file.objects)]
        expected = set(range(len(items))) - set(self._merged.skipped[rank])
        if len(written) == len(expected) and expected == set(written):
            return
        missing = sorted(items[position].name for position in expected - set(written))
        found = f"lacks {listed(missing)}" if missing else "has items twice, or items that nobody planned"
        raise CommitError(f"refusing to commit: what rank {rank} reports to have written {found}")

    def _check_replicas(
        self,
        merged: _Merged,
        records: Sequence[RankRecord],
        digests: Mapping[Key, bytes],
        objects: Mapping[str, ObjectEntry],
    ) -> None:
        """Replicas are saved once; here each of the others proves that nothing else was lost with it."""
        conflicts = []
        for rank, record in enumerate(records):
            for number, position in enumerate(merged.skipped[rank]):
                item = self._cache.items[rank][position]
                found = record.replicas[16 * number : 16 * number + 16]
                entry = objects.get(item.name)
                saved = digests[_key(item)] if item.spec is not None else _checksum_bytes(entry)
                if found != saved:
                    conflicts.append(f"{item.name!r} on ranks {merged.writers[_key(item)]} and {rank}")
        if conflicts:
            raise CommitError(
                "refusing to commit: ranks hold different things under one name, of which only one would survive: "
                f"{listed(conflicts)}; give them different names, or make the ranks agree"
            )


def _merge(plans: Sequence[Sequence[Item]]) -> _Merged:
    """Linear in the number of parts that all ranks hold together."""
    names: dict[str, tuple[Path | None, TensorSpec | None]] = {}
    holders: dict[Key, list[tuple[int, int]]] = {}
    boxes: dict[str, list[TensorSpec]] = {}
    for rank, items in enumerate(plans):
        for position, item in enumerate(items):
            name, path, spec = item
            known = names.setdefault(name, (path, spec))
            if known[1] is not spec and _whole(known[1]) != _whole(spec):
                raise CommitError(
                    f"refusing to save: {name!r} is {_describe(spec)} on rank {rank} and {_describe(known[1])} on "
                    "another rank; give them different names"
                )
            held = holders.setdefault(_key(item), [])
            if spec is not None and not held:
                boxes.setdefault(name, []).append(spec)
            elif held and spec != (other := plans[held[0][0]][held[0][1]].spec):
                raise CommitError(
                    f"refusing to save: the part of {name!r} at {_key(item)[1]} is {_part(spec)} on rank {rank} and "
                    f"{_part(other)} on rank {held[0][0]}"
                )
            held.append((rank, position))
    _check_boxes(boxes)
    return _share(plans, holders, names)


def _share(
    plans: Sequence[Sequence[Item]],
    holders: Mapping[Key, list[tuple[int, int]]],
    names: Mapping[str, tuple[Path | None, TensorSpec | None]],
) -> _Merged:
    loads = [0] * len(plans)
    replicated: list[tuple[Key, list[tuple[int, int]], int]] = []
    for key, held in holders.items():
        rank, position = held[0]
        spec = plans[rank][position].spec
        size = 1 if spec is None else num_bytes(spec)
        if len(held) == 1:
            loads[rank] += size
        else:
            replicated.append((key, held, size))
    skipped: list[list[int]] = [[] for _ in plans]
    writers: dict[Key, int] = {}
    for key, held, size in replicated:
        writer = min((rank for rank, _ in held), key=lambda rank: loads[rank])
        loads[writer] += size
        writers[key] = writer
        for rank, position in held:
            if rank != writer:
                skipped[rank].append(position)
    return _Merged(tuple(tuple(sorted(positions)) for positions in skipped), writers, names)


def _check_boxes(boxes: Mapping[str, Sequence[TensorSpec]]) -> None:
    for name, specs in boxes.items():
        first = specs[0]
        if len(specs) == 1 and first.sizes == first.shape:
            continue
        if problem := check_cover(first.shape, [Box(spec.offsets, spec.sizes) for spec in specs]):
            raise CommitError(f"refusing to save: tensor {name!r} is not covered exactly once: {problem}")


def _chunks(file: FileRecord, items: Sequence[Item]) -> Iterator[tuple[Item, Chunk]]:
    written = [items[position] for position in file.positions]
    return zip(written, file.tensors.chunks(map(_extent, written)), strict=True)


def _extent(item: Item) -> tuple[Box, int]:
    assert item.spec is not None, "the writer puts only tensors into these columns"
    return shared_box(item.spec.offsets, item.spec.sizes), num_bytes(item.spec)


def _end(file: FileRecord) -> int:
    """Bytes in the file, up to the end of the last container."""
    return max(
        max(map(operator.add, file.tensors.starts, file.tensors.lengths), default=0),
        max((entry.start + entry.length for entry in file.objects.values()), default=0),
    )


def _sorted(chunks: list[Chunk]) -> tuple[Chunk, ...]:
    return tuple(chunks if len(chunks) == 1 else sorted(chunks, key=lambda chunk: chunk.box.offsets))


def _key(item: Item) -> Key:
    return item.name, None if item.spec is None else item.spec.offsets


def _whole(spec: TensorSpec | None) -> tuple[str, tuple[int, ...]] | None:
    return None if spec is None else (spec.dtype, spec.shape)


def _checksum_bytes(entry: ObjectEntry | None) -> bytes:
    return b"" if entry is None or entry.checksum is None else entry.checksum.to_bytes(16, "little")


def _describe(spec: TensorSpec | None) -> str:
    return "no tensor" if spec is None else f"{spec.dtype}{list(spec.shape)}"


def _part(spec: TensorSpec | None) -> str:
    return "no tensor" if spec is None else f"of size {list(spec.sizes)}"
