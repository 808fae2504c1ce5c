"""What a tensor subclass needs besides its inner tensors, as plain values: recorded, compared, and made again.

    context ── encode ──> plain value     nested tuples of numbers and texts, which the record holds as JSON
    saved, live ── differences ──> what differs, by place
    plain value ── decode ──> context     only of values, sizes, dtypes and loaded classes without a method being run

The subclass's own size stands in it as "the outer size", as it is another one for each shard; so does its device. No
pickle is involved. Functions can be compared, but no checkpoint gets one called: they are never decoded.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ray_ckpt.errors import FormatError, UsageError
from ray_ckpt.format.torch_container import dtype_name, parse_dtype
from ray_ckpt.text import quoted

Plain = Any
"""None, a bool, a number, a text, or a tuple of a tag and of plain values."""

_SEQUENCES: dict[type, str] = {tuple: "$tuple", list: "$list", torch.Size: "$size"}
_MAKERS: dict[str, Callable[[Any], Any]] = {tag: kind for kind, tag in _SEQUENCES.items()}
_OF_CLASS = ("$enum", "$namedtuple", "$dataclass", "$class", "$function")
"""Tags that are followed by module and name of a class or function."""


def class_name(kind: Any) -> tuple[str, str]:
    """Module and qualified name of a class or function."""
    return kind.__module__, kind.__qualname__


def encode(value: Any, outer: tuple[int, ...]) -> Plain:
    """The context as a plain value.

    Args:
        outer: size of the tensor that it belongs to.

    Raises:
        UsageError: something in it is neither a value nor made of values.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in _SEQUENCES:
        if outer and tuple(value) == outer:
            return ("$outer", _SEQUENCES[kind])
        return (_SEQUENCES[kind], tuple(encode(item, outer) for item in value))
    if kind is dict:
        return ("$dict", tuple((encode(key, outer), encode(item, outer)) for key, item in value.items()))
    if kind is bytes:
        return ("$bytes", value.hex())
    if kind is torch.dtype:
        return ("$dtype", dtype_name(value))
    if kind is torch.device:
        return ("$device",)
    if kind in (torch.layout, torch.memory_format):
        return ("$torch", str(value).removeprefix("torch."))
    return _encode_object(value, outer)


def _encode_object(value: Any, outer: tuple[int, ...]) -> Plain:
    kind = type(value)
    if isinstance(value, enum.Enum):
        return ("$enum", class_name(kind), value.name if value.name else str(value.value))
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return ("$namedtuple", class_name(kind), tuple(encode(item, outer) for item in value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field.name, encode(getattr(value, field.name), outer)) for field in dataclasses.fields(value))
        return ("$dataclass", class_name(kind), tuple(fields))
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
        return ("$partial", tuple(encode(part, outer) for part in parts))
    if isinstance(value, type):
        return ("$class", class_name(value))
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType) and "<" not in value.__qualname__:
        return ("$function", class_name(value))
    raise UsageError(
        f"a {kind.__module__}.{kind.__qualname__} is neither a plain value nor made of plain values, so that no record "
        "can tell whether it is the same again"
    )


def differences(saved: Plain, live: Plain, where: str = "") -> Iterator[str]:
    """What differs between two contexts, as texts. Classes are compared by name: libraries move them."""
    if repr(saved) == repr(live):
        return
    tags = {_tag(saved), _tag(live)}
    tag = tags.pop()
    if tags or not tag or len(saved) != len(live) or len(saved) < 2 or (tag in _OF_CLASS and saved[1][1] != live[1][1]):
        yield f"{where or 'context'}: saved {shown(saved)}, wanted {shown(live)}"
    elif tag in ("$dict", "$dataclass"):
        one, other = dict(saved[-1]), dict(live[-1])
        for key in dict.fromkeys([*one, *other]):
            inner = f"{where}.{key if type(key) is str else shown(key)}".lstrip(".")
            if key in one and key in other:
                yield from differences(one[key], other[key], inner)
            else:
                yield f"{inner}: {'saved' if key in one else 'wanted'} only"
    elif tag in (*_MAKERS, "$namedtuple", "$partial") and len(saved[-1]) == len(live[-1]):
        for index, (one, other) in enumerate(zip(saved[-1], live[-1], strict=True)):
            yield from differences(one, other, f"{where}[{index}]")
    elif tag not in _OF_CLASS or saved[2:] != live[2:]:
        yield f"{where or 'context'}: saved {shown(saved)}, wanted {shown(live)}"


def _tag(value: Plain) -> str:
    is_tagged = type(value) is tuple and value and type(value[0]) is str
    return value[0] if is_tagged else ""


def shown(value: Plain) -> str:
    """For a message."""
    tag = _tag(value)
    if tag in ("$dtype", "$torch"):
        return str(value[1])
    if tag == "$enum":
        return f"{value[1][1]}.{value[2]}"
    if tag in _MAKERS:
        return f"[{', '.join(shown(item) for item in value[1])}]"
    return quoted(value) if not tag else quoted(value[1:])


def decode(value: Plain, outer: tuple[int, ...], device: torch.device) -> Any:
    """The context again, for a tensor of this size on this device.

    Raises:
        FormatError: it holds a function, a class that this process has not loaded, or what `encode` does not write.
    """
    tag = _tag(value)
    if not tag:
        return value
    content: Any = value[1] if len(value) > 1 else ()
    if tag == "$outer" and content in _MAKERS:
        return _MAKERS[content](outer)
    if tag == "$device":
        return device
    if tag in _MAKERS:
        return _MAKERS[tag]([decode(item, outer, device) for item in content])
    if tag == "$dict":
        return {decode(key, outer, device): decode(item, outer, device) for key, item in content}
    if tag == "$bytes":
        return bytes.fromhex(content)
    if tag == "$dtype":
        return parse_dtype(content)
    if tag == "$torch" and isinstance(found := getattr(torch, content), torch.layout | torch.memory_format):
        return found
    if tag in ("$enum", "$namedtuple", "$dataclass") and len(value) == 3:
        return _decode_object(tag, find_class(content), value[2], outer, device)
    raise FormatError(f"{quoted(shown(value))} is not made again from a checkpoint")


def _decode_object(tag: str, kind: type, content: Plain, outer: tuple[int, ...], device: torch.device) -> Any:
    """Made without its own methods: a checkpoint chooses the class, so it may not choose what runs."""
    if tag == "$enum" and issubclass(kind, enum.Enum) and content in kind.__members__:
        return kind.__members__[content]
    if tag == "$namedtuple" and issubclass(kind, tuple) and len(getattr(kind, "_fields", ())) == len(content):
        return tuple.__new__(kind, [decode(item, outer, device) for item in content])
    if tag == "$dataclass" and dataclasses.is_dataclass(kind):
        made = object.__new__(kind)
        if {field.name for field in dataclasses.fields(kind)} == {name for name, _ in content}:
            for name, item in content:
                object.__setattr__(made, name, decode(item, outer, device))
            return made
    raise FormatError(f"{kind.__module__}.{kind.__qualname__} is not what it was when it was saved")


def find_class(name: tuple[str, str]) -> type:
    """A class of this name that this process has loaded. Nothing is imported.

    Raises:
        FormatError: there is none.
    """
    module, qualname = name
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = vars(found).get(part) if isinstance(found, type | types.ModuleType) else None
    if not isinstance(found, type):
        raise FormatError(f"{quoted(f'{module}.{qualname}')} is no class that this process has imported")
    return found
