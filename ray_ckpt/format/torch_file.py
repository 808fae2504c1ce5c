"""A file that `torch.save` wrote: a zip archive with one pickle, and every tensor's storage uncompressed beside it.

    <name>/data.pkl        dicts and lists; a tensor is a call of `_rebuild_tensor_v2(storage, offset, sizes, ...)`
    <name>/byteorder       "little"
    <name>/data/<key>      one storage's bytes, stored as they are
    central directory      name, size and local header's place of every member

    central directory ── members ──> Member
    data.pkl          ── parse ──> Content     tensors as places in storages, everything else as it is
    Content, places of the storages ── to_manifest ──> Manifest

Nothing runs from the file: the pickle goes through an unpickler that knows the names which
`torch.load(weights_only=True)` admits for tensors and plain values, and resolves those of tensors to stand-ins. So a
tensor costs no byte before it is wanted, and then only those that are.

Source of the format: PyTorch's `torch/serialization.py` and `torch/_utils.py`.
"""

from __future__ import annotations

import codecs
import io
import pickle
import struct
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ray_ckpt.errors import FormatError, UnsafeCheckpointError
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.manifest import Chunk, Inline, Manifest, ObjectEntry, Path, TensorEntry
from ray_ckpt.format.ranges import span
from ray_ckpt.format.torch_container import dtype_name
from ray_ckpt.format.torch_internals import STORAGE_TYPES

__all__ = ["LOCAL_HEADER_BYTES", "MAGIC", "Content", "Tensor", "data_start", "parse", "to_manifest"]

MAGIC = b"PK\3\4"
"""A zip archive begins with this."""

LOCAL_HEADER_BYTES = 30
"""Of the fixed part of a member's local header, which tells how long the rest of it is."""

_MAX_ENTRIES = 10_000_000
"""Of a state dict."""

_LOCAL_HEADER = struct.Struct("<4s22x2H")


class Tensor(NamedTuple):
    """A tensor as the pickle describes it. A named tuple, because a pickle can change the fields of anything else."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Strides in elements."""
    key: str
    """Key of its storage, which names a member of the zip archive."""
    offset: int
    """Position of its first element in the storage, in elements."""
    storage_bytes: int
    """Size of the whole storage in bytes."""


