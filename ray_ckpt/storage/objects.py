"""Non-tensors: numbers, texts, lists and whatever else `torch.save` takes.

    saving    value ── saved_object ──> container for stock DCP, and the plain value for the manifest
    loading   manifest entry ── read_values ──> value

No code runs from a checkpoint: containers are looked through by our own unpickler, which gives plain values itself;
what holds more (tensors, classes that the caller has admitted) is then unpickled with `weights_only=True`.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.serialization
import xxhash

from ray_ckpt.errors import FormatError, RayCkptError, UnsafeCheckpointError, UsageError
from ray_ckpt.format import limits, values
from ray_ckpt.format.block_sums import BlockSums
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.dcp_pickle import TRUST_ADVICE
from ray_ckpt.format.manifest import Inline, ObjectEntry
from ray_ckpt.format.torch_internals import ExtensionRegistry, StreamTransformExtension
from ray_ckpt.format.torch_object import inspect
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.ranged_reads import Piece, Source, Tuning, fetch
from ray_ckpt.text import quoted

_SMALL_BYTES = 1 << 20
"""Memory that may be taken for nothing."""

_DECODED_PIECE_BYTES = 1 << 20

INLINE_BLOB_BYTES = 4 << 10
"""Objects whose container is no longer than this lie in the manifest too, so that reading them costs no request."""


# ------------------------------------------------------------------------------------------------------ saving


@dataclass(frozen=True)
class SavedObject:
    """A non-tensor on its way to disk."""

    container: bytes
    """The value as `torch.save` writes it, for stock DCP."""
    inline: Inline | None

    @property
    def checksum(self) -> int:
        """XXH3-64 of the container."""
        return xxhash.xxh3_64_intdigest(self.container)


def saved_object(value: object) -> SavedObject:
    try:
        text = json.dumps(values.encode(value), allow_nan=False)
    except values.NotPlainError:
        return SavedObject(torch_save(value), None)
    return SavedObject(save_plain(text), Inline(value))


_plain_containers: dict[str, bytes] = {}


def save_plain(text: str) -> bytes:
    """The container of an encoded value. Thousands of hyper-parameters share a few values: each is saved once."""
    if len(text) > INLINE_BLOB_BYTES:
        return torch_save(values.decode(json.loads(text)))
    if text not in _plain_containers:
        if len(_plain_containers) > 4096:
            _plain_containers.clear()
        _plain_containers[text] = torch_save(values.decode(json.loads(text)))
    return _plain_containers[text]


def torch_save(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


# ----------------------------------------------------------------------------------------------------- loading


class Decoder:
    """Turns a container's bytes into what was saved.

    Args:
        extensions: stream extensions that decode what a stock writer's have encoded.
        trusted: unpickle whatever the container names, and run it.
    """

    def __init__(self, extensions: ExtensionRegistry, *, trusted: bool) -> None:
        self.trusted = trusted
        self._extensions = extensions

    def decode(self, data: bytes, transforms: Sequence[str], name: str, max_bytes: int | None = None) -> bytes:
        """Undo stream extensions.

        Args:
            max_bytes: the decoded bytes are no more, where that is known.

        Raises:
            UsageError: an extension is not registered.
            FormatError: the bytes are not what the extension writes, or more than they may be.
        """
        if not transforms:
            return data
        try:
            extensions = self._extensions.from_descriptor_list(transforms)
        except ValueError as error:
            raise UsageError(
                f"{quoted(name)} was saved through the stream extensions {quoted(list(transforms))}: {error}; "
                "register them in an ExtensionRegistry and pass it as extensions="
            ) from error
        stream: Any = io.BytesIO(data)
        try:
            for extension in extensions:
                if isinstance(extension, StreamTransformExtension):
                    stream = _Bounded(extension.transform_from(stream), max_bytes, name)
            return bytes(stream.read(-1))
        except RayCkptError:
            raise
        except Exception as error:  # extensions are anybody's code and raise anything
            raise FormatError(
                f"{quoted(name)} cannot be decoded by {quoted(list(transforms))}: {str(error)[:200]}"
            ) from error

    def load(self, data: bytes, name: str) -> Any:
        """Unpickle a container.

        Raises:
            UnsafeCheckpointError: it names something that `weights_only=True` does not admit.
            FormatError: it is truncated, damaged, something else, or exceeds a limit.
        """
        try:
            if not self.trusted:
                inspected = inspect(data, quoted(name))
                if inspected.is_plain:
                    return inspected.value
            with torch.serialization.safe_globals([io.BytesIO]):
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=not self.trusted)
        except RayCkptError:
            raise
        except Exception as error:  # a damaged container raises nearly anything
            raise _explain(error, name) from error


class _Bounded(io.RawIOBase):
    """A decoded stream that ends in an error when there is more of it than there may be."""

    def __init__(self, stream: Any, max_bytes: int | None, name: str) -> None:
        super().__init__()
        self._stream = stream
        self._max_bytes = max_bytes
        self._left = limits.DECODED_BYTES.value if max_bytes is None else max_bytes
        self._name = name

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            return b"".join(iter(lambda: self.read(_DECODED_PIECE_BYTES), b""))
        piece: bytes = self._stream.read(size) or b""
        self._left -= len(piece)
        if self._left < 0:
            raise self._too_long()
        return piece

    def _too_long(self) -> FormatError:
        if self._max_bytes is None:
            return limits.DECODED_BYTES.error("more bytes than that once it is decoded", quoted(self._name))
        return FormatError(
            f"{quoted(self._name)} has more bytes once it is decoded than its shape has, {self._max_bytes}"
        )


def _explain(error: Exception, name: str) -> Exception:
    named = re.search(r"(?:GLOBAL|[Uu]nsupported class) `?([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and named:
        return UnsafeCheckpointError(
            f"reading {quoted(name)} would run {named.group(1)[:200]} from the checkpoint; {TRUST_ADVICE}; "
            "torch.serialization.add_safe_globals admits that one name"
        )
    return FormatError(f"{quoted(name)} cannot be read: {type(error).__name__}: {str(error)[:300]}")


def read_values(
    storage: Storage, entries: Mapping[str, ObjectEntry], decoder: Decoder, tuning: Tuning, *, verify: bool
) -> dict[str, Any]:
    """Non-tensors by name. Those that the manifest holds itself cost no read."""
    containers = decoded_containers(storage, entries, decoder, tuning, verify=verify)
    return {
        name: decoder.load(containers[name], name) if entry.inline is None else copy.deepcopy(entry.inline.value)
        for name, entry in entries.items()
    }


def decoded_containers(
    storage: Storage, entries: Mapping[str, ObjectEntry], decoder: Decoder, tuning: Tuning, *, verify: bool
) -> dict[str, bytes]:
    """The containers of those objects whose value is not in the manifest, without the transforms.

    Raises:
        UnsafeCheckpointError: one of them is not given to anybody.
    """
    for name, entry in entries.items():
        if entry.refusal:
            raise UnsafeCheckpointError(f"{quoted(name)} cannot be read: {entry.refusal}")
    present = {name: entry.blob for name, entry in entries.items() if entry.inline is None and entry.blob is not None}
    distant = {name: entry for name, entry in entries.items() if entry.inline is None and entry.blob is None}
    present |= fetch_containers(storage, distant, tuning, verify=verify)
    return {name: decoder.decode(data, entries[name].transforms, name) for name, data in present.items()}


def fetch_containers(
    storage: Storage, entries: Mapping[str, ObjectEntry], tuning: Tuning, *, verify: bool
) -> dict[str, bytes]:
    """The containers of these objects, in as few reads as their places allow. What lies at one place is read once."""
    places = {name: (entry.file, entry.start, entry.length, entry.checksum) for name, entry in entries.items()}
    check_lengths(storage, {(file, start, length) for file, start, length, _ in places.values()})
    targets = {place: torch.empty(place[2], dtype=torch.uint8) for place in places.values()}
    pieces = []
    for place, name in {place: name for name, place in places.items()}.items():
        file, start, length, checksum = place
        checksums = None
        if verify and checksum is not None:
            checksums = BlockSums(max(1, length), checksum.to_bytes(8, "little"))
        source = Source(name, file, start, (1,), torch.uint8, length, checksums)
        pieces.append(Piece(source, Box((0,), (length,)), targets[place]))
    fetch(storage, pieces, tuning)
    read = {place: target.numpy().tobytes() for place, target in targets.items()}
    return {name: read[place] for name, place in places.items()}


def check_lengths(storage: Storage, places: Collection[tuple[str, int, int]]) -> None:
    """Whether files have the bytes that are about to be read whole, before there is memory for them.

    Args:
        places: file, start and length of each container.

    Raises:
        FormatError: a file ends before, or has fewer bytes than the containers in it, which lie over each other.
    """
    if sum(length for _, _, length in places) <= _SMALL_BYTES:
        return
    ends, totals = dict[str, int](), dict[str, int]()
    for file, start, length in places:
        ends[file] = max(ends.get(file, 0), start + length)
        totals[file] = totals.get(file, 0) + length
    for file, end in ends.items():
        num_bytes = storage.size(file)
        if num_bytes is not None and max(end, totals[file]) > num_bytes:
            raise FormatError(
                f"{file} is too short: wanted {totals[file]} bytes up to byte {end}, it ends at {num_bytes}; the file "
                "is truncated or the metadata that points into it is damaged"
            )
