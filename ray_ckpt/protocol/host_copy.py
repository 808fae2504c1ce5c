"""Private copies of what a rank holds, so that training may go on while they are written.

HostCopy.take(holdings, skipped) ─┬─ tensors   into one buffer of host memory, used again by the next copy
                                   └─ objects   numbers and texts as they are, anything else as its bytes on disk
HostCopy.check()                       once it is written: whether buffer and objects still hold what was copied

A copy may wait for minutes until it is written. A bit that flips in its memory meanwhile would be saved with a valid
checksum, as that is made while writing. So every object, and every piece of a tensor, is digested as it is copied
(digested_copy.py).
"""

from __future__ import annotations

import contextlib
import copy
import mmap
import pickle
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import xxhash

from ray_ckpt.errors import CommitError, UsageError
from ray_ckpt.format.manifest import Inline
from ray_ckpt.format.memory import fault
from ray_ckpt.format.torch_container import parse_dtype
from ray_ckpt.protocol.digested_copy import Copy, Digest, changed_since, copy_digested
from ray_ckpt.protocol.holdings import Holdings
from ray_ckpt.protocol.messages import Item, TensorSpec, num_bytes
from ray_ckpt.rounding import round_up
from ray_ckpt.storage.objects import SavedObject, saved_object
from ray_ckpt.storage.staging import Converted, is_on_cuda
from ray_ckpt.text import listed

_ALIGNMENT = 64
"""Alignment of each tensor in the buffer, in bytes: a cache line, and a multiple of every element's size."""

_UNCHANGING = (int, float, complex, bool, str, bytes, type(None))


