"""Writing one file of a target, and reading it back. Both run here, or in a task on another node.

    write_file ── TensorPieces: some MiB, checked ── cast ── summed ── the file's form ──> NAME.part ──> NAME
    check_file ── the file's own reader ── summed ──> the same sums, or an error that names the tensor

Memory, whatever the sizes of files and tensors: the buffers of `storage/rewrite.py`, and what one of them becomes by a
cast. The pickle of a file by `torch.save` and the values that are no tensors are held too.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import xxhash

from ray_ckpt.conversion.jobs import FileJob, TensorJob, Written
from ray_ckpt.conversion.torch_writing import write_torch
from ray_ckpt.errors import FormatError, IntegrityError, StorageError, UsageError
from ray_ckpt.format import safetensors
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.fingerprint import WORD_MASK, digest_of, formula_of
from ray_ckpt.format.fingerprinting import sum_of_part
from ray_ckpt.format.manifest import Manifest, TensorEntry
from ray_ckpt.format.torch_container import dtype_name, parse_dtype
from ray_ckpt.progress import NOBODY, Meter
from ray_ckpt.storage import safetensors_files, torch_files
from ray_ckpt.storage.data_file import Packed, pack_into
from ray_ckpt.storage.files import OutputFile, Storage
from ray_ckpt.storage.ranged_reads import local_threads
from ray_ckpt.storage.rewrite import Entry, TensorPieces, WantedTensor
from ray_ckpt.storage.staging import bytes_of
from ray_ckpt.text import quoted

__all__ = ["check_file", "digest_of_file", "joined", "write_file"]


def write_file(job: FileJob, source: Storage, target: Storage, meter: Meter = NOBODY) -> Written:
    """Write one file. It is durable on return, and has its name only then.

    Args:
        meter: counts the bytes of tensors that were written.

    Raises:
        IntegrityError: what was read differs from its checksum, or from the fingerprint in the source's record.
        UsageError: a cast would turn finite elements into infinite ones.
        CheckpointError, StorageError: something cannot be read, or not be written.
    """

    def attempt() -> Written:
        with meter.trial() as passed:
            return _write_file(source, target, job, passed)

    return target.retried(attempt)


def _write_file(source: Storage, target: Storage, job: FileJob, passed: Callable[[int], None]) -> Written:
    reading = TensorPieces(source)
    sums: dict[str, str] = {}
    threads = max(1, local_threads() - 1)  # what is read ahead, and what is written, takes a core too
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="ray_ckpt-fingerprint") as pool,
        _whole_file(target, job.name) as out,
    ):
        wanted = {number: tensor.source for number, tensor in enumerate(job.tensors)}
        pieces = _summed(_cast(reading.pieces(wanted), job, pool, threads), job, sums, passed)
        record = ""
        if job.form == "safetensors":
            out.write(safetensors.header((tensor.name, tensor.dtype, tensor.shape) for tensor in job.tensors))
            for _, data in pieces:
                out.write(data)
        elif job.form == "torch":
            write_torch(out, job.pickled, [tensor.num_bytes for tensor in job.tensors], pieces)
        else:
            record = _record_of(job, pack_into(out, reading.objects(job.objects), pieces), out.num_bytes).to_json()
    return Written(job.name, out.num_bytes, out.digest, sums, record)


class _HashedFile:
    """A file being written, with a digest of all its bytes."""

    def __init__(self, name: str, file: OutputFile) -> None:
        self.name = name
        self.num_bytes = 0
        self._file = file
        self._hash = xxhash.xxh3_128()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._hash.update(data)
        self._file.write(data)
        self.num_bytes += len(data)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


@contextlib.contextmanager
def _whole_file(storage: Storage, name: str) -> Iterator[_HashedFile]:
    """A file that has its name once it is whole; after an error there is none of that name."""
    # A task that was given up may still write in the background, so that each attempt has a name of its own.
    written_as = name if storage.puts_at_once else f"{name}.{uuid.uuid4().hex[:12]}.part"
    file = storage.create(written_as)
    try:
        yield _HashedFile(name, file)
        file.close(with_name=written_as == name)
    except BaseException:
        # Left to itself, an object store's stream is closed when it is collected, and what there is then appears.
        with contextlib.suppress(StorageError):
            file.close(with_name=False)
        with contextlib.suppress(StorageError):
            storage.delete(written_as)
        raise
    if written_as != name:
        storage.rename(written_as, name)


# ------------------------------------------------------------------------------------------------------ pieces

_Pieces = Iterator[tuple[Entry, memoryview]]


def _cast(pieces: _Pieces, job: FileJob, pool: ThreadPoolExecutor, threads: int) -> _Pieces:
    """In the target's dtypes. What the source's record has a fingerprint of is compared with it on the way, by other
    threads while the piece is written."""
    opened: Entry | None = None
    given: Entry = -1, torch.empty(0)
    check: _Fingerprinted | None = None
    for entry, data in pieces:
        tensor = job.tensors[entry[0]]
        if entry is not opened:
            if check is not None:
                check.finish()
            opened, check = entry, _Fingerprinted(tensor) if tensor.fingerprint else None
            given = entry[0], torch.empty(tensor.shape, dtype=parse_dtype(tensor.dtype), device="meta")
        running: list[Future[int]] = [] if check is None else check.begin(data, pool, threads)
        is_cast = given[1].dtype != entry[1].dtype and len(data) > 0
        yield given, bytes_of(_converted(data, entry[1].dtype, given[1].dtype, tensor.name)) if is_cast else data
        if check is not None:
            check.add(running)
    if check is not None:
        check.finish()


def _converted(data: memoryview, dtype: torch.dtype, wanted: torch.dtype, name: str) -> torch.Tensor:
    """As torch's `Tensor.to` casts: to the nearest, ties to even.

    Raises:
        UsageError: elements would become infinite that are not.
    """
    elements = torch.frombuffer(data, dtype=torch.uint8).view(dtype)
    converted = elements.to(wanted)
    if all(bool(end.isfinite()) for end in torch.aminmax(converted)):  # many times faster than to count
        return converted
    if num_lost := int((converted.isinf() & elements.isfinite()).sum()):
        raise UsageError(
            f"{quoted(name)} has {num_lost} elements that are too large for {dtype_name(wanted)} and "
            "would become infinite: choose another dtype, such as bfloat16 or float32"
        )
    return converted


class _Fingerprinted:
    """Compares the elements of one tensor, as they come, with its recorded fingerprint."""

    def __init__(self, tensor: TensorJob) -> None:
        self._tensor = tensor
        self._dtype = parse_dtype(tensor.source.dtype)
        self._formula = formula_of(tensor.fingerprint)
        self._num_elements = 0
        self._sum = 0

    def begin(self, data: memoryview, pool: ThreadPoolExecutor, threads: int) -> list[Future[int]]:
        """Start to sum up the elements that come next, cut into as many parts as there are threads."""
        if not len(data):
            return []
        sums, elements = [], torch.frombuffer(data, dtype=torch.uint8).view(self._dtype)
        for part in elements.chunk(threads):
            start, end = self._num_elements, self._num_elements + part.numel()
            box = Box((start,), (part.numel(),))
            sums.append(pool.submit(sum_of_part, part, box, (end,), formula=self._formula))
            self._num_elements = end
        return sums

    def add(self, sums: Sequence[Future[int]]) -> None:
        """Wait for what `begin` has started."""
        self._sum = (self._sum + sum(part.result() for part in sums)) & WORD_MASK

    def finish(self) -> None:
        tensor = self._tensor
        found = digest_of(tensor.source.dtype, tensor.shape, [self._sum], self._formula)
        if found != tensor.fingerprint:
            raise FormatError(
                f"{quoted(tensor.source.name)} differs from the fingerprint in the source's record: {found}, recorded "
                f"{tensor.fingerprint}; what was saved is not what the ranks held"
            )


def _summed(pieces: _Pieces, job: FileJob, sums: dict[str, str], passed: Callable[[int], None]) -> _Pieces:
    """Fills in the sums of the tensors that have passed."""
    opened: Entry | None = None
    content = _Content("", ())
    for entry, data in pieces:
        if entry is not opened:
            if opened is not None:
                sums[job.tensors[opened[0]].name] = content.digest
            tensor = job.tensors[entry[0]]
            opened, content = entry, _Content(tensor.dtype, tensor.shape)
        content.add(data)
        yield entry, data
        passed(len(data))
    if opened is not None:
        sums[job.tensors[opened[0]].name] = content.digest


class _Content:
    """The digest of a tensor's dtype, shape and elements, whatever files and chunks they lie in."""

    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self._hash = xxhash.xxh3_128(f"{dtype}{list(shape)}".encode())

    def add(self, data: memoryview) -> None:
        self._hash.update(data)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def _record_of(job: FileJob, packed: Packed[int], num_bytes: int) -> Manifest:
    """The manifest of a file of containers."""
    written = [job.tensors[key] for key in packed.keys]
    chunks = packed.tensors.chunks((tensor.source.box, tensor.num_bytes) for tensor in written)
    tensors = {
        tensor.name: TensorEntry(tensor.dtype, tensor.shape, (chunk,), tensor.path)
        for tensor, chunk in zip(written, chunks, strict=True)
    }
    objects = {job.objects[key][0]: entry._replace(path=job.objects[key][1].path) for key, entry in packed.objects}
    return Manifest(tensors, objects, {job.name: num_bytes})


