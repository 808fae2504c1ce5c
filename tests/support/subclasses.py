"""Small tensor subclasses in the shapes that quantization libraries have, and states that hold them.

RowInt8     int8 codes and a scale per row
BlockInt8   int8 codes, a scale per block of elements in row-major order, and a table; can be cut by rows
Packed4     two codes per byte, and a scale per row; its context has its own size in it
Doubled     a subclass made of subclasses
Hidden      as RowInt8, but no operation on it gives one of its kind again
Split       as BlockInt8, with a number in a tensor for all; parts of it are taken by `split` only, as of NF4
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map

from ray_ckpt.format.torch_internals import local_tensor, placed

aten = torch.ops.aten


class Rounding(enum.Enum):
    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


class Range(NamedTuple):
    low: int
    high: int


SIGNED = Range(-127, 127)


@dataclass(frozen=True)
class Scheme:
    rounding: Rounding = Rounding.NEAREST
    range: Range = SIGNED
    dtype: torch.dtype = torch.int8


class Wrapper(torch.Tensor):
    """What is not one of its own operations is computed on the values that it stands for."""

    inner: ClassVar[tuple[str, ...]] = ()
    context: Any

    @staticmethod
    def wrap(cls: type, shape: Any, device: Any, dtype: torch.dtype = torch.float32) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def values(self) -> torch.Tensor:
        raise NotImplementedError

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.inner), self.context

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> Any:
        return cls(*(inner[name] for name in cls.inner), context, size)

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        inner = {name: function(getattr(self, name)) for name in self.inner}
        return self.__tensor_unflatten__(inner, self.context, self.shape, self.stride())

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self = args[0]
        if func is aten.copy_.default and type(self) is type(args[1]):
            for name in self.inner:
                getattr(self, name).copy_(getattr(args[1], name))
            return self
        if func in (aten.detach.default, aten.clone.default, aten.empty_like.default, aten.zeros_like.default):
            made = self.each(lambda part: func(part, **{k: v for k, v in kwargs.items() if k == "device"}))
            return return_and_correct_aliasing(func, args, kwargs, made)
        if func is aten._to_copy.default and kwargs.get("dtype") in (None, self.dtype):
            return self.each(lambda part: part.to(kwargs.get("device"), copy=True))
        if func is aten.add_.Tensor:
            for part in inner_bits(self):
                part.add_(args[1] if part.is_floating_point() else 1)
            return self
        if func is aten.slice.Tensor and (cut := self.cut(*args[1:])) is not None:
            return cut
        if func is aten.split.Tensor and isinstance(self, Split):
            return self.split_by(*args[1:])
        plain = [tree_map(lambda x: x.values() if isinstance(x, Wrapper) else x, part) for part in (args, kwargs)]
        return func(*plain[0], **plain[1])

    def cut(self, dim: int = 0, start: int = 0, end: int = 2**63 - 1, step: int = 1) -> Any:
        return None


class RowInt8(Wrapper):
    inner = ("codes", "scale")

    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, context: Any = Scheme(), size: Any = None) -> Any:
        return Wrapper.wrap(cls, codes.shape, codes.device)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, context: Any = Scheme(), size: Any = None) -> None:
        self.codes, self.scale, self.context = codes, scale, context

    @classmethod
    def of(cls, values: torch.Tensor) -> Any:
        scale = values.abs().amax(1, keepdim=True) / 127 + 1e-12
        return cls((values / scale).round().to(torch.int8), scale)

    def values(self) -> torch.Tensor:
        return self.codes.float() * self.scale

    def cut(self, dim: int = 0, start: int = 0, end: int = 2**63 - 1, step: int = 1) -> Any:
        codes = self.codes[start:end] if dim == 0 else self.codes[:, start:end]
        return type(self)(codes, self.scale[start:end] if dim == 0 else self.scale, self.context)


class Hidden(RowInt8):
    def cut(self, dim: int = 0, start: int = 0, end: int = 2**63 - 1, step: int = 1) -> Any:
        return None


class BlockInt8(Wrapper):
    inner = ("codes", "scale", "table")
    block = 4

    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, context: Any, size: Any) -> Any:
        return Wrapper.wrap(cls, codes.shape, codes.device)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, context: Any, size: Any) -> None:
        self.codes, self.scale, self.table, self.context = codes, scale, table, context

    @classmethod
    def of(cls, values: torch.Tensor, signed: bool = True) -> Any:
        blocks = values.reshape(-1, cls.block)
        scale = blocks.abs().amax(1) / 127 + 1e-12
        codes = (blocks / scale[:, None]).round().to(torch.int8).reshape(values.shape)
        return cls(codes, scale, torch.arange(-127.0, 128.0), [signed, torch.float32], values.shape)

    def values(self) -> torch.Tensor:
        codes = self.table[self.codes.int() + 127].reshape(len(self.scale), -1)
        return (codes * self.scale[:, None]).reshape(self.codes.shape)

    def cut(self, dim: int = 0, start: int = 0, end: int = 2**63 - 1, step: int = 1) -> Any:
        if dim:
            raise ValueError("only rows can be cut")
        end = min(end, len(self.codes))
        per_row, rest = divmod(self.codes[0].numel(), self.codes.numel() // len(self.scale))
        if rest:
            raise ValueError("only whole blocks can be cut")
        scale = self.scale[start * per_row : end * per_row]
        return type(self)(self.codes[start:end], scale, self.table.clone(), self.context, None)


class Split(BlockInt8):
    inner = ("codes", "scale", "table", "mean")

    def __new__(
        cls, codes: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, mean: Any, context: Any, size: Any = None
    ) -> Any:
        return Wrapper.wrap(cls, codes.shape, codes.device)

    def __init__(
        self, codes: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, mean: Any, context: Any, size: Any = None
    ) -> None:
        super().__init__(codes, scale, table, context, size)
        self.mean = mean

    @classmethod
    def of(cls, values: torch.Tensor, signed: bool = True) -> Any:
        made = BlockInt8.of(values, signed)
        return cls(made.codes, made.scale, made.table, torch.tensor(0.5), made.context)

    def cut(self, dim: int = 0, start: int = 0, end: int = 2**63 - 1, step: int = 1) -> Any:
        raise NotImplementedError("it can only be split")

    def split_by(self, size: int, dim: int = 0) -> list[Any]:
        count, rest = divmod(len(self.codes), size)
        if dim or rest or len(self.scale) % count:
            raise NotImplementedError("only equal parts by rows")
        pairs = zip(self.codes.split(size), self.scale.split(len(self.scale) // count), strict=True)
        return [type(self)(*pair, self.table, self.mean, self.context) for pair in pairs]


class Packed4(Wrapper):
    inner = ("packed", "scale")

    def __new__(cls, packed: torch.Tensor, scale: torch.Tensor, context: Any, size: Any = None) -> Any:
        return Wrapper.wrap(cls, context["shape"], packed.device)

    def __init__(self, packed: torch.Tensor, scale: torch.Tensor, context: Any, size: Any = None) -> None:
        self.packed, self.scale, self.context = packed, scale, context

    @classmethod
    def of(cls, values: torch.Tensor, group: int = 32) -> Any:
        scale = values.abs().amax(1) / 7 + 1e-12
        codes = ((values / scale[:, None]).round() + 8).to(torch.uint8)
        context = {"shape": values.shape, "group": group, "device": values.device, "layout": torch.strided}
        return cls(codes[:, ::2] * 16 + codes[:, 1::2], scale, context)

    def values(self) -> torch.Tensor:
        codes = torch.stack([self.packed // 16, self.packed % 16], -1).flatten(1)
        return (codes.float() - 8) * self.scale[:, None]


class Doubled(Wrapper):
    inner = ("first", "second")

    def __new__(cls, first: torch.Tensor, second: torch.Tensor, context: Any = None, size: Any = None) -> Any:
        return Wrapper.wrap(cls, first.shape, first.device)

    def __init__(self, first: torch.Tensor, second: torch.Tensor, context: Any = None, size: Any = None) -> None:
        self.first, self.second, self.context = first, second, context

    @classmethod
    def of(cls, values: torch.Tensor) -> Any:
        first = RowInt8.of(values)
        return cls(first, RowInt8.of(values - first.values()))

    def values(self) -> torch.Tensor:
        return self.first.values() + self.second.values()


class Halves(Wrapper):
    """Values as the sum of two halves of half the bits, element by element: it can be cut anywhere."""

    inner = ("high", "low")

    def __new__(cls, high: torch.Tensor, low: torch.Tensor, context: Any = None, size: Any = None) -> Any:
        return Wrapper.wrap(cls, high.shape, high.device)

    def __init__(self, high: torch.Tensor, low: torch.Tensor, context: Any = None, size: Any = None) -> None:
        self.high, self.low, self.context = high, low, context

    @classmethod
    def of(cls, values: torch.Tensor) -> Any:
        high = values.bfloat16()
        return cls(high, (values - high.float()).bfloat16())

    def values(self) -> torch.Tensor:
        return self.high.float() + self.low.float()

    def cut(self, dim: int = 0, start: int = 0, end: int = 2**63 - 1, step: int = 1) -> Any:
        return self.each(lambda part: aten.slice.Tensor(part, dim, start, end, step))


class HalvesSGD(torch.optim.Optimizer):
    """Momentum in `Halves`: of a DTensor, a DTensor of those."""

    def __init__(self, parameters: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": 0.9, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)

    def _step(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        before = self.state[parameter].get("momentum")
        if isinstance(parameter, DTensor):
            gradient = gradient.redistribute(placements=parameter.placements)
        kept = 0 if before is None else local_tensor(before).values() * group["momentum"]
        momentum = kept + local_tensor(gradient)
        made = Halves.of(momentum)
        if isinstance(parameter, DTensor):
            made = placed(made, parameter.device_mesh, parameter.placements, parameter.shape)
        self.state[parameter]["momentum"] = made
        local_tensor(parameter).sub_(momentum, alpha=group["lr"])


KINDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "row": RowInt8.of,
    "block": BlockInt8.of,
    "packed": Packed4.of,
    "doubled": Doubled.of,
    "hidden": Hidden.of,
    "split": Split.of,
}


def inner_bits(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Everything that it is made of."""
    if isinstance(tensor, Wrapper):
        return [part for name in tensor.inner for part in inner_bits(getattr(tensor, name))]
    return [tensor]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return type(one) is type(other) and all(map(torch.equal, inner_bits(one), inner_bits(other)))
