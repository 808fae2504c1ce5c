"""What stands in a read pickle for what it names, and the few containers of Python that are made for real.

Name          a class or function
Instance      what calling it would return, with the state and the items it was given
CALLS         how the containers are made: new ones, of checked keys
find          the first stand-in within a value
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ray_ckpt.errors import FormatError
from ray_ckpt.format import limits
from ray_ckpt.text import quoted

__all__ = ["CALLS", "DICTS", "Instance", "KeyGuard", "Name", "find_unknown", "is_harmless"]

DICTS = (dict, OrderedDict, defaultdict, Counter)
"""The dicts that a pickle may fill."""

_MAX_KEY_ITEMS = 64
"""Largest number of items in a tuple that is a key, and in the tuples in it."""

_WIDEST_PLAIN_KEY = 1 << 60
"""Integers below this have distinct hashes."""

_HARMLESS = (
    *("builtins.getattr", "builtins.range", "builtins.slice", "builtins.object", "builtins.list", "builtins.tuple"),
    *("builtins.str", "builtins.int", "builtins.float", "builtins.type", "copyreg._reconstructor"),
    *("builtins.xrange", "array.array", "array._array_reconstructor", "logging.getLogger", "re._compile"),
    *("collections.deque", "functools.partial", "operator.itemgetter", "operator.attrgetter"),
    *("datetime.", "numpy.", "torch.", "pandas.", "zoneinfo.", "uuid.", "decimal.", "fractions.", "pathlib."),
)
"""Names that occur in state although they are not spelled like a class. Those that end in a dot are modules."""


class Name:
    """The name of a class or function, and nothing else of it."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"<{self.text[:80]}>"


class Instance:
    """The object that a pickle makes by calling a name, or as a new object of a class."""

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name = name
        self.args = args
        self.state: Any = None
        """State that the pickle sets."""
        self.items: Sequence[Any] = ()
        """Values that the pickle appends, or keys and values in turn."""

    def add(self, items: list[Any]) -> None:
        """Append items, or keys and values in turn."""
        if isinstance(self.items, list):
            self.items.extend(items)
        else:
            self.items = items

    def __repr__(self) -> str:
        return f"<{self.name[:80]}(...)>"


def is_harmless(name: str) -> bool:
    """Whether a name is a class, by its spelling, or a known one. Such an object may lie in a checkpoint as long as
    nobody wants it. A call of an unknown function is how an attack begins, and no plain state has one."""
    return name.rpartition(".")[2].lstrip("_")[:1].isupper() or name.startswith(_HARMLESS)


def find_unknown(value: Any, what: str) -> str:
    """The name of the first stand-in within a value; empty when there is none. A value that contains itself counts as
    one.

    Args:
        what: where the value comes from, for messages.

    Raises:
        FormatError: it is nested too deep.
    """
    return _Search(what).look_into(value, 0)[0]


class _Search:
    def __init__(self, what: str) -> None:
        self._what = what
        self._max_depth = limits.NESTING.value
        self._seen: dict[int, tuple[str, int]] = {}

    def look_into(self, value: Any, depth: int) -> tuple[str, int]:
        """The first stand-in within, and the levels of nesting."""
        if isinstance(value, Name):
            return value.text, 0
        if isinstance(value, Instance):
            return value.name, 0
        if not isinstance(value, (dict, list, tuple, set, frozenset)):
            return "", 0
        if depth > self._max_depth:
            raise limits.NESTING.error("values that are nested too deep", self._what)
        if id(value) not in self._seen:
            self._seen[id(value)] = ("itself", 0)
            items = itertools.chain(value, value.values()) if isinstance(value, dict) else value
            found = [self.look_into(item, depth + 1) for item in items]
            unknown = next((name for name, _ in found if name), "")
            self._seen[id(value)] = unknown, 1 + max((height for _, height in found), default=0)
        unknown, height = self._seen[id(value)]
        if depth + height > self._max_depth:
            raise limits.NESTING.error("values that are nested too deep", self._what)
        return unknown, height


