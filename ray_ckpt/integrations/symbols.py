"""Symbols that stand for saved tensors, and write down what torch is asked to do with them.

They have a shape and a dtype, as code asks for these, but no elements. What a key map can (joining, splitting, slicing,
swapping dims) gives another symbol; anything else is refused by the name that it was asked by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ray_ckpt.errors import UsageError
from ray_ckpt.format.saved import Saved

__all__ = ["Deferred", "Symbol"]


class Symbol:
    """Stands for a tensor."""

    def __init__(self, saved: Saved, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.saved = saved
        self.shape = torch.Size(shape)
        self.dtype = dtype

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        make = _FUNCTIONS.get(function)
        if make is None:
            raise UsageError(f"it uses {function.__name__}")
        return make(*args, **(kwargs or {}))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> Symbol:
        return self

    def to(self, dtype: torch.dtype) -> Symbol:
        if dtype != self.dtype:
            raise UsageError(f"it casts {self.dtype} to {dtype}")
        return self

    def transpose(self, dim0: int, dim1: int) -> Symbol:
        shape = list(self.shape)
        shape[dim0], shape[dim1] = shape[dim1], shape[dim0]
        return Symbol(self.saved.transpose(dim0, dim1), shape, self.dtype)

    def narrow(self, dim: int, start: int, length: int) -> Symbol:
        shape = list(self.shape)
        if length == shape[dim]:
            return self
        shape[dim] = length
        return Symbol(self.saved.narrow(dim, start, length), shape, self.dtype)

    def select(self, dim: int, index: int) -> Symbol:
        shape = list(self.shape)
        index %= shape.pop(dim)
        return Symbol(self.saved.select(dim, index), shape, self.dtype)

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> tuple[Symbol, ...]:
        whole = self.shape[dim]
        if isinstance(sizes, int):
            sizes = [min(sizes, whole - start) for start in range(0, whole, sizes)]
        if sum(sizes) != whole:
            raise UsageError(f"it splits {whole} into {list(sizes)}")
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        return tuple(self.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Symbol, ...]:
        return self.split(max(1, -(-self.shape[dim] // chunks)), dim)

    def unbind(self, dim: int = 0) -> tuple[Symbol, ...]:
        return tuple(self.select(dim, index) for index in range(self.shape[dim]))

    def squeeze(self, dim: int) -> Symbol:
        return self.select(dim, 0) if self.shape[dim] == 1 else self

    def __getitem__(self, key: Any) -> Symbol:
        found, dim = self, 0
        for item in key if isinstance(key, tuple) else (key,):
            if isinstance(item, int):
                found = found.select(dim, item)
            elif isinstance(item, slice) and item.step in (None, 1):
                start, end, _ = item.indices(found.shape[dim])
                found, dim = found.narrow(dim, start, end - start), dim + 1
            else:
                raise UsageError(f"it takes the indices {key}")
        return found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UsageError(f"it uses .{name} of a tensor")


class Deferred:
    """How transformers takes a tensor that has still to be read."""

    def __init__(self, symbol: Symbol) -> None:
        self._symbol = symbol

    def __call__(self) -> Symbol:
        return self._symbol


def _cat(tensors: Sequence[Symbol], dim: int = 0) -> Symbol:
    if len(tensors) == 1:
        return tensors[0]
    shape = list(tensors[0].shape)
    shape[dim] = sum(each.shape[dim] for each in tensors)
    return Symbol(Saved.cat([each.saved for each in tensors], dim), shape, _dtype(tensors))


def _stack(tensors: Sequence[Symbol], dim: int = 0) -> Symbol:
    shape = list(tensors[0].shape)
    shape.insert(dim % (len(shape) + 1), len(tensors))
    return Symbol(Saved.stack([each.saved for each in tensors], dim), shape, _dtype(tensors))


def _dtype(tensors: Sequence[Symbol]) -> torch.dtype:
    if len(dtypes := {each.dtype for each in tensors}) > 1:
        raise UsageError(f"it joins tensors of {', '.join(sorted(map(str, dtypes)))}")
    return tensors[0].dtype


_FUNCTIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.cat: _cat,
    torch.stack: _stack,
    torch.chunk: Symbol.chunk,
    torch.split: Symbol.split,
    torch.transpose: Symbol.transpose,
    torch.unbind: Symbol.unbind,
    torch.narrow: Symbol.narrow,
    torch.select: Symbol.select,
}
