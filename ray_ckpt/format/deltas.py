"""Deltas: a checkpoint that holds only what has changed since the one before, and how it says so.

    <section>.link            JSON: the step before, by its number and by what it holds (`identity`)
    <section>.parts.<rank>    JSON: of each part of a tensor where its bytes are, how they are coded, and the checksums
                              of the part itself
    <section>.bytes.<rank>    those bytes, one part after the other

It is a checkpoint like any other: these entries are values and tensors of bytes. What it stands for has the tensors of
the first checkpoint of the chain, the anchor, cut into the same parts; `rebuilt` is the record of that. Pure.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import xxhash

from ray_ckpt.errors import FormatError
from ray_ckpt.format.block_sums import BlockSums, block_size
from ray_ckpt.format.entries import Chunk, TensorEntry, itemsize
from ray_ckpt.format.manifest import Manifest
from ray_ckpt.rounding import ceil_div
from ray_ckpt.text import quoted

SECTION = "ray_ckpt_delta"
"""First part of the names of all that makes a checkpoint a delta."""

LINK, PARTS, BYTES = f"{SECTION}.link", f"{SECTION}.parts", f"{SECTION}.bytes"

REBUILT = "ray_ckpt.delta"
"""Transform of a chunk whose elements are rebuilt from a chain of checkpoints."""

WHOLE, CHANGED = "whole", "xor"
"""How a part's bytes are coded: as they are, or as what differs from the step before."""

_MIN_BLOCK_BYTES = 64 << 10
"""Smaller checksum blocks would take a tenth of a small delta."""

_MAX_PARTS_BYTES = 256 << 20
"""Size of a list of parts, unpacked. A hundred thousand parts take a tenth of it."""

Key = tuple[str, tuple[int, ...]]
"""A part of a tensor: the tensor's name, and the part's first element, per dim."""


class Part(NamedTuple):
    """Where the bytes of a part are, and what it is."""

    coding: str
    holder: str
    """The tensor of bytes in which they are."""
    start: int
    length: int
    sums: BlockSums
    """Checksums of the part's elements, once they are rebuilt."""


@dataclass(frozen=True)
class Link:
    """What a delta is built on."""

    step: int
    """The step before, in the same store."""
    identity: str
    """What that step held; another one of the same number is another base."""


def part_block_size(num_bytes: int) -> int:
    """Bytes of a checksum block of a part."""
    return max(block_size(num_bytes), _MIN_BLOCK_BYTES)


