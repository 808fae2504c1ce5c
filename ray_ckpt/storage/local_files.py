"""What only local file systems need: names and files that no loss of power takes back, and safe removal."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import itertools
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "is_plain_file",
    "lock_directory",
    "make_directory",
    "remove_plain_file",
    "rename",
    "sync_directory",
    "sync_file",
]

_logger = logging.getLogger("ray_ckpt")

_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
"""Errors of a file system that does not support an operation."""


def sync_file(path: str, *, with_name: bool) -> None:
    """fsync a finished file, and its directory for the name. Any descriptor flushes all of the file's pages."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if with_name:
        sync_directory(os.path.dirname(path))


def sync_directory(path: str) -> None:
    """Make the names in a directory durable, where the file system can: some network ones refuse, which is logged."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _sync_names(descriptor, path)
    finally:
        os.close(descriptor)


_unsyncable_devices: set[int] = set()


def _sync_names(directory: int, path: str) -> None:
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        device = os.fstat(directory).st_dev
        if device not in _unsyncable_devices:
            _unsyncable_devices.add(device)
            _logger.warning("the file system of %s cannot sync a directory: a loss of power may undo a commit", path)


def make_directory(path: str) -> None:
    """Create a directory and its parents, durably."""
    missing = list(itertools.takewhile(lambda parent: not parent.exists(), (Path(path), *Path(path).parents)))
    if not missing:
        return
    os.makedirs(path, exist_ok=True)
    for directory in missing:
        sync_directory(str(directory.parent))


def rename(source: str, target: str, *, replace: bool) -> None:
    """Give a file another name in the same directory, durably.

    Without `replace` the kernel sees to it that no other file has the name, by `renameat2(2)` or, where the file system
    does not know that, `link(2)`. Where it knows neither, the name is looked for first.

    Raises:
        FileExistsError: another file has the name, and `replace` was not given.
    """
    if replace:
        os.replace(source, target)
    else:
        _rename_new(source, target)
    sync_directory(os.path.dirname(target))


def _rename_new(source: str, target: str) -> None:
    try:
        _rename_noreplace(source, target)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    else:
        return
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in {*_UNSUPPORTED, errno.EPERM, errno.EMLINK}:
            raise
    else:
        os.unlink(source)
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
    os.rename(source, target)


_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
"""Constants of Linux' `fcntl.h` and `fs.h`."""


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def _rename_noreplace(source: str, target: str) -> None:
    function = _renameat2()
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)


def remove_plain_file(top: str, name: str, *, durable: bool) -> bool:
    """Remove a regular file below a directory.

    Args:
        top: an absolute path, which may lead through links.
        name: relative to it; its directories may not be links.
        durable: return only when no loss of power can bring it back.

    Returns:
        Whether it was removed: False when it is a link, a directory or a device, or lies behind a link.

    Raises:
        FileNotFoundError: there is none.
    """
    *directories, file = name.split("/")
    descriptor = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for directory in directories:
            inner = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        if not stat.S_ISREG(os.stat(file, dir_fd=descriptor, follow_symlinks=False).st_mode):
            return False
        os.unlink(file, dir_fd=descriptor)
        if durable:
            _sync_names(descriptor, top)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            return False
        raise
    finally:
        os.close(descriptor)
    return True


def is_plain_file(top: str, name: str) -> bool:
    """Whether a name below a directory is that of a regular file, reached through no link."""
    *directories, file = name.split("/")
    path = top
    for directory in directories:
        path = os.path.join(path, directory)
        if os.path.islink(path):
            return False
    try:
        return stat.S_ISREG(os.lstat(os.path.join(path, file)).st_mode)
    except OSError:
        return False


@contextmanager
def lock_directory(path: str, *, timeout_s: float) -> Iterator[bool]:
    """Hold the `flock(2)` of a directory, which ends with the process at the latest. Yields False where there is none,
    as on some network file systems.

    Raises:
        TimeoutError: somebody else holds it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _flock(descriptor, time.monotonic() + timeout_s)
    finally:
        os.close(descriptor)


def _flock(descriptor: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError("another process holds its lock") from None
            time.sleep(0.05)
        except OSError:
            return False
        else:
            return True
