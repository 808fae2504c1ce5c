"""What may be opened on a local file system: regular files inside the checkpoint's directory."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence

from ray_ckpt.errors import FormatError, UnsafeCheckpointError

__all__ = ["check_readable", "no_file"]

_NO_FILES: Sequence[tuple[Callable[[int], bool], str]] = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def no_file(path: str) -> str:
    """What a path leads to that is no regular file, in words; empty for a file, for what is not there, and for what a
    shell passes open, as `<(command)`."""
    try:
        mode = os.lstat(os.path.realpath(path)).st_mode
    except (OSError, ValueError):  # not there, no name at all, or a pipe that has none
        return ""
    return "" if stat.S_ISREG(mode) else _kind_of(mode)


def _kind_of(mode: int) -> str:
    return next((kind for is_kind, kind in _NO_FILES if is_kind(mode)), "of an unknown kind")


def check_readable(top: str, name: str) -> None:
    """Refuse, before it is opened, a name that is not that of a file in the directory: opening a FIFO would wait
    forever, and a link may lead anywhere. A missing file passes: opening it will fail.

    Args:
        top: the checkpoint's directory, which may itself be a link.

    Raises:
        FormatError: it is no file.
        UnsafeCheckpointError: it is a link, or lies behind one, that leaves the directory.
    """
    path = os.path.join(top, name)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # not there, or no name at all
        return
    if not stat.S_ISREG(mode):
        raise FormatError(f"{path} is {_kind_of(mode)}, not a file; nothing was read from it")
    found, directory = os.path.realpath(path), os.path.realpath(top)
    if not any(found.startswith(f"{home.rstrip('/')}/") for home in (directory, *_hub_blobs(directory))):
        raise UnsafeCheckpointError(
            f"{path} is a link to {found}, which leaves the checkpoint's directory; nothing was read from it: put the "
            "file itself there"
        )


def _hub_blobs(directory: str) -> Sequence[str]:
    """Where the files of a snapshot in the cache of the Hugging Face hub are. The snapshot itself consists of links."""
    snapshots = os.path.dirname(directory)
    return [f"{os.path.dirname(snapshots)}/blobs"] if os.path.basename(snapshots) == "snapshots" else []
