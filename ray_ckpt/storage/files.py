"""Where bytes lie: local paths, object stores and file servers behind one small class. The only home of pyarrow.

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
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from ray_ckpt.errors import FormatError, RayCkptError, StorageError
from ray_ckpt.format.manifest import check_file_name
from ray_ckpt.storage.address import ARROW_SCHEMES, Address, parse
from ray_ckpt.storage.local_files import make_directory, rename, sync_directory, sync_file
from ray_ckpt.storage.redact import without_secrets
from ray_ckpt.storage.retry import RetryPolicy, is_transient, retried

__all__ = ["InputFile", "OutputFile", "RetryPolicy", "Storage"]

T = TypeVar("T")

_STORAGE_ERRORS = (OSError, pa.ArrowException, ValueError, ImportError, NotImplementedError)
_LONGEST_CAUSE = 600
"""Characters of a library's message that are repeated."""

_OBJECT_STORES = frozenset({"s3", "gcs", "abfs"})
"""`FileSystem.type_name` of those without directories, where an object appears whole when its writer closes it."""
_FILE_SERVERS = frozenset({"hdfs", "py::fsspec+sftp", "py::fsspec+ssh", "py::fsspec+smb", "py::fsspec+webhdfs"})
"""Where a reader may see a file grow, and a rename replaces its target."""


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

    def __init__(self, target: str | os.PathLike[str], *, retry: RetryPolicy | None = None) -> None:
        self._address = parse(target)
        self.retry = retry or RetryPolicy()
        self._below = ""
        """Name of the target below the storage that it is a child of. Nothing is removed through a link in it."""
        self._built: tuple[int, pafs.FileSystem, str] | None = None

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

    @property
    def is_local(self) -> bool:
        """Whether a read costs a system call rather than a request over a network. NFS counts as local."""
        return self._address.is_local

    # ------------------------------------------------------------------------------------------------- reading

    def read_bytes(self, name: str) -> bytes:
        """The whole file.

        Raises:
            StorageError: it cannot be read; `FileNotFoundError` is its cause when there is none of that name.
        """

        def read() -> bytes:
            with self.filesystem.open_input_stream(self._path(name), compression=None) as stream:
                return bytes(stream.read())

        return self.retried(lambda: self.perform("read", name, read))

    @contextmanager
    def open_input(self, name: str) -> Iterator[InputFile]:
        """Open a file for ranged reads by one thread at a time."""
        path = self._path(name)
        native = self.retried(lambda: self.perform("open", name, lambda: self.filesystem.open_input_file(path)))
        with native:
            yield InputFile(self, name, native)

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
        return {
            name: Scanned(int(info.size or 0), None if info.mtime_ns is None else info.mtime_ns / 1e9)
            for name, info in self._entries(recursive=True)
            if info.is_file
        }

    def list_files(self) -> dict[str, int]:
        """The files directly in the target: name -> bytes."""
        return {name: int(info.size or 0) for name, info in self._entries(recursive=False) if info.is_file}

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
        if not self._is_local_filesystem:
            split = (name.split("/") for name in self.list())
            return sorted(parts[0] for parts in split if len(parts) == 2 and parts[1] == file)
        directories = self.list_directories()
        paths = [self._path(f"{directory}/{file}") for directory in directories]
        infos = self.retried(lambda: self.perform("look for", file, lambda: self.filesystem.get_file_info(paths)))
        return [directory for directory, info in zip(directories, infos, strict=True) if info.is_file]

    # ------------------------------------------------------------------------------------------------- writing

    def create(self, name: str) -> OutputFile:
        """Start a new file. It is durable, and on an object store visible, once its `close` has returned.

        What was written before a failure stays as an orphan that no manifest names.
        """
        path = self._path(name)

        def start() -> pa.NativeFile:
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
        if self._is_local_filesystem or self.filesystem.type_name in _FILE_SERVERS:
            temporary = f"{name}.{uuid.uuid4().hex[:12]}.tmp"
            self.retried(lambda: self._write_file(temporary, data))
            self.retried(lambda: self.perform("rename", name, lambda: self._rename(temporary, name)))
        else:
            self.retried(lambda: self._write_file(name, data))

    def delete(self, name: str, *, durable: bool = False) -> None:
        """Remove a file. One that is already gone counts as removed.

        Args:
            durable: return only when no loss of power can bring it back.
        """

        def delete() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.filesystem.delete_file(self._path(name))
                if durable and self._is_local_filesystem:
                    sync_directory(os.path.dirname(self._path(name)))

        self.retried(lambda: self.perform("delete", name, delete))

    def delete_empty_directory(self, name: str) -> None:
        """Remove a local directory with nothing in it; any other stays.

        An object store keeps an empty object in place of the directory: removing that by what pyarrow offers would
        take along whatever has been put below it meanwhile.
        """

        def delete() -> None:
            try:
                os.rmdir(self._path(name))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST):
                    raise

        if self._is_local_filesystem:
            self.perform("delete", name, delete)

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
        return retried(action, self.retry)

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The pyarrow file system, built at the first use in this process."""
        return self._build()[1]

    @property
    def _root(self) -> str:
        return self._build()[2]

    @property
    def _is_local_filesystem(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def _build(self) -> tuple[int, pafs.FileSystem, str]:
        if self._built is None or self._built[0] != os.getpid():
            filesystem, root = self.perform("open", "", lambda: _open_filesystem(self._address))
            self._built = (os.getpid(), filesystem, root)
        return self._built

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{check_file_name(name)}"

    def _info(self, name: str) -> pafs.FileInfo:
        path = self._path(name)
        return self.retried(lambda: self.perform("look for", name, lambda: self.filesystem.get_file_info(path)))

    def _entries(self, *, recursive: bool) -> Iterable[tuple[str, pafs.FileInfo]]:
        selector = pafs.FileSelector(self._root, recursive=recursive, allow_not_found=True)
        infos = self.retried(lambda: self.perform("list", "", lambda: self.filesystem.get_file_info(selector)))
        prefix = self._root.strip("/") + "/"
        return [(info.path.strip("/").removeprefix(prefix), info) for info in infos]

    def _write_file(self, name: str, data: bytes) -> None:
        with self.create(name) as file:
            file.write(data)

    def _rename(self, source: str, target: str) -> None:
        if not self._is_local_filesystem:
            self.filesystem.move(self._path(source), self._path(target))
            return
        rename(self._path(source), self._path(target), replace=True)

    def _make_directory(self, path: str) -> None:
        """Create a directory and its parents, durably; object stores have none."""
        if self.filesystem.type_name in _OBJECT_STORES:
            return
        if not self._is_local_filesystem:
            self.filesystem.create_dir(path, recursive=True)
            return
        make_directory(path)


def _rebuild(cls: type[Storage], state: dict[str, Any]) -> Storage:
    storage = cls.__new__(cls)
    storage.__dict__.update(state)
    return storage


class InputFile:
    """An open file, for ranged reads. Not for two threads at a time: each opens its own."""

    def __init__(self, storage: Storage, name: str, native: pa.NativeFile) -> None:
        self.name = name
        self._storage = storage
        self._native = native

    def read_into(self, offset: int, memory: memoryview) -> None:
        """Fill `memory` with the bytes `[offset, offset + len(memory))`, without an intermediate copy.

        Raises:
            FormatError: the file ends before that. A short read is an error, never "the remainder".
        """

        def read() -> int:
            self._native.seek(offset)
            return int(self._native.readinto(memory))

        num_read = self._storage.retried(lambda: self._storage.perform("read", self.name, read))
        if num_read != len(memory):
            raise FormatError(
                f"{self.name} is too short: wanted bytes [{offset}, {offset + len(memory)}), "
                f"it ends at {offset + num_read}; the file is truncated or the metadata that points into it is damaged"
            )


class OutputFile:
    """A file being written. Leaving its `with` block by an error abandons it."""

    def __init__(self, storage: Storage, name: str, native: pa.NativeFile) -> None:
        self.name = name
        self._storage = storage
        self._native = native

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append. The memory may be reused as soon as the call returns."""
        self._storage.perform("write", self.name, lambda: self._native.write(data))

    def close(self) -> None:
        """Finish the file and make it durable: fsync of the file and of its directory where there are such things."""
        self._storage.perform("finish", self.name, self._native.close)
        if self._storage._is_local_filesystem:
            self._storage.perform("sync", self.name, lambda: sync_file(self._storage._path(self.name)))

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.close()