@dataclass
class Content:
    """What the pickle holds, flattened as DCP flattens a state dict."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    """Everything that is not a tensor."""
    paths: dict[str, Path] = field(default_factory=dict)
    """Flat name -> keys that lead to it in the nested state dict."""

    @property
    def storages(self) -> set[str]:
        return {tensor.key for tensor in self.tensors.values()}


def parse(data: bytes, file: str) -> Content:
    """Read the pickle of a file.

    Raises:
        UnsafeCheckpointError: it names something that is neither a plain tensor nor a plain value.
        FormatError: it is damaged, or holds no dict.
    """
    try:
        root = _Unpickler(io.BytesIO(data), file).load()
    except UnsafeCheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise FormatError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(root, Mapping):
        raise FormatError(
            f"{file} holds a {type(root).__name__}, not a dict of tensors: save a state dict rather than the object"
        )
    try:
        return _Flattener(file).flatten(root)
    except RecursionError as error:
        raise FormatError(f"{file} holds dicts or lists that are nested too deep") from error


def data_start(header: bytes, header_start: int, file: str) -> int:
    """Where a member's bytes begin in the file.

    Args:
        header: the first `LOCAL_HEADER_BYTES` bytes of its local header.
        header_start: where that header begins in the file.

    Raises:
        FormatError: there is no header of a member.
    """
    magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    if magic != MAGIC:
        raise FormatError(f"{file} has no member at byte {header_start}, where its directory says that one begins")
    return header_start + LOCAL_HEADER_BYTES + int(name_length) + int(extra_length)


def to_manifest(content: Content, places: Mapping[str, tuple[int, int]], file: str, file_bytes: int) -> Manifest:
    """Where everything in the file lies.

    Args:
        places: storage's key -> where its bytes begin in the file, and how many there are.

    Raises:
        FormatError: a tensor reaches outside its storage.
    """
    tensors = {}
    for name, tensor in content.tensors.items():
        if tensor.key not in places:
            raise FormatError(f"{file} lacks the storage {tensor.key!r}, which {name!r} lies in")
        start, num_bytes = places[tensor.key]
        num_elements = span(tensor.shape, tensor.strides) if 0 not in tensor.shape else 0
        first = tensor.offset * tensor.dtype.itemsize
        if first + num_elements * tensor.dtype.itemsize > num_bytes:
            raise FormatError(
                f"{file}: {name!r} of {list(tensor.shape)} with strides {list(tensor.strides)} from element "
                f"{tensor.offset} reaches outside its storage, which has {num_bytes} bytes"
            )
        chunk = Chunk(Box.whole(tensor.shape), file, start, num_bytes, data_start=start + first, strides=tensor.strides)
        tensors[name] = TensorEntry(dtype_name(tensor.dtype), tensor.shape, (chunk,), content.paths[name])
    objects = {
        name: ObjectEntry(file, 0, 0, inline=Inline(value), path=content.paths[name])
        for name, value in content.values.items()
    }
    manifest = Manifest(tensors, objects, {file: file_bytes})
    manifest.check()
    return manifest


# ------------------------------------------------------------------------------------------------ flattening


class _Flattener:
    """Dicts are flattened, and so are lists and tuples that hold tensors or dicts, as DCP does."""

    def __init__(self, file: str) -> None:
        self.content = Content()
        self._file = file
        self._measured: dict[int, tuple[int, bool] | None] = {}

    def flatten(self, root: Mapping[Any, Any]) -> Content:
        num_entries, _ = self._measure(root)
        if num_entries > _MAX_ENTRIES:
            raise FormatError(f"{self._file} stands for {num_entries} entries, which no model has")
        self._add(root, ())
        return self.content

    def _measure(self, value: Any) -> tuple[int, bool]:
        """Entries in this value, and whether tensors or dicts are among them. What is shared counts where it appears,
        but is looked through once: a pickle of a few bytes can stand for more than any memory holds."""
        if isinstance(value, Tensor) or not isinstance(value, (Mapping, list, tuple, set)):
            return 1, isinstance(value, Tensor)
        if id(value) not in self._measured:
            self._measured[id(value)] = None
            parts = [self._measure(item) for item in (value.values() if isinstance(value, Mapping) else value)]
            is_branch = isinstance(value, Mapping) or any(branches for _, branches in parts)
            self._measured[id(value)] = 1 + sum(count for count, _ in parts), is_branch
        measured = self._measured[id(value)]
        if measured is None:
            raise FormatError(f"{self._file} holds a {type(value).__name__} that contains itself")
        return measured

    def _add(self, value: Any, path: Path) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                self._add(item, (*path, str(key)))
            return
        if not isinstance(value, Tensor) and isinstance(value, (list, tuple)) and self._measure(value)[1]:
            for number, item in enumerate(value):
                self._add(item, (*path, number))
            return
        name = ".".join(map(str, path))
        if name in self.content.paths:
            raise FormatError(f"{self._file} holds two entries called {name!r} once its dicts are flattened")
        self.content.paths[name] = path
        if isinstance(value, Tensor):
            self.content.tensors[name] = value
        else:
            self.content.values[name] = value


# ----------------------------------------------------------------------------------------------- unpickling


class _Storage(NamedTuple):
    dtype: torch.dtype | None
    """None: bytes, whose meaning the tensor tells."""
    key: str
    num_bytes: int


class _Unpickler(pickle.Unpickler):
    """Resolves names to stand-ins of tensors and to plain containers, and to nothing else."""

    def __init__(self, stream: io.BytesIO, file: str) -> None:
        super().__init__(stream, encoding="utf-8")
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ADMITTED:
            return _ADMITTED[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise UnsafeCheckpointError(
            f"{self._file} asks for {module}.{name}, which is neither a plain tensor nor a plain value, and could run "
            "code; save the state dicts alone (tensors, numbers, texts, lists, dicts), or convert the file with "
            "torch.load(..., weights_only=False) if you trust its author"
        )

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _device, num_elements = pid
        if kind != "storage" or type(num_elements) is not int or num_elements < 0 or type(key) is not str:
            raise pickle.UnpicklingError(f"{str(pid)[:80]} is no storage")
        return _Storage(dtype, key, num_elements * (1 if dtype is None else dtype.itemsize))


def _rebuild_v2(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    if len(rest) > 2 and rest[2]:
        raise pickle.UnpicklingError("a conjugate or negated view has other elements than its bytes say")
    return _tensor(storage, storage.dtype, offset, shape, strides)


def _rebuild_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Tensor:
    if rest and rest[0]:
        raise pickle.UnpicklingError("a conjugate or negated view has other elements than its bytes say")
    return _tensor(storage, dtype, offset, shape, strides)


def _tensor(storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    numbers = (offset, *shape, *strides)
    if (
        not isinstance(storage, _Storage)
        or not isinstance(dtype, torch.dtype)
        or len(shape) != len(strides)
        or any(type(number) is not int or not 0 <= number < 1 << 63 for number in numbers)
    ):
        raise pickle.UnpicklingError(f"no tensor has the shape {str(shape)[:80]} and strides {str(strides)[:80]}")
    return Tensor(dtype, tuple(shape), tuple(strides), storage.key, offset, storage.num_bytes)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How a pickle of protocol 2 spells bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes are not spelt in {str(encoding)[:40]!r}")
    return codecs.encode(text, encoding)


_ADMITTED: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch.storage", "UntypedStorage"): None,
    ("torch", "UntypedStorage"): None,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "Counter"): Counter,
    ("collections", "defaultdict"): defaultdict,
    ("_codecs", "encode"): _encode,
    ("builtins", "set"): set,
    ("builtins", "dict"): dict,
    ("__builtin__", "set"): set,
    ("__builtin__", "dict"): dict,
}
_STORAGE_DTYPES = {name: dtype for dtype, name in STORAGE_TYPES.items()}
