"""Reading bytes that must be those that were saved, from whichever copy has them.

read_good ─┬─ the file as it was opened, checked
           └─ where that fails: other_copies ─┬─ each copy that a registered file system has, as `ram://` on its nodes
                                              └─ the durable tier's, where the file lies in the front of a store
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ray_ckpt.errors import CheckpointError, IntegrityError, StorageError
from ray_ckpt.format.block_sums import BlockSums, sums_of
from ray_ckpt.storage.file_objects import InputFile
from ray_ckpt.storage.registered import RegisteredFileSystem

if TYPE_CHECKING:
    from ray_ckpt.storage.files import Storage

__all__ = ["Copy", "Reread", "check_blocks", "note", "other_copies", "read_good"]

_logger = logging.getLogger("ray_ckpt")


class Reread(NamedTuple):
    """Bytes that were read from another copy of a file, because one is damaged or gone."""

    problem: str
    """What is wrong with the copy that was read first, in one line."""
    place: str
    """Where they were read instead."""
    num_bytes: int
    is_durable: bool
    """Whether the durable tier had to be asked."""

    def __str__(self) -> str:
        return f"{self.problem}; read from {self.place} instead"


class Copy(NamedTuple):
    """A copy of a file, still to be opened."""

    place: str
    is_durable: bool
    open: Callable[[], contextlib.AbstractContextManager[InputFile]]


def read_good(
    storage: Storage,
    name: str,
    offset: int,
    memory: memoryview,
    *,
    opened: Callable[[], InputFile],
    check: Callable[[memoryview], None],
) -> None:
    """Fill `memory` with the bytes `[offset, offset + len(memory))` of a file.

    Args:
        opened: gives the file as it is read first.
        check: raises an `IntegrityError` unless these are the bytes that were saved.

    Raises:
        IntegrityError, FormatError, StorageError: of the first copy, when no other is any better.
    """
    try:
        opened().read_into(offset, memory)
        check(memory)
        return
    except (CheckpointError, StorageError) as error:
        first = error
    for copy in other_copies(storage, name):
        try:
            with copy.open() as file:
                file.read_into(offset, memory)
            check(memory)
        except (CheckpointError, StorageError):
            continue
        note(storage, Reread(str(first), copy.place, len(memory), copy.is_durable))
        return
    raise first


def other_copies(storage: Storage, name: str) -> Iterator[Copy]:
    """All copies of a file that there are, where there can be several; the one that is read first may be among them."""
    filesystem = storage.filesystem
    if isinstance(filesystem, RegisteredFileSystem):
        with contextlib.suppress(StorageError):
            path = storage.path(name)
            copies = storage.perform("look for", name, lambda: filesystem.open_copies(path))
            for place, native in copies:
                yield Copy(place, False, partial(_opened, storage, name, native))
    if storage.durable is not None:
        yield Copy(storage.durable.address, True, partial(storage.durable.open_input, name))


@contextlib.contextmanager
def _opened(storage: Storage, name: str, native: Any) -> Iterator[InputFile]:
    with native:
        yield InputFile(storage, name, native)


def note(storage: Storage, reread: Reread) -> None:
    """Remember, and say once for each problem's file and place, that another copy was needed."""
    if all(other.place != reread.place for other in storage.rereads):
        _logger.warning("%s", reread)
    storage.rereads.append(reread)


def check_blocks(data: memoryview, sums: BlockSums, *, file: str, start: int, data_start: int, name: str) -> None:
    """Compare bytes that begin and end with a checksum block, or end with the data, with their checksums.

    Args:
        start: where the bytes begin in the file.
        data_start: where the first block begins in the file.

    Raises:
        IntegrityError: a block differs.
    """
    size = sums.block_bytes
    first = (start - data_start) // size
    found = BlockSums(size, sums_of(data, size))
    if found.sums == sums.sums[8 * first : 8 * (first + len(found))]:
        return
    for block in range(len(found)):
        if found[block] != sums[first + block]:
            at = block * size
            raise IntegrityError(
                file=file,
                start=start + at,
                end=start + min(at + size, len(data)),
                tensor=name,
                expected=f"{sums[first + block]:016x}",
                found=f"{found[block]:016x}",
                hint="restore the file from a copy, or load an earlier step",
            )
