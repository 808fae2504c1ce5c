"""The manifest: everything there is to know about a checkpoint, as JSON that needs neither torch nor pyarrow.

    {"format": "ray_ckpt", "version": 2, "attempt": ..., "layout": ..., "saved_by": {...},
     "fingerprints": {name: digest}, "metadata_digest": ..., "fingerprints_2": {name: digest},
     "files":   {file: bytes},
     "tensors": {name: {"dtype", "shape", "path", "chunks": [{"offsets", "sizes", "file", "start", "length",
                                                              "data_start", "block_bytes", "checksums"}]}},
     "objects": {name: {"path", "file", "start", "length", "value" | "blob", "checksum"}},
     "digest": ...}

A tensor is stored as disjoint chunks that cover it. A chunk is a box of the tensor in row-major order; its elements are
the bytes `[data_start, data_start + data_bytes)` of `file`, inside the container `[start, start + length)` that stock
DCP reads. `checksums` is base64 of one little-endian XXH3-64 per block of `block_bytes` data bytes, the last of which
may be short. An object is a non-tensor: its value inline when JSON holds it exactly (`values.py`), else the container's
bytes in base64 when they are few, else only in the file.

`path` is where the entry stood in the nested state dict; it is left out when it is the name itself.

`metadata_digest` is the XXH3-128 of the `.metadata` beside the record, which stock DCP reads. `digest` is the record's
own (`record.py`): every flipped bit of either is found. Version 1 had neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

from ray_ckpt.errors import FormatError
from ray_ckpt.format import canonical, limits, record
from ray_ckpt.format.boxes import check_cover
from ray_ckpt.format.entries import (
    Chunk,
    Inline,
    ObjectEntry,
    Path,
    TensorColumns,
    TensorEntry,
    check_file_name,
    itemsize,
)
from ray_ckpt.format.fingerprint import CURRENT, FIRST, formula_of
from ray_ckpt.format.limits import check_shape
from ray_ckpt.format.ranges import span
from ray_ckpt.format.tensor_table import TensorTable
from ray_ckpt.rounding import ceil_div
from ray_ckpt.text import quoted

__all__ = [
    "IMPORTED_FROM",
    "MANIFEST_NAME",
    "VERSION",
    "Chunk",
    "Inline",
    "Manifest",
    "ObjectEntry",
    "Path",
    "TensorColumns",
    "TensorEntry",
    "check_file_name",
    "itemsize",
]

MANIFEST_NAME = "manifest.json"
"""A directory that holds a file of this name holds a committed checkpoint; any other does not."""

VERSION = 2
"""Raised when an older reader would misread what is written; readers accept every version up to their own."""

IMPORTED_FROM = "imported_from"
"""Key of `saved_by`: what kind of checkpoint of another program's one of ours was made of. Its names are that one's."""

_SEALED_SINCE = 2
"""Records of this version and later carry a digest."""

_MEMBERS = {"format", "version", "attempt", "layout", "saved_by", "fingerprints", "files", "tensors", "objects"}
"""Members of a record of every version. All are required, so that a damaged key drops none silently."""

_FINGERPRINTS = {FIRST: "fingerprints", CURRENT: "fingerprints_2"}
"""Formula -> member. A reader that knows the first formula alone finds none by the second, and takes none for wrong."""


@dataclass(frozen=True, repr=False)
class Manifest:
    """What a checkpoint holds: its tensors, its other values, its files, and the layout that saved it.

    Example:
        >>> import torch
        >>> from ray_ckpt import CheckpointStore, save
        >>> store = CheckpointStore("run")
        >>> report = save({"model": {"weight": torch.ones(2, 3)}, "lr": 0.1}, store, step=1, layout="single")
        >>> manifest = store.manifest(1)
        >>> manifest.tensors["model.weight"].shape, manifest.values(), manifest.layout
        ((2, 3), {'lr': 0.1}, 'single')
    """

    tensors: Mapping[str, TensorEntry]
    """Name -> tensor. Of a very large checkpoint it makes an entry each time that it is asked for one."""
    objects: Mapping[str, ObjectEntry]
    files: Mapping[str, int]
    """Name -> bytes of every data file. In a foreign checkpoint: the bytes up to the end of the last container."""
    attempt: str = ""
    """Id of the attempt that wrote it; empty in a foreign checkpoint."""
    layout: str | None = None
    """How the model lay across ranks when it was saved, in the words of whoever saved it."""
    saved_by: Mapping[str, str] = field(default_factory=dict)
    """Name -> version of the software that wrote it; empty in a foreign checkpoint."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Tensor -> `Fingerprint.digest` of what the ranks held; it does not depend on the layout."""

    metadata_digest: str | None = field(default=None, compare=False)
    """XXH3-128 of the `.metadata` that was written with it; None when that is not known."""
    replaced_metadata: str | None = field(default=None, compare=False)
    """XXH3-128 of the `.metadata` of the checkpoint that this one has replaced; None when it replaced none."""
    has_digest: bool = field(default=True, compare=False)
    """Whether the record that this was read from carries a digest of itself. Those of version 1 do not."""

    @property
    def has_own_names(self) -> bool:
        """Whether a save of ours chose the names, rather than another program."""
        return bool(self.attempt) and IMPORTED_FROM not in self.saved_by

    @property
    def total_bytes(self) -> int:
        """Size of the checkpoint: the sum of its data files."""
        return sum(self.files.values())

    def values(self) -> dict[str, Any]:
        """Every non-tensor whose value the manifest holds itself, by name: no file is read for it."""
        return {name: entry.inline.value for name, entry in self.objects.items() if entry.inline is not None}

    def __repr__(self) -> str:
        """A line, however many entries there are."""
        layout = f", layout {self.layout!r}" if self.layout is not None else ""
        return (
            f"<Manifest of {len(self.tensors)} tensors and {len(self.objects)} objects, {self.total_bytes} bytes in "
            f"{len(self.files)} files{layout}>"
        )

    def to_json(self) -> str:
        """The text of `manifest.json`, with the digest of itself; `from_json` reads it."""
        return self.to_bytes().decode()

    def to_bytes(self) -> bytes:
        """The same as it stands in the file."""
        head: dict[str, Any] = {
            "format": "ray_ckpt",
            "version": VERSION,
            "attempt": self.attempt,
            "layout": self.layout,
            "saved_by": dict(self.saved_by),
            "fingerprints": {},
            "metadata_digest": self.metadata_digest,
            "files": dict(self.files),
        }
        for name, digest in self.fingerprints.items():
            head.setdefault(_FINGERPRINTS[formula_of(digest)], {})[name] = digest
        if self.replaced_metadata is not None:
            head["replaced_metadata"] = self.replaced_metadata
        tensors, objects = record.tensors_to_json(self.tensors), record.objects_to_json(self.objects)
        return record.sealed(chain((f'{record.dumps(head)[:-1]},"tensors":',), tensors, (f',"objects":{objects}',)))

    @classmethod
    def from_json(cls, text: str | bytes, where: str = MANIFEST_NAME) -> Manifest:
        """Parse and check a manifest: what this returns points only inside its own files and covers every tensor.

        Args:
            where: what the messages call it, such as its address.

        Raises:
            FormatError: it is not a manifest, damaged, of a later version, or does not hold together.
            UnsafeCheckpointError: a file name leaves the checkpoint's directory.
        """
        limits.RECORD_BYTES.check(len(text), where)
        data = text.encode("utf-8", "replace") if isinstance(text, str) else bytes(text)
        has_digest = record.is_sealed(data, where)
        try:
            manifest = _parse(data, has_digest=has_digest)
        except (*record.MISFITS, RecursionError, MemoryError) as error:
            kind = "" if isinstance(error, (record.MisfitError, FormatError)) else f"{type(error).__name__}: "
            raise FormatError(f"{where} is no manifest that this reader can use: {kind}{error}") from error
        try:
            manifest.check()
        except FormatError as error:
            raise FormatError(f"{where}: {error}") from error
        return manifest

    def check(self) -> None:
        """Whether the parts fit each other.

        Raises:
            FormatError: a chunk points outside its file or container, or a tensor is not covered exactly once.
            UnsafeCheckpointError: a file name leaves the checkpoint's directory.
        """
        for file in self.files:
            check_file_name(file)
        tensors = self.tensors
        for name in tensors.unproven(self.files) if isinstance(tensors, TensorTable) else tensors:
            tensor = tensors[name]
            check_shape(tensor.shape, name)
            if problem := check_cover(tensor.shape, [chunk.box for chunk in tensor.chunks]):
                raise FormatError(f"tensor {quoted(name)} does not hold together: {problem}")
            width = itemsize(tensor.dtype)
            for chunk in tensor.chunks:
                self._check_extent(name, chunk.file, chunk.start, chunk.length)
                _check_strides(name, chunk)
                _check_chunk(name, chunk, _num_elements(chunk) * width)
        for name, entry in self.objects.items():
            self._check_extent(name, entry.file, entry.start, entry.length)

    def _check_extent(self, name: str, file: str, start: int, length: int) -> None:
        size = self.files.get(file)
        if size is None:
            raise FormatError(f"{quoted(name)} lies in {quoted(file)}, which is not among the checkpoint's files")
        if start + length > size:
            raise FormatError(
                f"{quoted(name)} is said to lie at [{start}, {start + length}) of {quoted(file)}, which has {size} "
                "bytes"
            )


