"""What readers hold: a step stays whole until they are done, whatever becomes of its names meanwhile.

begin ──> the files below a directory as they are now: all that the hold sees, and nothing that was removed before
a file loses its name, by a delete or to another file ──> `keep`: its bytes stay while a hold has them
end, or no renewal ──> what nobody holds any more is to be freed

For the index, which locks.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from ray_ckpt.cluster.ram.keeper import Place
from ray_ckpt.cluster.ram.records import Found
from ray_ckpt.text_units import format_bytes

LEASE_S = 30.0
"""A hold that has not been renewed for so long is over: its reader has been killed, or lost with its node."""

RENEW_S = 5.0


@dataclass
class File:
    """A file in the memory of nodes."""

    path: str
    key: str
    version: int
    num_bytes: int
    modified_s: float
    copies: dict[str, Place]

    @property
    def found(self) -> Found:
        """As a process of the cluster sees it."""
        return Found(self.key, self.num_bytes, self.modified_s, dict(self.copies))


@dataclass
class _Hold:
    files: Mapping[str, File]
    until: float
    """The end of its lease, by `time.monotonic`."""


class Holds:
    """The holds of one store, and what has lost its name and is held.

    Args:
        lease_s: how long a hold lasts without a renewal.
    """

    def __init__(self, lease_s: float = LEASE_S) -> None:
        self._lease_s = lease_s
        self._holds: dict[str, _Hold] = {}
        self._kept: dict[str, File] = {}

    def begin(self, files: Mapping[str, File]) -> str:
        """Hold files, by path. Returns the id of the hold."""
        hold = uuid.uuid4().hex
        self._holds[hold] = _Hold(files, time.monotonic() + self._lease_s)
        return hold

    def renew(self, hold: str) -> None:
        """Let a hold last; one that is over stays so."""
        if hold in self._holds:
            self._holds[hold].until = time.monotonic() + self._lease_s

    def end(self, hold: str) -> list[File]:
        """End a hold. Returns what has no name and is held by nobody any more."""
        self._holds.pop(hold, None)
        freed = [file for key, file in self._kept.items() if not self._is_held(key)]
        for file in freed:
            del self._kept[file.key]
        return freed

    def overdue(self) -> list[str]:
        """The holds that have not been renewed."""
        return [hold for hold, held in self._holds.items() if held.until < time.monotonic()]

    def files(self, hold: str) -> Mapping[str, File] | None:
        """What a hold sees; None where it is over, or is none."""
        return self._holds[hold].files if hold in self._holds else None

    def keep(self, file: File) -> bool:
        """Keep a file that has lost its name, if somebody holds it. Returns whether."""
        if self._is_held(file.key):
            self._kept[file.key] = file
        return file.key in self._kept

    def kept_bytes(self, node: str) -> int:
        """Bytes on a node of files without names."""
        return sum(file.num_bytes for file in self._kept.values() if node in file.copies)

    def told(self, node: str) -> str:
        """The same for a message; empty where there are none."""
        kept = self.kept_bytes(node)
        return f" ({format_bytes(kept)} of that is of removed steps that are still being read)" if kept else ""

    @property
    def directories(self) -> set[str]:
        """Where held files are or were: nothing is gained by removing them now."""
        return {path.rpartition("/")[0] for held in self._holds.values() for path in held.files}

    def lost(self, node: str) -> None:
        """Forget the copies of a node."""
        for file in self._kept.values():
            file.copies.pop(node, None)

    def _is_held(self, key: str) -> bool:
        return any(file.key == key for held in self._holds.values() for file in held.files.values())
