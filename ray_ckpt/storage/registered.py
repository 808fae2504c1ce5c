"""Schemes whose files neither pyarrow nor fsspec keeps: their home registers them by name, and Storage opens them.

    REGISTERED[scheme] = "module:function"     a function of an Address that gives Files, imported at the first use
    RegisteredFileSystem(files)                what Storage calls of a pyarrow file system, on these

A file appears whole when its writer closes it, and there are no directories, as on an object store.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pyarrow.fs as pafs

from ray_ckpt.report import CopyReport
from ray_ckpt.storage.address import Address
from ray_ckpt.storage.cuts import Cut

if TYPE_CHECKING:
    from ray_ckpt.storage.files import Storage

REGISTERED: dict[str, str] = {"ram": "ray_ckpt.cluster.ram.client:open_files"}
"""Scheme -> the function that opens it, as text: this floor knows nothing of those above."""


HOLD = "hold"
"""The option of a URI that names a hold: then only what it holds is seen."""


class Found(NamedTuple):
    """A file as it is found."""

    num_bytes: int
    modified_s: float
    """When it was written, in seconds since the epoch."""


class ReadableFile(Protocol):
    """An open file for ranged reads, by one thread at a time."""

    num_bytes: int
    makes_cuts: bool
    """Whether whoever keeps the file is elsewhere, and can compare blocks with their checksums."""

    def seek(self, offset: int, /) -> object: ...
    def readinto(self, memory: memoryview, /) -> int: ...
    def read_cuts(self, cuts: Sequence[Cut], memory: memoryview, /) -> bool:
        """Fill memory with cuts, one after the other. Returns whether: if not, the blocks have to be read."""
        ...

    def close(self) -> None: ...


class WritableFile(Protocol):
    """A file being written. It appears when it is closed."""

    def write(self, data: bytes | bytearray | memoryview, /) -> object: ...
    def close(self) -> None: ...


class CopyOrder(NamedTuple):
    """Committed steps of a store that are to be copied to another store, in the background."""

    source: str
    """Path of the store in its file system."""
    target: Storage
    """The other store."""
    every: int
    """Steps that are multiples of this are to be copied, once each."""
    step: int
    """This one is to be copied anew, whatever its number."""
    overwrite: bool
    """Whether `step` may replace another attempt's checkpoint."""


class Files(Protocol):
    """Who keeps the files of a scheme. Paths are relative, with `/` between their parts."""

    def look(self, paths: Sequence[str]) -> Sequence[Found | None]: ...
    def list(self, directory: str) -> Iterable[tuple[str, Found]]:
        """All files below a directory, at any depth, by path."""
        ...

    def open(self, path: str) -> ReadableFile:
        """Open a file; one that is not there is a `FileNotFoundError`."""
        ...

    def open_copies(self, path: str) -> Iterable[tuple[str, ReadableFile]]:
        """Every copy of a file that there is, opened by itself, with the place where it is."""
        ...

    def create(self, path: str, num_bytes: int) -> WritableFile:
        """Start a file that will have about this many bytes. An error where there is no room for them."""
        ...

    def delete(self, path: str) -> None: ...

    def hold(self, directory: str) -> str:
        """Keep the files below a directory as they are now until `release`, for whoever opens them with this `HOLD`.

        What loses its name before the call is not in it. It ends with this process, too. Empty: there are no files.
        """
        ...

    def release(self, hold: str) -> None:
        """End a hold."""
        ...

    def copy_out(self, order: CopyOrder) -> CopyReport:
        """Take an order; whoever keeps the files carries it out, after a failure again and again."""
        ...

    def copying(self, store: str) -> CopyReport:
        """What has not been copied yet of a store in this file system."""
        ...


def open_registered(address: Address) -> tuple[RegisteredFileSystem, str]:
    """The file system of a registered scheme, and the path of the address in it."""
    module, _, function = REGISTERED[address.scheme].partition(":")
    opened: Callable[[Address], Files] = getattr(importlib.import_module(module), function)
    return RegisteredFileSystem(address.scheme, opened(address)), address.path.strip("/")


class RegisteredFileSystem:
    """The methods of `pyarrow.fs.FileSystem` that Storage calls. Errors are `OSError`s."""

    def __init__(self, scheme: str, files: Files) -> None:
        self.type_name = scheme
        self._files = files

    def get_file_info(self, asked: str | Sequence[str] | pafs.FileSelector) -> Any:
        """As pyarrow's: of a path, of several, or of everything below a directory."""
        if isinstance(asked, str):
            return self.get_file_info([asked])[0]
        if isinstance(asked, pafs.FileSelector):
            return self._entries(asked.base_dir.strip("/"), recursive=asked.recursive)
        paths = [path.strip("/") for path in asked]
        return [
            pafs.FileInfo(path, pafs.FileType.NotFound) if found is None else _info(path, found)
            for path, found in zip(paths, self._files.look(paths), strict=True)
        ]

    def _entries(self, directory: str, *, recursive: bool) -> list[pafs.FileInfo]:
        prefix = f"{directory}/" if directory else ""
        infos, directories = [], set()
        for path, found in self._files.list(directory):
            inner, deeper, _ = path.removeprefix(prefix).partition("/")
            if deeper and not recursive:
                directories.add(prefix + inner)
            else:
                infos.append(_info(path, found))
        return infos + [pafs.FileInfo(path, pafs.FileType.Directory) for path in sorted(directories)]

    def open_input_file(self, path: str) -> _Input:
        """Open a file for ranged reads."""
        return _Input(self._files.open(path.strip("/")))

    def open_copies(self, path: str) -> Iterable[tuple[str, _Input]]:
        """Every copy of a file, opened by itself, with the place where it is."""
        return ((place, _Input(file)) for place, file in self._files.open_copies(path.strip("/")))

    def create(self, path: str, num_bytes: int) -> WritableFile:
        """Start a file; it appears when it is closed."""
        return self._files.create(path.strip("/"), num_bytes)

    def delete_file(self, path: str) -> None:
        """Remove a file; one that is not there is an error."""
        self._files.delete(path.strip("/"))

    def hold(self, directory: str) -> str:
        """Keep the files below a directory for a reader."""
        return self._files.hold(directory.strip("/"))

    def release(self, hold: str) -> None:
        """End a hold."""
        self._files.release(hold)

    def copy_out(self, order: CopyOrder) -> CopyReport:
        """Have steps copied to another store in the background."""
        return self._files.copy_out(order)

    def copying(self, store: str) -> CopyReport:
        """What has not been copied yet."""
        return self._files.copying(store)


def _info(path: str, found: Found) -> pafs.FileInfo:
    return pafs.FileInfo(path, pafs.FileType.File, mtime=found.modified_s, size=found.num_bytes)


class _Input:
    """An open file that can also be read whole."""

    def __init__(self, file: ReadableFile) -> None:
        self._file = file
        self.seek, self.readinto, self.read_cuts = file.seek, file.readinto, file.read_cuts
        self.makes_cuts = file.makes_cuts

    def size(self) -> int:
        return self._file.num_bytes

    def read(self) -> bytearray:
        memory = bytearray(self._file.num_bytes)
        self._file.seek(0)
        num_read = self._file.readinto(memoryview(memory))
        return memory[:num_read]

    def __enter__(self) -> _Input:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
