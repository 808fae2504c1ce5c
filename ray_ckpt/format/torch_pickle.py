"""Tensors in the pickles that `torch.save` writes: as descriptions, of which nothing is rebuilt.

    data.pkl bytes ── read ──> plain values, with a Tensor for each tensor, a Sharded for each rank's part of one
                               (sharded_pickle.py), and stand-ins for what is unknown

Source of the format: PyTorch's `torch/_utils.py` (`_rebuild_tensor_v2`, `_rebuild_tensor_v3`, `_rebuild_parameter`) and
the persistent ids of `torch/serialization.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ray_ckpt.format import limits
from ray_ckpt.format.pickle_reader import Unpickler
from ray_ckpt.format.sharded_pickle import Sharded, Tensor, rebuild_from_type
from ray_ckpt.format.stand_ins import Name
from ray_ckpt.format.torch_internals import STORAGE_TYPES, TENSOR_CLASSES
from ray_ckpt.text import quoted

__all__ = ["Content", "Sharded", "Tensor", "read"]


class Content(NamedTuple):
    """What a pickle holds."""

    root: Any
    storages: dict[str, int]
    """Name -> size in bytes, of every storage that the pickle mentions."""
    has_lost_attributes: bool
    """Whether a dict had attributes, which are left out."""


class _StorageType(NamedTuple):
    """Stands for a storage class. Its dtype is None when the tensor has it instead."""

    dtype: torch.dtype | None


class _Storage(NamedTuple):
    dtype: torch.dtype | None
    key: str
    num_bytes: int


def read(data: bytes, what: str, *, trust_advice: str | None = None) -> Content:
    """Read one pickle.

    Args:
        trust_advice: as for `Unpickler`.

    Raises:
        UnsafeCheckpointError: it calls a function that is not known.
        FormatError: it is damaged, or exceeds a limit.
    """
    storages: dict[str, int] = {}

    def load_storage(persistent_id: Any) -> _Storage:
        storage = _storage(persistent_id)
        storages[storage.key] = max(storage.num_bytes, storages.get(storage.key, 0))
        return storage

    unpickler = Unpickler(
        data, what, constant=constant, makers=_MAKERS, load_storage=load_storage, trust_advice=trust_advice
    )
    root = unpickler.load()
    return Content(root, storages, unpickler.has_lost_attributes)


def constant(name: str) -> Any:
    """The dtype, or what stands for the class of storages, of that name; None when there is none."""
    module, _, last = name.rpartition(".")
    if module in ("torch", "torch.storage") and last in _STORAGE_TYPES:
        return _STORAGE_TYPES[last]
    found = vars(torch).get(last) if module == "torch" else None
    return found if isinstance(found, torch.dtype) else None


def make_size(sizes: Any = ()) -> torch.Size:
    """What `torch.Size` would return."""
    return torch.Size(sizes)


def _device(*args: Any) -> torch.device:
    return torch.device(*args)


def _storage(persistent_id: Any) -> _Storage:
    kind, storage_type, key, _device_name, num_elements = persistent_id
    if (kind, type(storage_type), type(key), type(num_elements)) != (
        "storage",
        _StorageType,
        str,
        int,
    ) or not 0 <= num_elements <= limits.MAX_ELEMENTS:
        raise ValueError(f"{quoted(persistent_id)} is no storage")
    dtype = storage_type.dtype
    return _Storage(dtype, key, num_elements * (1 if dtype is None else dtype.itemsize))


def _rebuild_v2(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    return _tensor(storage, storage.dtype, offset, shape, strides, rest[2:3])


def _rebuild_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Tensor:
    return _tensor(storage, dtype, offset, shape, strides, rest[:1])


def _tensor(storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any, bits: tuple[Any, ...]) -> Tensor:
    """
    Args:
        bits: nothing, or what says whether the tensor is a conjugate or negated view.
    """
    if (
        not isinstance(storage, _Storage)
        or not isinstance(dtype, torch.dtype)
        or not isinstance(shape, tuple)
        or not isinstance(strides, tuple)
        or len(shape) != len(strides)
        or any(type(number) is not int or not 0 <= number < 1 << 63 for number in (offset, *shape, *strides))
    ):
        raise ValueError(f"no tensor has the shape {quoted(shape)} and strides {quoted(strides)}")
    limits.check_shape(shape, storage.key)
    return Tensor(dtype, tuple(shape), tuple(strides), storage.key, offset, any(bits))


def _refuse_sizes_alone(*sizes: Any) -> Any:
    raise ValueError(f"a tensor of {quoted(sizes)} that comes with no bytes")


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    if not isinstance(tensor, (Tensor, Sharded)):
        raise ValueError(f"a parameter of {quoted(tensor)}")
    return tensor


def _rebuild_from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor that has attributes, or a class of its own. Attributes are left out."""
    is_plain = isinstance(kind, Name) and kind.text in ("torch.Tensor", "torch.nn.parameter.Parameter")
    if is_plain and isinstance(function, Name) and function.text in _PLAIN_TENSORS:
        return _PLAIN_TENSORS[function.text](*args)
    return rebuild_from_type(function, kind, args, state)


def _name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__name__}"


_STORAGE_TYPES = {
    "UntypedStorage": _StorageType(None),
    **{name: _StorageType(dtype) for dtype, name in STORAGE_TYPES.items()},
}

_PLAIN_TENSORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}

_MAKERS: dict[str, Callable[..., Any]] = {
    **_PLAIN_TENSORS,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": make_size,
    "torch.device": _device,
    **dict.fromkeys(map(_name_of, (torch.Tensor, *TENSOR_CLASSES)), _refuse_sizes_alone),
}