def identity(manifest: Manifest) -> str:
    """A digest of all that a checkpoint holds, wherever its bytes lie and whoever has copied them there.

    Raises:
        FormatError: it has no checksums, as another program wrote it.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(manifest.tensors):
        entry = manifest.tensors[name]
        for chunk in entry.chunks:
            if chunk.checksums is None:
                raise FormatError(f"{quoted(name)} has no checksums, and nothing can be built on it")
            kind = [name, entry.dtype, entry.shape, chunk.box.offsets, chunk.box.sizes, chunk.checksums.block_bytes]
            digest.update(f"{json.dumps(kind)}\n".encode())
            digest.update(chunk.checksums.sums)
    for name in sorted(manifest.objects):
        digest.update(f"{json.dumps([name, manifest.objects[name].checksum])}\n".encode())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------- writing


def link_text(link: Link) -> str:
    """The value of `LINK`."""
    return json.dumps({"step": link.step, "identity": link.identity})


def parts_text(parts: Mapping[Key, Part]) -> str:
    """The value of one of `PARTS`. Packed, as the record and a data file both hold it."""
    rows = [
        [name, offsets, part.coding, part.length, part.sums.block_bytes, base64.b64encode(part.sums.sums).decode()]
        for (name, offsets), part in parts.items()
    ]
    return base64.b64encode(zlib.compress(json.dumps(rows, separators=(",", ":")).encode())).decode()


# ----------------------------------------------------------------------------------------------------- reading


def link_of(manifest: Manifest) -> Link | None:
    """What a checkpoint is built on; None for one that is whole.

    Raises:
        FormatError: what it says is damaged.
    """
    if LINK not in manifest.objects:
        return None
    try:
        found = json.loads(_text_of(manifest, LINK))
        step, told = found["step"], found["identity"]
        if type(step) is not int or step < 0 or type(told) is not str:
            raise TypeError("its values have other types")
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{LINK} says nothing of what this delta is built on: {error}") from error
    return Link(step, told)


def parts_of(manifest: Manifest) -> dict[Key, Part]:
    """All parts that a delta holds.

    Raises:
        FormatError: they are damaged, or do not lie where the delta says.
    """
    found: dict[Key, Part] = {}
    for name in manifest.objects:
        rank = name.removeprefix(f"{PARTS}.")
        if rank == name:
            continue
        holder = f"{BYTES}.{rank}"
        try:
            parts = dict(_parts(_text_of(manifest, name), holder))
        except (ValueError, TypeError, KeyError, zlib.error) as error:
            raise FormatError(f"{name} says nothing of the parts of this delta: {error}") from error
        num_bytes = sum(part.length for part in parts.values())
        if num_bytes != _size_of(manifest, holder):
            raise FormatError(f"{holder} has {_size_of(manifest, holder)} bytes, and the parts in it {num_bytes}")
        if twice := found.keys() & parts.keys():
            raise FormatError(f"{quoted(min(twice)[0])} has a part twice in this delta")
        found |= parts
    return found


def _parts(text: str, holder: str) -> Iterator[tuple[Key, Part]]:
    unpacking, start = zlib.decompressobj(), 0
    rows = json.loads(unpacking.decompress(base64.b64decode(text, validate=True), _MAX_PARTS_BYTES))
    for name, offsets, coding, length, block_bytes, sums in rows:
        numbers = [*offsets, length, block_bytes]
        if not all(type(number) is int and number >= 0 for number in numbers) or not block_bytes:
            raise ValueError("a size or an offset is none")
        if type(name) is not str or coding not in (WHOLE, CHANGED):
            raise ValueError(f"{str(coding)[:60]!r} is no coding that this version knows")
        blocks = BlockSums(block_bytes, base64.b64decode(sums, validate=True))
        yield (name, tuple(offsets)), Part(coding, holder, start, length, blocks)
        start += length


def _text_of(manifest: Manifest, name: str) -> str:
    inline = manifest.objects[name].inline
    if inline is None or type(inline.value) is not str:
        raise TypeError(f"{name} is no text in the record")
    return inline.value


def _size_of(manifest: Manifest, holder: str) -> int:
    entry = manifest.tensors.get(holder)
    if entry is None:
        return 0
    if entry.dtype != "uint8" or len(entry.shape) != 1 or len(entry.chunks) != 1:
        raise FormatError(f"{holder} is {entry.dtype}{list(entry.shape)} in {len(entry.chunks)} chunks, not bytes")
    return entry.shape[0]


def check_parts(anchor: Manifest, parts: Mapping[Key, Part]) -> None:
    """Whether a delta has exactly the parts that the anchor is cut into.

    Raises:
        FormatError: it has not.
    """
    chunks = dict(keyed_chunks(anchor))
    if differing := sorted(chunks.keys() ^ parts.keys()):
        name, offsets = differing[0]
        where = "the delta lacks" if (name, offsets) in chunks else "the anchor lacks"
        raise FormatError(f"{where} the part of {quoted(name)} at {offsets}: they were not cut alike")
    for key, (entry, chunk) in chunks.items():
        num_bytes, part = chunk.box.num_elements * itemsize(entry.dtype), parts[key]
        if len(part.sums.sums) != 8 * ceil_div(num_bytes, part.sums.block_bytes):
            raise FormatError(f"the part of {quoted(key[0])} at {key[1]} has not one checksum for each block")
        if part.coding == WHOLE and part.length != num_bytes:
            raise FormatError(f"the part of {quoted(key[0])} at {key[1]} has {part.length} bytes, not {num_bytes}")


def keyed_chunks(manifest: Manifest) -> Iterator[tuple[Key, tuple[TensorEntry, Chunk]]]:
    """The chunks of all tensors."""
    for name in manifest.tensors:
        entry = manifest.tensors[name]
        for chunk in entry.chunks:
            yield (name, chunk.box.offsets), (entry, chunk)


def rebuilt(anchor: Manifest, delta: Manifest, parts: Mapping[Key, Part]) -> Manifest:
    """The record of what a delta stands for, once it is rebuilt on its chain.

    Args:
        anchor: the record of the first checkpoint of the chain.
        parts: those of the delta, which fit the anchor (`check_parts`).
    """
    tensors = {}
    for name in anchor.tensors:
        entry = anchor.tensors[name]
        chunks = tuple(
            chunk._replace(transforms=(REBUILT,), checksums=parts[name, chunk.box.offsets].sums)
            for chunk in entry.chunks
        )
        tensors[name] = entry._replace(chunks=chunks)
    return replace(delta, tensors=tensors, objects=values_of(delta.objects))


def values_of(objects: Mapping[str, Any]) -> dict[str, Any]:
    """What of a delta's values is not about itself."""
    return {name: entry for name, entry in objects.items() if not is_of_delta(name)}


def is_of_delta(name: str) -> bool:
    return name == SECTION or name.startswith(f"{SECTION}.")


def taken_names(names: Collection[str]) -> list[str]:
    """The names of a state that a delta has for itself."""
    return sorted(name for name in names if is_of_delta(name))
