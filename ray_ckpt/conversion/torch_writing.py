"""A file as `torch.save` writes it, of tensors that come piece by piece."""

from __future__ import annotations

import binascii
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from ray_ckpt.format.torch_container import ALIGNMENT, Archive
from ray_ckpt.storage.data_file import Sink
from ray_ckpt.storage.rewrite import Entry

__all__ = ["write_torch"]


def write_torch(out: Sink, pickled: bytes, sizes: Sequence[int], pieces: Iterator[tuple[Entry, memoryview]]) -> None:
    """Write the archive: the pickle, then storage after storage, each with its CRC-32 behind it.

    Args:
        sizes: bytes of the storages, by their keys.
        pieces: their bytes, in that order.
    """
    archive = Archive()
    archive.add("data.pkl", pickled)
    archive.add(".format_version", b"1")
    archive.add(".storage_alignment", str(ALIGNMENT).encode())
    archive.add("byteorder", b"little")
    opened, crc = -1, 0
    with ThreadPoolExecutor(1, thread_name_prefix="ray_ckpt-crc") as pool:
        for (key, _), data in pieces:
            if key != opened:
                if opened >= 0:
                    archive.close_reserved(crc)
                archive.reserve(f"data/{key}", sizes[key])
                out.write(archive.take())
                opened, crc = key, 0
            sum_so_far = pool.submit(binascii.crc32, data, crc)  # takes as long as the write
            out.write(data)
            crc = sum_so_far.result()
    if opened >= 0:
        archive.close_reserved(crc)
    archive.add("version", b"3\n")
    archive.add(".data/serialization_id", b"0" * 40)
    archive.finish()
    out.write(archive.take())
