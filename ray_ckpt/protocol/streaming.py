"""A transfer, as ranks of both sides go through it: bytes of live tensors, window by window, into live tensors.

source rank    offer    names, parts, values              (stream_plan.py makes a record of them)
source rank    window   the next bytes of its stream, and checksums of what ends in them
target rank    as in a load: open, offer, prepare; then
target rank    expect   allocate; what is wanted of which stream
target rank    fill     a window of a stream
target rank    settle   whether all has come; only now, where the old values were to be kept until then
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch.distributed.checkpoint.stateful import Stateful

from ray_ckpt.errors import CheckpointError, UsageError
from ray_ckpt.format.block_sums import BlockHasher, BlockSums, block_size
from ray_ckpt.format.manifest import ObjectEntry
from ray_ckpt.format.memory import fault
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.protocol.holdings import Holdings, fingerprint_sum, hold
from ray_ckpt.protocol.load_options import LoadOptions
from ray_ckpt.protocol.messages import Assignment, num_bytes
from ray_ckpt.protocol.rank_load import RankLoad
from ray_ckpt.protocol.rank_save import PlanMemory
from ray_ckpt.protocol.save_options import SaveOptions
from ray_ckpt.protocol.selecting import select
from ray_ckpt.protocol.share_plan import Extent, Wants
from ray_ckpt.protocol.shared_reading import Placer
from ray_ckpt.protocol.stream_plan import ALIGNMENT, Proof, StreamOffer
from ray_ckpt.rounding import round_up
from ray_ckpt.state.buffers import buffers_of
from ray_ckpt.state.load_plan import Claim
from ray_ckpt.state.train_state import TrainState, is_hyperparameter
from ray_ckpt.storage.data_file import hash_tensors
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.objects import INLINE_BLOB_BYTES, saved_object
from ray_ckpt.storage.staging import Converted, bytes_of, host_pieces, is_on_cuda, plain
from ray_ckpt.text import listed

Bytes = npt.NDArray[np.uint8]


class StreamPiece(NamedTuple):
    """Bytes of a stream."""

    start: int
    data: Bytes


class StreamWindow(NamedTuple):
    """The next bytes of a stream."""

    pieces: list[StreamPiece]
    """Ascending. Where that is possible, views of the tensors' memory: valid as long as the state does not change."""
    checksum: int
    """XXH3-64 of the bytes of all pieces."""
    proof: Proof
    """What is told of the parts that end here, and in the last window of all others that this rank holds."""
    is_last: bool

    @property
    def num_bytes(self) -> int:
        return sum(len(piece.data) for piece in self.pieces)


