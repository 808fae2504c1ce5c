"""Files of a Storage while they are read or written.

Storage.open_input ──> InputFile      ranged reads, straight into memory
Storage.create ──> OutputFile         durable once closed
Storage.prepare ──> PreparedFile      small, written, and still without its name
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

import pyarrow as pa

from ray_ckpt.errors import FormatError, StorageError
from ray_ckpt.storage.cuts import Cut
from ray_ckpt.storage.local_files import sync_file
from ray_ckpt.storage.registered import WritableFile

if TYPE_CHECKING:
    from ray_ckpt.storage.files import Storage

__all__ = ["InputFile", "OutputFile", "PreparedFile"]

_PIECE_BYTES = 4 << 20

_COMPARED_BYTES = 4096
"""Number of first bytes by which a file that was just published is recognized: they hold a record's attempt."""


class InputFile:
    """An open file, for ranged reads.

    Args:
        for_threads: whether several threads may read it at the same time. It takes a copy of what is read.
    """

    def __init__(self, storage: Storage, name: str, native: pa.NativeFile, *, for_threads: bool = False) -> None:
        self.name = name
        self._storage = storage
        self._native = native
        self._for_threads = for_threads
        self.makes_cuts: bool = getattr(native, "makes_cuts", False)
        """Whether whoever keeps the file can cut out of blocks what is wanted of them (cuts.py)."""

    def read_cuts(self, cuts: Sequence[Cut], memory: memoryview) -> bool:
        """Fill `memory` with cuts, one after the other. Returns whether: if not, the blocks have to be read."""
        return bool(self._storage.perform("read", self.name, lambda: self._native.read_cuts(cuts, memory)))

    def read_into(self, offset: int, memory: memoryview) -> None:
        """Fill `memory` with the bytes `[offset, offset + len(memory))`.

        Raises:
            FormatError: the file ends before that. A short read is an error, never "the remainder".
        """

        def read() -> int:
            if self._for_threads:
                data = self._native.read_at(len(memory), offset)
                memory[: len(data)] = data
                return len(data)
            self._native.seek(offset)
            return int(self._native.readinto(memory))

        num_read = self._storage.retried(lambda: self._storage.perform("read", self.name, read))
        if num_read != len(memory):
            raise FormatError(
                f"{self.name} is too short: wanted bytes [{offset}, {offset + len(memory)}), "
                f"it ends at {offset + num_read}; the file is truncated or the metadata that points into it is damaged"
            )

    def pieces(self, num_bytes: int) -> Iterator[memoryview]:
        """The first bytes in pieces of some MiB, each of which is valid until the next one is asked for.

        Raises:
            FormatError: the file has less.
        """
        memory = memoryview(bytearray(min(_PIECE_BYTES, num_bytes)))
        for start in range(0, num_bytes, _PIECE_BYTES):
            piece = memory[: num_bytes - start]
            self.read_into(start, piece)
            yield piece


class PreparedFile:
    """A small file that is written, but does not have its name yet."""

    def __init__(self, storage: Storage, name: str, data: bytes, temporary: str | None) -> None:
        self.name = name
        self._storage = storage
        self._data = data
        self._temporary = temporary

    def write(self) -> None:
        """Write all of it, and see that it has arrived before anything is replaced by it.

        Raises:
            StorageError: it cannot be written, or reads back as something else.
        """
        try:
            self._storage.retried(lambda: self._write_as(self._temporary or self.name))
            if self._temporary is not None and self._read_back(self._temporary) != self._data:
                self._fail("write", OSError(errno.EIO, "it reads back as something else"))
        except StorageError:
            self.abandon()
            raise

    def publish(self, *, replace: bool = True) -> None:
        """Give it its name, durably.

        Args:
            replace: whether another file may have the name by now. Local file systems tell for certain. Elsewhere it is
                looked for before, and read back afterwards: of two writers within the time between, one may not notice.

        Raises:
            StorageError: it failed, or another file has the name: then `FileExistsError` is its cause.
        """
        if not replace and not self._storage.has_local_files and self._storage.exists(self.name):
            self._fail("create", FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)))
        if self._temporary is None:
            self.write()
        else:
            self._rename(self._temporary, replace=replace)
        if not replace and not self._storage.has_local_files and not self._is_there():
            # Only what is seen to be another's says that ours is not there: its data files may then be removed.
            absent = self._storage.size(self.name) is None
            code = errno.ENOENT if absent else errno.EEXIST
            self._fail("find" if absent else "create", OSError(code, os.strerror(code)))

    def abandon(self) -> None:
        """Leave no temporary file behind, as far as the storage lets us: a clean-up finds what it does not."""
        if self._temporary is not None:
            with contextlib.suppress(StorageError):
                self._storage.delete(self._temporary)

    def _write_as(self, name: str) -> None:
        file = self._storage.create(name)
        file.write(self._data)
        file.close(with_name=self._temporary is None)  # a temporary name need not last

    def _read_back(self, name: str) -> bytes:
        """Without the checks of `Storage.read_bytes`, as nobody else has written this."""

        def read() -> bytes:
            with self._storage.filesystem.open_input_file(self._storage.path(name)) as file:
                return bytes(file.read())

        return self._storage.retried(lambda: self._storage.perform("read", name, read))

    def _rename(self, temporary: str, *, replace: bool) -> None:
        try:
            self._storage.rename(temporary, self.name, replace=replace)
        except StorageError as error:
            # A network file system may lose the answer to a rename that it has carried out, and then finds it done.
            done = isinstance(error.__cause__, (FileExistsError, FileNotFoundError)) and self._is_there()
            self.abandon()
            if not done:
                raise

    def _is_there(self) -> bool:
        """Whether the file of that name is this one, by its size and its first bytes."""
        if self._storage.size(self.name) != len(self._data):
            return False
        memory = bytearray(min(len(self._data), _COMPARED_BYTES))
        with self._storage.open_input(self.name) as file:
            file.read_into(0, memoryview(memory))
        return self._data.startswith(memory)

    def _fail(self, operation: str, error: OSError) -> NoReturn:
        raise StorageError(operation, f"{self._storage.address}/{self.name}", str(error)) from error


class OutputFile:
    """A file being written. Leaving its `with` block by an error abandons it."""

    def __init__(self, storage: Storage, name: str, native: pa.NativeFile | WritableFile) -> None:
        self.name = name
        self._storage = storage
        self._native = native

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append. The memory may be reused as soon as the call returns."""
        if not len(data):
            return  # that of an empty tensor is nowhere, and pyarrow ends the process
        self._storage.perform("write", self.name, lambda: self._native.write(data))

    def close(self, *, with_name: bool = True) -> None:
        """Finish the file and make it durable: fsync of the file and of its directory where there are such things.

        Args:
            with_name: False leaves out the directory.
        """
        self._storage.perform("finish", self.name, self._native.close)
        if self._storage.has_local_files:
            self._storage.perform(
                "sync", self.name, lambda: sync_file(self._storage.path(self.name), with_name=with_name)
            )

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.close()
        elif hasattr(self._native, "abandon"):  # pyarrow's have none: what is written of theirs stays as an orphan
            self._storage.perform("abandon", self.name, self._native.abandon)
