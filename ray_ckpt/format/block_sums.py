"""Checksums of a chunk's data: one XXH3-64 per block, so that a ranged read can be checked by itself."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

import xxhash

from ray_ckpt.rounding import ceil_div

__all__ = ["BlockHasher", "BlockSums", "block_size", "sums_of"]

_MIN_BLOCK_BYTES, _MAX_BLOCK_BYTES, _BLOCKS_PER_CHUNK = 16 << 10, 1 << 20, 256


@dataclass(frozen=True, slots=True)
class BlockSums:
    """One XXH3-64 per block of a chunk's data, or of an object's bytes."""

    block_bytes: int
    sums: bytes
    """The checksums, one after the other, 8 bytes each, little-endian."""

    def __getitem__(self, block: int) -> int:
        return int.from_bytes(self.sums[8 * block : 8 * block + 8], "little")

    def __len__(self) -> int:
        return len(self.sums) // 8


@lru_cache(maxsize=4096)
def block_size(data_bytes: int) -> int:
    """Bytes per checksum block: a 256th of the chunk, in steps of 16 KiB, at most 1 MiB.

    A ranged read is widened to whole blocks, so small blocks save reads; each costs 11 bytes of manifest. Less than
    16 KiB saves nothing, for so long a gap is read over anyway, and of blocks of 4 KiB each, hashing takes a third of
    the time that the steps between do.
    """
    blocks = ceil_div(data_bytes, _BLOCKS_PER_CHUNK * _MIN_BLOCK_BYTES)
    return min(max(1, blocks) * _MIN_BLOCK_BYTES, _MAX_BLOCK_BYTES)


def sums_of(data: memoryview, block_bytes: int) -> bytes:
    """The checksums of blocks that lie one after the other, the last of which may be shorter.

    One call for many blocks: of the smallest, hashing takes half of the time, and the steps between the other.
    """
    digest = xxhash.xxh3_64_intdigest
    sums = [digest(data[at : at + block_bytes]) for at in range(0, len(data), block_bytes)]
    return struct.pack(f"<{len(sums)}Q", *sums)


class BlockHasher:
    """Computes a chunk's block sums from pieces of any size."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._sums = bytearray()
        self._open: xxhash.xxh3_64 | None = None
        """Hasher of a block that is not complete yet; None between blocks."""
        self._open_bytes = 0

    def update(self, data: memoryview) -> None:
        if self._open is not None:
            taken = min(self._block_bytes - self._open_bytes, len(data))
            self._extend(self._open, data[:taken])
            data = data[taken:]
        whole = len(data) - len(data) % self._block_bytes
        self._sums += sums_of(data[:whole], self._block_bytes)
        if whole < len(data):
            self._open = xxhash.xxh3_64()
            self._extend(self._open, data[whole:])

    def finish(self) -> BlockSums:
        if self._open is not None:
            self._close(self._open)
        return BlockSums(self._block_bytes, bytes(self._sums))

    def _extend(self, block: xxhash.xxh3_64, data: memoryview) -> None:
        block.update(data)
        self._open_bytes += len(data)
        if self._open_bytes == self._block_bytes:
            self._close(block)

    def _close(self, block: xxhash.xxh3_64) -> None:
        self._sums += block.intdigest().to_bytes(8, "little")
        self._open, self._open_bytes = None, 0
