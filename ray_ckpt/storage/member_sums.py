"""The CRC-32 of zip members that a load reads whole: the only checksum that other programs' files carry.

    pieces ── read in one go ──> compared as they come (ranged_reads.py)
           ── long, straight to where they belong ── long_members ──> one more small read for the CRC-32 behind each
    after the reads ── check_members ──> IntegrityError where one differs

A part of a member cannot be checked; long members that are converted, or copied to a GPU, are not. `verify` reads every
member whole. A CRC-32 of 0 means that the writer left it out, as ours does, and torch does when it is told to.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from ray_ckpt.format.boxes import Box
from ray_ckpt.format.torch_container import DESCRIPTOR_BYTES
from ray_ckpt.storage.ranged_reads import Piece, Source, Tuning, check_crc, is_direct, is_whole
from ray_ckpt.storage.staging import bytes_of

__all__ = ["LongMember", "check_members", "long_members"]


class LongMember(NamedTuple):
    """A piece that is a whole member, and the bytes behind the member, which may be its descriptor."""

    piece: Piece
    descriptor: Piece | None
    """None when the CRC-32 is known already."""


def long_members(pieces: Sequence[Piece], tuning: Tuning) -> list[LongMember]:
    """The whole members that go straight to their targets in several reads, and must be compared afterwards."""
    return [
        LongMember(piece, None if piece.source.crc else _descriptor(piece.source))
        for piece in pieces
        if piece.source.has_crc and is_whole(piece) and is_direct(piece, tuning)
    ]


def _descriptor(source: Source) -> Piece:
    start = source.data_start + source.data_bytes
    size = min(DESCRIPTOR_BYTES, source.container_end - start)
    place = Source(source.name, source.file, start, (1,), torch.uint8, size, None)
    return Piece(place, Box((0,), (size,)), torch.empty(size, dtype=torch.uint8))


def check_members(members: Sequence[LongMember], threads: int) -> None:
    """Compare what was read with what the archives tell.

    Raises:
        IntegrityError: a member differs from its CRC-32.
    """
    if threads == 1 or len(members) < 2:
        for member in members:
            _check(member)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="ray_ckpt-crc") as pool:
        for _ in pool.map(_check, members):
            pass


def _check(member: LongMember) -> None:
    behind = b"" if member.descriptor is None else member.descriptor.target.numpy().tobytes()
    check_crc(member.piece.source, bytes_of(member.piece.target), memoryview(behind))