def _open_filesystem(address: Address) -> tuple[pafs.FileSystem, str]:
    if address.is_local:
        return pafs.LocalFileSystem(), address.path
    if address.scheme not in ARROW_SCHEMES:
        return _open_fsspec(address)
    if address.scheme == "s3" and (anonymous := _open_anonymous_s3(address)):
        return anonymous
    filesystem, path = pafs.FileSystem.from_uri(address.text)
    return filesystem, path


def _open_fsspec(address: Address) -> tuple[pafs.FileSystem, str]:
    import fsspec  # only those who use such a URI need it

    if address.scheme not in fsspec.available_protocols():
        raise ValueError(f"no file system is known for {address.scheme}://, neither by pyarrow nor by fsspec")
    filesystem, path = fsspec.url_to_fs(address.text)
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def _open_anonymous_s3(address: Address) -> tuple[pafs.FileSystem, str] | None:
    """What `from_uri` cannot say: S3 without credentials, asked for by `anonymous=true`."""
    options = dict(urllib.parse.parse_qsl(address.options))
    if options.pop("anonymous", "false").lower() != "true":
        return None
    return pafs.S3FileSystem(anonymous=True, **options), urllib.parse.unquote(address.place + address.path)


def _describe(error: BaseException, address: Address) -> str:
    """One line of what a library says."""
    text = " ".join(address.redact(str(error)).split())
    if isinstance(error, NotImplementedError):
        text = text or f"the file system of {address.scheme}:// cannot do this"
    return f"{type(error).__name__}: {text if len(text) <= _LONGEST_CAUSE else text[:_LONGEST_CAUSE] + '...'}"
