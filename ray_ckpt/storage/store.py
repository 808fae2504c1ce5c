"""CheckpointStore: the checkpoints of one training run, by step.

    <store>/step-<N>/   one checkpoint, as `Coordinator` or `ArrowStorageWriter` saves it into `store.location(N)`
    <store>/.pins/      who wants a step kept, and who is about to delete one (`pins.py`)

delete, prune ──> claim the step ──> manifest.json, durably ──> .metadata ──> data files ──> give the claim back
clean         ──> deletes that were cut off, then files that no manifest names

Anything else in the store's directory, or in a step's, is somebody else's: it is neither counted nor touched.
"""

from __future__ import annotations

import operator
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from ray_ckpt.errors import CheckpointError, CheckpointNotFoundError, StorageError, UsageError
from ray_ckpt.format.manifest import MANIFEST_NAME, Manifest
from ray_ckpt.report import RemovalReport
from ray_ckpt.storage.files import Scanned, Storage
from ray_ckpt.storage.pins import Pins
from ray_ckpt.storage.publish import STOCK_RECORD_NAME
from ray_ckpt.storage.retention import Policy, retained

__all__ = ["CheckpointStore"]

DAY_S = 86400.0
"""No save takes this long."""

_STEP = re.compile(r"step-(0|[1-9][0-9]*)", re.ASCII)
_DATA_FILE = re.compile(r"__[0-9]+_[0-9]+-([0-9a-f]{12})\.distcp")
_TEMPORARY = re.compile(rf"(?:{re.escape(MANIFEST_NAME)}|{re.escape(STOCK_RECORD_NAME)})\.[0-9a-f]{{12}}\.tmp")
_DELETES_IN_FLIGHT = 8
"""On a network, where a delete waits for three requests."""


@dataclass(frozen=True)
class _Record:
    """What the commit record of a step says of its files."""

    attempt: str
    """Empty when the record is damaged."""
    files: Mapping[str, int]
    """Name -> bytes; empty when the record is damaged: then nobody knows whose files there are."""


