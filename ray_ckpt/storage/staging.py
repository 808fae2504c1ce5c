"""Tensors -> the bytes of their elements, in row-major order, in host memory, piece by piece.

A contiguous CPU tensor is handed out as views of its own memory. Everything else passes through bounded buffers: a
strided CPU tensor and one that is to be converted through small copies, a CUDA tensor through two pinned buffers, so
that the copy of the next piece (of the same tensor or of the next one) runs while the caller works on this one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from ray_ckpt.errors import UsageError

PIECE_BYTES = 1 << 20
"""Size of a view of CPU memory: what is hashed just before it is written is still in the cache."""

STAGING_BYTES = 8 << 20
"""Size of a staging buffer. A writing thread holds at most two."""

K = TypeVar("K")


@dataclass(frozen=True)
class Converted:
    """A tensor of whose elements another dtype is wanted. They are converted window by window, when they are needed."""

    name: str
    """What messages call it."""
    tensor: torch.Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.dtype.itemsize

    def convert(self, window: torch.Tensor) -> torch.Tensor:
        """Elements of the tensor in the other dtype.

        Raises:
            UsageError: a finite one is beyond what the other dtype can hold.
        """
        window = plain(window)
        self._check(window)
        return window.to(self.dtype)

    def windows(self) -> Iterator[torch.Tensor]:
        """All of it in row-major order, converted; at most `STAGING_BYTES` at a time."""
        for window in self._windows():
            yield self.convert(window).contiguous()

    def copy_to(self, target: torch.Tensor) -> None:
        """Convert all of it into contiguous memory."""
        flat, start = target.reshape(-1), 0
        for window in self._windows():
            self._check(window)
            flat[start : start + window.numel()].view(window.shape).copy_(window)
            start += window.numel()

    def _windows(self) -> Iterator[torch.Tensor]:
        elements = STAGING_BYTES // max(self.dtype.itemsize, self.tensor.itemsize)
        return _row_major_parts(plain(self.tensor), elements * self.tensor.itemsize)

    def _check(self, window: torch.Tensor) -> None:
        largest = torch.finfo(self.dtype).max
        if largest >= torch.finfo(window.dtype).max or not window.numel():
            return
        low, high = torch.aminmax(window)  # costs as much as a copy; to look at each element costs four times that
        if -largest <= low.item() and high.item() <= largest:
            return
        if not torch.equal(window.to(self.dtype).isinf(), window.isinf()):
            raise UsageError(
                f"{self.name!r} has elements beyond {largest:g}, the largest {self.dtype}; cast it to another dtype"
            )


def host_pieces(tensors: Iterable[tuple[K, torch.Tensor | Converted]]) -> Iterator[tuple[K, memoryview]]:
    """The bytes of many tensors, in order. Each tensor yields at least one piece; an empty tensor yields an empty one.

    A piece is valid only until the next one is yielded.

    Args:
        tensors: such that `format.memory.fault` finds none; whoever knows their names asks.
    """
    staging = _PinnedStaging()
    for key, given in tensors:
        if isinstance(given, Converted):
            on_cuda, parts = given.tensor.is_cuda, given.windows()
        else:
            tensor = plain(given)
            on_cuda = tensor.is_cuda
            if not on_cuda and not staging.is_filling and tensor.nbytes <= PIECE_BYTES and tensor.is_contiguous():
                yield key, bytes_of(tensor)  # as below, where it costs twice as much: most tensors are small
                continue
            parts = _parts(tensor)
        if on_cuda:
            yield from staging.push(key, parts)
            continue
        if staging.is_filling:
            yield from staging.drain()
        for part in parts:
            for piece in _views(part):
                yield key, piece
    yield from staging.drain()


def is_on_cuda(value: object) -> bool:
    tensor = value.tensor if isinstance(value, Converted) else value
    return isinstance(tensor, torch.Tensor) and tensor.is_cuda


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its bits as they are: detached, with pending conjugations and negations carried out."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, which lives as long as the view.

    Made from its address: going through numpy takes five times as long, which matters for thousands of small tensors.
    """
    address = tensor.data_ptr()
    if not address and tensor.nbytes:
        raise UsageError(f"a {type(tensor).__name__} of {tensor.nbytes} bytes has no memory")
    memory = (ctypes.c_ubyte * tensor.nbytes).from_address(address)
    memory.tensor = tensor  # type: ignore[attr-defined]
    return memoryview(memory).cast("B")


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor in row-major order: as it is where its memory can be handed out, else in small parts."""
    if tensor.is_contiguous() and not tensor.is_cuda:
        yield tensor
        return
    for part in _row_major_parts(tensor, STAGING_BYTES):
        yield part if part.is_cuda else part.contiguous()


def _views(contiguous: torch.Tensor) -> Iterator[memoryview]:
    data = bytes_of(contiguous)
    if len(data) <= PIECE_BYTES:
        yield data
        return
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]


def _row_major_parts(tensor: torch.Tensor, max_bytes: int) -> Iterator[torch.Tensor]:
    """Cut a tensor into parts whose elements follow each other in row-major order."""
    if tensor.nbytes <= max_bytes:
        yield tensor
        return
    row_bytes = tensor.nbytes // len(tensor)
    if row_bytes > max_bytes:
        for row in tensor:
            yield from _row_major_parts(row, max_bytes)
        return
    yield from torch.split(tensor, max_bytes // row_bytes)


class _PinnedStaging:
    """Copies CUDA tensors to the host through two pinned buffers: one is filled while the other is handed out."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._turn = 0
        self._in_flight: tuple[object, torch.Tensor, torch.cuda.Event] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def is_filling(self) -> bool:
        """Whether a piece is in flight."""
        return self._in_flight is not None

    def push(self, key: K, parts: Iterable[torch.Tensor]) -> Iterator[tuple[K, memoryview]]:
        """Start copying the parts of a tensor; yields the pieces that are complete meanwhile."""
        for part in parts:
            started = self._start(key, part)
            yield from self.drain()
            self._in_flight = started

    def drain(self) -> Iterator[tuple[K, memoryview]]:
        """Wait for the piece in flight."""
        if self._in_flight is not None:
            key, host, copied = self._in_flight
            self._in_flight = None
            copied.synchronize()
            yield key, memoryview(host.numpy())  # type: ignore[arg-type, misc]

    def _start(self, key: object, part: torch.Tensor) -> tuple[object, torch.Tensor, torch.cuda.Event]:
        if not self._buffers:
            self._buffers = [torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        host = self._buffers[self._turn][: part.nbytes]
        self._turn = 1 - self._turn
        stream = self._streams.setdefault(part.device, torch.cuda.Stream(part.device))
        stream.wait_stream(torch.cuda.current_stream(part.device))
        with torch.cuda.stream(stream):
            contiguous = part.contiguous()
            host.copy_(contiguous.reshape(-1).view(torch.uint8), non_blocking=True)
            contiguous.record_stream(stream)
            return key, host, stream.record_event()
