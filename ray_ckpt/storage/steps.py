"""The steps of a store: which are committed, and which of those are good.

Steps(storage) ─┬─ committed        by name alone: there is a manifest
                ├─ look ──> Look    its record is read, and its files have the recorded sizes
                └─ latest           the highest good one, from above, so that few are looked at
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray_ckpt.errors import CheckpointError, CheckpointNotFoundError, FormatError, StorageError
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.storage.delta_links import built_on
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.publish import DATA_FILE
from ray_ckpt.storage.record_files import parse_and_keep, read_record
from ray_ckpt.storage.step_names import directory_of, parse_steps

__all__ = ["Look", "Steps", "look_at"]

_logger = logging.getLogger("ray_ckpt")


@dataclass(frozen=True)
class Look:
    """What the commit record of a step says of its files, and whether they are there."""

    attempt: str
    """Id of the attempt that committed; empty when the record cannot be read."""
    files: Mapping[str, int]
    """Data files of ours that the record names: name -> bytes. Empty when the record cannot be read."""
    damage: str
    """Path and reason, when the step cannot be loaded; else empty."""
    has_replaced: bool = False
    """Whether another checkpoint was there, whose `.metadata` an interrupted overwrite may have left."""
    built_on: tuple[int, ...] = ()
    """Steps of the store without which it cannot be loaded, as it is a delta."""


def look_at(directory: Storage) -> Look | None:
    """Read a checkpoint's record, and compare the sizes of its files. No data file is read.

    Returns:
        None when none is committed there.
    """
    try:
        manifest = read_record(directory, parse_and_keep)
    except (CheckpointError, StorageError) as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        if isinstance(error, StorageError) and error.transient:
            raise
        return Look("", {}, str(error))
    ours = {name: size for name, size in manifest.files.items() if DATA_FILE.fullmatch(name)}
    damage = _compare(directory, manifest.files)
    if damage and not directory.exists(MANIFEST_NAME):
        return None  # it was deleted meanwhile
    has_replaced = manifest.replaced_metadata is not None
    before, broken = ((), "") if damage else built_on(directory, manifest)
    return Look(manifest.attempt, ours, damage or broken, has_replaced, before)


class Steps:
    """The steps below a directory or prefix."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def location(self, step: int) -> Storage:
        """The storage of a step's directory, whether a checkpoint is there or not."""
        return self._storage.child(directory_of(step))

    def holding(self, step: int) -> Storage:
        """The storage that a committed step is read from."""
        return self.location(step)

    def committed(self) -> tuple[int, ...]:
        """Those with a manifest, ascending."""
        return tuple(sorted(parse_steps(self._storage.directories_with(MANIFEST_NAME))))

    def is_committed(self, step: int) -> bool:
        return self._storage.exists(f"{directory_of(step)}/{MANIFEST_NAME}")

    def has_from(self, step: int) -> bool:
        """Whether this step or a higher one is committed: one listing, and a look at each of those."""
        return any(other >= step and self.is_committed(other) for other in self._descending())

    def look(self, step: int) -> Look | None:
        """What the record of a step says. None when the step is not committed."""
        return look_at(self.location(step))

    def damage(self, step: int) -> str | None:
        """Empty when the step is good, None when it is not committed."""
        found = self.look(step)
        return None if found is None else found.damage

    def highest_good(self, damages: dict[int, str] | None = None) -> int | None:
        """The highest step that is good.

        Args:
            damages: takes the damaged ones above it, with path and reason.
        """
        for step in self._descending():
            damage = self.damage(step)
            if damage == "":
                return step
            if damage is not None and damages is not None:
                damages[step] = damage
        return None

    def latest(self, *, fallback: bool) -> int | None:
        """As `CheckpointStore.latest`."""
        damages: dict[int, str] = {}
        step = self.highest_good(damages)
        if damages and (step is None or not fallback):
            highest = max(damages)
            advice = "no other is good" if step is None else f"step {step} is good: fallback=True takes it"
            raise FormatError(f"step {highest} of {self._storage.address} is damaged: {damages[highest]}; {advice}")
        for damaged, reason in damages.items():
            _logger.warning("step %d of %s is damaged and left out: %s", damaged, self._storage.address, reason)
        return step

    def not_found(self, step: int | None) -> CheckpointNotFoundError:
        """What to raise about a step that is not committed."""
        highest = next((other for other in self._descending() if self.is_committed(other)), None)
        if highest is None:
            asked = "" if step is None else f"; step {step} was asked for"
            return CheckpointNotFoundError(f"no committed step in {self._storage.address}{asked}")
        return CheckpointNotFoundError(
            f"step {step} is not committed in {self._storage.address}, or has been deleted; the latest one is {highest}"
        )

    def _descending(self) -> Sequence[int]:
        """Numbers of all directories that are named like steps: one listing of the store's directory."""
        return sorted(parse_steps(self._storage.list_directories()), reverse=True)


def _compare(directory: Storage, recorded: Mapping[str, int]) -> str:
    found = directory.sizes(recorded)
    for name, size in recorded.items():
        if name not in found:
            return f"{directory.address}/{name}: is missing"
        if found[name] != size:
            return f"{directory.address}/{name}: has {found[name]} bytes, and was saved with {size}"
        try:
            directory.check_readable(name)
        except CheckpointError as error:  # its bytes are there, but no load reads them
            return str(error)
    return ""
