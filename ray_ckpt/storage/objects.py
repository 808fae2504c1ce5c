"""Non-tensors: numbers, texts, lists and whatever else `torch.save` takes.

    saving    value ── saved_object ──> container for stock DCP, and the plain value for the manifest
    loading   manifest entry ── read_values ──> value

No code runs from a checkpoint: containers are unpickled with `weights_only=True`.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.serialization
import xxhash

from ray_ckpt.errors import FormatError, UnsafeCheckpointError, UsageError
from ray_ckpt.format import values
from ray_ckpt.format.block_sums import BlockSums
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.manifest import Inline, ObjectEntry
from ray_ckpt.format.torch_internals import ExtensionRegistry, StreamTransformExtension
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.ranged_reads import Piece, Source, Tuning, fetch

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

    def decode(self, data: bytes, transforms: Sequence[str], name: str) -> bytes:
        """Undo stream extensions.

        Raises:
            UsageError: an extension is not registered.
            FormatError: the bytes are not what the extension writes.
        """
        if not transforms:
            return data
        try:
            extensions = self._extensions.from_descriptor_list(transforms)
        except ValueError as error:
            raise UsageError(
                f"{name!r} was saved through the stream extensions {list(transforms)}: {error}; "
                "register them in an ExtensionRegistry and pass it as extensions="
            ) from error
        stream: Any = io.BytesIO(data)
        try:
            for extension in extensions:
                if isinstance(extension, StreamTransformExtension):
                    stream = extension.transform_from(stream)
            return bytes(stream.read(-1))
        except Exception as error:  # extensions are anybody's code and raise anything
            raise FormatError(f"{name!r} cannot be decoded by {list(transforms)}: {error}") from error

    def load(self, data: bytes, name: str) -> Any:
        """Unpickle a container.

        Raises:
            UnsafeCheckpointError: it names something that `weights_only=True` does not admit.
            FormatError: it is truncated, damaged or something else.
        """
        try:
            with torch.serialization.safe_globals([io.BytesIO]):
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=not self.trusted)
        except Exception as error:  # a damaged container raises nearly anything
            raise _explain(error, name) from error


def _explain(error: Exception, name: str) -> Exception:
    named = re.search(r"(?:GLOBAL|[Uu]nsupported class) `?([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and named:
        return UnsafeCheckpointError(
            f"reading {name!r} would run {named.group(1)} from the checkpoint; if you trust its author, read it with "
            "trusted=True, or admit that one name with torch.serialization.add_safe_globals"
        )
    return FormatError(f"{name!r} cannot be read: {type(error).__name__}: {str(error)[:300]}")


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
    """The containers of those objects whose value is not in the manifest, without the transforms."""
    present = {name: entry.blob for name, entry in entries.items() if entry.inline is None and entry.blob is not None}
    distant = {name: entry for name, entry in entries.items() if entry.inline is None and entry.blob is None}
    present |= fetch_containers(storage, distant, tuning, verify=verify)
    return {name: decoder.decode(data, entries[name].transforms, name) for name, data in present.items()}


def fetch_containers(
    storage: Storage, entries: Mapping[str, ObjectEntry], tuning: Tuning, *, verify: bool
) -> dict[str, bytes]:
    """The containers of these objects, in as few reads as their places allow."""
    targets = {name: torch.empty(entry.length, dtype=torch.uint8) for name, entry in entries.items()}
    pieces = []
    for name, entry in entries.items():
        checksums = None
        if verify and entry.checksum is not None:
            checksums = BlockSums(max(1, entry.length), entry.checksum.to_bytes(8, "little"))
        source = Source(name, entry.file, entry.start, (1,), torch.uint8, entry.length, checksums)
        pieces.append(Piece(source, Box((0,), (entry.length,)), targets[name]))
    fetch(storage, pieces, tuning)
    return {name: target.numpy().tobytes() for name, target in targets.items()}
