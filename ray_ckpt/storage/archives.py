"""Other programs' zip archives, read whole and compared with the CRC-32 of each member.

    archives(storage, manifest) ─┬─ a stock DCP directory: one archive per container, however many a file has
                                 └─ a file by torch.save: the file
    check_archive ─┬─ the directory: every member where it says, none over another
                   ├─ members: piece by piece, against their CRC-32
                   └─ tensors of DCP: dtype and shape inside are those of `.metadata`

A CRC-32 of 0 means that the writer left it out. A safetensors file has no checksum at all.
"""

from __future__ import annotations

import binascii
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ray_ckpt.errors import CheckpointError, StorageError
from ray_ckpt.format import zip_directory
from ray_ckpt.format.manifest import Manifest
from ray_ckpt.format.torch_container import dtype_name, parse_dtype
from ray_ckpt.report import Damage
from ray_ckpt.storage.chunk_sources import SavedChunk, locate
from ray_ckpt.storage.files import InputFile, Storage
from ray_ckpt.storage.nonfinite import Tally, count_apart
from ray_ckpt.storage.placed import Elements
from ray_ckpt.storage.places import Counting
from ray_ckpt.storage.ranged_reads import tuning_for
from ray_ckpt.storage.stretches import Checked, overlap

__all__ = ["Archive", "archives", "check_archive"]

_PIECE_BYTES = 1 << 20
"""Size of a read: what has just been read is still in the cache when it is hashed."""


@dataclass(frozen=True)
class Archive:
    """Bytes `[start, end)` of a file that are one zip archive."""

    file: str
    start: int
    end: int
    names: tuple[str, ...]
    """Names of what is in it, when it is the container of one tensor or object."""
    places: Mapping[int, tuple[str, ...]]
    """Names of tensors by the byte offset in `file` of the member that holds them, when the archive has many."""
    chunk: SavedChunk | None = None
    """The chunk that `.metadata` describes, when it is the container of one."""
    elements: Mapping[int, tuple[Elements, ...]] = field(default_factory=dict)
    """What is counted, by the byte offset of the member that holds it."""
    counted: bool = False
    """Whether the elements of `chunk` are counted."""

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


def archives(storage: Storage, manifest: Manifest, sizes: Mapping[str, int], counting: Counting) -> list[Archive]:
    """The archives in the files of another program's checkpoint, as far as these files reach.

    Args:
        sizes: bytes of the files that are there.
        counting: whose NaN and Inf are counted.
    """
    found: dict[tuple[str, int, int], Archive] = {}
    files: dict[str, dict[int, tuple[str, ...]]] = {file: {} for file in manifest.files}
    elements: dict[tuple[str, int], list[Elements]] = defaultdict(list)
    for name, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            if chunk.data_start is not None:
                places = files[chunk.file]
                places[chunk.start] = (*places.get(chunk.start, ()), name)
                if counted := counting.elements(name, tensor.dtype, chunk):
                    elements[chunk.file, chunk.start].append(counted)
            elif not chunk.transforms:
                key = (chunk.file, chunk.start, chunk.start + chunk.length)
                found[key] = Archive(
                    *key,
                    (name,),
                    {},
                    SavedChunk(name, parse_dtype(tensor.dtype), chunk),
                    counted=counting.of_dtype(tensor.dtype) and bool(chunk.box.num_elements),
                )
    for name, entry in manifest.objects.items():
        key = (entry.file, entry.start, entry.start + entry.length)
        if entry.length and not entry.transforms:
            found[key] = Archive(*key, (*(found[key].names if key in found else ()), name), {})
    containers = {archive.file for archive in found.values()}
    whole = {file: places for file, places in files.items() if file not in containers and file in sizes}
    for file, places in whole.items():
        if _begins_as_archive(storage, file, sizes[file]):
            in_file = {start: tuple(elements[file, start]) for start in places}
            found[file, 0, sizes[file]] = Archive(file, 0, sizes[file], (), places, elements=in_file)
    return [archive for archive in found.values() if archive.end <= sizes.get(archive.file, 0)]


def _begins_as_archive(storage: Storage, file: str, num_bytes: int) -> bool:
    magic = zip_directory.MAGIC
    if num_bytes < len(magic):
        return False
    with storage.open_input(file) as opened:
        return _read(opened, 0, len(magic)) == magic


