"""`far://`: files of a local directory, of which only a keeper's sender knows the bytes, as of a node's memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_ckpt.cluster.ram.client import RamInput
from ray_ckpt.cluster.ram.keeper import Place
from ray_ckpt.cluster.ram.records import Found
from ray_ckpt.cluster.ram.sending import Door, Sender
from ray_ckpt.storage import registered
from ray_ckpt.storage.address import Address
from ray_ckpt.storage.cuts import Cut

COPIES: dict[str, Mapping[str, Path]] = {}
"""Name of a store -> the directories that its copies are in, by the names of nodes."""

MOVED: list[int] = []
"""Bytes that each read was sent."""


class _Counted(RamInput):
    def readinto(self, memory: memoryview, /) -> int:
        MOVED.append(super().readinto(memory))
        return MOVED[-1]

    def read_cuts(self, cuts: Sequence[Cut], memory: memoryview, /) -> bool:
        is_done = super().read_cuts(cuts, memory)
        MOVED.append(len(memory) if is_done else 0)
        return is_done


class FarFiles:
    """What a reader calls of `ram://` files, none of which are on this node."""

    node = "here"

    def __init__(self, copies: Mapping[str, Path]) -> None:
        self._copies = copies
        self._doors = {node: sender_of(path) for node, path in copies.items()}

    def look(self, paths: Sequence[str]) -> Sequence[registered.Found | None]:
        found = [self._size(path) for path in paths]
        return [None if size is None else registered.Found(size, 0.0) for size in found]

    def list(self, directory: str) -> Iterable[tuple[str, registered.Found]]:
        for path in self._any.rglob("*"):
            if path.is_file():
                yield str(path.relative_to(self._any)), registered.Found(path.stat().st_size, 0.0)

    def open(self, path: str) -> RamInput:
        return self._opened(path, self._doors)

    def open_copies(self, path: str) -> Iterable[tuple[str, RamInput]]:
        for node, door in self._doors.items():
            yield f"node {node}", self._opened(path, {node: door})

    def hold(self, directory: str) -> str:
        return "held"

    def release(self, hold: str) -> None: ...

    def _opened(self, path: str, doors: Mapping[str, Door]) -> RamInput:
        size = self._size(path)
        if size is None:
            raise FileNotFoundError(path)
        files: Any = self
        return _Counted(files, path, Found(path, size, 0.0, {node: Place(0, 0, door) for node, door in doors.items()}))

    def _size(self, path: str) -> int | None:
        return (self._any / path).stat().st_size if (self._any / path).is_file() else None

    @property
    def _any(self) -> Path:
        """The last copy: tests damage the first."""
        return list(self._copies.values())[-1]


_senders: dict[Path, Sender] = {}


def sender_of(directory: Path) -> Door:
    """Where the bytes of a directory's files are sent from."""

    @contextlib.contextmanager
    def opened(key: str) -> Iterator[int]:
        descriptor = os.open(directory / key, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    return _senders.setdefault(directory, Sender("127.0.0.1", opened)).door


def open_files(address: Address) -> FarFiles:
    return FarFiles(COPIES[address.place])