class HostCopy:
    """Host memory that one rank's saves share: what `take` returns is valid until `take` is called again.

    It holds as many bytes as the largest copy so far, plus at most 64 per tensor, and the last copy's objects; pinned
    once it has held tensors of a CUDA device. While names, shapes and dtypes stay the same, so do the tensors it gives.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._pinned = False
        self._items: tuple[Item, ...] = ()
        self._skipped: Sequence[int] = ()
        self._places: list[torch.Tensor | None] = []
        self._digests: list[Digest] | None = None
        """What all places held as `take` left them."""
        self._objects: dict[int, tuple[str, object, tuple[int, int]]] = {}
        """Identity of a value -> name of the first object that it is, its copy, and the digest of that."""

    @property
    def num_bytes(self) -> int:
        """Size of the host memory held."""
        return self._buffer.nbytes

    def take(self, holdings: Holdings, skipped: Sequence[int] = ()) -> Holdings:
        """Copy everything except the skipped positions, where the copy holds None.

        The originals may change as soon as this returns.

        Raises:
            UsageError: a tensor has no plain elements, or is no longer what was planned, or cannot be cast.
        """
        self._lay_out(holdings, skipped)
        left_out = set(skipped)
        self._objects = frozen = {}  # by identity: parameters of one group share each hyper-parameter
        values: list[Any] = []
        copies = []
        for position, value in enumerate(holdings.values):
            if position in left_out:
                values.append(None)
            elif holdings.items[position].spec is None:
                if id(value) not in frozen:
                    kept = _frozen(value)
                    frozen[id(value)] = holdings.items[position].name, kept, _digest_object(kept)
                values.append(frozen[id(value)][1])
            else:
                tensor = value.tensor if isinstance(value, Converted) else value
                if wrong := fault(tensor):
                    raise UsageError(f"{holdings.items[position].name!r} {wrong}")
                place = self._place(position, value)
                values.append(place)
                if place.nbytes:
                    copies.append(Copy(place.data_ptr() - self._buffer.data_ptr(), place, value))
        self._digests = copy_digested(self._buffer, copies)
        return Holdings(holdings.items, tuple(values))

    def check(self) -> None:
        """Compare what the buffer holds with what `take` copied into it.

        Raises:
            CommitError: bits have changed since then; names the tensors that lie there.
        """
        assert self._digests is not None, "take comes first"
        if (changed := changed_since(self._buffer, self._digests)) is not None:
            raise _changed(self._names_in(changed))
        if names := [repr(name) for name, kept, digest in self._objects.values() if _digest_object(kept) != digest]:
            raise _changed(names)

    def _names_in(self, part: Digest) -> list[str]:
        first = self._buffer.data_ptr()
        return [
            repr(item.name)
            for item, place in zip(self._items, self._places, strict=True)
            if place is not None
            and place.data_ptr() < first + part.stop
            and place.data_ptr() + place.nbytes > first + part.start
        ]

    def _place(self, position: int, source: torch.Tensor | Converted) -> torch.Tensor:
        place = self._places[position]
        assert place is not None, "what is not skipped has its place"
        if (source.dtype, source.shape) != (place.dtype, place.shape):
            name, _, spec = self._items[position]
            raise UsageError(
                f"{name!r} was planned as {_described(spec)} but is now {source.dtype}{list(source.shape)}; "
                "do not change the state dict during a save"
            )
        return place

    def _lay_out(self, holdings: Holdings, skipped: Sequence[int]) -> None:
        """Give every tensor its place in the buffer."""
        on_cuda = any(is_on_cuda(value) for value in holdings.values)
        must_pin = on_cuda and not self._pinned
        if not must_pin and (holdings.items, skipped) == (self._items, self._skipped):
            return
        left_out = set(skipped)
        specs = [None if position in left_out else item.spec for position, item in enumerate(holdings.items)]
        sizes = [0 if spec is None else num_bytes(spec) for spec in specs]
        spans = [round_up(size, _ALIGNMENT) for size in sizes]
        self._items, self._places = (), []
        if must_pin or sum(spans) > self._buffer.nbytes:
            self._pinned = self._pinned or must_pin
            self._buffer = torch.empty(0, dtype=torch.uint8)  # given back before more is taken
            self._buffer = _allocate(sum(spans), pinned=self._pinned)
        parts = self._buffer[: sum(spans)].split_with_sizes(spans)
        for spec, size, part in zip(specs, sizes, parts, strict=True):
            raw = None if spec is None else part[:size]
            self._places.append(None if spec is None or raw is None else _shaped(raw, spec))
        self._items, self._skipped = holdings.items, skipped


def _changed(names: Sequence[str]) -> CommitError:
    return CommitError(
        f"refusing to commit: the copy in host memory of {listed(names)} has changed since it was made. Save once "
        "more; if it happens again, have the machine's memory tested"
    )


def _digest_object(kept: object) -> tuple[int, int]:
    """XXH3-64 of the container, if there is one yet, and of the value."""
    if isinstance(kept, SavedObject):
        return kept.checksum, xxhash.xxh3_64_intdigest(pickle.dumps(kept.inline))
    return 0, xxhash.xxh3_64_intdigest(pickle.dumps(kept))


def _allocate(num_bytes: int, *, pinned: bool) -> torch.Tensor:
    """Allocate exactly so many bytes, page-aligned."""
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        # Huge pages, because the first copy touches every page for the first time: 0.09 s per GiB instead of 0.37.
        # Not for forked children, as those of a data loader: each page would be copied when it is next written.
        with contextlib.suppress(AttributeError, OSError):
            memory.madvise(getattr(mmap, advice))
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    if pinned:
        _pin(buffer)
    return buffer


def _pin(buffer: torch.Tensor) -> None:
    """Pin memory that is there already: torch's own allocator of pinned memory rounds up to a power of two."""
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 1))
    weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr()).atexit = False


def _shaped(raw: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    return raw.view(parse_dtype(spec.dtype)).view(spec.sizes)


def _described(spec: TensorSpec | None) -> str:
    return "no tensor" if spec is None else f"{spec.dtype}{list(spec.sizes)}"


def _frozen(value: object) -> object:
    if type(value) in _UNCHANGING:
        return value
    saved = saved_object(value)
    if saved.inline is None:
        return saved
    return replace(saved, inline=Inline(copy.deepcopy(saved.inline.value)))