class CheckpointStore:
    """The checkpoints of one training run: directories `step-<N>` (no leading zeros) below one directory or prefix.

    A step is committed when its `manifest.json` exists. Steps are ordered by number, whenever they were written.

    Example:
        >>> import torch
        >>> from ray_ckpt import CheckpointStore, keep_last, save
        >>> store = CheckpointStore("checkpoints")  # or s3://bucket/run
        >>> reports = [save({"weight": torch.ones(3)}, store, step=step) for step in (10, 20, 30)]
        >>> store.steps(), store.latest()
        ((10, 20, 30), 30)
        >>> store.pin(10)
        >>> store.prune(keep_last(1)).removed
        (20,)

    Any number of processes may use one store at once, on local files and on object stores. They can rely on this:

    - A step appears atomically. While it is being saved, nothing but `clean` removes any of its files, and
      `clean` only those of an attempt that has written nothing for `older_than_s`: let that be longer than a save.
    - A delete takes the commit record first. From then on the step does not exist; a delete that is cut off leaves
      files that `clean` removes.
    - Once `pin` has returned, no `prune` and no `delete` of any process removes the step. A `pin` that meets a delete
      which has already begun raises.
    - `prune` never removes the highest step that its listing shows. `delete` does what it is told, to that one too.
    - A delete and an overwriting save of one step at a time leave either none, or the new one with all its data. In the
      latter case the `.metadata` for stock DCP may be missing if the two write it within the same moment.
    - A reader whose step is deleted meanwhile fails. Within `reading`, the error says that this is why.

    Args:
        target: a local path, a URI as `Storage` takes it, or a `Storage`.
    """

    def __init__(self, target: str | os.PathLike[str] | Storage) -> None:
        self._storage = target if isinstance(target, Storage) else Storage(target)
        self._pins = Pins(self._storage)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address!r})"

    @property
    def address(self) -> str:
        """Where it is, without credentials and options."""
        return self._storage.address

    # ------------------------------------------------------------------------------------------------- reading

    def steps(self) -> tuple[int, ...]:
        """The committed steps, ascending.

        One listing: of the directory and a look into each step on local files; on an object store of all names in the
        store, a thousand to a request.
        """
        return tuple(sorted(_parse_steps(self._storage.directories_with(MANIFEST_NAME))))

    def latest(self) -> int | None:
        """The highest committed step; None when there is none. One listing of the steps and usually one look."""
        steps = _parse_steps(self._storage.list_directories())
        return next((step for step in sorted(steps, reverse=True) if self._is_committed(step)), None)

    def manifest(self, step: int) -> Manifest:
        """What a committed step holds, at the cost of one read.

        Raises:
            CheckpointNotFoundError: the step is not committed.
            FormatError, UnsafeCheckpointError: its manifest is damaged.
        """
        data = self._read_record(step)
        if data is None:
            raise self._not_found(step)
        return Manifest.from_json(data, f"{self.location(step).address}/{MANIFEST_NAME}")

    @contextmanager
    def reading(self, step: int | None = None) -> Iterator[Storage]:
        """The storage of a committed step, by default the latest, while it is read.

        Raises:
            CheckpointNotFoundError: the step is not committed, or was deleted while it was read; what has been read by
                then is incomplete.
        """
        chosen = self.latest() if step is None else step
        if chosen is None or not self._is_committed(chosen):
            raise self._not_found(chosen)
        try:
            yield self.location(chosen)
        except (StorageError, CheckpointError) as error:
            if self._is_committed(chosen):
                raise
            raise CheckpointNotFoundError(
                f"step {chosen} of {self.address} was deleted while it was read; read a step that is left, "
                "or pin it before you read it"
            ) from error

    # ------------------------------------------------------------------------------------------------- writing

    def location(self, step: int) -> Storage:
        """The storage of a step's directory, whether a checkpoint is there or not. Nothing is read or written.

        Raises:
            UsageError: `step` is not a number from 0.
        """
        return self._storage.child(_directory(step))

    def delete(self, step: int) -> RemovalReport:
        """Remove a committed step: the commit record first, durably, then the files that it names. Others stay.

        Raises:
            CheckpointNotFoundError: the step is not committed.
            UsageError: it is pinned.
        """
        record = self._record(step)
        if record is None:
            raise self._not_found(step)
        files = self._remove(step, record)
        if files is None:
            raise UsageError(f"step {step} of {self.address} is pinned and stays; unpin({step}) first")
        return self._report([step], (), files, dry_run=False)

    def prune(self, *policies: Policy, dry_run: bool = False) -> RemovalReport:
        """Remove the committed steps that no policy keeps, the lowest first; pinned ones and the highest always stay.

        Raises:
            UsageError: there is no policy.
        """
        wishes, steps = self._pins.list(), self.steps()
        kept = retained(steps, policies, wishes.pins)
        removed, files = [], dict[str, int]()
        for step in sorted(set(steps) - set(kept)):
            record = self._record(step)
            if record is None:
                continue  # another process was faster
            found = self._files(step, record) if dry_run else self._remove(step, record)
            if found is not None:
                removed.append(step)
                files.update(found)
        return self._report(removed, kept, files, dry_run=dry_run)

    # ---------------------------------------------------------------------------------------------------- pins

    def pin(self, step: int) -> None:
        """Keep a committed step, whatever policies say, until it is unpinned. All processes see it.

        Raises:
            CheckpointNotFoundError: the step is not committed.
            CheckpointError: a delete of the step has begun. The pin is there, but may have come too late.
        """
        if not self._is_committed(step):
            raise self._not_found(step)
        is_safe = self._pins.pin(step)
        if not self._is_committed(step):
            raise self._not_found(step)
        if not is_safe:
            raise CheckpointError(
                f"a delete of step {step} of {self.address} has begun, and may not have seen the pin; pin it again, "
                "after clean() if that delete was cut off"
            )

    def unpin(self, step: int) -> None:
        """Let policies decide again. A step that is not pinned is left as it is."""
        _directory(step)
        self._pins.unpin(step)

    def pins(self) -> tuple[int, ...]:
        """The pinned steps, ascending."""
        return tuple(sorted(self._pins.list().pins))

    # --------------------------------------------------------------------------------------------------- clean

    def clean(self, *, older_than_s: float = DAY_S, dry_run: bool = False) -> RemovalReport:
        """Finish deletes that were cut off, and remove what failed saves left: files of our names that no manifest
        names. Files next to a damaged manifest stay, for nobody knows whose they are.

        Costs one listing of everything and a read of every manifest.

        Args:
            older_than_s: leave attempts alone that have written anything within this time. 0 takes everything: only
                when nobody is saving.

        Raises:
            UsageError: `older_than_s` is negative.
        """
        if not older_than_s >= 0:
            raise UsageError(f"clean(older_than_s={older_than_s}) would remove files before they are written")
        horizon = time.time() - older_than_s if older_than_s else float("inf")
        removed, files = self._finish_deletes(horizon, dry_run=dry_run)
        by_step: dict[str, dict[str, Scanned]] = {}
        for name, scanned in self._storage.scan().items():
            directory, _, file = name.partition("/")
            by_step.setdefault(directory, {})[file] = scanned
        kept = [step for step in _parse_steps(by_step) if MANIFEST_NAME in by_step[_directory(step)]]
        for step in sorted(_parse_steps(by_step)):
            orphans = self._orphans(step, by_step[_directory(step)], horizon)
            files |= orphans
            if not dry_run:
                self._delete_files(orphans)
        if not dry_run:
            for step in _parse_steps(self._storage.list_directories()):
                self._storage.delete_empty_directory(_directory(step))
        return self._report(removed, sorted(set(kept) - set(removed)), files, dry_run=dry_run)

    def _finish_deletes(self, horizon: float, *, dry_run: bool) -> tuple[list[int], dict[str, int]]:
        """Deletes that stopped half-way, pins of steps that are gone, and what is left of half-written ones."""
        wishes = self._pins.list()
        removed, files = [], dict[str, int]()
        for claim in wishes.claims:
            if not _is_old([claim.modified_s], horizon):
                continue
            attempt, record = self._pins.claimed_attempt(claim), self._record(claim.step)
            if record is not None and record.attempt == attempt:
                found = self._files(claim.step, record) if dry_run else self._remove(claim.step, record)
                if found is not None:
                    removed.append(claim.step)
                    files |= found
            if not dry_run:
                self._pins.discard(claim.file)
        for name, modified_s in wishes.temporaries.items():
            if not dry_run and _is_old([modified_s], horizon):
                self._pins.discard(name)
        for step, modified_s in wishes.pins.items():
            if not dry_run and _is_old([modified_s], horizon) and not self._is_committed(step):
                self._pins.unpin(step)
        return sorted(set(removed)), files

    def _orphans(self, step: int, found: Mapping[str, Scanned], horizon: float) -> dict[str, int]:
        """Files of a step's directory that an attempt left and no manifest names: name in the store -> bytes."""
        attempts: dict[str, list[str]] = {}
        for file in found:
            if match := _DATA_FILE.fullmatch(file):
                attempts.setdefault(match[1], []).append(file)
            elif _TEMPORARY.fullmatch(file):
                attempts[file] = [file]
        if STOCK_RECORD_NAME in found and MANIFEST_NAME not in found:
            # It may be of any of the attempts, so it goes when the youngest does.
            attempts[STOCK_RECORD_NAME] = [STOCK_RECORD_NAME, *(file for files in attempts.values() for file in files)]
        old = {
            file
            for files in attempts.values()
            if _is_old([found[file].modified_s for file in files], horizon)
            for file in files
        }
        if not old:
            return {}
        # Read after the listing, so that a save which was committed in between is seen.
        record = self._record(step)
        if record is not None and not record.attempt:
            return {}
        if record is not None or not self._is_our_stock_record(step, old):
            old.discard(STOCK_RECORD_NAME)
        named = set() if record is None else set(record.files)
        return {f"{_directory(step)}/{file}": found[file].num_bytes for file in sorted(old - named)}

    def _is_our_stock_record(self, step: int, candidates: set[str]) -> bool:
        if STOCK_RECORD_NAME not in candidates:
            return False
        from ray_ckpt.format import dcp_metadata  # here, because it loads torch, which a driver goes without

        try:
            return dcp_metadata.is_ours(dcp_metadata.loads(self.location(step).read_bytes(STOCK_RECORD_NAME)))
        except CheckpointError:
            return False  # somebody's, and not for us to judge

    # ----------------------------------------------------------------------------------------------- machinery

    def _is_committed(self, step: int) -> bool:
        return self._storage.exists(f"{_directory(step)}/{MANIFEST_NAME}")

    def _read_record(self, step: int) -> bytes | None:
        return _read(self._storage, f"{_directory(step)}/{MANIFEST_NAME}")

    def _record(self, step: int) -> _Record | None:
        """None when the step is not committed."""
        data = self._read_record(step)
        if data is None:
            return None
        try:
            manifest = Manifest.from_json(data)
        except CheckpointError:
            return _Record("", {})
        ours = {name: size for name, size in manifest.files.items() if _DATA_FILE.fullmatch(name)}
        return _Record(manifest.attempt, ours)

    def _files(self, step: int, record: _Record) -> dict[str, int]:
        return {f"{_directory(step)}/{name}": size for name, size in record.files.items()}

    def _remove(self, step: int, record: _Record) -> dict[str, int] | None:
        """Delete a step, and tell its data files; None when it is pinned. A damaged record goes alone.

        Only what this record names is removed: a save that overwrites the step at the same time keeps its files.
        """
        claim = self._pins.claim(step, record.attempt)
        if claim is None:
            return None
        directory, files = _directory(step), self._files(step, record)
        self._storage.delete(f"{directory}/{MANIFEST_NAME}", durable=True)
        stock_record = _read(self._storage, f"{directory}/{STOCK_RECORD_NAME}")
        if stock_record is not None and record.attempt and record.attempt.encode() in stock_record:
            self._storage.delete(f"{directory}/{STOCK_RECORD_NAME}")
        self._delete_files(files)
        self._storage.delete_empty_directory(directory)
        self._pins.discard(claim.file)
        return files

    def _delete_files(self, names: Iterable[str]) -> None:
        if self._storage.is_local:
            for name in names:
                self._storage.delete(name)
            return
        with ThreadPoolExecutor(_DELETES_IN_FLIGHT, thread_name_prefix="ray_ckpt-delete") as pool:
            for future in [pool.submit(self._storage.delete, name) for name in names]:
                future.result()

    def _report(
        self, removed: Sequence[int], kept: Iterable[int], files: Mapping[str, int], *, dry_run: bool
    ) -> RemovalReport:
        return RemovalReport(
            self.address, tuple(removed), tuple(kept), tuple(files), sum(files.values()), dry_run=dry_run
        )

    def _not_found(self, step: int | None) -> CheckpointNotFoundError:
        latest = self.latest()
        if latest is None:
            return CheckpointNotFoundError(f"no committed step in {self.address}")
        return CheckpointNotFoundError(
            f"step {step} is not committed in {self.address}, or has been deleted; the latest one is {latest}"
        )


def _directory(step: int) -> str:
    """The name of a step's directory."""
    try:
        number = -1 if isinstance(step, bool) else operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise UsageError(f"{step!r} is not a step: it is a number from 0")
    return f"step-{number}"


def _parse_steps(directories: Iterable[str]) -> list[int]:
    return [int(match[1]) for match in map(_STEP.fullmatch, directories) if match]


def _read(storage: Storage, name: str) -> bytes | None:
    """A file's bytes; None when there is none."""
    try:
        return storage.read_bytes(name)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def _is_old(times: Iterable[float | None], horizon: float) -> bool:
    """Whether the youngest of these was written before the horizon. One whose time is not known never was, unless the
    horizon is infinite."""
    return all(horizon == float("inf") or (modified_s is not None and modified_s < horizon) for modified_s in times)
