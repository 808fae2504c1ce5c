"""Where bytes lie: local paths, object stores and file servers behind one small class, on pyarrow's file systems.

    Storage(uri) ─┬─ read_bytes, open_input ── InputFile.read_into(offset, memory)
                  ├─ create ── OutputFile.write(buffer), .close()       durable once closed
                  ├─ write_atomic(name, data)                           all of it or nothing, durable once returned
                  └─ exists, list, scan, list_directories, directories_with, delete
    every one of them ── perform(operation, name, action)               errors become StorageError here, nowhere else
                  some of them ── retried(action)                       transient ones are tried again

The file system is built on first use inside the process that uses it, because pyarrow's file systems lose their retry
strategy when pickled and their threads when forked. A Storage pickles as its address.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from ray_ckpt.errors import RayCkptError, StorageError
from ray_ckpt.format import limits
from ray_ckpt.format.manifest import check_file_name
from ray_ckpt.storage.address import ARROW_SCHEMES, Address, parse
from ray_ckpt.storage.advice import advice_on
from ray_ckpt.storage.file_objects import InputFile, OutputFile, PreparedFile
from ray_ckpt.storage.filesystems import open_filesystem
from ray_ckpt.storage.good_reads import Reread
from ray_ckpt.storage.local_files import is_plain_file, lock_directory, make_directory, remove_plain_file, rename
from ray_ckpt.storage.redact import without_secrets
from ray_ckpt.storage.registered import HOLD, REGISTERED, RegisteredFileSystem, WritableFile
from ray_ckpt.storage.regular_files import check_readable
from ray_ckpt.storage.retry import RetryPolicy, is_transient, retried

__all__ = ["InputFile", "OutputFile", "RetryPolicy", "Storage"]

T = TypeVar("T")

_STORAGE_ERRORS = (OSError, pa.ArrowException, ValueError, ImportError, NotImplementedError)
_LOCK_TIMEOUT_S = 30.0
_LONGEST_CAUSE = 600
"""Characters of a library's message that are repeated."""

_OBJECT_STORES = frozenset({"s3", "gcs", "abfs", *REGISTERED})
"""`FileSystem.type_name` of those without directories, where an object appears whole when its writer closes it."""
_ASKED_FOR_SIZES = frozenset({"s3", "gcs", "abfs"})
"""`FileSystem.type_name` of those that pyarrow asks how long a file is when it is opened. Threads may share it then."""
_PUT_AT_ONCE = frozenset({"s3", "s3a", "gs", "gcs", "oss", *REGISTERED})
"""Schemes where nobody sees a file before it is whole. Anywhere else one is written under another name and renamed: on
Azure pyarrow puts an empty object there as it opens a stream, and adlfs deletes the one that is there."""


@dataclass(frozen=True)
class Scanned:
    """A file as a listing shows it."""

    num_bytes: int
    modified_s: float | None
    """When it was written last, in seconds since the epoch by the storage's clock; None where that is not kept."""


