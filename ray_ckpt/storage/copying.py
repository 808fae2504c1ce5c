"""Copying a committed checkpoint to another storage, byte for byte, without torch.

    copy_files     data files, by any number of processes; what is read is compared with the record's checksums
    commit_copy    when all are there: the records, by the same rule as a save's

Names of data files hold the attempt's id: copies of two attempts never mix. Until the commit there is no checkpoint at
the target, whatever is cut off.
"""

from __future__ import annotations

import contextlib
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ray_ckpt.errors import CommitError, FormatError, StorageError
from ray_ckpt.format.block_sums import BlockSums
from ray_ckpt.format.manifest import Manifest, itemsize
from ray_ckpt.format.ranges import cut
from ray_ckpt.format.record import digest
from ray_ckpt.storage.files import InputFile, Storage
from ray_ckpt.storage.good_reads import check_blocks, read_good
from ray_ckpt.storage.publish import STOCK_RECORD_NAME, is_of_attempt, publish
from ray_ckpt.storage.record_files import read_record
from ray_ckpt.text import listed

__all__ = ["commit_copy", "copy_files"]

PIECE_BYTES = 8 << 20
"""Size of a read, and of the one buffer."""


class _Known(NamedTuple):
    """Bytes of a file that the record has checksums of."""

    start: int
    end: int
    name: str
    sums: BlockSums


def copy_files(source: Storage, target: Storage, files: Iterable[str]) -> int:
    """Copy some of a checkpoint's data files. They are durable on return; nothing is committed.

    Args:
        files: names; those that the record does not name are left out.

    Returns:
        Number of bytes; 0 where the checkpoint is committed there already.

    Raises:
        IntegrityError: what was read differs from its checksum, in all copies.
        FormatError, StorageError: something cannot be read, or not be written.
    """
    manifest = read_record(source)
    if is_of_attempt(target, manifest.attempt):
        return 0
    known = _known(manifest)
    named = [name for name in files if name in manifest.files]
    for name in named:
        _copy_file(source, target, name, manifest.files[name], known[name])
    return sum(manifest.files[name] for name in named)


def commit_copy(source: Storage, target: Storage, *, overwrite: bool) -> None:
    """Commit a checkpoint whose data files have been copied. One that is there already, of the same attempt, is kept.

    Args:
        overwrite: replace another attempt's checkpoint.

    Raises:
        CheckpointExistsError: there is another attempt's.
        CommitError: a file is missing at the target, or has another size.
        FormatError, StorageError: a record cannot be read, or not be written.
    """
    manifest = read_record(source)
    if is_of_attempt(target, manifest.attempt):
        return
    found = target.sizes(manifest.files)
    if wrong := sorted(name for name, size in manifest.files.items() if found.get(name) != size):
        raise CommitError(f"refusing to commit {target.address}: it lacks {listed(wrong)}, or has other sizes of them")
    stock_record = source.read_bytes(STOCK_RECORD_NAME)
    if digest(stock_record) != manifest.metadata_digest:
        raise FormatError(f"{source.address}/{STOCK_RECORD_NAME} is not the one that was saved with its record")
    publish(target, manifest, stock_record, overwrite=overwrite)


def _known(manifest: Manifest) -> Mapping[str, list[_Known]]:
    """File -> what there are checksums of, by position."""
    known: dict[str, list[_Known]] = defaultdict(list)
    for name, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            if chunk.checksums is not None and chunk.data_start is not None:
                end = chunk.data_start + chunk.box.num_elements * itemsize(tensor.dtype)
                known[chunk.file].append(_Known(chunk.data_start, end, name, chunk.checksums))
    for name, entry in manifest.objects.items():
        if entry.checksum is not None:
            sums = BlockSums(max(1, entry.length), entry.checksum.to_bytes(8, "little"))
            known[entry.file].append(_Known(entry.start, entry.start + entry.length, name, sums))
    for of_file in known.values():
        of_file.sort(key=lambda part: (part.start, part.end))
    return known


def _copy_file(source: Storage, target: Storage, name: str, num_bytes: int, known: Iterable[_Known]) -> None:
    """Where a file is seen before it is whole, it gets its name at the end: a copy that was given up and goes on never
    touches one that has been committed."""
    written_as = name if target.puts_at_once else f"{name}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        with _File(source, name) as file, target.create(written_as, num_bytes=num_bytes) as output:
            for start, end, part in _pieces(num_bytes, known):
                output.write(file.read(start, end, part))
        if written_as != name:
            target.rename(written_as, name)
    except BaseException:
        if written_as != name:
            with contextlib.suppress(StorageError):
                target.delete(written_as)
        raise


def _pieces(num_bytes: int, known: Iterable[_Known]) -> Iterator[tuple[int, int, _Known | None]]:
    """All bytes of a file in order: whole checksum blocks of what is known, and what lies between."""
    at = 0
    for part in known:
        if part.start < at:
            continue  # several objects may share their bytes
        yield from ((start, end, None) for start, end in cut(at, part.start, PIECE_BYTES))
        block = part.sums.block_bytes
        step = max(block, PIECE_BYTES // block * block)
        yield from ((start, end, part) for start, end in cut(part.start, part.end, step))
        at = part.end
    yield from ((start, end, None) for start, end in cut(at, num_bytes, PIECE_BYTES))


class _File:
    """A file that is read from its beginning to its end."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage = storage
        self._name = name
        self._opened = contextlib.ExitStack()
        self._input: InputFile | None = None
        self._memory = memoryview(b"")

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def read(self, start: int, end: int, part: _Known | None) -> memoryview:
        """These bytes, until the next call."""
        if len(self._memory) < end - start:
            self._memory = memoryview(bytearray(end - start))
        data = self._memory[: end - start]

        def check(read: memoryview) -> None:
            if part is not None:
                check_blocks(read, part.sums, file=self._name, start=start, data_start=part.start, name=part.name)

        read_good(self._storage, self._name, start, data, opened=self._open, check=check)
        return data

    def _open(self) -> InputFile:
        if self._input is None:
            self._input = self._opened.enter_context(self._storage.open_input(self._name))
        return self._input
