"""Where the elements of saved chunks lie.

Our manifest knows. In a foreign checkpoint only the container's own first bytes tell, so they are read, many with one
request where containers are small. What a container does not tell (a stream extension encoded it, or it holds no plain
tensor) is left to `load_whole`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch

from ray_ckpt.errors import FormatError
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.manifest import Chunk
from ray_ckpt.format.ranges import contiguous_strides, span
from ray_ckpt.format.torch_container import HEAD_BYTES, find_data
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.objects import Decoder, check_lengths
from ray_ckpt.storage.ranged_reads import Piece, Source, Tuning, fetch
from ray_ckpt.text import quoted

K = TypeVar("K")

_MAX_FRAMING_BYTES = 1 << 20
"""Bytes of a container besides the elements; usually 2 000."""


class SavedChunk(NamedTuple):
    """A chunk and the tensor that it is part of."""

    name: str
    dtype: torch.dtype
    chunk: Chunk

    def source(self, data_start: int, strides: tuple[int, ...], *, verify: bool) -> Source:
        chunk = self.chunk
        elements = span(chunk.box.sizes, strides) if chunk.box.num_elements else 0
        in_container = verify and chunk.data_start is None
        return Source(
            name=self.name,
            file=chunk.file,
            data_start=data_start,
            strides=strides,
            dtype=self.dtype,
            data_bytes=elements * self.dtype.itemsize,
            checksums=chunk.checksums if verify else None,
            crc=chunk.crc if verify else 0,
            container_end=chunk.start + chunk.length if in_container else 0,
        )


def locate(storage: Storage, chunks: Mapping[K, SavedChunk], tuning: Tuning, *, verify: bool) -> dict[K, Source]:
    """The sources of those chunks whose elements can be read without the rest of the container.

    Raises:
        FormatError: a container holds another tensor than the metadata says.
    """
    sources: dict[K, Source] = {}
    heads: dict[K, torch.Tensor] = {}
    for key, saved in chunks.items():
        if saved.chunk.transforms:
            continue
        if saved.chunk.data_start is not None:
            strides = saved.chunk.strides
            if strides is None:
                strides = contiguous_strides(saved.chunk.box.sizes)
            sources[key] = saved.source(saved.chunk.data_start, strides, verify=verify)
        else:
            heads[key] = torch.empty(min(HEAD_BYTES, saved.chunk.length), dtype=torch.uint8)
    fetch(storage, [_container_piece(chunks[key], head) for key, head in heads.items()], tuning)
    for key, head in heads.items():
        saved = chunks[key]
        stored = find_data(head.numpy().tobytes(), saved.chunk.length)
        if stored is None:
            continue
        if (stored.dtype, stored.shape) != (saved.dtype, saved.chunk.box.sizes):
            raise _contradiction(saved, stored.dtype, stored.shape)
        sources[key] = saved.source(saved.chunk.start + stored.data_start, stored.strides, verify=verify)
    return sources


def load_whole(storage: Storage, saved: SavedChunk, decoder: Decoder, tuning: Tuning) -> torch.Tensor:
    """Read and decode a whole container: for a chunk that `locate` has no source for.

    Raises:
        FormatError, UnsafeCheckpointError: it does not hold the tensor that the metadata says.
    """
    chunk, max_bytes = saved.chunk, saved.chunk.box.num_elements * saved.dtype.itemsize + _MAX_FRAMING_BYTES
    check_lengths(storage, [(chunk.file, chunk.start, chunk.length)])
    whole = torch.empty(chunk.length, dtype=torch.uint8)
    fetch(storage, [_container_piece(saved, whole)], tuning)
    data = decoder.decode(whole.numpy().tobytes(), chunk.transforms, saved.name, max_bytes)
    tensor = decoder.load(data, saved.name)
    if not isinstance(tensor, torch.Tensor):
        raise FormatError(f"{quoted(saved.name)} is a {type(tensor).__name__} in {saved.chunk.file}, not a tensor")
    if (tensor.dtype, tuple(tensor.shape)) != (saved.dtype, saved.chunk.box.sizes):
        raise _contradiction(saved, tensor.dtype, tuple(tensor.shape))
    return tensor


def _container_piece(saved: SavedChunk, target: torch.Tensor) -> Piece:
    chunk = saved.chunk
    source = Source(saved.name, chunk.file, chunk.start, (1,), torch.uint8, chunk.length, None)
    return Piece(source, Box((0,), (len(target),)), target)


def _contradiction(saved: SavedChunk, dtype: torch.dtype, shape: tuple[int, ...]) -> FormatError:
    return FormatError(
        f"{saved.chunk.file} holds {dtype} of shape {shape} where the metadata says that {saved.name!r} at "
        f"{saved.chunk.box.offsets} is {saved.dtype} of shape {saved.chunk.box.sizes}"
    )
