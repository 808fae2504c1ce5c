"""Checksums of a chunk's data: one XXH3-64 per block, so that a ranged read can be checked by itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import xxhash

from ray_ckpt.rounding import ceil_div

__all__ = ["BlockHasher", "BlockSums", "block_size"]

_MIN_BLOCK_BYTES, _MAX_BLOCK_BYTES, _BLOCKS_PER_CHUNK = 4 << 10, 1 << 20, 256


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
    """Bytes per checksum block: a 256th of the chunk, in steps of 4 KiB, at most 1 MiB.

    A ranged read is widened to whole blocks, so small blocks save reads; each costs 11 bytes of manifest.
    """
    blocks = ceil_div(data_bytes, _BLOCKS_PER_CHUNK * _MIN_BLOCK_BYTES)
    return min(max(1, blocks) * _MIN_BLOCK_BYTES, _MAX_BLOCK_BYTES)


class BlockHasher:
    """Computes a chunk's block sums from pieces of any size."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._sums = bytearray()
        self._open: xxhash.xxh3_64 | None = None
        """Hasher of a block that is not complete yet; None between blocks."""
        self._open_bytes = 0

    def update(self, data: memoryview) -> None:
        while len(data):
            taken = min(self._block_bytes - self._open_bytes, len(data))
            if taken == self._block_bytes:
                self._append(xxhash.xxh3_64_intdigest(data[:taken]))
            else:
                self._open = self._open or xxhash.xxh3_64()
                self._open.update(data[:taken])
                self._open_bytes += taken
                if self._open_bytes == self._block_bytes:
                    self._close_block(self._open)
            data = data[taken:]

    def finish(self) -> BlockSums:
        if self._open is not None:
            self._close_block(self._open)
        return BlockSums(self._block_bytes, bytes(self._sums))

    def _close_block(self, block: xxhash.xxh3_64) -> None:
        self._append(block.intdigest())
        self._open, self._open_bytes = None, 0

    def _append(self, digest: int) -> None:
        self._sums += digest.to_bytes(8, "little")
