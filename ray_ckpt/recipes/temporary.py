"""The job's temporary directory: it goes away with the job, and one whose job was killed goes with the next job.

A job holds a lock on its directory, which the kernel releases however the job ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ray_ckpt.errors import UsageError

PREFIX = "ray-ckpt-job-"
"""Begins the name of a directory that is locked: it gets this name after its lock, or another job might remove it."""


@contextlib.contextmanager
def temporary_directory() -> Iterator[str]:
    """A directory of mode 0700 for the block. Those of this user's jobs that were killed are removed on the way.

    Raises:
        UsageError: it cannot be made.
    """
    try:
        made = Path(tempfile.mkdtemp(prefix="ray-ckpt-new-"))  # of mode 0700: others have no business in it
        lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        directory = made.rename(made.with_name(made.name.replace("ray-ckpt-new-", PREFIX)))
    except OSError as error:
        raise UsageError(f"cannot make a temporary directory: {error}; give --storage, or set TMPDIR") from error
    try:
        _remove_orphans(directory.parent)
        yield str(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _remove_orphans(parent: Path) -> None:
    """What cannot be looked at or removed stays: it is only in the way."""
    for entry in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            found = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused where its job is alive
                if os.fstat(found).st_uid == os.getuid():
                    shutil.rmtree(entry)
            finally:
                os.close(found)