def check_archive(storage: Storage, archive: Archive, count: Callable[[int], None]) -> Checked:
    """Whatever in an archive is not what was written.

    Args:
        count: called with the bytes that have been read, as often as some have.

    Raises:
        StorageError: the storage does not answer.
    """
    checked = Checked()
    try:
        with storage.open_input(archive.file) as file:
            counted = _check_members(file, archive, count, checked)
        if archive.chunk is not None and not checked.damages:
            locate(storage, {0: archive.chunk}, tuning_for(storage), verify=False)
            if archive.counted and not counted:
                name, dtype, chunk = archive.chunk
                count_apart(storage, name, dtype_name(dtype), chunk, checked)
    except (StorageError, CheckpointError) as error:
        if isinstance(error, StorageError) and error.transient:
            raise
        problem = f"cannot be read: {error.cause}" if isinstance(error, StorageError) else str(error)
        return Checked(list(_damages(archive, archive.start, archive.end, archive.names, problem)))
    return checked


def _check_members(file: InputFile, archive: Archive, count: Callable[[int], None], checked: Checked) -> set[Elements]:
    """Compare the members, and count what is to be counted in them; returns that."""
    counted: set[Elements] = set()
    members = zip_directory.read_members(
        lambda offset, length: _read(file, archive.start + offset, length), archive.num_bytes, archive.file
    )
    memory = memoryview(bytearray(min(_PIECE_BYTES, archive.num_bytes)))
    for name, member in members.items():
        header = _read(file, archive.start + member.header_start, zip_directory.LOCAL_HEADER_BYTES)
        start = archive.start + zip_directory.data_start(header, member.header_start, archive.file)
        if start + member.num_bytes > archive.end:
            raise _outside(archive, name)
        elements = archive.elements.get(start) or _chunk_in(archive, name, start, member.num_bytes)
        counted.update(elements)
        tallies = [(part, Tally(part.dtype)) for part in elements]
        found = _crc(file, start, member.num_bytes, memory, count, tallies)
        for part, tally in tallies:
            checked.count(part.name, tally.found)
        if member.crc and found != member.crc:
            problem = f"{name} differs: CRC-32 {found:08x}, saved with {member.crc:08x}"
            names = archive.names or archive.places.get(start, ())
            checked.damages += _damages(archive, start, start + member.num_bytes, names, problem)
    for part in itertools.chain.from_iterable(archive.elements.values()):
        if part not in counted:
            checked.uncounted[part.name] = f"its elements are in no member of {archive.file}"
    return counted


def _chunk_in(archive: Archive, member: str, start: int, num_bytes: int) -> tuple[Elements, ...]:
    """The elements of the archive's chunk, if this member is what holds them, and nothing else."""
    if archive.chunk is None or not archive.counted:
        return ()
    name, dtype, chunk = archive.chunk
    if not num_bytes or num_bytes != chunk.box.num_elements * dtype.itemsize or "/data/" not in member:
        return ()
    return (Elements(name, dtype_name(dtype), start, start + num_bytes),)


def _crc(
    file: InputFile,
    start: int,
    num_bytes: int,
    memory: memoryview,
    count: Callable[[int], None],
    tallies: Sequence[tuple[Elements, Tally]],
) -> int:
    crc = 0
    for at in range(start, start + num_bytes, len(memory)):
        piece = memory[: min(len(memory), start + num_bytes - at)]
        file.read_into(at, piece)
        crc = binascii.crc32(piece, crc)
        for elements, tally in tallies:
            tally.update(overlap(elements, at, piece))
        count(len(piece))
    return crc


def _outside(archive: Archive, member: str) -> CheckpointError:
    return CheckpointError(f"{archive.file}: {member} reaches behind the archive that it is in")


def _damages(archive: Archive, start: int, end: int, names: tuple[str, ...], problem: str) -> Iterator[Damage]:
    for name in names or ("",):
        yield Damage(archive.file, start, end, name, problem)


def _read(file: InputFile, offset: int, length: int) -> bytes:
    data = bytearray(length)
    if length:
        file.read_into(offset, memoryview(data))
    return bytes(data)