class KeyGuard:
    """Checks that keys are hashed and compared in a time that they cannot drive up.

    A tuple of tuples that share their parts can stand for more elements than anybody can visit, a deep one overflows
    the interpreter's stack, and tuples and wide integers can be chosen so that their hashes collide.

    Args:
        what: where the keys come from, for messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._num_odd = 0

    def check(self, keys: Iterable[Any]) -> None:
        """Raises FormatError."""
        for key in keys:
            kind = type(key)
            if kind in _PLAIN_KEYS or (kind is int and -_WIDEST_PLAIN_KEY < key < _WIDEST_PLAIN_KEY):
                continue
            self._num_odd += 1
            limits.ODD_KEYS.check(self._num_odd, self._what)
            if isinstance(key, (tuple, frozenset)) and _num_items(key) > _MAX_KEY_ITEMS:
                raise FormatError(f"{self._what} has a dict key of more than {_MAX_KEY_ITEMS} values: {quoted(key)}")


_PLAIN_KEYS = frozenset({str, bytes, bool, float, type(None), Name, Instance})


def _num_items(key: Any) -> int:
    """Items in a key and in the tuples in it, counted no further than past the limit: they may share their parts."""
    count, waiting = 0, [key]
    while waiting and count <= _MAX_KEY_ITEMS:
        item = waiting.pop()
        count += 1
        if isinstance(item, (tuple, frozenset)):
            waiting.extend(itertools.islice(item, _MAX_KEY_ITEMS + 1))
    return count


# ------------------------------------------------------------------------------------------------------- containers


def _ordered_dict(guard: KeyGuard, pairs: Any = ()) -> OrderedDict[Any, Any]:
    keys = [key for key, _ in pairs]
    guard.check(keys)
    return OrderedDict(zip(keys, [value for _, value in pairs], strict=True))


def _default_dict(guard: KeyGuard, factory: Name | None = None) -> defaultdict[Any, Any]:
    return defaultdict(None if factory is None else _FACTORIES[factory.text])


def _counter(guard: KeyGuard, counts: dict[Any, int] | None = None) -> Counter[Any]:
    if counts is not None and type(counts) is not dict:
        raise TypeError(f"a Counter of {quoted(counts)}")
    return Counter(counts)


def _dict(guard: KeyGuard) -> dict[Any, Any]:
    return {}


def _set(guard: KeyGuard, items: Any = ()) -> set[Any]:
    guard.check(items)
    return set(items)


def _frozen_set(guard: KeyGuard, items: Any = ()) -> frozenset[Any]:
    guard.check(items)
    return frozenset(items)


def _bytes(guard: KeyGuard, text: str = "", encoding: str = "latin1") -> bytes:
    """How a pickle of protocol 2 spells bytes."""
    if encoding != "latin1":
        raise ValueError(f"bytes are not spelled in {quoted(encoding)}")
    return text.encode("latin1")


def _empty_bytes(guard: KeyGuard) -> bytes:
    return b""


def _byte_array(guard: KeyGuard, content: Any = b"", encoding: str = "latin-1") -> bytearray:
    """Of bytes, or of a text as protocol 2 has it; a number would be as many zeros."""
    if type(content) is str and encoding == "latin-1":
        content = content.encode("latin-1")
    if type(content) is not bytes:
        raise ValueError(f"a bytearray of {quoted(content)}")
    return bytearray(content)


def _complex(guard: KeyGuard, real: float, imaginary: float) -> complex:
    return complex(real, imaginary)


_FACTORIES: dict[str, type] = {
    f"builtins.{factory.__name__}": factory for factory in (list, dict, set, int, float, str, bool, tuple)
}

CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": _default_dict,
    "collections.Counter": _counter,
    "builtins.dict": _dict,
    "builtins.set": _set,
    "builtins.frozenset": _frozen_set,
    "builtins.bytes": _empty_bytes,
    "builtins.bytearray": _byte_array,
    "builtins.complex": _complex,
    "_codecs.encode": _bytes,
}
"""Name -> function that makes what a call of that name would, of a guard and the call's arguments."""
