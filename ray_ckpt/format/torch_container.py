"""The container that DCP puts around one tensor: a zip archive as `torch.save` writes it.

    archive/data.pkl             how to rebuild the tensor: dtype, shape, strides
    archive/.format_version      "1"
    archive/.storage_alignment   "64"
    archive/byteorder            "little"
    archive/data/0               the elements, stored, aligned to 64 bytes
    archive/version              "3"
    archive/.data/serialization_id
    central directory, zip64 end record and locator, end record

Everything but the elements depends on dtype and shape alone, so `container` builds the bytes before and after them once
and the writer streams the tensor's own memory between. The CRC-32 of the elements is 0, as torch leaves it under
`torch.serialization.set_crc32_options(False)`: no torch reader looks at it, and the manifest holds better checksums.

`find_data` is the way back: from the first bytes of anybody's container to where the elements start. It rebuilds
nothing.

Source of the format: PyTorch's `caffe2/serialize/inline_container.cc` and `torch/serialization.py`; PKWARE APPNOTE 6.3.
"""

from __future__ import annotations

import binascii
import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch

from ray_ckpt.errors import CheckpointError, FormatError
from ray_ckpt.format import torch_pickle
from ray_ckpt.format.ranges import contiguous_strides, span
from ray_ckpt.format.torch_internals import STORAGE_TYPES, rebuild_tensor_v2, rebuild_tensor_v3
from ray_ckpt.format.torch_pickle import Tensor
from ray_ckpt.text import quoted

__all__ = [
    "ALIGNMENT",
    "DESCRIPTOR_BYTES",
    "HEAD_BYTES",
    "Archive",
    "Container",
    "StoredElsewhere",
    "StoredTensor",
    "container",
    "descriptor_crc",
    "dtype_name",
    "find_data",
    "parse_dtype",
    "pickled",
]

ALIGNMENT = 64
"""Alignment of the elements within a container, in bytes. The writer aligns containers likewise."""

HEAD_BYTES = 2048
"""Number of a container's first bytes that `find_data` usually needs."""

_LOCAL = struct.Struct("<4s5H3I2H")
_DESCRIPTOR = struct.Struct("<4s3I")
_DESCRIPTOR64 = struct.Struct("<4sI2Q")
_DESCRIPTOR_MAGIC = b"PK\7\x08"
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")
_UTF8_NAME = 0x0800
_SIZES_FOLLOW = 0x0008
_UINT32 = 0xFFFFFFFF

DESCRIPTOR_BYTES = _DESCRIPTOR64.size
"""Size of the longest descriptor of a member, which follows its bytes."""


@dataclass(frozen=True)
class Container:
    """The bytes before and after the elements of a tensor of one dtype and shape."""

    head: bytes
    tail: bytes
    data_bytes: int

    @cached_property
    def length(self) -> int:
        return len(self.head) + self.data_bytes + len(self.tail)


@dataclass(frozen=True)
class StoredTensor:
    """What a container says of the tensor inside it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Strides in elements."""
    data_start: int
    """Byte offset of the first element in the container."""


