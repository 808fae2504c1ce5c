"""Reading all of a committed checkpoint, and comparing it with what was recorded when it was saved.

    manifest ── parts ──> every byte of every file, each with what is known of it
             ── Audit.work ──> pieces of work, which ranks, threads or tasks share
    audit ─┬─ files       as many bytes as recorded? one listing
           ├─ stretches   read once, piece by piece, hashed on the way (stretches.py)
           ├─ archives    of other programs: their own CRC-32 (archives.py)
           ├─ values      those that stand in the manifest are those in the files
           └─ .metadata   tells stock DCP the same

What is wrong is collected rather than raised: whoever asks wants to know all of it. Only a storage that does not answer
is raised, for it says nothing of the checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import xxhash

from ray_ckpt.errors import CheckpointError, CheckpointNotFoundError, FormatError, StorageError
from ray_ckpt.format import dcp_metadata, ranges, values
from ray_ckpt.format.block_sums import BlockSums
from ray_ckpt.format.manifest import MANIFEST_NAME, Chunk, Manifest, itemsize
from ray_ckpt.format.record import digest
from ray_ckpt.format.torch_container import container, parse_dtype
from ray_ckpt.format.torch_internals import ExtensionRegistry
from ray_ckpt.progress import NOBODY, Meter
from ray_ckpt.report import Damage, VerifyReport
from ray_ckpt.storage.archives import Archive, archives
from ray_ckpt.storage.checkpoint_reader import CheckpointReader
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.nonfinite import count_apart, may_be_odd
from ray_ckpt.storage.objects import Decoder, fetch_containers
from ray_ckpt.storage.publish import STOCK_RECORD_NAME
from ray_ckpt.storage.ranged_reads import tuning_for
from ray_ckpt.storage.stretches import Checked, Elements, Span, Stretch, check_parts, damages_of

STRETCH_BYTES = 32 << 20
"""Size of the piece of work that a thread takes at a time, apart from an entry at its end."""

_NO_DIGEST = (
    f"{MANIFEST_NAME} has no digest of itself, as those of format version 1: its names and values were compared with "
    f"{STOCK_RECORD_NAME} and the data files alone"
)

_CRC_ALONE = "what its zip archives hold was compared with the CRC-32 there, where the writer left one"

_MAX_PADDING_BYTES = 1 << 20

_ELEMENTS, _CONTAINER, _PADDING = "elements", "container around the elements", "padding between entries"


Work = Stretch | Archive
"""A piece of work."""

P = TypeVar("P", Span, Archive)


def verify_share(
    storage: Storage,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    scan_nan: bool = False,
    trusted: bool = False,
    meter: Meter = NOBODY,
) -> VerifyReport:
    """Read and check one rank's share of whatever checkpoint is there; `VerifyReport.merge` joins the shares.

    Args:
        scan_nan: count NaN and Inf in the same read.
        trusted: as `CheckpointReader` takes it.
        meter: counts the bytes that are read.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint, or it was deleted meanwhile.
        FormatError, UnsafeCheckpointError: its record or header is damaged, or not safe to read.
        StorageError: the storage does not answer.
    """
    audit = Audit(storage, scan_nan=scan_nan, trusted=trusted)
    mine = audit.work[rank::num_ranks]
    num_bytes = sum(part.num_bytes for part in mine)
    meter.expect(num_bytes)
    checked = check_parts(audit.files, mine, tuning_for(audit.files).threads, meter)
    if rank == 0:
        checked.add(audit.check_records())
    meter.end()
    return audit.report(checked, num_bytes)


class Audit:
    """The check of whatever checkpoint is there: what there is to read, and the report of what was found.

    Holds a few records per entry of the manifest.

    Args:
        scan_nan: count NaN and Inf as well.
        trusted: as `CheckpointReader` takes it.

    Raises:
        CheckpointNotFoundError, FormatError, UnsafeCheckpointError, StorageError: as `verify_share`.
    """

    def __init__(self, storage: Storage, *, scan_nan: bool = False, trusted: bool = False) -> None:
        self._started = time.monotonic()
        reader = CheckpointReader(storage, trusted=trusted)
        self._manifest = manifest = reader.read_manifest()
        self._address = reader.address
        self.files = reader.files
        """Where the files are that the work is in."""
        self._sizes = self.files.sizes(manifest.files)
        self._scan_nan = scan_nan
        countable, self._apart = _countable(manifest) if scan_nan else ({}, [])
        self._parts = _parts(manifest, countable)
        zipped = [] if manifest.attempt else archives(self.files, manifest, self._sizes, countable)
        self.work, self._overlaps = _share_out(self._parts, zipped, self._sizes)
        """Pieces in which no byte is read twice."""
        self._notes = (
            *(() if manifest.has_digest else (_NO_DIGEST,)), *((_CRC_ALONE,) if zipped else ()), *reader.notes,
        )  # fmt: skip

    def check_records(self) -> Checked:
        """Everything that is not in a piece of work.

        Raises:
            StorageError: the storage does not answer.
        """
        manifest, sizes = self._manifest, self._sizes
        checked = Checked(list(self._overlaps))
        for file, of_file in self._parts.items():
            checked.damages += _misfits(manifest, file, of_file, sizes.get(file))
        if manifest.attempt:
            checked.damages += _misquoted(self.files, manifest, sizes)
            checked.damages += _stock_record(self.files, manifest)
        for name, chunk in self._apart:
            count_apart(self.files, name, manifest.tensors[name].dtype, chunk, checked)
        return checked

    def report(self, checked: Checked, num_bytes: int) -> VerifyReport:
        """The report of this, in which `num_bytes` bytes were read.

        Raises:
            CheckpointNotFoundError: the checkpoint was deleted meanwhile.
        """
        manifest = self._manifest
        if checked.damages and manifest.attempt and not self.files.exists(MANIFEST_NAME):
            raise CheckpointNotFoundError(f"{self._address} was deleted while it was verified")
        uncounted = [f"{name} could not be scanned for NaN: {why}" for name, why in checked.uncounted.items()]
        unchecked = {name for of_file in self._parts.values() for p in of_file if p.sums is None for name in p.names}
        return VerifyReport(
            uri=self._address,
            num_files=len(manifest.files),
            num_tensors=len(manifest.tensors),
            num_objects=len(manifest.objects),
            total_bytes=num_bytes,
            seconds=time.monotonic() - self._started,
            damages=tuple(sorted(set(checked.damages))),
            unchecked=tuple(sorted(unchecked)),
            notes=(*self._notes, *uncounted),
            nonfinite=dict(sorted(checked.nonfinite.items())) if self._scan_nan else None,
        )


# ------------------------------------------------------------------------------------------- what there is to read


def _countable(manifest: Manifest) -> tuple[dict[str, list[Elements]], list[tuple[str, Chunk]]]:
    """Tensor -> what of it can be counted where it lies, for tensors that may hold NaN or Inf; and chunks to be read
    apart, as their bytes are encoded or hold other elements in between."""
    found: dict[str, list[Elements]] = {}
    apart: list[tuple[str, Chunk]] = []
    odd = {dtype for dtype in {tensor.dtype for tensor in manifest.tensors.values()} if may_be_odd(dtype)}
    for name, tensor in manifest.tensors.items():
        if tensor.dtype not in odd:
            continue
        found[name] = []
        for chunk in tensor.chunks:
            strides = chunk.strides
            is_dense = strides is None or ranges.span(chunk.box.sizes, strides) == chunk.box.num_elements
            if chunk.transforms or not is_dense:
                apart.append((name, chunk))
            elif chunk.data_start is not None and chunk.box.num_elements:
                end = chunk.data_start + chunk.box.num_elements * itemsize(tensor.dtype)
                found[name].append(Elements(name, tensor.dtype, chunk.data_start, end))
    return found, apart


def _parts(manifest: Manifest, countable: Mapping[str, Sequence[Elements]]) -> dict[str, list[Span]]:
    """File -> what is in it, by position, without a gap."""
    parts: dict[str, list[Span]] = {file: [] for file in sorted(manifest.files)}
    for name, tensor in manifest.tensors.items():
        elements = {part.start: part for part in countable.get(name, ())}
        for chunk in tensor.chunks:
            counted = None if chunk.data_start is None else elements.get(chunk.data_start)
            parts[chunk.file] += _tensor_parts(name, tensor.dtype, chunk, counted)
    shared: dict[tuple[str, int, int, int | None], list[str]] = {}
    for name, entry in manifest.objects.items():
        shared.setdefault((entry.file, entry.start, entry.length, entry.checksum), []).append(name)
    for (file, start, length, checksum), names in shared.items():
        sums = None if checksum is None else BlockSums(max(1, length), checksum.to_bytes(8, "little"))
        parts[file].append(Span(start, start + length, tuple(names), _ELEMENTS, sums))
    return {
        file: list(_without_gaps(sorted(of_file, key=_position), manifest.files[file], is_ours=bool(manifest.attempt)))
        for file, of_file in parts.items()
    }


def _tensor_parts(name: str, dtype: str, chunk: Chunk, counted: Elements | None) -> Iterator[Span]:
    end = chunk.start + chunk.length
    sums, data_start = chunk.checksums, chunk.data_start
    if sums is None or data_start is None:
        yield Span(chunk.start, end, (name,), _ELEMENTS, None, counted)
        return
    data_end = data_start + chunk.box.num_elements * itemsize(dtype)
    head, tail = _framing(dtype, chunk)
    yield Span(chunk.start, data_start, (name,) if head else (), _CONTAINER, head)
    num_blocks = max(1, STRETCH_BYTES // sums.block_bytes)
    for first in range(0, len(sums), num_blocks):
        start = data_start + first * sums.block_bytes
        some = BlockSums(sums.block_bytes, sums.sums[8 * first : 8 * (first + num_blocks)])
        until = min(start + len(some) * sums.block_bytes, data_end)
        yield Span(start, until, (name,), _ELEMENTS, some, counted)
    yield Span(data_end, end, (name,) if tail else (), _CONTAINER, tail)


def _framing(dtype: str, chunk: Chunk) -> tuple[BlockSums | None, BlockSums | None]:
    """What stands before and after the elements, which follows from dtype and shape alone."""
    try:
        wrapping = container(parse_dtype(dtype), chunk.box.sizes)
    except FormatError:  # a dtype of a later torch
        return None, None
    if (len(wrapping.head), wrapping.length) != ((chunk.data_start or 0) - chunk.start, chunk.length):
        return None, None
    return _sums_of(wrapping.head), _sums_of(wrapping.tail)


def _without_gaps(parts: Sequence[Span], num_bytes: int, *, is_ours: bool) -> Iterator[Span]:
    at = 0
    for part in parts:
        if part.start > at:
            yield _padding(at, part.start, is_ours=is_ours)
        yield part
        at = max(at, part.end)
    if at < num_bytes:
        yield _padding(at, num_bytes, is_ours=is_ours)


def _padding(start: int, end: int, *, is_ours: bool) -> Span:
    """Zeros, where ray_ckpt wrote the file. It never leaves long gaps: who claims one may claim any length."""
    is_known = is_ours and end - start <= _MAX_PADDING_BYTES
    return Span(start, end, (), _PADDING, _sums_of(bytes(end - start)) if is_known else None)


def _sums_of(data: bytes) -> BlockSums:
    return BlockSums(max(1, len(data)), xxhash.xxh3_64_intdigest(data).to_bytes(8, "little"))


def _share_out(
    parts: Mapping[str, Sequence[Span]], zipped: Sequence[Archive], sizes: Mapping[str, int]
) -> tuple[list[Stretch | Archive], list[Damage]]:
    """Pieces of work, in which no byte is read twice; and what lies over something else, of which no save is guilty.

    Args:
        zipped: archives, whose files are read by them alone.
        sizes: bytes of the files that are there.
    """
    of_file: dict[str, list[Archive]] = {}
    for archive in zipped:
        of_file.setdefault(archive.file, []).append(archive)
    work: list[Stretch | Archive] = []
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


def _stretches(file: str, parts: Sequence[Span], num_bytes: int) -> Iterator[Stretch]:
    """The parts that lie within the file as it is."""
    taken: list[Span] = []
    for part in parts:
        if part.end > num_bytes or part.start == part.end:
            continue
        if taken and (part.start != taken[-1].end or part.end - taken[0].start > STRETCH_BYTES):
            yield Stretch(file, taken)
            taken = []
        taken.append(part)
    if taken:
        yield Stretch(file, taken)


def _position(part: Span | Archive) -> tuple[int, int]:
    return part.start, part.end


# ------------------------------------------------------------------------------------- what a listing and records say


def _misfits(manifest: Manifest, file: str, parts: Sequence[Span], num_bytes: int | None) -> Iterator[Damage]:
    """A file that is missing, too short or too long, and what is lost with it."""
    saved = manifest.files[file]
    if num_bytes == saved or (num_bytes is not None and num_bytes > saved and not manifest.attempt):
        return
    problem = "the file is missing" if num_bytes is None else f"the file has {num_bytes} bytes, saved with {saved}"
    yield Damage(file, 0, saved, "", problem)
    for part in parts:
        if part.end > (num_bytes or 0) and part.names and part.what == _ELEMENTS:
            yield from damages_of(file, part, part.start, part.end, problem)


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
