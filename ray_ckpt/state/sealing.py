"""Seal nested state (of a scheduler, a data loader, ...) into flat names and plain values, and unseal it exactly.

pack("scaler", {"scale": 2.0, "history": {}})  ->  {"scaler.scale": 2.0, "scaler.history": ("$dict", ())}

Dicts with plain text keys become dotted names, so that a checkpoint can be looked into; tensors stay tensors. What DCP
would flatten and not bring back (empty dicts, dicts in lists, keys that are no text) is sealed into tagged tuples,
which the manifest holds as JSON. No pickle is involved, so none has to be trusted, and equal states have equal bits.
"""

from __future__ import annotations

import copy
import io
import operator
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch

from ray_ckpt.errors import FormatError, UsageError
from ray_ckpt.format import values
from ray_ckpt.format.torch_container import dtype_name, parse_dtype
from ray_ckpt.format.wrappers import are_same
from ray_ckpt.state import named_values, nesting
from ray_ckpt.state.group_lists import TAG, GroupList

_DICTS: dict[type, str] = {dict: "$dict", OrderedDict: "$ordered", Counter: "$counter"}
_FACTORIES: dict[Any, str] = {
    None: "$default",
    **{factory: f"$default {factory.__name__}" for factory in (int, float, bool, str, list, dict, set, tuple)},
}
"""What a `defaultdict` makes -> its tag."""
_SEQUENCES: dict[type, str] = {
    list: "$list",
    tuple: "$tuple",
    set: "$set",
    frozenset: "$frozenset",
    torch.Size: "$size",
}
_MAKERS_OF_DICTS: dict[str, Callable[[Any], Any]] = {
    **{tag: kind for kind, tag in _DICTS.items()},
    **{tag: partial(defaultdict, factory) for factory, tag in _FACTORIES.items()},
}
MAKERS: dict[str, Callable[[Any], Any]] = {**_MAKERS_OF_DICTS, **{tag: kind for kind, tag in _SEQUENCES.items()}}
"""Tag in a sealed value -> what makes it of its items."""


_UNCHANGING = frozenset({bool, int, float, str, type(None)})