def _parse(text: bytes, *, has_digest: bool) -> Manifest:
    """The manifest, whose parts may not fit each other yet.

    Raises:
        record.MISFITS: something in the record is not what belongs there.
    """
    parsed = canonical.read(text) if has_digest else None
    data = record.parse(text) if parsed is None else parsed
    version = data.get("version")
    if data.get("format") != "ray_ckpt":
        raise FormatError(f"format is {str(data.get('format'))[:60]!r}, not 'ray_ckpt'")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise FormatError(f"version is {str(version)[:60]}, this reader knows 1 to {VERSION}; upgrade ray-ckpt")
    required = _MEMBERS | ({"metadata_digest", "digest"} if version >= _SEALED_SINCE else set())
    if missing := sorted(required - data.keys()):
        raise FormatError(f"it lacks {', '.join(missing)}: it is damaged")
    if "digest" in data and not has_digest:
        raise FormatError("its digest does not stand at its end: it is damaged, or was rewritten after the save")
    if not has_digest and (unknown := sorted(data.keys() - required)):
        raise FormatError(f"{unknown[0][:60]!r} is no member of version {version}: it is damaged")
    ours = bool(record.text(data, "attempt"))
    parse_tensor, parse_object = partial(record.parse_tensor, ours=ours), partial(record.parse_object, ours=ours)
    return Manifest(
        tensors=parsed["tensors"] if parsed else record.parse_each(data, "tensors", parse_tensor),
        objects=parsed["objects"] if parsed else record.parse_each(data, "objects", parse_object),
        files=record.parse_members(data, "files", record.size),
        attempt=data["attempt"],
        layout=None if data["layout"] is None else record.text(data, "layout"),
        saved_by=record.parse_members(data, "saved_by", record.text),
        fingerprints={
            name: digest
            for member in _FINGERPRINTS.values()
            if member in data
            for name, digest in record.parse_members(data, member, record.text).items()
        },
        metadata_digest=record.parse_digest(data, "metadata_digest") if version >= _SEALED_SINCE else None,
        replaced_metadata=record.parse_digest(data, "replaced_metadata") if "replaced_metadata" in data else None,
        has_digest=has_digest,
    )


