"""Copies of tensors into one buffer of host memory, of which every piece is digested as it arrives.

What has just been copied is still in the cache, where XXH3 takes a tenth of the time of the copy. After a whole copy
its bytes would have to come from memory again.

source                                  copied                                 digested
contiguous on the CPU, 64 KiB or more   1 MiB at a time, on torch's number of  each right after its copy
                                        threads
small                                   many by one call of torch's            together
strided, or converted                   by torch, a window at a time           all windows at the end
on a CUDA device                        by torch, without waiting              when it has arrived, while others do
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from ray_ckpt.format.torch_internals import copy_each
from ray_ckpt.rounding import ceil_div
from ray_ckpt.storage.staging import PIECE_BYTES, Converted, bytes_of, plain

_SMALL_BYTES = 64 << 10
"""Below this, what Python adds to the copy of a tensor is as much as the copy."""

_WINDOW_BYTES = 16 << 20
"""Size of what torch has copied that has a digest of its own."""

_PIECES_PER_THREAD = 16
"""No thread is started for fewer."""

Bytes = npt.NDArray[np.uint8]


class Copy(NamedTuple):
    """One tensor that is to be copied."""

    start: int
    """Byte offset in the buffer."""
    place: torch.Tensor
    """The tensor there, contiguous, of the source's shape and of the dtype that is wanted."""
    source: torch.Tensor | Converted


class Digest(NamedTuple):
    """What a part of the buffer held right after it was copied."""

    start: int
    stop: int
    value: int
    """XXH3-64."""


def copy_digested(buffer: torch.Tensor, copies: Sequence[Copy]) -> list[Digest]:
    """Make all copies, and wait for those from GPUs.

    Args:
        buffer: contiguous bytes, where the places lie in the order of the copies.

    Returns:
        Digests that cover every place, in no order.

    Raises:
        UsageError: a tensor has elements that the wanted dtype cannot hold.
    """
    work = _Work(np.frombuffer(bytes_of(buffer), np.uint8))
    for copy in copies:
        work.add(copy)
    return work.finish()


class _Work:
    """What is copied together, and what is still under way."""

    def __init__(self, memory: Bytes) -> None:
        self._memory = memory
        self._digests: list[Digest] = []
        self._blocks: list[tuple[int, Bytes]] = []
        """Byte offset in the buffer, and what is to be copied there."""
        self._small: list[Copy] = []
        self._flying: list[tuple[int, int, list[torch.cuda.Event]]] = []

    def add(self, copy: Copy) -> None:
        start, place, source = copy
        size = place.nbytes
        if size < _SMALL_BYTES and isinstance(source, torch.Tensor):
            self._small.append(copy)
            if start + size - self._small[0].start >= PIECE_BYTES:
                self._copy_small()
            return
        self._copy_small()  # what lies between is not copied yet
        if isinstance(source, Converted):
            source.copy_to(place)
            self._arrive(start, start + size, [source.tensor])
        elif source.device.type == "cpu" and (bits := plain(source)).is_contiguous():
            self._blocks.append((start, np.frombuffer(bytes_of(bits), np.uint8)))
        else:
            self._copy_by_torch([copy])

    def finish(self) -> list[Digest]:
        self._copy_small()
        pieces = [
            (start + at, block[at : at + PIECE_BYTES])
            for start, block in self._blocks
            for at in range(0, len(block), PIECE_BYTES)
        ]
        num_threads = min(torch.get_num_threads(), ceil_div(len(pieces), _PIECES_PER_THREAD))
        if num_threads <= 1:
            self._digests += self._copy_pieces(pieces)
        else:
            share = ceil_div(len(pieces), num_threads)
            with ThreadPoolExecutor(num_threads, thread_name_prefix="ray_ckpt-copy") as pool:
                shares = [pieces[at : at + share] for at in range(0, len(pieces), share)]
                for digests in pool.map(self._copy_pieces, shares):
                    self._digests += digests
        for start, stop, events in self._flying:
            for event in events:
                event.synchronize()
            self._digest(start, stop)
        return self._digests

    def _copy_small(self) -> None:
        if self._small:
            self._copy_by_torch(self._small)
            self._small = []

    def _copy_by_torch(self, copies: Sequence[Copy]) -> None:
        """Neighbors, by one call."""
        sources = [plain(source) for _, _, source in copies if isinstance(source, torch.Tensor)]
        copy_each([_copied(place) for _, place, _ in copies], [_copied(source) for source in sources])
        last = copies[-1]
        self._arrive(copies[0].start, last.start + last.place.nbytes, sources)

    def _arrive(self, start: int, stop: int, sources: Sequence[torch.Tensor]) -> None:
        """Digest what was copied: at once, or when it comes from a GPU, as soon as it has arrived."""
        devices = {source.device for source in sources if source.is_cuda}
        if devices:
            events = [torch.cuda.current_stream(device).record_event() for device in devices]
            self._flying.append((start, stop, events))
        else:
            self._digest(start, stop)

    def _digest(self, start: int, stop: int) -> None:
        for at in range(start, stop, _WINDOW_BYTES):
            part = self._memory[at : min(at + _WINDOW_BYTES, stop)]
            self._digests.append(Digest(at, at + len(part), xxhash.xxh3_64_intdigest(part.data)))

    def _copy_pieces(self, pieces: Sequence[tuple[int, Bytes]]) -> list[Digest]:
        digests = []
        for start, piece in pieces:
            copied = self._memory[start : start + len(piece)]
            np.copyto(copied, piece)
            digests.append(Digest(start, start + len(piece), xxhash.xxh3_64_intdigest(copied.data)))
        return digests


def changed_since(buffer: torch.Tensor, digests: Sequence[Digest]) -> Digest | None:
    """The first part of the buffer that no longer holds what was copied into it."""
    memory = bytes_of(buffer)
    for digest in sorted(digests):
        if xxhash.xxh3_64_intdigest(memory[digest.start : digest.stop]) != digest.value:
            return digest
    return None


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or its bytes where torch has no copy for its dtype, as for some of less than a byte."""
    return tensor if _has_copy(tensor.dtype) else tensor.reshape(-1).view(torch.uint8)


@cache
def _has_copy(dtype: torch.dtype) -> bool:
    try:
        torch.empty(1, dtype=dtype).copy_(torch.empty(1, dtype=dtype))
    except (RuntimeError, NotImplementedError):
        return False
    return True
