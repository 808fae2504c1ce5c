"""The CRC-32 of zip members that a load reads whole: the only checksum that other programs' files carry.

    pieces ── whole_members ──> those that take a member as it is; one more small read for its CRC-32
    after the reads ── check_members ──> IntegrityError where one differs

A part of a member cannot be checked; elements that are converted, or copied to a GPU, are not. `verify` reads every
member whole. A CRC-32 of 0 means that the writer left it out, as ours does, and torch does when it is told to.
"""

from __future__ import annotations

import binascii
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from ray_ckpt.errors import IntegrityError
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.ranges import is_dense
from ray_ckpt.format.torch_container import DESCRIPTOR_BYTES, descriptor_crc
from ray_ckpt.storage.ranged_reads import Piece, Source, is_plain_copy
from ray_ckpt.storage.staging import bytes_of

__all__ = ["WholeMember", "check_members", "whole_members"]


class WholeMember(NamedTuple):
    """A piece that is a whole member, and the bytes behind the member, which may be its descriptor."""

    piece: Piece
    descriptor: Piece | None
    """None when the CRC-32 is known already."""

    @property
    def crc(self) -> int:
        """The CRC-32 that the archive tells; 0 when it tells none."""
        source = self.piece.source
        if self.descriptor is None:
            return source.crc
        return descriptor_crc(self.descriptor.target.numpy().tobytes(), source.data_bytes)


def whole_members(pieces: Sequence[Piece]) -> list[WholeMember]:
    """The pieces whose bytes can be compared with a CRC-32."""
    members = []
    for piece in pieces:
        source = piece.source
        if (
            (source.crc or source.container_end)
            and piece.box.num_elements * source.dtype.itemsize == source.data_bytes > 0
            and is_plain_copy(piece)
            and is_dense(piece.box.sizes, source.strides)
        ):
            members.append(WholeMember(piece, None if source.crc else _descriptor(source)))
    return members


def _descriptor(source: Source) -> Piece:
    start = source.data_start + source.data_bytes
    size = min(DESCRIPTOR_BYTES, source.container_end - start)
    target = torch.empty(size, dtype=torch.uint8)
    place = Source(source.name, source.file, start, (1,), torch.uint8, size, None)
    return Piece(place, Box((0,), (size,)), target)


def check_members(members: Sequence[WholeMember], threads: int) -> None:
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


def _check(member: WholeMember) -> None:
    told, source = member.crc, member.piece.source
    if told and told != (found := binascii.crc32(bytes_of(member.piece.target))):
        raise IntegrityError(
            file=source.file,
            start=source.data_start,
            end=source.data_start + source.data_bytes,
            tensor=source.name,
            expected=f"{told:08x}",
            found=f"{found:08x}",
            hint="the checksum is the CRC-32 of the zip archive; restore the file from a copy, or load an earlier step",
        )
