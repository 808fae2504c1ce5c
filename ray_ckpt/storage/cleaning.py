"""Cleaning up a store after interrupted deletes, overwrites and saves, and pins of steps that are gone.

run ─┬─ deletes that have begun        finished, unless the step is the highest good one by now
     ├─ files that no manifest names   removed when their attempt is old; before that `.metadata` is restored where an
     │                                 interrupted overwrite has left one that names them
     ├─ empty directories of steps     removed
     └─ unfinished uploads, on S3      aborted when they are old

A checkpoint that lies in the store's own directory, rather than in one of a step, is cleaned up after as well.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping

from ray_ckpt.errors import CheckpointError, StorageError
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.storage.files import Scanned, Storage
from ray_ckpt.storage.pins import Pins, Wishes
from ray_ckpt.storage.publish import DATA_FILE, STOCK_RECORD_NAME, is_ours, restore_stock_record
from ray_ckpt.storage.record_files import read_if_there
from ray_ckpt.storage.removal import Removal
from ray_ckpt.storage.step_names import directory_of, name_in, parse_steps
from ray_ckpt.storage.steps import Look, Steps, look_at
from ray_ckpt.storage.unfinished_uploads import UnfinishedUploads, Upload

__all__ = ["Cleaning", "probe_name"]

_logger = logging.getLogger("ray_ckpt")

_PROBE = re.compile(r"probe-[0-9a-f]{12}-[0-9]+(?:\.[0-9a-f]{12}\.tmp)?")
_TEMPORARY = re.compile(
    rf"(?:{re.escape(MANIFEST_NAME)}|{re.escape(STOCK_RECORD_NAME)}|__[0-9]+_[0-9]+-[0-9a-f]{{12}}\.distcp)"
    rf"\.[0-9a-f]{{12}}\.tmp|{_PROBE.pattern}"
)


def probe_name(token: str, rank: int) -> str:
    """The name of a file by which a job finds out who can write. One that a killed job leaves goes with the next clean.

    Args:
        token: 12 hexadecimal digits.
    """
    return f"probe-{token}-{rank}"


class Cleaning:
    """One clean-up of a store."""

    def __init__(self, storage: Storage, steps: Steps, pins: Pins, removal: Removal, *, dry_run: bool) -> None:
        self._storage = storage
        self._steps = steps
        self._pins = pins
        self._removal = removal
        self._dry_run = dry_run
        self.removed: list[int] = []
        """Steps whose delete was finished, ascending."""
        self.kept: list[int] = []
        """Steps that the listing shows as committed and that stay, ascending."""
        self.files: dict[str, int] = {}
        """Files that were removed, or would be: name in the store -> size in bytes."""
        self.uploads: tuple[str, ...] = ()
        """Names of files whose unfinished uploads were aborted, or would be."""

    def run(self, older_than_s: float) -> None:
        """Clean up. Attempts younger than `older_than_s` are left alone; 0 takes everything."""
        by_step: dict[str, dict[str, Scanned]] = {}
        for name, scanned in self._storage.scan().items():
            directory, slash, file = name.partition("/")
            by_step.setdefault(directory if slash else "", {})[file if slash else name] = scanned
        unfinished = UnfinishedUploads(self._storage)
        uploads = unfinished.find()
        horizon = self._horizon(older_than_s, by_step, uploads)
        self._finish_deletes(horizon)
        self._clean_files(None, by_step.get("", {}), horizon)
        for step in sorted(parse_steps(by_step)):
            self._clean_files(step, by_step[directory_of(step)], horizon)
        if not self._dry_run:
            for step in parse_steps(self._storage.list_directories()):
                self._storage.delete_empty_directory(directory_of(step))
        old = [upload for upload in uploads if _is_old([upload.begun_s], horizon)]
        self.uploads = tuple(dict.fromkeys(upload.name for upload in old))
        if not self._dry_run:
            unfinished.abort(old)
        committed = [step for step in parse_steps(by_step) if MANIFEST_NAME in by_step[directory_of(step)]]
        self.kept = sorted(set(committed) - set(self.removed))

    def _clean_files(self, step: int | None, found: Mapping[str, Scanned], horizon: float) -> None:
        old = _old_files(found, horizon)
        # Read after the listing, so that a save which was committed in between is seen.
        record = look_at(self._location(step)) if old else None
        orphans = self._orphans(step, found, old, record)
        if self._dry_run:
            self.files |= orphans
        elif self._restore_stock_record(
            step, found, needed=bool(orphans) or (record is not None and record.has_replaced)
        ):
            self.files |= orphans
            self._removal.remove_files(orphans)

    def _horizon(
        self, older_than_s: float, by_step: Mapping[str, Mapping[str, Scanned]], uploads: Iterable[Upload]
    ) -> float:
        """The time before which files count as old, in seconds since the epoch by the storage's clock.

        This host's clock may be wrong. Where the storage takes no file to tell its own, as when it is full, the
        youngest file tells a time that has passed there.
        """
        times = [
            file.modified_s for files in by_step.values() for file in files.values() if file.modified_s is not None
        ]
        times += [upload.begun_s for upload in uploads]
        if not older_than_s:
            return float("inf")
        if not times:
            return float("-inf")  # nothing whose age is known
        now = self._pins.now()
        return (max(times) if now is None else now) - older_than_s

    def _restore_stock_record(self, step: int | None, found: Mapping[str, Scanned], *, needed: bool) -> bool:
        """Restore the `.metadata` of the manifest before the files are removed that one of an interrupted overwrite
        names. Returns whether they may be removed.

        Args:
            needed: whether one that is there may be such a one.
        """
        if MANIFEST_NAME not in found or (STOCK_RECORD_NAME in found and not needed):
            return True
        if not self._removal.is_possible(step):
            return True
        try:
            if restore_stock_record(self._location(step)):
                _logger.info("restored %s/%s", self._location(step).address, STOCK_RECORD_NAME)
        except StorageError as error:
            _logger.warning(
                "%s keeps the files of an interrupted save, since stock DCP reads them: %s",
                self._location(step).address,
                error,
            )
            return False
        return True

    def _finish_deletes(self, horizon: float) -> None:
        """Deletes that stopped half-way, pins of steps that are gone, and what is left of half-written ones."""
        wishes = self._pins.list()
        finished = set[int]()
        for claim in wishes.claims:
            if not _is_old([claim.modified_s], horizon):
                continue
            found = self._steps.look(claim.step)
            if found is not None and found.attempt == claim.attempt and self._may_finish(claim.step):
                files = self._removal.files(claim.step, found)
                if self._dry_run or self._removal.remove(claim.step, found) is not None:
                    finished.add(claim.step)
                    self.files |= files
            if not self._dry_run:
                self._pins.discard(claim.file)
        self.removed = sorted(finished)
        if not self._dry_run:
            self._discard_wishes(wishes, horizon)

    def _discard_wishes(self, wishes: Wishes, horizon: float) -> None:
        for name, modified_s in wishes.temporaries.items():
            if _is_old([modified_s], horizon):
                self._pins.discard(name)
        for step, modified_s in wishes.pins.items():
            if _is_old([modified_s], horizon) and not self._steps.is_committed(step):
                self._pins.unpin(step)

    def _may_finish(self, step: int) -> bool:
        """Whether a delete that was cut off before it took the record may still go on. The steps that were above it at
        the time may be gone or damaged by now, and the highest good step is nothing to be removed by the way."""
        return step != self._steps.highest_good() and self._removal.is_possible(step)

    def _orphans(
        self, step: int | None, found: Mapping[str, Scanned], old: set[str], record: Look | None
    ) -> dict[str, int]:
        """What an attempt left and no manifest names, in a step's directory or the store's own (None): name in the
        store -> bytes.

        Args:
            old: names of files of attempts that have ended.
            record: what the step's manifest says; None when there is none.
        """
        if not old:
            return {}
        if record is not None and record.damage:
            return {}  # nobody knows whose files these are
        if record is not None or not self._is_our_stock_record(step, old):
            old.discard(STOCK_RECORD_NAME)
        named = set() if record is None else set(record.files)
        orphans = {name_in(step, file): found[file].num_bytes for file in sorted(old - named)}
        return {name: size for name, size in orphans.items() if self._storage.may_delete(name)}

    def _location(self, step: int | None) -> Storage:
        return self._storage if step is None else self._steps.location(step)

    def _is_our_stock_record(self, step: int | None, candidates: set[str]) -> bool:
        if STOCK_RECORD_NAME not in candidates:
            return False
        try:
            data = read_if_there(self._location(step), STOCK_RECORD_NAME)
        except CheckpointError:
            return False  # no file, or none that a save writes
        return data is not None and is_ours(data)


def _old_files(found: Mapping[str, Scanned], horizon: float) -> set[str]:
    """Files of attempts that have written nothing since the horizon: an attempt is as old as its youngest file."""
    attempts: dict[str, list[str]] = {}
    for file in found:
        if match := DATA_FILE.fullmatch(file):
            attempts.setdefault(match[1], []).append(file)
        elif _TEMPORARY.fullmatch(file):
            attempts[file] = [file]
    if STOCK_RECORD_NAME in found and MANIFEST_NAME not in found:
        # It may be of any of the attempts, so it goes when the youngest does.
        attempts[STOCK_RECORD_NAME] = [STOCK_RECORD_NAME, *(file for files in attempts.values() for file in files)]
    old = [files for files in attempts.values() if _is_old([found[file].modified_s for file in files], horizon)]
    return {file for files in old for file in files}


def _is_old(times: Iterable[float | None], horizon: float) -> bool:
    """Whether the youngest of these was written before the horizon. One whose time is not known never was, unless the
    horizon is infinite."""
    return all(horizon == float("inf") or (modified_s is not None and modified_s < horizon) for modified_s in times)
