"""Removing a step of a store: the commit record first, durably, then what belongs to it.

remove ──> claim the step ──> manifest.json, durably ──> .metadata, model.sig ──> data files ──> give the claim back

Only plain files with names of ours are ever removed, in the step's own directory and through no link.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor

from ray_ckpt.errors import CheckpointError
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.pins import Pins
from ray_ckpt.storage.publish import SIGNATURE_NAME, STOCK_RECORD_NAME, names_attempt
from ray_ckpt.storage.record_files import read_if_there
from ray_ckpt.storage.step_names import directory_of, name_in
from ray_ckpt.storage.steps import Look

__all__ = ["REQUESTS_IN_FLIGHT", "Removal"]

REQUESTS_IN_FLIGHT = 8
"""Number of deletes, or of looks at steps, at the same time on a network; each waits for about three requests."""


class Removal:
    """Removes steps of a store, and files of them."""

    def __init__(self, storage: Storage, pins: Pins) -> None:
        self._storage = storage
        self._pins = pins

    def is_possible(self, step: int | None) -> bool:
        """Whether the step's own directory holds its record, rather than one that a link leads to."""
        return self._storage.may_delete(name_in(step, MANIFEST_NAME))

    def led_to(self, steps: Collection[int], linked: Collection[int]) -> set[int]:
        """Those of the steps that linked ones, for which removal is not possible, lead to."""
        homes = {self._home(step) for step in linked}
        return {step for step in steps if homes and self._home(step) in homes}

    def _home(self, step: int) -> str:
        return os.path.dirname(os.path.realpath(self._storage.path(name_in(step, MANIFEST_NAME))))

    def files(self, step: int, found: Look) -> dict[str, int]:
        """The data files of a step that `remove` removes: name in the store -> bytes."""
        named = {f"{directory_of(step)}/{name}": size for name, size in found.files.items()}
        return {name: size for name, size in named.items() if self._storage.may_delete(name)}

    def remove(self, step: int, found: Look) -> dict[str, int] | None:
        """Remove a step, and return its data files; None when it is pinned. A damaged record goes alone.

        Only what this record names is removed: a save that overwrites the step at the same time keeps its files.
        """
        directory, files = directory_of(step), self.files(step, found)
        with self._pins.deleting(step, found.attempt) as is_free:
            if not is_free:
                return None
            self._storage.delete(f"{directory}/{MANIFEST_NAME}", durable=True)
            if self._has_stock_record(directory, found.attempt):
                self._storage.delete(f"{directory}/{STOCK_RECORD_NAME}")
            self._storage.delete(f"{directory}/{SIGNATURE_NAME}")
            self.remove_files(files)
            self._storage.delete_empty_directory(directory)
        return files

    def _has_stock_record(self, directory: str, attempt: str) -> bool:
        try:
            data = read_if_there(self._storage, f"{directory}/{STOCK_RECORD_NAME}")
        except CheckpointError:
            return False  # no file, or none that a save writes
        return data is not None and names_attempt(data, attempt)

    def remove_files(self, names: Iterable[str]) -> None:
        """Remove files by their names in the store."""
        if self._storage.is_local:
            for name in names:
                self._storage.delete(name)
            return
        with ThreadPoolExecutor(REQUESTS_IN_FLIGHT, thread_name_prefix="ray_ckpt-delete") as pool:
            for future in [pool.submit(self._storage.delete, name) for name in names]:
                future.result()
