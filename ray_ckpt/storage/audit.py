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
from collections.abc import Iterable, Iterator, Mapping, Sequence

import xxhash

from ray_ckpt.errors import CheckpointError, CheckpointNotFoundError, StorageError
from ray_ckpt.format import dcp_metadata, values
from ray_ckpt.format.manifest import MANIFEST_NAME, Manifest
from ray_ckpt.format.record import digest
from ray_ckpt.format.torch_internals import ExtensionRegistry
from ray_ckpt.progress import NOBODY, Meter
from ray_ckpt.report import Damage, VerifyReport
from ray_ckpt.storage.archives import Archive, archives
from ray_ckpt.storage.checkpoint_reader import CheckpointReader
from ray_ckpt.storage.delta_links import built_on
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.nonfinite import count_apart
from ray_ckpt.storage.objects import Decoder, fetch_containers
from ray_ckpt.storage.placed import ELEMENTS, Stretch
from ray_ckpt.storage.places import OVERLAP, Counting, Piece, Places
from ray_ckpt.storage.publish import STOCK_RECORD_NAME
from ray_ckpt.storage.ranged_reads import tuning_for
from ray_ckpt.storage.stretches import Checked, check_parts, damages_of

_NO_DIGEST = (
    f"{MANIFEST_NAME} has no digest of itself, as those of format version 1: its names and values were compared with "
    f"{STOCK_RECORD_NAME} and the data files alone"
)

_CRC_ALONE = "what its zip archives hold was compared with the CRC-32 there, where the writer left one"

Work = Piece | Archive
"""A piece of work."""


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
    checked = check_parts(audit.files, map(audit.described, mine), tuning_for(audit.files).threads, meter)
    if rank == 0:
        checked.add(audit.check_records())
    meter.end()
    return audit.report(checked, num_bytes)


class Audit:
    """The check of whatever checkpoint is there: what there is to read, and the report of what was found.

    Holds a few words per piece of work, and of what lies in them no more than is read at the time.

    Args:
        scan_nan: count NaN and Inf as well.
        trusted: as `CheckpointReader` takes it.

    Raises:
        CheckpointNotFoundError, FormatError, UnsafeCheckpointError, StorageError: as `verify_share`.
    """

    def __init__(self, storage: Storage, *, scan_nan: bool = False, trusted: bool = False) -> None:
        self._started = time.monotonic()
        reader = CheckpointReader(storage, trusted=trusted)
        self._manifest = manifest = reader.read_stored()
        self._address = reader.address
        self.files = reader.files
        """Where the files are that the work is in."""
        self._sizes = self.files.sizes(manifest.files)
        self._scan_nan = scan_nan
        self._counting = counting = Counting(is_asked=scan_nan)
        self._places = Places(manifest, self._sizes, counting)
        zipped = [] if manifest.attempt else archives(self.files, manifest, self._sizes, counting)
        self.work, self._overlaps = _share_out(self._places, sorted(manifest.files), zipped)
        """Pieces in which no byte is read twice."""
        self._notes = (
            *(() if manifest.has_digest else (_NO_DIGEST,)), *((_CRC_ALONE,) if zipped else ()), *reader.notes,
        )  # fmt: skip

    def described(self, work: Work) -> Stretch | Archive:
        """A piece of work with all that is known of its bytes, as `check_parts` takes it."""
        return self._places.stretch(work) if isinstance(work, Piece) else work

    def check_records(self) -> Checked:
        """Everything that is not in a piece of work.

        Raises:
            StorageError: the storage does not answer.
        """
        manifest, sizes = self._manifest, self._sizes
        checked = Checked(list(self._overlaps))
        for file in sorted(manifest.files):
            checked.damages += self._misfits(file, sizes.get(file))
        if manifest.attempt:
            checked.damages += _misquoted(self.files, manifest, sizes)
            checked.damages += _stock_record(self.files, manifest)
        if broken := built_on(self.files, manifest)[1]:
            checked.damages.append(Damage(MANIFEST_NAME, 0, 0, "", broken))
        for name, chunk in self._counting.apart(manifest):
            count_apart(self.files, name, manifest.tensors[name].dtype, chunk, checked)
        return checked

    def _misfits(self, file: str, num_bytes: int | None) -> Iterator[Damage]:
        """A file that is missing, too short or too long, and what is lost with it."""
        saved = self._manifest.files[file]
        if num_bytes == saved or (num_bytes is not None and num_bytes > saved and not self._manifest.attempt):
            return
        problem = "the file is missing" if num_bytes is None else f"the file has {num_bytes} bytes, saved with {saved}"
        yield Damage(file, 0, saved, "", problem)
        for span in self._places.spans(file):
            if span.end > (num_bytes or 0) and span.names and span.what == ELEMENTS:
                yield from damages_of(file, span, span.start, span.end, problem)

    def report(self, checked: Checked, num_bytes: int) -> VerifyReport:
        """The report of this, in which `num_bytes` bytes were read.

        Raises:
            CheckpointNotFoundError: the checkpoint was deleted meanwhile.
        """
        manifest = self._manifest
        if checked.damages and manifest.attempt and not self.files.exists(MANIFEST_NAME):
            raise CheckpointNotFoundError(f"{self._address} was deleted while it was verified")
        uncounted = [f"{name} could not be scanned for NaN: {why}" for name, why in checked.uncounted.items()]
        return VerifyReport(
            uri=self._address,
            num_files=len(manifest.files),
            num_tensors=len(manifest.tensors),
            num_objects=len(manifest.objects),
            total_bytes=num_bytes,
            seconds=time.monotonic() - self._started,
            damages=tuple(sorted(set(checked.damages))),
            unchecked=tuple(sorted(self._places.unchecked())),
            notes=(*self._notes, *uncounted),
            nonfinite=dict(sorted(checked.nonfinite.items())) if self._scan_nan else None,
        )


# ------------------------------------------------------------------------------------------- what there is to read


def _share_out(places: Places, files: Iterable[str], zipped: Sequence[Archive]) -> tuple[list[Work], list[Damage]]:
    """Pieces of work, in which no byte is read twice; and what lies over something else, of which no save is guilty.

    Args:
        zipped: archives, whose files are read by them alone.
    """
    of_file: dict[str, list[Archive]] = {}
    for archive in zipped:
        of_file.setdefault(archive.file, []).append(archive)
    work: list[Work] = []
    damages: list[Damage] = []
    for file in files:
        if file not in of_file:
            work += places.pieces(file)
            damages += places.overlaps(file)
    for file, archives_there in of_file.items():
        at = 0
        for archive in sorted(archives_there, key=lambda archive: (archive.start, archive.end)):
            if archive.start < min(at, archive.end):
                damages += [Damage(file, archive.start, archive.end, name, OVERLAP) for name in archive.names or ("",)]
            else:
                work.append(archive)
                at = max(at, archive.end)
    return work, damages


# ------------------------------------------------------------------------------------- what a listing and records say


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
