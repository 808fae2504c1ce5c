"""Bytes from one node's memory to another: Arrow Flight.

A keeper listens on its node's address, at a free port. Whoever asks for a range of a file names the file's key and
shows the keeper's token, which the index tells to those that Ray lets in. The bytes leave the memory that the file lies
in without a copy.

What is asked for may also be cuts (storage/cuts.py): the blocks are compared with their checksums here, and what is cut
out of them goes with a checksum of its own, which the receiver compares.

Ray's own object transfer moves less than half as much per second and needs room in the object stores of both nodes
(benchmarks/RESULTS.md).
"""

from __future__ import annotations

import errno
import hmac
import json
import mmap
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, NamedTuple

import pyarrow as pa
import xxhash
from pyarrow import flight

from ray_ckpt.format.block_sums import BlockSums
from ray_ckpt.storage.cuts import Cut, cut_out, size_of
from ray_ckpt.text import first_line

BATCH_BYTES = 8 << 20
"""Bytes of one message."""

_SCHEMA = pa.schema([("bytes", pa.uint8())])
_HEADER = "authorization"


class Door(NamedTuple):
    """Where a keeper listens, and what it wants to be shown."""

    location: str
    """`grpc://<address>:<port>`."""
    token: str

    def __repr__(self) -> str:
        return f"Door({self.location!r})"


class Sender:
    """Listens for the other nodes, as long as this process lives.

    Args:
        address: of this node.
        opened: a file's key -> a descriptor of it, which is closed at the end.
            `FileNotFoundError` for a key that is not held.
    """

    def __init__(self, address: str, opened: Callable[[str], AbstractContextManager[int]]) -> None:
        token = secrets.token_urlsafe(32)
        host = f"[{address}]" if ":" in address else address
        # It listens from here on. `serve()` would only wait, and take the process' signal handlers for it.
        self._server = _Server(f"grpc://{host}:0", token, opened)
        self.door = Door(f"grpc://{host}:{self._server.port}", token)


class _Server(flight.FlightServerBase):  # type: ignore[misc]
    def __init__(self, location: str, token: str, opened: Callable[[str], AbstractContextManager[int]]) -> None:
        super().__init__(location, middleware={"token": _Guard(token)})
        self._opened = opened

    def do_get(self, context: Any, ticket: Any) -> Any:
        """The bytes of `{"key": ..., "offset": ..., "num_bytes": ...}`; fewer where the file ends before.

        Or of `{"key": ..., "cuts": [...]}`; none where a block is not what was saved.
        """
        asked = json.loads(ticket.ticket)
        with self._opened(asked["key"]) as descriptor:
            if "cuts" in asked:
                return flight.GeneratorStream(_SCHEMA, _cut_out(descriptor, [_cut(told) for told in asked["cuts"]]))
            end = min(os.fstat(descriptor).st_size, asked["offset"] + asked["num_bytes"])
            whole = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) if end > asked["offset"] else b""
        # Arrow holds the mapping until the last byte is sent, also when the file is freed meanwhile.
        batches = _batches(pa.py_buffer(whole), asked["offset"], end)
        return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(_SCHEMA, batches))


def _cut_out(descriptor: int, cuts: Sequence[Cut]) -> Iterator[tuple[Any, bytes]]:
    """One message and its checksum, or none."""
    packed = memoryview(bytearray(size_of(cuts)))
    whole = memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) if os.fstat(descriptor).st_size else b"")
    at = 0
    for cut in cuts:
        if not cut_out(whole, cut, packed[at : at + cut.num_wanted]):
            return iter(())
        at += cut.num_wanted
    column = pa.Array.from_buffers(pa.uint8(), len(packed), [None, pa.py_buffer(packed)])
    batch = pa.RecordBatch.from_arrays([column], schema=_SCHEMA)
    return iter([(batch, xxhash.xxh3_64_digest(packed))])


def _told(cut: Cut) -> list[Any]:
    return [*cut[:2], cut.sums.block_bytes, cut.sums.sums.hex(), *cut[3:]]


def _cut(told: Sequence[Any]) -> Cut:
    start, num_bytes, block_bytes, sums, first, sizes, strides = told
    return Cut(start, num_bytes, BlockSums(block_bytes, bytes.fromhex(sums)), first, tuple(sizes), tuple(strides))


def _batches(whole: Any, offset: int, end: int) -> Iterator[Any]:
    for at in range(offset, end, BATCH_BYTES):
        length = min(BATCH_BYTES, end - at)
        column = pa.Array.from_buffers(pa.uint8(), length, [None, whole.slice(at, length)])
        yield pa.RecordBatch.from_arrays([column], schema=_SCHEMA)


class _Guard(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Turns away who does not show the token."""

    def __init__(self, token: str) -> None:
        self._token = token

    def start_call(self, info: Any, headers: Mapping[str, Sequence[str | bytes]]) -> None:
        shown = [_as_bytes(value) for value in headers.get(_HEADER, ())]
        if not any(hmac.compare_digest(value, self._token.encode()) for value in shown):
            raise flight.FlightUnauthenticatedError("the token of this keeper was not shown")


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def receive(
    door: Door, key: str, offset: int, num_bytes: int, take: Callable[[memoryview], None], *, timeout_s: float
) -> None:
    """Give a range of a file on another node to `take`, piece by piece.

    Args:
        timeout_s: for all of it.

    Raises:
        OSError: that node does not answer in time, does not hold the file, or sends fewer bytes.
    """
    left = num_bytes
    for chunk in _answer(door, {"key": key, "offset": offset, "num_bytes": num_bytes}, timeout_s):
        piece = _bytes_of(chunk)
        left -= len(piece)
        take(piece)
    if left:
        raise EOFError(f"{key} ends {left} bytes too early on {door.location}")


def receive_cuts(door: Door, key: str, cuts: Sequence[Cut], memory: memoryview, *, timeout_s: float) -> bool:
    """Fill memory with cuts of a file on another node, one after the other.

    Returns:
        Whether that is done: not if a block there is not what was saved, or what arrives is not what was sent.

    Raises:
        OSError: that node does not answer in time, or does not hold the file.
    """
    done = 0
    for chunk in _answer(door, {"key": key, "cuts": [_told(cut) for cut in cuts]}, timeout_s):
        piece = _bytes_of(chunk)
        if xxhash.xxh3_64_digest(piece) != chunk.app_metadata.to_pybytes():
            return False
        memory[done : done + len(piece)] = piece
        done += len(piece)
    return done == len(memory)


def _answer(door: Door, asked: Mapping[str, Any], timeout_s: float) -> Iterator[Any]:
    ticket = flight.Ticket(json.dumps(asked).encode())
    options = flight.FlightCallOptions(timeout=timeout_s, headers=[(_HEADER.encode(), door.token.encode())])
    try:
        yield from _client(door.location).do_get(ticket, options)
    except (pa.ArrowException, flight.FlightError) as error:
        what = re.split(r"\.? (?:Detail:|gRPC client)", first_line(error))[0]
        raise OSError(errno.EIO, f"{door.location} does not send it: {what}") from error


def _bytes_of(chunk: Any) -> memoryview:
    return memoryview(chunk.data.column(0).buffers()[1]).cast("B")


@lru_cache(maxsize=64)
def _client(location: str) -> Any:
    # A proxy for the web is not the way to a neighbor.
    return flight.connect(location, generic_options=[("grpc.enable_http_proxy", 0)])