class Storage:
    """A directory, or a prefix of an object store, and the files below it.

    The verbs take a path or a URI as well; make a `Storage` to give a retry policy.

    Example:
        >>> from ray_ckpt import Storage, save
        >>> storage = Storage("run/step-1")  # or s3://bucket/run/step-1?region=eu-west-1
        >>> report = save({"step": 1}, storage)
        >>> sorted(storage.list())
        ['.metadata', '__0_0-....distcp', 'manifest.json']

    Args:
        target: A local path, or a URI: `file://`, `s3://`, `gs://`, `abfs://`, `hdfs://` with the options that
            `pyarrow.fs.FileSystem.from_uri` takes (for S3: `region`, `scheme`, `endpoint_override`, ...) plus
            `anonymous=true` on S3; any other scheme goes to fsspec. Credentials come from the URI or the usual
            environment variables.
        retry: What is done about transient errors.

    Names of files are relative to the target, with `/` between their parts; a name that leaves the target is refused.
    """

    tier: str | None = None
    """`front` or `durable`, for a step of a store with two tiers."""
    durable: Storage | None = None
    """Where a step of a front is copied to, and read from when what is here is damaged."""

    def __init__(self, target: str | os.PathLike[str], *, retry: RetryPolicy | None = None) -> None:
        self._address = parse(target)
        self.retry = retry or RetryPolicy()
        self._below = ""
        """Name of the target below the storage that it is a child of. Nothing is removed through a link in it."""
        self._built: tuple[int, pafs.FileSystem, str] | None = None
        self._retries: list[None] = []
        """One for each retry, as threads may append at the same time. Children and parents share it."""
        self.rereads: list[Reread] = []
        """What was read from another copy, as one was damaged; shared likewise."""

    @classmethod
    def of(cls, target: str | os.PathLike[str] | Storage) -> Storage:
        """The target itself where it is a storage, else the storage there."""
        return target if isinstance(target, Storage) else cls(target)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), {**self.__dict__, "_built": None})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address!r})"

    @property
    def uri(self) -> str:
        """The target as text that gives the same storage again. It holds the credentials: not for messages."""
        return self._address.text

    @property
    def address(self) -> str:
        """The target without credentials and options: what messages and logs may show."""
        return self._address.display

    def child(self, name: str) -> Storage:
        """The storage of a directory below this one: of the same class and retry policy, on the same connections."""
        child = copy.copy(self)
        child._address = self._address.child(check_file_name(name))
        child._below = f"{self._below}/{name}".lstrip("/")
        child._built = None
        if self._built is not None:
            process, filesystem, root = self._built
            child._built = (process, filesystem, f"{root.rstrip('/')}/{name}")
        return child

    def parent(self) -> tuple[Storage, str] | None:
        """The directory that holds the target, and the target's name in it; None at the top of a file system."""
        found = self._address.parent()
        if found is None:
            return None
        parent = copy.copy(self)
        parent._address, name = found
        parent._below, parent._built = "", None
        return parent, name

    @contextmanager
    def held(self) -> Iterator[Storage]:
        """This storage as it is now, here and in processes that it is sent to: what is removed or replaced within the
        block is still read from it. Only registered file systems can promise that; of others it is this one itself."""
        filesystem = self.filesystem
        if not isinstance(filesystem, RegisteredFileSystem):
            yield self
            return
        hold = self.perform("hold", "", lambda: filesystem.hold(self._root))
        held = copy.copy(self)
        held._address, held._built = self._address.with_option(HOLD, hold), None
        try:
            yield held
        finally:
            with contextlib.suppress(StorageError):  # what has been read has been read
                self.perform("release", "", lambda: filesystem.release(hold))

    @property
    def is_local(self) -> bool:
        """Whether a read costs a system call rather than a request over a network. NFS counts as local."""
        return self._address.is_local

    # ------------------------------------------------------------------------------------------------- reading

    def read_bytes(self, name: str) -> bytes:
        """All of a file that is a record, such as a manifest.

        Raises:
            StorageError: it cannot be read; `FileNotFoundError` is its cause when there is none of that name.
            FormatError: it is no file, or longer than records are.
            UnsafeCheckpointError: it is a link that leaves the target.
        """
        self.check_readable(name)

        def read() -> bytes:
            with self.filesystem.open_input_file(self.path(name)) as file:
                limits.RECORD_BYTES.check(int(file.size()), f"{self.address}/{name}")
                return bytes(file.read())

        return self.retried(lambda: self.perform("read", name, read))

    @contextmanager
    def open_input(self, name: str) -> Iterator[InputFile]:
        """Open a file for ranged reads, by one thread at a time unless `opening_costs_a_request`.

        Raises:
            StorageError: it cannot be opened.
            FormatError: it is no file.
            UnsafeCheckpointError: it is a link that leaves the target.
        """
        self.check_readable(name)
        path = self.path(name)
        native = self.retried(lambda: self.perform("open", name, lambda: self.filesystem.open_input_file(path)))
        with native:
            yield InputFile(self, name, native, for_threads=self.opening_costs_a_request)

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """Bytes in the file, or None when there is no file of that name."""
        info = self._info(name)
        return int(info.size or 0) if info.type == pafs.FileType.File else None

    def list(self) -> dict[str, int]:
        """Every file below the target, at any depth: name -> bytes. Empty when the target does not exist."""
        return {name: scanned.num_bytes for name, scanned in self.scan().items()}

    def scan(self) -> dict[str, Scanned]:
        """As `list`, with times: one listing, whatever lies below the target."""
        return {name: _scanned(info) for name, info in self._entries(recursive=True) if info.is_file}

    def list_files(self) -> dict[str, int]:
        """The files directly in the target: name -> bytes."""
        return {name: int(info.size or 0) for name, info in self._entries(recursive=False) if info.is_file}

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of those of these files that are there.

        Local: a look at each, at once. Elsewhere: one listing, because a look costs a request.
        """
        if not self.has_local_files:
            listed = self.list()
            return {name: listed[name] for name in names if name in listed}
        return {name: scanned.num_bytes for name, scanned in self.scan_files(names).items()}

    def scan_files(self, names: Iterable[str]) -> dict[str, Scanned]:
        """Those of these files that are there, with times: a look at each."""
        wanted = tuple(names)
        infos = self._infos([self.path(name) for name in wanted], "")
        return {name: _scanned(info) for name, info in zip(wanted, infos, strict=True) if info.is_file}

    def list_directories(self) -> Sequence[str]:
        """Names of the directories directly in the target, sorted. Object stores make them up from longer names."""
        if self.filesystem.type_name == "gcs":
            # Its listings that do not go deeper leave out directories that are no objects of their own.
            return sorted({name.partition("/")[0] for name in self.list() if "/" in name})
        return sorted(name for name, info in self._entries(recursive=False) if info.type == pafs.FileType.Directory)

    def directories_with(self, file: str) -> Sequence[str]:
        """Names of the directories directly in the target that hold a file of this name, sorted.

        One listing. Local: of the target alone, then a look into each directory. Elsewhere: of everything below the
        target, because a look costs a request, and a request lists a thousand files.
        """
        if not self.has_local_files:
            split = (name.split("/") for name in self.list())
            return sorted(parts[0] for parts in split if len(parts) == 2 and parts[1] == file)
        directories = self.list_directories()
        infos = self._infos([self.path(f"{directory}/{file}") for directory in directories], file)
        return [directory for directory, info in zip(directories, infos, strict=True) if info.is_file]

    # ------------------------------------------------------------------------------------------------- writing

    def create(self, name: str, *, num_bytes: int = 0) -> OutputFile:
        """Start a new file. It is durable, and on an object store visible, once its `close` has returned.

        What was written before a failure stays as an orphan that no manifest names.

        Args:
            num_bytes: about how long it will be. Where room is shared out beforehand, as in memory, there must be as
                much.
        """
        path = self.path(name)

        def start() -> pa.NativeFile | WritableFile:
            if isinstance(self.filesystem, RegisteredFileSystem):
                return self.filesystem.create(path, num_bytes)
            directory = os.path.dirname(path)
            self._make_directory(directory)
            try:
                return self.filesystem.open_output_stream(path, compression=None)
            except FileNotFoundError:  # somebody found the directory empty and removed it
                self._make_directory(directory)
                return self.filesystem.open_output_stream(path, compression=None)

        return OutputFile(self, name, self.perform("create", name, start))

    def write_atomic(self, name: str, data: bytes) -> None:
        """Publish a small file: a reader sees the old one or all of the new one, and it is durable on return.

        Local: a temporary name in the same directory, fsync, rename, fsync of the directory. Object stores: one
        put, which replaces the object at once. The price is that everything is held in memory.
        """
        self.prepare(name, data).publish()

    def prepare(self, name: str, data: bytes) -> PreparedFile:
        """Do the part of `write_atomic` that needs room, where there are two parts: what is left is to publish it."""
        if self.puts_at_once:
            return PreparedFile(self, name, data, None)
        prepared = PreparedFile(self, name, data, f"{name}.{uuid.uuid4().hex[:12]}.tmp")
        prepared.write()
        return prepared

    @property
    def puts_at_once(self) -> bool:
        """Whether nobody sees a file before it is whole, as on object stores: there is no need to rename one."""
        return self._address.scheme in _PUT_AT_ONCE

    def rename(self, name: str, new_name: str, *, replace: bool = True) -> None:
        """Give a file another name, durably.

        Args:
            replace: whether another file may have that name. Local file systems tell for certain.

        Raises:
            StorageError: it failed, or another file has the name: then `FileExistsError` is its cause.
        """

        def move() -> None:
            source, target = self.path(name), self.path(new_name)
            if self.has_local_files:
                rename(source, target, replace=replace)
                return
            try:
                self.filesystem.move(source, target)
            except NotImplementedError:  # Azure without a hierarchical namespace; the service copies by itself
                self.filesystem.copy_file(source, target)
                self.filesystem.delete_file(source)

        self.retried(lambda: self.perform("rename", new_name, move))

    def delete(self, name: str, *, durable: bool = False) -> bool:
        """Remove a file. One that is already gone counts as removed.

        Args:
            durable: return only when no loss of power can bring it back.

        Returns:
            Whether it is gone: a local name that is not a plain file's, or that leads through a link, is left alone.
        """

        def delete() -> bool:
            with contextlib.suppress(FileNotFoundError):
                if self.has_local_files:
                    return remove_plain_file(*self._top_and_name(name), durable=durable)
                self.filesystem.delete_file(self.path(name))
            return True

        return self.retried(lambda: self.perform("delete", name, delete))

    def may_delete(self, name: str) -> bool:
        """Whether `delete` would not leave this file alone."""
        return not self.has_local_files or is_plain_file(*self._top_and_name(name))

    def delete_empty_directory(self, name: str) -> None:
        """Remove a local directory with nothing in it; any other stays.

        An object store keeps an empty object in place of the directory: removing that by what pyarrow offers would
        take along whatever has been put below it meanwhile.
        """

        def delete() -> None:
            try:
                os.rmdir(self.path(name))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST):
                    raise

        if self.has_local_files:
            self.perform("delete", name, delete)

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Keep others out who lock the same local directory; yields whether it could be done. Costs no room.

        Raises:
            StorageError: somebody else has not given it back in time.
        """
        with contextlib.ExitStack() as held:
            yield self.has_local_files and self.perform(
                "lock", "", lambda: held.enter_context(lock_directory(self._root, timeout_s=_LOCK_TIMEOUT_S))
            )

    # ------------------------------------------------------------------------------------------------- machinery

    def perform(self, operation: str, name: str, action: Callable[[], T]) -> T:
        """Run one operation on the file system. All of them pass through here, and all errors are translated here.

        Args:
            operation: A verb, for the message: "cannot {operation} {path}".
            name: The file it touches; empty for the target itself.
        """
        try:
            return action()
        except RayCkptError:
            raise
        except Exception as error:
            if not isinstance(error, _STORAGE_ERRORS) and self._address.scheme in (*ARROW_SCHEMES, "file"):
                raise  # fsspec's file systems raise anything, these do not
            failure = self._failure(operation, name, error)
            cause = without_secrets(error, self._address)
        # Outside of the block above, so that the error holds no reference to one whose text holds a secret.
        raise failure from cause

    def _failure(self, operation: str, name: str, error: Exception) -> StorageError:
        where = f"{self.address}/{name}".rstrip("/")
        return StorageError(operation, where, _describe(error, self._address), transient=is_transient(error))

    def retried(self, action: Callable[[], T]) -> T:
        """Run an action, again and again after transient errors, within the retry policy."""
        return retried(action, self.retry, lambda: self._retries.append(None))

    @property
    def num_retries(self) -> int:
        """How often an operation was tried again so far, here and in the directories around."""
        return len(self._retries)

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The pyarrow file system, built at the first use in this process."""
        return self._build()[1]

    @property
    def _root(self) -> str:
        return self._build()[2]

    @property
    def has_local_files(self) -> bool:
        """Whether the operating system's own calls reach the files, by `path`."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    @property
    def opening_costs_a_request(self) -> bool:
        """Whether a file had better be opened once for all threads, which may read it at the same time."""
        return self.filesystem.type_name in _ASKED_FOR_SIZES

    def _build(self) -> tuple[int, pafs.FileSystem, str]:
        if self._built is None or self._built[0] != os.getpid():
            filesystem, root = self.perform("open", "", lambda: open_filesystem(self._address))
            self._built = (os.getpid(), filesystem, root)
        return self._built

    def check_readable(self, name: str) -> None:
        """Refuse what no reader would open: a local name of no file, or of a link that leaves the target."""
        if self.has_local_files:
            check_readable(self._root, check_file_name(name))

    def path(self, name: str) -> str:
        """Path of a file in `filesystem`."""
        return f"{self._root.rstrip('/')}/{check_file_name(name)}"

    def _info(self, name: str) -> pafs.FileInfo:
        path = self.path(name)
        return self.retried(lambda: self.perform("look for", name, lambda: self.filesystem.get_file_info(path)))

    def _infos(self, paths: Sequence[str], name: str) -> Sequence[pafs.FileInfo]:
        return self.retried(lambda: self.perform("look for", name, lambda: self.filesystem.get_file_info(paths)))

    def _entries(self, *, recursive: bool) -> Iterable[tuple[str, pafs.FileInfo]]:
        selector = pafs.FileSelector(self._root, recursive=recursive, allow_not_found=True)
        infos = self.retried(lambda: self.perform("list", "", lambda: self.filesystem.get_file_info(selector)))
        prefix = self._root.strip("/") + "/"
        return [(info.path.strip("/").removeprefix(prefix), info) for info in infos]

    def _top_and_name(self, name: str) -> tuple[str, str]:
        """The path of the storage that this one is a child of, if it is one, and the file's name below that."""
        if not self._below:
            return self._root, check_file_name(name)
        return self._root.removesuffix(f"/{self._below}") or "/", f"{self._below}/{check_file_name(name)}"

    def _make_directory(self, path: str) -> None:
        """Create a directory and its parents, durably; object stores have none."""
        if self.filesystem.type_name in _OBJECT_STORES:
            return
        if not self.has_local_files:
            self.filesystem.create_dir(path, recursive=True)
            return
        make_directory(path)


def _scanned(info: pafs.FileInfo) -> Scanned:
    return Scanned(int(info.size or 0), None if info.mtime_ns is None else info.mtime_ns / 1e9)


def _rebuild(cls: type[Storage], state: dict[str, Any]) -> Storage:
    storage = cls.__new__(cls)
    storage.__dict__.update(state)
    return storage


def _describe(error: BaseException, address: Address) -> str:
    """One line of what a library says."""
    text = " ".join(address.redact(str(error)).split())
    if isinstance(error, NotImplementedError):
        text = text or f"the file system of {address.scheme}:// cannot do this"
    advice = advice_on(text)
    shown = text if len(text) <= _LONGEST_CAUSE else text[:_LONGEST_CAUSE] + "..."
    return f"{type(error).__name__}: {shown}" + (f" ({advice})" if advice else "")
