"""Counting NaN and Inf in the bytes of tensors, as they pass by.

Tally           consecutive bytes of elements, while they are read for another purpose
count_apart     a chunk whose elements do not lie there as they are: encoded, or a view with gaps
"""

from __future__ import annotations

import math

import torch

from ray_ckpt.errors import CheckpointError, FormatError, StorageError
from ray_ckpt.format.manifest import Chunk
from ray_ckpt.format.torch_container import parse_dtype
from ray_ckpt.report import NonFinite
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.rewrite import TensorPieces, WantedTensor
from ray_ckpt.storage.stretches import Checked

__all__ = ["Tally", "count_apart", "may_be_odd"]

_SLICE_ELEMENTS = 1 << 15
"""Elements that are looked at together: torch uses one thread for so few, and they stay in the cache."""


def may_be_odd(dtype: str) -> bool:
    """Whether elements of this type can be NaN or Inf, as far as this torch knows it. Those of 4 bits cannot."""
    try:
        found = parse_dtype(dtype)
    except FormatError:  # a dtype of a later torch
        return False
    return (found.is_floating_point or found.is_complex) and not dtype.startswith("float4")


class Tally:
    """Counts NaN and Inf in the consecutive bytes of elements of one type."""

    def __init__(self, dtype: str) -> None:
        self._dtype = parse_dtype(dtype)
        self._begun = b""
        """First bytes of an element whose others have not come yet."""
        self.found = NonFinite(0, 0)

    def update(self, data: memoryview) -> None:
        """Take the bytes that follow."""
        width = self._dtype.itemsize
        if self._begun:
            missing = width - len(self._begun)
            self._begun += bytes(data[:missing])
            data = data[missing:]
            if len(self._begun) < width:
                return
            self._count(memoryview(bytearray(self._begun)))
            self._begun = b""
        whole = len(data) // width * width
        for start in range(0, whole, _SLICE_ELEMENTS * width):
            self._count(data[start : min(start + _SLICE_ELEMENTS * width, whole)])
        self._begun = bytes(data[whole:])

    def _count(self, data: memoryview) -> None:
        raw = torch.frombuffer(data, dtype=torch.uint8)
        if raw.data_ptr() % self._dtype.itemsize:
            raw = raw.clone()
        elements = raw.view(self._dtype)
        if elements.is_complex():
            elements = torch.view_as_real(elements).flatten()
        if elements.dtype.itemsize == 1:
            elements = elements.to(torch.float32)  # torch does not compare those of 8 bits
        low, high = torch.aminmax(elements)  # which are NaN if one element is
        if not (math.isfinite(low) and math.isfinite(high)):
            self.found += NonFinite(int(elements.isnan().sum()), int(elements.isinf().sum()))


def count_apart(storage: Storage, name: str, dtype: str, chunk: Chunk, checked: Checked) -> None:
    """Count in one saved chunk, which is read on its own; where that cannot be done, note why.

    Raises:
        StorageError: the storage does not answer.
    """
    tally = Tally(dtype)
    try:
        for _, data in TensorPieces(storage).pieces({0: WantedTensor(name, dtype, chunk.box, (chunk,))}):
            tally.update(data)
    except CheckpointError as error:
        checked.uncounted[name] = str(error)
    except StorageError as error:
        if error.transient:
            raise
        checked.uncounted[name] = str(error)
    checked.count(name, tally.found)