def _check_strides(name: str, chunk: Chunk) -> None:
    if chunk.strides is not None and (chunk.data_start is None or len(chunk.strides) != len(chunk.box.sizes)):
        raise FormatError(
            f"chunk of {quoted(name)} has strides {quoted(chunk.strides)}, which do not fit its size {chunk.box.sizes}"
        )


def _num_elements(chunk: Chunk) -> int:
    """As many as lie between the first and the last, both included."""
    num_elements = chunk.box.num_elements
    return num_elements if chunk.strides is None or not num_elements else span(chunk.box.sizes, chunk.strides)


def _check_chunk(name: str, chunk: Chunk, data_bytes: int) -> None:
    data_start, sums = chunk.data_start, chunk.checksums
    if data_start is not None and not (
        chunk.start <= data_start and data_start + data_bytes <= chunk.start + chunk.length
    ):
        raise FormatError(f"{_where(name, chunk)} has {data_bytes} bytes at {data_start}, outside its container")
    if sums is not None and len(sums.sums) != 8 * ceil_div(data_bytes, sums.block_bytes):
        raise FormatError(
            f"{_where(name, chunk)} has checksums of {len(sums.sums)} bytes, which is not one of 8 bytes per block"
        )


def _where(name: str, chunk: Chunk) -> str:
    return f"chunk of {quoted(name)} at {chunk.box.offsets}"
