"""What an attempt that was cut off has left, so that the next one goes on from it.

    NAME.ray_ckpt-export.json    what is being made of what, and the files that are finished, with a digest of each

It is there from the first byte to the last check. Without it a target that holds anything is somebody's, and refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from ray_ckpt.conversion.jobs import FileJob, Written
from ray_ckpt.conversion.writing import digest_of_file
from ray_ckpt.errors import CheckpointError, CheckpointExistsError, FormatError, StorageError
from ray_ckpt.format.foreign_json import parse_object
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.record_files import read_if_there

__all__ = ["SUFFIX", "Remainder"]

SUFFIX = "ray_ckpt-export.json"

_UNFINISHED = re.compile(r"(.+)\.[0-9a-f]{12}\.(?:part|tmp)")
"""Name of a file that was being written: its own, an attempt, and the suffix of `writing.py` or of `Storage`."""


class Remainder:
    """Args:
    target: the directory that is written to.
    name: of the record in it.
    files: names of the files that are to be written.
    identity: digest of the source and of everything that was asked for.
    what: the same in words.
    """

    def __init__(self, target: Storage, name: str, files: Collection[str], identity: str, what: str) -> None:
        self._target = target
        self._name = name
        self._files = {*files, name}
        self._identity = identity
        self._what = what
        self._finished: dict[str, Written] = {}
        self.is_resumed = False

    def open(self, taken: Collection[str]) -> None:
        """Begin, or go on.

        Args:
            taken: names of files that are in the way if this is a beginning.

        Raises:
            CheckpointExistsError: they are, or the target holds the remainder of something else.
        """
        found = self._read()
        if found is None:
            if in_the_way := sorted(taken):
                raise CheckpointExistsError(
                    f"{self._target.address} holds {in_the_way[0]} already; give another place, or remove it first"
                )
            self._write()
        elif found.get("identity") != self._identity:
            raise CheckpointExistsError(
                f"{self._target.address} holds what was left of another attempt ({found.get('what')}); its source or "
                "options were others than now: repeat that one to finish it, or remove the target"
            )
        else:
            self.is_resumed = True
            self._finished = _finished(found)

    def kept(self, jobs: Collection[FileJob], final: Mapping[str, str]) -> dict[str, Written]:
        """The finished files that hold what was written to them.

        Args:
            final: name of a file -> the name that it has after the commit.
        """
        kept: dict[str, Written] = {}
        for job in jobs:
            written = self._finished.get(job.name)
            if written is None:
                continue
            places = (job.name, final[job.name]) if job.name in final else (job.name,)
            if any(digest_of_file(self._target, place, written.num_bytes) == written.digest for place in places):
                kept[job.name] = written
        self._finished = dict(kept)
        return kept

    def add(self, written: Written) -> None:
        """Note a file that is finished."""
        self._finished[written.name] = written
        self._write()

    def abandon(self) -> None:
        """After a failure: leave nothing, unless there is something to go on from."""
        if not self._finished and not self.is_resumed:
            with contextlib.suppress(StorageError):
                self.close()

    def close(self) -> None:
        """At the end: remove the record, and what attempts that were cut off had begun to write."""
        for name in self._target.list_files():
            match = _UNFINISHED.fullmatch(name)
            if match and match[1] in self._files:
                self._target.delete(name)
        self._target.delete(self._name, durable=True)

    def _read(self) -> Mapping[str, Any] | None:
        data = read_if_there(self._target, self._name)
        if data is None:
            return None
        try:
            return parse_object(data, self._name)
        except FormatError:
            return {}

    def _write(self) -> None:
        data = {
            "identity": self._identity,
            "what": self._what,
            "files": [dataclasses.asdict(written) for written in self._finished.values()],
        }
        self._target.write_atomic(self._name, json.dumps(data).encode())


def _finished(data: Mapping[str, Any]) -> dict[str, Written]:
    """Raises CheckpointError when it is something else."""
    try:
        return {entry["name"]: Written.from_json(entry) for entry in data["files"]}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the record of the attempt before is damaged: {error!r}; remove the target") from error