@lru_cache
def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@lru_cache
def parse_dtype(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        FormatError: this torch has none.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise FormatError(
            f"torch {torch.__version__} has no dtype {quoted(name)}; upgrade torch to read this checkpoint"
        )
    return dtype


# ----------------------------------------------------------------------------------------------------- writing


@lru_cache(maxsize=4096)
def container(dtype: torch.dtype, shape: tuple[int, ...]) -> Container:
    """The container of a contiguous tensor."""
    shape = tuple(shape)  # a torch.Size would be pickled as one
    data_bytes = dtype.itemsize
    for size in shape:
        data_bytes *= size
    archive = Archive()
    archive.add("data.pkl", _pickle_tensor(dtype, shape))
    archive.add(".format_version", b"1")
    archive.add(".storage_alignment", str(ALIGNMENT).encode())
    archive.add("byteorder", b"little")
    archive.reserve("data/0", data_bytes)
    head = archive.take()
    archive.close_reserved(0)
    archive.add("version", b"3\n")
    archive.add(".data/serialization_id", b"0" * 40)
    archive.finish()
    return Container(head, archive.take(), data_bytes)


class Archive:
    """A zip archive in the making: uncompressed members, sizes behind the data, each one's data aligned."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._position = 0
        self._directory = bytearray()
        self._num_members = 0
        self._reserved: tuple[bytes, int, int] | None = None

    def take(self) -> bytes:
        """What was appended since the last call."""
        taken, self._bytes = bytes(self._bytes), bytearray()
        return taken

    def add(self, name: str, data: bytes) -> None:
        self._append_header(name, len(data))
        self._append(data)
        self.close_reserved(binascii.crc32(data))

    def reserve(self, name: str, size: int) -> None:
        """Append a member's header. Its bytes follow from elsewhere, and then `close_reserved`."""
        self._append_header(name, size)
        self._position += size

    def close_reserved(self, crc: int) -> None:
        """Append what stands behind the bytes of the member that was begun last."""
        assert self._reserved is not None, "a member comes first"
        path, start, size = self._reserved
        self._append_directory(path, start, size, crc)
        if not size:
            return  # an empty member has none, see `_flags`
        layout = _DESCRIPTOR if size < _UINT32 else _DESCRIPTOR64
        self._append(layout.pack(_DESCRIPTOR_MAGIC, crc, size, size))

    def finish(self) -> None:
        start, length, count = self._position, len(self._directory), self._num_members
        self._append(self._directory)
        self._append(_END64.pack(b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, length, start))
        self._append(_LOCATOR64.pack(b"PK\6\7", 0, start + length, 1))
        self._append(_END.pack(b"PK\5\6", 0, 0, count, count, length, min(start, _UINT32), 0))

    def _append_header(self, name: str, size: int) -> None:
        path = f"archive/{name}".encode()
        start = self._position
        zip64 = _zip64_extra([size, size] if size >= _UINT32 else [])
        stated = _UINT32 if zip64 else 0
        unpadded = start + _LOCAL.size + len(path) + len(zip64) + 4
        padding = -unpadded % ALIGNMENT
        extra = zip64 + b"FB" + struct.pack("<H", padding) + b"Z" * padding
        self._append(
            _LOCAL.pack(b"PK\3\4", 0, _flags(size), 0, 0, 0, 0, stated, stated, len(path), len(extra)) + path + extra
        )
        self._reserved = path, start, size

    def _append_directory(self, path: bytes, start: int, size: int, crc: int) -> None:
        """Central directory record; values past 32 bits move to the zip64 extra field."""
        large = ([size, size] if size >= _UINT32 else []) + ([start] if start >= _UINT32 else [])
        extra = _zip64_extra(large)
        stated = min(size, _UINT32)
        fields = (
            0,
            0,
            _flags(size),
            0,
            0,
            0,
            crc,
            stated,
            stated,
            len(path),
            len(extra),
            0,
            0,
            0,
            0,
            min(start, _UINT32),
        )
        self._directory += _CENTRAL.pack(b"PK\1\2", *fields) + path + extra
        self._num_members += 1

    def _append(self, data: bytes | bytearray) -> None:
        self._bytes += data
        self._position += len(data)


def _flags(size: int) -> int:
    return _UTF8_NAME | (_SIZES_FOLLOW if size else 0)


def _zip64_extra(numbers: list[int]) -> bytes:
    return struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


@dataclass(frozen=True)
class StoredElsewhere:
    """Stands for a contiguous tensor on the CPU whose elements are the member `data/<key>`, in `pickled`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    key: str


@dataclass(frozen=True)
class _Storage:
    """Stands for the tensor's storage in `_TensorPickler`."""

    persistent_id: tuple[Any, ...]


class _TensorPickler(pickle.Pickler):
    """Writes what `torch.save` writes for contiguous CPU tensors, without the tensors."""

    def reducer_override(self, obj: object) -> Any:
        if not isinstance(obj, StoredElsewhere):
            return NotImplemented
        numel = 1
        for size in obj.shape:
            numel *= size
        storage_class = STORAGE_TYPES.get(obj.dtype)
        storage = _Storage(
            ("storage", getattr(torch, storage_class), obj.key, "cpu", numel)
            if storage_class
            else ("storage", torch.UntypedStorage, obj.key, "cpu", numel * obj.dtype.itemsize)
        )
        common: tuple[Any, ...] = (storage, 0, obj.shape, contiguous_strides(obj.shape), False, OrderedDict())
        if storage_class:
            return rebuild_tensor_v2, common
        return rebuild_tensor_v3, (*common, obj.dtype)

    def persistent_id(self, obj: object) -> Any:
        return obj.persistent_id if isinstance(obj, _Storage) else None


def _pickle_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    _TensorPickler(stream, protocol=2).dump(StoredElsewhere(dtype, shape, "0"))
    return stream.getvalue()


def pickled(state: object) -> bytes:
    """The pickle of a file by `torch.save`. Equal states have equal bytes.

    Args:
        state: dicts and lists of plain values, with `StoredElsewhere` for each tensor.
    """
    stream = io.BytesIO()
    pickler = _TensorPickler(stream, protocol=2)
    pickler.fast = True  # no references to what was written before, which depend on what is one object by chance
    pickler.dump(state)
    return stream.getvalue()


# ----------------------------------------------------------------------------------------------------- reading


def find_data(head: bytes | memoryview, length: int) -> StoredTensor | None:
    """Read the first bytes of a container of `length` bytes.

    Raises:
        FormatError: its description of the tensor differs from its CRC-32, or a member's header is damaged.

    Returns:
        What it holds; None when `head` ends too early, or when this is not a container of one plain tensor: then only
        the whole can tell.
    """
    data = bytes(head)
    if not data.startswith(b"PK\3\4"):
        return None
    members = _members(data)
    pickled = next(members, None)
    if pickled is None or not pickled.name.endswith("/data.pkl"):
        return None
    if pickled.crc and pickled.crc != binascii.crc32(memoryview(data)[pickled.start : pickled.end]):
        raise FormatError("the description of a tensor differs from its CRC-32: the container is damaged")
    tensor = _read_tensor(data[pickled.start : pickled.end])
    if tensor is None:
        return None
    wanted = pickled.name.removesuffix("data.pkl") + f"data/{tensor.key}"
    storage = next((member for member in members if member.name == wanted), None)
    if storage is None:
        return None
    if not _are_fields(data[storage.extra_start : storage.start]):
        raise FormatError("the local header of a member is damaged: its extra fields do not fill their place")
    stored = _locate(tensor, storage.start)
    return stored if _fits(stored, length) else None


@lru_cache(maxsize=4096)
def _read_tensor(pickled: bytes) -> Tensor | None:
    """The tensor that a pickle describes; None when it is none, or not a plain one. Containers of one dtype and shape
    share their pickle."""
    try:
        root = torch_pickle.read(pickled, "a container").root
    except CheckpointError:
        return None
    return root if isinstance(root, Tensor) and not root.is_converted else None


class _Member(NamedTuple):
    """A member of an archive, as far as the archive's first bytes tell."""

    name: str
    extra_start: int
    """Byte offset of the extra fields, which end where its data start."""
    start: int
    """Byte offset of its data."""
    end: int | None
    """Byte offset behind its data; None when these bytes end before."""
    crc: int
    """CRC-32 of its data; 0 when it is not known, or was left out."""


def _members(data: bytes) -> Iterator[_Member]:
    """The members of an archive, as far as its first bytes tell.

    A local header does not know its member's size; the descriptor behind the data repeats it, which is how it is told
    from the same four bytes within the data.
    """
    position = 0
    while data[position : position + 4] == b"PK\3\4" and position + _LOCAL.size <= len(data):
        _, _, flags, _, _, _, crc, size, _, name_length, extra_length = _LOCAL.unpack_from(data, position)
        name_start = position + _LOCAL.size
        extra_start = name_start + name_length
        start = extra_start + extra_length
        if start > len(data):
            return
        name = data[name_start:extra_start].decode("utf-8", "replace")
        if not flags & _SIZES_FOLLOW:
            position = start + size
            yield _Member(name, extra_start, start, position, crc if position <= len(data) else 0)
            continue
        end = data.find(_DESCRIPTOR_MAGIC, start)
        while end >= 0 and data[end + 8 : end + 12] != struct.pack("<I", end - start):
            end = data.find(_DESCRIPTOR_MAGIC, end + 1)
        if end < 0:
            yield _Member(name, extra_start, start, None, 0)
            return
        yield _Member(name, extra_start, start, end, int.from_bytes(data[end + 4 : end + 8], "little"))
        position = end + _DESCRIPTOR.size


def _are_fields(extra: bytes) -> bool:
    """Whether extra fields (id, length, content) follow each other up to the end. A damaged length of theirs, or of the
    name before them, would move the elements behind them by some bytes."""
    position = 0
    while position + 4 <= len(extra):
        position += 4 + int.from_bytes(extra[position + 2 : position + 4], "little")
    return position == len(extra)


def descriptor_crc(data: bytes, num_bytes: int) -> int:
    """The CRC-32 of a member, from the descriptor behind it; 0 when the writer left it out.

    Args:
        data: the `DESCRIPTOR_BYTES` bytes behind a member of `num_bytes` bytes, or all there are.

    Returns:
        0 also when that is no descriptor of such a member.
    """
    for layout in (_DESCRIPTOR, _DESCRIPTOR64):
        if len(data) >= layout.size:
            magic, crc, stored, size = layout.unpack_from(data)
            if magic == _DESCRIPTOR_MAGIC and stored == size == num_bytes:
                return int(crc)
    return 0


def _locate(tensor: Tensor, storage_start: int) -> StoredTensor:
    start = storage_start + tensor.offset * tensor.dtype.itemsize
    return StoredTensor(tensor.dtype, tensor.shape, tensor.strides, start)


def _fits(stored: StoredTensor, length: int) -> bool:
    num_elements = span(stored.shape, stored.strides) if 0 not in stored.shape else 0
    return stored.data_start + num_elements * stored.dtype.itemsize <= length