class RankStream:
    """What one rank of the source sends. The state may not change before the last window has been copied.

    Args:
        options: what of the state is sent, and how.
    """

    def __init__(self, options: SaveOptions) -> None:
        self._options = options
        self._holdings = Holdings((), ())
        self._skipped: tuple[int, ...] = ()
        self._stream: Iterator[tuple[int, StreamPiece]] = iter(())
        self._rest: tuple[int, StreamPiece] | None = None
        self._by_fingerprint: Collection[str] = ()
        self._hashed: int | None = None
        """Position of the part whose bytes are being sent."""
        self._hasher = BlockHasher(1)

    def offer(self, state: Stateful | Mapping[str, Any]) -> StreamOffer:
        """Look through the state.

        Raises:
            UsageError: it holds something that is neither a tensor nor a small value; or as `hold` and `select`.
        """
        with collector_paused():
            everything = hold(state.state_dict() if isinstance(state, Stateful) else state)
            selected = select(everything, self._options)
            self._holdings = selected.holdings
            plan = PlanMemory().plan(selected, frozenset(), lambda: self._options.saved_names(buffers_of(state)))
            objects, refused = {}, []
            for position, (item, value) in enumerate(zip(self._holdings.items, self._holdings.values, strict=True)):
                entry = None if item.spec is not None else _entry(value)
                if entry is not None:
                    objects[position] = entry
                elif item.spec is None or is_hyperparameter(item.name):
                    refused.append(item.name)
        if refused:
            raise UsageError(
                "a transfer moves tensors of the model and the optimizer, and small values, not "
                f"{listed(sorted(refused))}: leave that out by only=('model',), or save it and load it"
            )
        return StreamOffer(plan, objects, state.layout if isinstance(state, TrainState) else None)

    def begin(self, assignment: Assignment, by_fingerprint: Collection[str]) -> None:
        """Be told what other ranks send, and of which tensors the target needs fingerprints."""
        self._skipped = assignment.skipped
        self._by_fingerprint = by_fingerprint
        self._stream = self._all_pieces()

    def window(self, max_bytes: int) -> StreamWindow:
        """The next bytes of the stream, and the proof of what ends in them."""
        pieces: list[StreamPiece] = []
        proof = Proof()
        left, checksum = max_bytes, xxhash.xxh3_64()
        while left and (found := self._rest or next(self._stream, None)) is not None:
            position, (start, data) = found
            taken = data[:left]
            pieces.append(StreamPiece(start, taken))
            checksum.update(taken.data)
            if position != self._hashed:
                self._close(proof)
                self._hashed, self._hasher = position, BlockHasher(block_size(self._num_bytes(position)))
            self._hasher.update(taken.data)
            self._rest = (position, StreamPiece(start + left, data[left:])) if len(data) > left else None
            left -= len(taken)
        is_last = left > 0
        if is_last:
            self._close(proof)
            self._prove_others(proof)
        return StreamWindow(pieces, checksum.intdigest(), proof, is_last)

    def _close(self, proof: Proof) -> None:
        """Prove the part whose bytes have all been sent."""
        if self._hashed is not None:
            proof.blocks[self._hashed] = self._hasher.finish()
            self._add_fingerprint(self._hashed, proof)
            self._hashed = None

    def _prove_others(self, proof: Proof) -> None:
        """What has no bytes, and what other ranks send and this one holds, too."""
        items = self._holdings.items
        empty = [p for p, item in enumerate(items) if item.spec is not None and not self._num_bytes(p)]
        held = [p for p in self._skipped if items[p].spec is not None and p not in empty]
        for position in empty:
            proof.blocks[position] = BlockHasher(block_size(0)).finish()
            self._add_fingerprint(position, proof)
        for position, value, sums in hash_tensors((p, self._holdings.values[p]) for p in held):
            proof.blocks[position] = BlockSums(block_size(value.nbytes), sums)

    def _add_fingerprint(self, position: int, proof: Proof) -> None:
        if self._holdings.items[position].name in self._by_fingerprint and position not in self._skipped:
            proof.sums[position] = self._sum(position)

    def _num_bytes(self, position: int) -> int:
        spec = self._holdings.items[position].spec
        assert spec is not None, "only tensors are sent"
        return num_bytes(spec)

    def _sum(self, position: int) -> int:
        spec = self._holdings.items[position].spec
        assert spec is not None, "only tensors have fingerprints"
        return fingerprint_sum(spec, self._holdings.values[position])

    def _all_pieces(self) -> Iterator[tuple[int, StreamPiece]]:
        starts, at = {}, 0
        for position, item in enumerate(self._holdings.items):
            if item.spec is not None and position not in self._skipped:
                starts[position] = at
                at += round_up(num_bytes(item.spec), ALIGNMENT)
        tensors = [(position, self._holdings.values[position]) for position in starts]
        for position, value in tensors:
            if wrong := fault(value.tensor if isinstance(value, Converted) else value):
                raise UsageError(f"{self._holdings.items[position].name!r} {wrong}")
        for position, data in _bytes_in_order(tensors):
            if len(data):
                yield position, StreamPiece(starts[position], data)
                starts[position] += len(data)


def _bytes_in_order(tensors: list[tuple[int, torch.Tensor | Converted]]) -> Iterator[tuple[int, Bytes]]:
    if any(is_on_cuda(value) for _, value in tensors):
        for position, piece in host_pieces(tensors):
            yield position, np.frombuffer(bytes(piece), np.uint8)  # the staging buffer is used again
        return
    for position, value in tensors:
        whole = None if isinstance(value, Converted) else plain(value)
        if whole is not None and whole.is_contiguous():
            yield position, np.frombuffer(bytes_of(whole), np.uint8)
            continue
        for _, piece in host_pieces([(position, value)]):
            yield position, np.frombuffer(piece, np.uint8)


