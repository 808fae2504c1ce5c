"""Values of classes that have names: members of enums and named tuples, as the names that stand for them.

A load makes them again from a class of that name that this process has imported already, if its members or fields are
what was saved. Nothing is imported, and no code of the class runs.
"""

from __future__ import annotations

import enum
import sys
from typing import Any

from ray_ckpt.errors import StateMismatchError

_ADVICE = "Import or define the class, as it was, before the load"


def class_name(kind: type) -> str:
    """As a checkpoint names it."""
    return f"{kind.__module__}:{kind.__qualname__}"


def is_findable(kind: type) -> bool:
    """Whether another process may find the class by its name. That of a local one says nothing."""
    return _find(class_name(kind)) is kind


def is_member(value: object) -> bool:
    """Whether it is a member of an enum with a name. Flags that are joined have none."""
    if not isinstance(value, enum.Enum) or not is_findable(type(value)):
        return False
    return type(value).__members__.get(str(value._name_)) is value


def is_named_tuple(value: object) -> bool:
    return isinstance(value, tuple) and _fields(type(value)) is not None and is_findable(type(value))


def member(name: str, of: str, key: str, saved: object) -> enum.Enum:
    """A member of an enum.

    Args:
        name: of the entry, for the message.
        of: name of the class.
        key: name of the member.
        saved: its value; that of today's member has to be the same.

    Raises:
        StateMismatchError: there is none.
    """
    kind = _find(of)
    found = kind.__members__.get(key) if isinstance(kind, enum.EnumMeta) else None
    if not isinstance(found, enum.Enum) or repr(found._value_) != repr(saved):
        raise StateMismatchError(
            f"{name!r} was saved as member {key} = {saved!r:.80} of the enum {of}, which this process does not have: "
            f"{of if found is None else found!r}. {_ADVICE}"
        )
    return found


def named_tuple(name: str, of: str, fields: tuple[str, ...], items: list[Any]) -> tuple[Any, ...]:
    """A named tuple of these items.

    Raises:
        StateMismatchError: there is no such class, or it has other fields.
    """
    kind = _find(of)
    if kind is None or _fields(kind) != fields or len(items) != len(fields):
        raise StateMismatchError(
            f"{name!r} was saved as the named tuple {of} of {', '.join(fields)}, which this process does not have. "
            f"{_ADVICE}"
        )
    made: tuple[Any, ...] = tuple.__new__(kind, items)
    return made


def _fields(kind: type) -> tuple[str, ...] | None:
    """Of a class that `collections.namedtuple` or `typing.NamedTuple` has made."""
    fields = vars(kind).get("_fields")
    is_named = kind.__bases__ == (tuple,) and isinstance(fields, tuple) and all(type(field) is str for field in fields)
    return fields if is_named else None


def _find(name: str) -> type | None:
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    return found if isinstance(found, type) else None
