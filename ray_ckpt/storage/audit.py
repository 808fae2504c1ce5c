"""Reading all of a committed checkpoint, and comparing it with what was recorded when it was saved.

    manifest ── parts ──> every byte of every file, each with what is known of it
             ── stretches ──> pieces of work; ranks share them, and on each rank threads
    audit ─┬─ files       as many bytes as recorded? one listing
           ├─ stretches   read once, piece by piece, hashed on the way
           ├─ archives    of other programs: their own CRC-32 (archives.py)
           ├─ values      those that stand in the manifest are those in the files
           └─ .metadata   tells stock DCP the same

What is wrong is collected rather than raised: whoever asks wants to know all of it. Only a storage that does not answer
is raised, for it says nothing of the checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import xxhash

from ray_ckpt.errors import CheckpointError, CheckpointNotFoundError, FormatError, StorageError
from ray_ckpt.format import dcp_metadata, values
from ray_ckpt.format.block_sums import BlockHasher, BlockSums
from ray_ckpt.format.manifest import MANIFEST_NAME, Chunk, Manifest, itemsize
from ray_ckpt.format.record import digest
from ray_ckpt.format.torch_container import container, parse_dtype
from ray_ckpt.format.torch_internals import ExtensionRegistry
from ray_ckpt.report import Damage, VerifyReport
from ray_ckpt.storage.archives import Archive, archives, check_archive
from ray_ckpt.storage.checkpoint_reader import CheckpointReader
from ray_ckpt.storage.files import InputFile, Storage
from ray_ckpt.storage.objects import Decoder, fetch_containers
from ray_ckpt.storage.publish import STOCK_RECORD_NAME
from ray_ckpt.storage.ranged_reads import tuning_for

PIECE_BYTES = 4 << 20
"""Size of a read, and of the one buffer that a thread holds."""

STRETCH_BYTES = 32 << 20
"""Size of the piece of work that a thread takes at a time, apart from an entry at its end."""

_NO_DIGEST = (
    f"{MANIFEST_NAME} has no digest of itself, as those of format version 1: its names and values were compared with "
    f"{STOCK_RECORD_NAME} and the data files alone"
)

_CRC_ALONE = "what its zip archives hold was compared with the CRC-32 there, where the writer left one"

_MAX_PADDING_BYTES = 1 << 20

_ELEMENTS, _CONTAINER, _PADDING = "elements", "container around the elements", "padding between entries"


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes `[start, end)` of a file and what is known of them."""

    start: int
    end: int
    names: tuple[str, ...]
    """Name of the tensor, or names of the objects that share these bytes."""
    what: str
    sums: BlockSums | None
    """Checksums of the bytes; None when there is nothing to compare with."""


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Consecutive parts of one file."""

    file: str
    parts: Sequence[_Span]

    @property
    def num_bytes(self) -> int:
        return self.parts[-1].end - self.parts[0].start


P = TypeVar("P", _Span, Archive)


Progress = Callable[[int, int], None]
"""Takes the bytes that are done, and those that there are."""


def _unseen(done: int, total: int) -> None:
    """Progress that nobody asked for."""


def verify_share(
    storage: Storage, *, rank: int = 0, num_ranks: int = 1, progress: Progress = _unseen, trusted: bool = False
) -> VerifyReport:
    """Read and check one rank's share of whatever checkpoint is there; `VerifyReport.merge` joins the shares.

    Args:
        trusted: as `CheckpointReader` takes it.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint, or it was deleted meanwhile.
        FormatError, UnsafeCheckpointError: its record or header is damaged, or not safe to read.
        StorageError: the storage does not answer.
    """
    reader = CheckpointReader(storage, trusted=trusted)
    manifest = reader.read_manifest()
    report = audit(reader.files, manifest, rank=rank, num_ranks=num_ranks, progress=progress)
    return replace(report, uri=reader.address, notes=(*report.notes, *reader.notes))


def audit(
    storage: Storage, manifest: Manifest, *, rank: int = 0, num_ranks: int = 1, progress: Progress = _unseen
) -> VerifyReport:
    """Check one rank's share of the files that a manifest describes; `VerifyReport.merge` joins the shares.

    Holds one buffer of `PIECE_BYTES` per thread, and a few records per entry of the manifest.

    Raises:
        CheckpointNotFoundError: the checkpoint was deleted meanwhile.
        StorageError: the storage does not answer.
    """
    started = time.monotonic()
    sizes, parts = storage.sizes(manifest.files), _parts(manifest)
    zipped = [] if manifest.attempt else archives(storage, manifest, sizes)
    work, overlaps = _share_out(parts, zipped, sizes)
    mine = work[rank::num_ranks]
    tuning = tuning_for(storage)
    damages: list[Damage] = []
    total, done = sum(part.num_bytes for part in mine), 0
    with ThreadPoolExecutor(tuning.threads, thread_name_prefix="ray_ckpt-verify") as pool:
        for part, found in zip(mine, pool.map(lambda part: _check(storage, part), mine), strict=True):
            damages += found
            done += part.num_bytes
            progress(done, total)
    if rank == 0:
        damages += overlaps
        for file, of_file in parts.items():
            damages += _misfits(manifest, file, of_file, sizes.get(file))
        if manifest.attempt:
            damages += _misquoted(storage, manifest, sizes)
            damages += _stock_record(storage, manifest)
    if damages and manifest.attempt and not storage.exists(MANIFEST_NAME):
        raise CheckpointNotFoundError(f"{storage.address} was deleted while it was verified")
    unchecked = {name for of_file in parts.values() for p in of_file if p.sums is None for name in p.names}
    return VerifyReport(
        uri=storage.address,
        num_files=len(manifest.files),
        num_tensors=len(manifest.tensors),
        num_objects=len(manifest.objects),
        total_bytes=total,
        seconds=time.monotonic() - started,
        damages=tuple(damages),
        unchecked=tuple(sorted(unchecked)),
        notes=(*(() if manifest.has_digest else (_NO_DIGEST,)), *((_CRC_ALONE,) if zipped else ())),
    )


# ------------------------------------------------------------------------------------------- what there is to read


def _parts(manifest: Manifest) -> dict[str, list[_Span]]:
    """File -> what is in it, by position, without a gap."""
    parts: dict[str, list[_Span]] = {file: [] for file in sorted(manifest.files)}
    for name, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            parts[chunk.file] += _tensor_parts(name, tensor.dtype, chunk)
    shared: dict[tuple[str, int, int, int | None], list[str]] = {}
    for name, entry in manifest.objects.items():
        shared.setdefault((entry.file, entry.start, entry.length, entry.checksum), []).append(name)
    for (file, start, length, checksum), names in shared.items():
        sums = None if checksum is None else BlockSums(max(1, length), checksum.to_bytes(8, "little"))
        parts[file].append(_Span(start, start + length, tuple(names), _ELEMENTS, sums))
    return {
        file: list(_without_gaps(sorted(of_file, key=_position), manifest.files[file], is_ours=bool(manifest.attempt)))
        for file, of_file in parts.items()
    }


def _tensor_parts(name: str, dtype: str, chunk: Chunk) -> Iterator[_Span]:
    end = chunk.start + chunk.length
    sums, data_start = chunk.checksums, chunk.data_start
    if sums is None or data_start is None:
        yield _Span(chunk.start, end, (name,), _ELEMENTS, None)
        return
    data_end = data_start + chunk.box.num_elements * itemsize(dtype)
    head, tail = _framing(dtype, chunk)
    yield _Span(chunk.start, data_start, (name,) if head else (), _CONTAINER, head)
    num_blocks = max(1, STRETCH_BYTES // sums.block_bytes)
    for first in range(0, len(sums), num_blocks):
        start = data_start + first * sums.block_bytes
        some = BlockSums(sums.block_bytes, sums.sums[8 * first : 8 * (first + num_blocks)])
        yield _Span(start, min(start + len(some) * sums.block_bytes, data_end), (name,), _ELEMENTS, some)
    yield _Span(data_end, end, (name,) if tail else (), _CONTAINER, tail)


def _framing(dtype: str, chunk: Chunk) -> tuple[BlockSums | None, BlockSums | None]:
    """What stands before and after the elements, which follows from dtype and shape alone."""
    try:
        wrapping = container(parse_dtype(dtype), chunk.box.sizes)
    except FormatError:  # a dtype of a later torch
        return None, None
    if (len(wrapping.head), wrapping.length) != ((chunk.data_start or 0) - chunk.start, chunk.length):
        return None, None
    return _sums_of(wrapping.head), _sums_of(wrapping.tail)


def _without_gaps(parts: Sequence[_Span], num_bytes: int, *, is_ours: bool) -> Iterator[_Span]:
    at = 0
    for part in parts:
        if part.start > at:
            yield _padding(at, part.start, is_ours=is_ours)
        yield part
        at = max(at, part.end)
    if at < num_bytes:
        yield _padding(at, num_bytes, is_ours=is_ours)


def _padding(start: int, end: int, *, is_ours: bool) -> _Span:
    """Zeros, where ray_ckpt wrote the file. It never leaves long gaps: who claims one may claim any length."""
    is_known = is_ours and end - start <= _MAX_PADDING_BYTES
    return _Span(start, end, (), _PADDING, _sums_of(bytes(end - start)) if is_known else None)


def _sums_of(data: bytes) -> BlockSums:
    return BlockSums(max(1, len(data)), xxhash.xxh3_64_intdigest(data).to_bytes(8, "little"))


def _share_out(
    parts: Mapping[str, Sequence[_Span]], zipped: Sequence[Archive], sizes: Mapping[str, int]
) -> tuple[list[_Stretch | Archive], list[Damage]]:
    """Pieces of work, in which no byte is read twice; and what lies over something else, of which no save is guilty.

    Args:
        zipped: archives, whose files are read by them alone.
        sizes: bytes of the files that are there.
    """
    of_file: dict[str, list[Archive]] = {}
    for archive in zipped:
        of_file.setdefault(archive.file, []).append(archive)
    work: list[_Stretch | Archive] = []
    damages: list[Damage] = []
    for file, spans in parts.items():
        if file not in of_file:
            kept, over = _apart(file, spans)
            work += _stretches(file, kept, sizes.get(file, 0))
            damages += over
    for file, archives_there in of_file.items():
        whole, over = _apart(file, archives_there)
        work += whole
        damages += over
    return work, damages


def _apart(file: str, parts: Sequence[P]) -> tuple[list[P], list[Damage]]:
    """The parts of a file by position, without those that lie over one before them; these are damaged."""
    kept: list[P] = []
    damages: list[Damage] = []
    at = 0
    for part in sorted(parts, key=_position):
        if part.start < min(at, part.end):
            problem = "lies over what is before it in the file"
            damages += [Damage(file, part.start, part.end, name, problem) for name in part.names or ("",)]
        else:
            kept.append(part)
            at = max(at, part.end)
    return kept, damages


def _stretches(file: str, parts: Sequence[_Span], num_bytes: int) -> Iterator[_Stretch]:
    """The parts that lie within the file as it is."""
    taken: list[_Span] = []
    for part in parts:
        if part.end > num_bytes or part.start == part.end:
            continue
        if taken and (part.start != taken[-1].end or part.end - taken[0].start > STRETCH_BYTES):
            yield _Stretch(file, taken)
            taken = []
        taken.append(part)
    if taken:
        yield _Stretch(file, taken)


def _position(part: _Span | Archive) -> tuple[int, int]:
    return part.start, part.end


# ------------------------------------------------------------------------------------------------------ reading it


def _check(storage: Storage, part: _Stretch | Archive) -> list[Damage]:
    return check_archive(storage, part) if isinstance(part, Archive) else _check_stretch(storage, part)


def _check_stretch(storage: Storage, stretch: _Stretch) -> list[Damage]:
    damages: list[Damage] = []
    read: set[_Span] = set()
    try:
        with storage.open_input(stretch.file) as file:
            window = _Window(file, stretch.parts[-1].end)
            for part in stretch.parts:
                found = window.sums(part)
                read.add(part)
                if part.sums is not None:
                    damages += _differences(stretch.file, part, part.sums, found)
    except StorageError as error:
        if error.transient:
            raise
        for part in stretch.parts:
            if part not in read:
                damages += _damages(stretch.file, part, part.start, part.end, f"cannot be read: {error.cause}")
    return damages


class _Window:
    """One buffer that slides over a file."""

    def __init__(self, file: InputFile, end: int) -> None:
        self._file = file
        self._end = end
        self._memory = memoryview(bytearray(PIECE_BYTES))
        self._held = range(0)

    def sums(self, part: _Span) -> BlockSums:
        """Read a part, and hash it in the blocks that it was hashed in when it was saved."""
        hasher = BlockHasher(PIECE_BYTES if part.sums is None else part.sums.block_bytes)
        at = part.start
        while at < part.end:
            if at not in self._held:
                size = min(PIECE_BYTES, self._end - at)
                self._held = range(0)
                self._file.read_into(at, self._memory[:size])
                self._held = range(at, at + size)
            until = min(part.end, self._held.stop)
            if part.sums is not None:
                hasher.update(self._memory[at - self._held.start : until - self._held.start])
            at = until
        return hasher.finish()


def _differences(file: str, part: _Span, saved: BlockSums, found: BlockSums) -> Iterator[Damage]:
    """One for each run of blocks that differ."""
    if saved.sums == found.sums:
        return
    wrong = [block for block in range(len(saved)) if saved[block] != found[block]]
    first = wrong[0]
    for block, following in zip(wrong, [*wrong[1:], -1], strict=True):
        if following != block + 1:
            start = part.start + first * saved.block_bytes
            end = min(part.start + (block + 1) * saved.block_bytes, part.end)
            sums = f"checksum {found[first]:016x}, saved with {saved[first]:016x}"
            yield from _damages(file, part, start, end, f"{part.what} differ: {sums}" if part.names else sums)
            first = following


def _damages(file: str, part: _Span, start: int, end: int, problem: str) -> Iterator[Damage]:
    """One for each name that lives there."""
    for name in part.names or ("",):
        yield Damage(file, start, end, name, problem)


# ------------------------------------------------------------------------------------- what a listing and records say


def _misfits(manifest: Manifest, file: str, parts: Sequence[_Span], num_bytes: int | None) -> Iterator[Damage]:
    """A file that is missing, too short or too long, and what is lost with it."""
    saved = manifest.files[file]
    if num_bytes == saved or (num_bytes is not None and num_bytes > saved and not manifest.attempt):
        return
    problem = "the file is missing" if num_bytes is None else f"the file has {num_bytes} bytes, saved with {saved}"
    yield Damage(file, 0, saved, "", problem)
    for part in parts:
        if part.end > (num_bytes or 0) and part.names and part.what == _ELEMENTS:
            yield from _damages(file, part, part.start, part.end, problem)


def _misquoted(storage: Storage, manifest: Manifest, sizes: Mapping[str, int]) -> Iterator[Damage]:
    """Values that the manifest holds itself, and that differ from those in the files, where these are whole."""
    quoted = {
        name: entry
        for name, entry in manifest.objects.items()
        if (entry.inline is not None or entry.blob is not None)
        and entry.start + entry.length <= sizes.get(entry.file, 0)
    }
    places = {(entry.file, entry.start): name for name, entry in quoted.items()}
    tuning = tuning_for(storage)
    try:
        read = fetch_containers(storage, {name: quoted[name] for name in places.values()}, tuning, verify=False)
    except StorageError as error:
        if error.transient:
            raise
        return  # what cannot be read is known by now
    decoder = Decoder(ExtensionRegistry(), trusted=False)
    texts: dict[str, str] = {}
    for name, entry in quoted.items():
        example = places[entry.file, entry.start]
        data = read[example]
        if xxhash.xxh3_64_intdigest(data) != entry.checksum:
            continue
        if entry.inline is None:
            is_same = data == entry.blob
        else:
            if example not in texts:
                texts[example] = _decoded(decoder, data, name)
            is_same = _encoded(entry.inline.value) == texts[example]
        if not is_same:
            problem = f"the value in {MANIFEST_NAME} differs from the one in the file"
            yield Damage(entry.file, entry.start, entry.start + entry.length, name, problem)


def _decoded(decoder: Decoder, data: bytes, name: str) -> str:
    try:
        return _encoded(decoder.load(data, name))
    except CheckpointError as error:  # values that stand in the manifest are plain
        return str(error)


def _encoded(value: object) -> str:
    try:
        return json.dumps(values.encode(value))
    except values.NotPlainError:
        return f"a {type(value).__name__}"


def _stock_record(storage: Storage, manifest: Manifest) -> Iterator[Damage]:
    """What stock DCP would read must be what was written with the manifest.

    Where the manifest has its digest, every bit must be; or every bit of what would be written today, as `clean`
    restores it. An older manifest has none: then it must say the same, as far as we read it.
    """
    try:
        data = storage.read_bytes(STOCK_RECORD_NAME)
        if manifest.metadata_digest == digest(data) or data == dcp_metadata.dumps(manifest):
            return
        difference = dcp_metadata.difference(dcp_metadata.loads(data), manifest)
    except (StorageError, CheckpointError) as error:
        if isinstance(error, StorageError) and error.transient:
            raise
        yield Damage(STOCK_RECORD_NAME, 0, 0, "", f"stock DCP cannot read the checkpoint: {error}")
        return
    if difference or manifest.metadata_digest is not None:
        found = difference or "its bytes are not those that were written"
        if digest(data) == manifest.replaced_metadata:
            found = "it is still that of the checkpoint which was replaced, as the save was cut off; save again"
        problem = f"tells stock DCP something else than {MANIFEST_NAME}: {found}"
        yield Damage(STOCK_RECORD_NAME, 0, len(data), "", problem)