# --------------------------------------------------------------------------------------------------- reading back


def check_file(job: FileJob, target: Storage, written: Written, meter: Meter = NOBODY) -> None:
    """Read a file as whoever wants it will, and compare every tensor with what was written.

    Args:
        meter: counts the bytes of tensors that were read.

    Raises:
        IntegrityError: a tensor has other bits, or is missing.
        CheckpointError, StorageError: the file cannot be read.
    """
    manifest = _read_manifest(target, job, written)
    expected = {tensor.name: tensor for tensor in job.tensors}
    if manifest.tensors.keys() != expected.keys():
        odd = sorted(manifest.tensors.keys() ^ expected.keys())[0]
        raise FormatError(f"{target.address}/{job.name} does not hold what was written: see {quoted(odd)}")
    sums: dict[str, str] = {}
    wanted = {
        number: WantedTensor(tensor.name, entry.dtype, Box.whole(entry.shape), entry.chunks)
        for number, tensor in enumerate(job.tensors)
        for entry in (manifest.tensors[tensor.name],)
    }
    for number, tensor in enumerate(job.tensors):
        if (wanted[number].dtype, wanted[number].box.sizes) != (tensor.dtype, tensor.shape):
            raise FormatError(f"{quoted(tensor.name)} in {job.name} reads back as another dtype or shape")
    reading = TensorPieces(target)
    for _ in _summed(reading.pieces(wanted), job, sums, meter.add):
        pass
    if job.objects:
        reading.objects({key: (name, manifest.objects[name]) for key, (name, _) in job.objects.items()})
    for tensor in job.tensors:
        if sums[tensor.name] != written.tensors[tensor.name]:
            chunk = manifest.tensors[tensor.name].chunks[0]
            raise IntegrityError(
                file=job.name,
                start=chunk.start,
                end=chunk.start + chunk.length,
                tensor=tensor.name,
                expected=written.tensors[tensor.name],
                found=sums[tensor.name],
                hint="the storage returns other bytes than were written to it; start the command again",
            )


def _read_manifest(target: Storage, job: FileJob, written: Written) -> Manifest:
    if job.form == "safetensors":
        return safetensors_files.open_files(target, [job.name])
    if job.form == "torch":
        return torch_files.open_file(target, job.name, written.num_bytes)
    return Manifest.from_json(written.record)


def digest_of_file(storage: Storage, name: str, num_bytes: int) -> str | None:
    """XXH3-128 of a file; None when there is none of that size."""
    if storage.size(name) != num_bytes:
        return None
    found = xxhash.xxh3_128()
    with storage.open_input(name) as file:
        for piece in file.pieces(num_bytes):
            found.update(piece)
    return found.hexdigest()


def joined(records: Mapping[str, Written]) -> Manifest:
    """One manifest of files of containers."""
    manifests = [Manifest.from_json(written.record) for written in records.values()]
    return Manifest(
        {name: entry for manifest in manifests for name, entry in manifest.tensors.items()},
        {name: entry for manifest in manifests for name, entry in manifest.objects.items()},
        {name: size for manifest in manifests for name, size in manifest.files.items()},
    )
