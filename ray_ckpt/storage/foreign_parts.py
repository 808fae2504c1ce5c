"""What a checkpoint of another program is found to be, and how several of its parts become one manifest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ray_ckpt.errors import FormatError
from ray_ckpt.format.manifest import Chunk, Manifest, ObjectEntry, TensorEntry
from ray_ckpt.storage.files import InputFile, Storage
from ray_ckpt.text import listed, quoted

__all__ = ["Found", "below", "check_parts", "join", "prefixed", "read_range"]

_PART = re.compile(r"-([0-9]{1,9})-of-([0-9]{1,9})\.")


@dataclass(frozen=True)
class Found:
    """A checkpoint that another program wrote."""

    kind: str
    """Kind of checkpoint, for messages."""
    storage: Storage
    """Where the manifest's files are."""
    manifest: Manifest
    notes: tuple[str, ...] = ()
    """Parts that cannot be read, and why."""


def below(directory: str, manifest: Manifest) -> Manifest:
    """The manifest as seen from the directory above."""

    def moved(chunk: Chunk) -> Chunk:
        return chunk._replace(file=f"{directory}/{chunk.file}")

    tensors = {
        name: entry._replace(chunks=tuple(moved(chunk) for chunk in entry.chunks))
        for name, entry in manifest.tensors.items()
    }
    objects = {name: entry._replace(file=f"{directory}/{entry.file}") for name, entry in manifest.objects.items()}
    return Manifest(tensors, objects, {f"{directory}/{file}": size for file, size in manifest.files.items()})


def prefixed(prefix: str, manifest: Manifest) -> Manifest:
    """The manifest with all names below one more component."""
    tensors = {
        f"{prefix}.{name}": entry._replace(path=(prefix, *(entry.path or (name,))))
        for name, entry in manifest.tensors.items()
    }
    objects = {
        f"{prefix}.{name}": entry._replace(path=(prefix, *(entry.path or (name,))))
        for name, entry in manifest.objects.items()
    }
    return Manifest(tensors, objects, manifest.files)


def join(manifests: Iterable[Manifest], storage: Storage) -> Manifest:
    """One manifest of several parts.

    Raises:
        FormatError: two of them hold one name.
    """
    tensors: dict[str, TensorEntry] = {}
    objects: dict[str, ObjectEntry] = {}
    files: dict[str, int] = {}
    for manifest in manifests:
        names = manifest.tensors.keys() | manifest.objects.keys()
        if twice := sorted(names & (tensors.keys() | objects.keys())):
            raise FormatError(f"two parts of {storage.address} hold {quoted(twice[0])}")
        tensors |= manifest.tensors
        objects |= manifest.objects
        files |= manifest.files
    return Manifest(tensors, objects, files)


def check_parts(where: str, names: Sequence[str]) -> None:
    """Whether files that count themselves, as `model-00001-of-00003.safetensors` does, are all there.

    Raises:
        FormatError: one is not.
    """
    counted = [match for name in names if (match := _PART.search(name))]
    totals = {int(match[2]) for match in counted}
    if len(totals) > 1:
        raise FormatError(f"{where} holds parts of several checkpoints: {listed(sorted(names), at_most=4)}")
    for total in totals:
        if lacking := sorted(set(range(1, min(total, 10**5) + 1)) - {int(match[1]) for match in counted}):
            numbers = listed([str(number) for number in lacking], at_most=4)
            raise FormatError(f"{where} lacks part {numbers} of {total}: the checkpoint is incomplete")


def read_range(file: InputFile, offset: int, length: int) -> bytes:
    data = bytearray(length)
    if length:
        file.read_into(offset, memoryview(data))
    return bytes(data)