_NUMPY_SCALARS = frozenset(
    {"bool", "float16", "float32", "float64", "complex64", "complex128"}
    | {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
)
"""Names of dtypes of NumPy's whose scalars are saved."""

RECORD = "$names"
"""Last component of the entry in which `pack_state` records what it has packed."""


def pack(name: str, value: object) -> dict[str, Any]:
    """Flat name -> tensor or sealed value. `unpack` is the inverse.

    Raises:
        UsageError: something in it is neither a tensor nor a plain value.
    """
    with nesting.named(name, value):
        return _pack(name, value)


def _pack(name: str, value: object) -> dict[str, Any]:
    if type(value) is dict and value and all(is_component(key) for key in value):
        return {flat: leaf for key, item in value.items() for flat, leaf in _pack(f"{name}.{key}", item).items()}
    return _pack_whole(name, value)


def pack_whole(name: str, value: object) -> dict[str, Any]:
    """As `pack`, but a dict stays one sealed value; only the tensors in it have names of their own."""
    with nesting.named(name, value):
        return _pack_whole(name, value)


def _pack_whole(name: str, value: object) -> dict[str, Any]:
    if isinstance(value, torch.Tensor):
        return {name: value}
    tensors: list[torch.Tensor] = []
    sealed = _seal(name, value, tensors)
    return {name: sealed} | {f"{name}.${number}": tensor for number, tensor in enumerate(tensors)}


def pack_state(name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """As `pack`, with a record of the names below `name`, so that a load can tell what is missing."""
    packed = pack(name, dict(state))
    return packed | {f"{name}.{RECORD}": tuple(sorted(flat[len(name) + 1 :] for flat in packed))}


def unpack(name: str, leaves: Mapping[str, Any]) -> Any:
    """The value that was packed under this name.

    Args:
        leaves: at least everything at and below the name.

    Raises:
        FormatError: there is nothing of that name, or a tag that `pack` does not write.
    """
    if name in leaves:
        leaf = leaves[name]
        return leaf if isinstance(leaf, torch.Tensor) else _unseal(name, leaf, leaves)
    start = len(name) + 1
    below = {flat[start:].partition(".")[0]: None for flat in leaves if flat.startswith(f"{name}.")}
    keys = [key for key in below if key != RECORD]
    if not keys:
        raise FormatError(f"nothing was saved under {name!r}")
    return {key: unpack(f"{name}.{key}", leaves) for key in keys}


def is_same(one: object, other: object) -> bool:
    """Whether two values are packed alike: numbers exactly, tensors by their bits, and a NaN is itself.

    Plain dicts are equal in any order, as Python has it: of some the keys were names, which come back sorted.
    """
    first, second = pack("", _sorted(one)), pack("", _sorted(other))
    return first.keys() == second.keys() and all(_is_same_leaf(leaf, second[name]) for name, leaf in first.items())


def _sorted(value: Any) -> Any:
    if type(value) is dict:
        return {key: _sorted(value[key]) for key in sorted(value, key=repr)}
    return type(value)(map(_sorted, value)) if type(value) in (list, tuple) else value


def _is_same_leaf(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other) and repr(one) == repr(other)
    return one is other or are_same(one, other)


def seal(name: str, value: object) -> Any:
    """A value without tensors, in a form that DCP does not flatten."""
    tensors: list[torch.Tensor] = []
    with nesting.named(name, value):
        sealed = _seal(name, value, tensors)
    if tensors:
        raise UsageError(f"{name!r} holds tensors inside a {type(value).__name__}: give each a name of its own")
    return sealed


def unseal(name: str, sealed: object) -> Any:
    """The value that was given to `seal`."""
    return _unseal(name, sealed, {})


def fresh(value: Any) -> Any:
    """A value of a checkpoint for an object to keep: equal ones were read as one object, and lists and dicts change."""
    return value if type(value) in _UNCHANGING else copy.deepcopy(value)


def dict_tag(value: object) -> str:
    """The tag of a dict's class; empty for what is no dict, or is of a class that cannot be made again."""
    if type(value) is defaultdict:
        return next((tag for factory, tag in _FACTORIES.items() if factory is value.default_factory), "")
    return _DICTS.get(type(value), "")


def dict_like(shown: Mapping[Any, Any], items: Mapping[Any, Any]) -> Any:
    """A dict of the class of one that an object shows, with other items."""
    if type(shown) is dict or not isinstance(shown, MutableMapping):
        return dict(items)
    made = copy.copy(shown)
    made.clear()
    made.update(items)
    return made


def is_component(key: object) -> bool:
    """Whether a key can be part of a name."""
    return type(key) is str and bool(key) and "." not in key and key[0] != "$"


def _seal(name: str, value: Any, tensors: list[torch.Tensor]) -> Any:
    kind = type(value)
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return ("$tensor", len(tensors) - 1)
    if tag := dict_tag(value):
        of_keys: list[torch.Tensor] = []
        keys = [_seal(name, key, of_keys) for key in value]
        if of_keys:
            raise UsageError(
                f"{name!r} has tensors for keys, by which nothing is found after a load, as it makes others: use names"
            )
        items = [_seal(f"{name}.{key}", item, tensors) for key, item in value.items()]
        pairs = list(zip(keys, items, strict=True))
        return (tag, tuple(pairs))
    if kind in _SEQUENCES:
        items = list(_seal_items(name, value, tensors))
        if kind in (set, frozenset):
            items.sort(key=repr)
        untouched = kind in (list, tuple) and all(map(operator.is_, items, value))
        if untouched and not (items and type(items[0]) is str and items[0][:1] == "$"):
            return value
        return (_SEQUENCES[kind], tuple(items))
    if kind is bytes:
        return ("$bytes", value.hex())
    if kind is io.BytesIO:
        return ("$stream", value.getvalue().hex())
    if kind is torch.dtype:
        return ("$dtype", dtype_name(value))
    if kind is complex:
        return ("$complex", (value.real, value.imag))
    if kind is deque:
        return ("$deque", (value.maxlen, _seal_items(name, value, tensors)))
    if named_values.is_member(value):
        content = _seal(f"{name}.{value._name_}", value._value_, tensors)
        return ("$enum", (named_values.class_name(kind), value._name_, content))
    if named_values.is_named_tuple(value):
        return ("$named", (named_values.class_name(kind), value._fields, _seal_items(name, value, tensors)))
    if kind is GroupList:
        return (TAG, (value.kind, value.path))
    if isinstance(value, list):
        return _seal(name, list(value), tensors)
    try:
        values.encode(value)
    except values.NotPlainError:
        if _is_numpy_scalar(value):
            return ("$numpy", (value.dtype.name, _seal(name, value.item(), tensors)))
        raise UsageError(
            f"{name!r} is a {kind.__module__}.{kind.__qualname__}, which cannot be saved so that any reader gets it "
            "back: give tensors, numbers, texts, and dicts, lists and tuples of them"
        ) from None
    return value


def _seal_items(name: str, items: Iterable[Any], tensors: list[torch.Tensor]) -> tuple[Any, ...]:
    return tuple(_seal(f"{name}.{index}", item, tensors) for index, item in enumerate(items))


def _unseal(name: str, sealed: Any, leaves: Mapping[str, Any]) -> Any:
    if type(sealed) is not tuple or len(sealed) != 2 or type(sealed[0]) is not str or sealed[0][:1] != "$":
        return fresh(sealed)
    tag, content = sealed
    if tag == "$tensor":
        return leaves[f"{name}.${content}"]
    if tag == "$bytes":
        return bytes.fromhex(content)
    if tag == "$stream":
        return io.BytesIO(bytes.fromhex(content))
    if tag == "$dtype":
        return parse_dtype(content)
    if tag == TAG:
        return GroupList(*content)
    if tag == "$complex":
        return complex(*content)
    if tag == "$numpy":
        return _numpy_scalar(name, content[0], _unseal(name, content[1], leaves))
    if tag == "$deque":
        return deque((_unseal(name, item, leaves) for item in content[1]), content[0])
    if tag == "$enum":
        return named_values.member(name, content[0], content[1], _unseal(name, content[2], leaves))
    if tag == "$named":
        items = [_unseal(name, item, leaves) for item in content[2]]
        return named_values.named_tuple(name, content[0], content[1], items)
    if tag not in MAKERS:
        raise FormatError(f"{name!r} is sealed as {tag!r}, which this version does not know; upgrade ray-ckpt")
    if tag in _MAKERS_OF_DICTS:
        return MAKERS[tag]({_unseal(name, key, leaves): _unseal(name, item, leaves) for key, item in content})
    return MAKERS[tag]([_unseal(name, item, leaves) for item in content])


def _is_numpy_scalar(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic) and value.dtype.name in _NUMPY_SCALARS


def _numpy_scalar(name: str, dtype: str, value: Any) -> Any:
    if dtype not in _NUMPY_SCALARS:
        raise FormatError(f"{name!r} is sealed as a {dtype!r} of NumPy's, which this version does not know")
    import numpy  # whoever has none of its scalars need not have it

    return numpy.dtype(dtype).type(value)
