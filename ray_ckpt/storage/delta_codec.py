"""What has changed between two versions of the same elements, in few bytes; and back.

encode ── per frame ── XOR ──> the first bytes of all elements, then the second, ... ──> zstd
decode ── per frame ── zstd ──> elements ── XOR ──> into the version before

At small learning rates most elements of a bfloat16 weight stay as they are, and the upper byte of nearly all: bytes of
one place are alike, and zstd finds that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_ckpt.errors import FormatError
from ray_ckpt.rounding import ceil_div

__all__ = ["FRAME_BYTES", "apply_delta", "encode_delta"]

FRAME_BYTES = 4 << 20
"""Bytes of elements that are coded together, and a multiple of every element's size: what is held besides them."""

_LEVEL = 1
"""How hard zstd looks. Level 3 took two to six times as long, and found nothing more."""

_LENGTH_BYTES = 8


def encode_delta(before: memoryview, now: memoryview, element_bytes: int) -> bytes:
    """What makes `now` of `before`, which are as long.

    Returns:
        Lengths of the frames, 8 bytes each, and the frames.
    """
    codec = pa.Codec("zstd", _LEVEL)
    frames = []
    for start in range(0, len(now), FRAME_BYTES):
        changed = np.bitwise_xor(_array(before, start), _array(now, start))
        planes = np.ascontiguousarray(changed.reshape(-1, element_bytes).T)
        frames.append(codec.compress(planes, asbytes=True))
    lengths = np.array([len(frame) for frame in frames], dtype="<u8")
    return b"".join([lengths.tobytes(), *frames])


def apply_delta(coded: memoryview, version: memoryview, element_bytes: int) -> None:
    """Make the next version of one, in place.

    Raises:
        FormatError: this is no delta of so many bytes. The version may then be half of each.
    """
    num_frames = ceil_div(len(version), FRAME_BYTES)
    position = _LENGTH_BYTES * num_frames
    lengths = np.frombuffer(coded[:position], dtype="<u8").tolist() if len(coded) >= position else [len(coded)]
    if position + sum(lengths) != len(coded):
        raise FormatError(f"a delta of {len(coded)} bytes is not one of {len(version)} bytes of elements")
    codec: Any = pa.Codec("zstd")
    for number, length in enumerate(lengths):
        target = _array(version, number * FRAME_BYTES)
        try:
            planes = codec.decompress(coded[position : position + length], decompressed_size=len(target))
        except (OSError, ValueError) as error:
            raise FormatError(f"a delta cannot be unpacked: {str(error)[:200]}") from error
        if len(planes) != len(target):
            raise FormatError(f"a delta has {len(planes)} bytes where {len(target)} are to be changed")
        elements = target.reshape(-1, element_bytes)
        for place, changed in enumerate(np.frombuffer(planes, dtype=np.uint8).reshape(element_bytes, -1)):
            np.bitwise_xor(elements[:, place], changed, out=elements[:, place])
        position += length


def _array(data: memoryview, start: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data[start : start + FRAME_BYTES], dtype=np.uint8)