def _entry(value: object) -> ObjectEntry | None:
    """A value as a record holds it; None where it does not."""
    saved = saved_object(value)
    blob = saved.container if saved.inline is None else None
    if blob is not None and len(blob) > INLINE_BLOB_BYTES:
        return None
    return ObjectEntry("", 0, len(saved.container), inline=saved.inline, blob=blob, checksum=saved.checksum)


class StreamedLoad(RankLoad):
    """One rank of the target.

    Args:
        storage: what messages call the source; nothing is read of it.
        atomic: keep the old values in place until all bytes are there, at the cost of as much memory again.
    """

    def __init__(self, storage: Storage, options: LoadOptions, *, atomic: bool) -> None:
        super().__init__(storage, options)
        self._atomic = atomic
        self._placer = Placer(())
        self._left_bytes = 0

    def expect(self) -> Wants:
        """Allocate what has no memory yet, and tell what is wanted of which stream."""
        wants = self.want()
        assert self._wanted is not None, "that is what want has made"
        self._placer = Placer(self._wanted.reads.ranges)
        self._left_bytes = sum(item.end - item.start for item in self._wanted.reads.ranges)
        self._reading = not self._atomic
        return wants

    def fill(self, stream: str, pieces: list[StreamPiece], checksum: int) -> None:
        """Take the next bytes of a stream.

        Raises:
            CheckpointError: they are not what was sent.
        """
        hasher = xxhash.xxh3_64()
        for _, data in pieces:
            hasher.update(data.data)
        if hasher.intdigest() != checksum:
            raise CheckpointError(f"{stream} of {self._storage.address} has arrived with other bytes than were sent")
        with self._clock.phase("read"):
            for start, data in pieces:
                extent = Extent(stream, start, start + len(data), -1, ())
                self._left_bytes -= self._placer.fill(extent, _memory_of(data), is_checked=True)

    def settle(self) -> None:
        """Give the state its new values, where it does not have them yet.

        Raises:
            CheckpointError: some bytes have not come.
        """
        assert self._wanted is not None, "expect comes first"
        if self._left_bytes:
            raise CheckpointError(f"{self._left_bytes} wanted bytes of {self._storage.address} have not come")
        self._reading = True
        self._wanted.copy()

    def _allocate(
        self, claims: Mapping[str, Claim]
    ) -> tuple[dict[str, torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
        tensors, copies = super()._allocate(claims)
        if not self._atomic:
            return tensors, copies
        new = {name: torch.empty_like(target) for name, target in tensors.items()}
        of_target = {id(target): new[name] for name, target in tensors.items()}
        copies = [(target, of_target[id(filled)]) for target, filled in copies]
        return new, [*((target, new[name]) for name, target in tensors.items()), *copies]

    def _read_early(self, claims: Mapping[str, Claim]) -> Mapping[str, torch.Tensor]:
        if read := sorted(wanted for wanted, claim in claims.items() if claim.spec is not None):
            raise UsageError(
                f"a transfer cannot give {listed(read)} to objects that may refuse it: leave them out by "
                "only=('model',), or save them and load them"
            )
        return super()._read_early(claims)


def _memory_of(data: Bytes) -> memoryview:
    """The memory of an array as if it could be written: torch warns of memory that cannot, as that of Ray's objects."""
    memory = (ctypes.c_ubyte * len(data)).from_address(data.ctypes.data)
    memory.array = data  # type: ignore[attr-defined]
    return memoryview(memory).cast("B")


def of_stream(options: Mapping[str, Any], storage: Storage, *, atomic: bool) -> StreamedLoad:
    """A rank of the target, with the fields of `LoadOptions`."""
    return StreamedLoad(storage, replace(LoadOptions(), **options), atomic=atomic)
