"""States that contain themselves, or are nested without need: named where a walk through them does not end.

with named(name, value): walk(value)     costs nothing until the walk runs out of stack
check(name, value)                       walks itself, for values that have something nested in them
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ray_ckpt.errors import UsageError
from ray_ckpt.format.limits import NESTING
from ray_ckpt.text import quoted

_SEQUENCES = (list, tuple, set, frozenset, deque)

CONTAINERS = frozenset({dict, *_SEQUENCES})
"""Classes of what may contain itself."""

_UNCHANGING = frozenset({bool, int, float, str, type(None)})


class named:
    """Walk through a value.

    Args:
        name: of the value; empty for a whole state, whose keys are the names.

    Raises:
        UsageError: it contains itself, or is nested deeper than Python can follow.
    """

    __slots__ = ("_name", "_value")

    def __init__(self, name: str, value: object) -> None:
        self._name = name
        self._value = value

    def __enter__(self) -> None:
        """Only the end matters."""

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        # A user's own code may run out of stack too, in a state that has an end.
        if kind is RecursionError and (found := _fault(self._name, self._value)):
            raise UsageError(found) from None


def check(name: str, value: object) -> None:
    """Raises:
    UsageError: the value contains itself, or is nested deeper than a record may be.
    """
    if found := _fault(name, value):
        raise UsageError(found)


def check_paths(paths: Mapping[str, Sequence[object]]) -> None:
    """
    Args:
        paths: flat name -> the keys that lead to what has it.

    Raises:
        UsageError: they are more than would be read again.
    """
    most = NESTING.value
    for name, path in paths.items():
        if len(path) > most:
            raise UsageError(_too_deep(name))


def asked(name: str, owner: Any) -> Any:
    """What an object shows of itself.

    Raises:
        UsageError: it never comes to an end, as objects that are in each other's states.
    """
    try:
        return owner.state_dict()
    except RecursionError:
        kind = type(owner)
        raise UsageError(
            f"{_short(name)}: the state_dict of {kind.__module__}.{kind.__qualname__} calls itself without end: leave "
            "out of it whatever it is a part of"
        ) from None


def _fault(name: str, value: object) -> str:
    """What is wrong with a value; empty if nothing is. It may be nested deeper than Python's own stack."""
    within = {id(value): name}
    done: set[int] = set()
    walks = [(value, _items(name, value))]
    while walks:
        container, items = walks[-1]
        for place, item in items:
            if id(item) in within:
                return (
                    f"{_short(place)} is the {type(item).__qualname__} {_short(within[id(item)])} that it lies in, so "
                    "that the state has no end: keep a name or a copy of what is wanted in its place"
                )
            is_container = isinstance(item, (Mapping, *_SEQUENCES))
            if len(walks) + (0 if is_container or type(item) in _UNCHANGING else 2) > NESTING.value:
                return _too_deep(name or place.partition(".")[0])
            if is_container and id(item) not in done:
                within[id(item)] = place
                walks.append((item, _items(place, item)))
                break
        else:
            walks.pop()
            del within[id(container)]
            done.add(id(container))
    return ""


def _items(name: str, container: Any) -> Iterator[tuple[str, object]]:
    pairs = container.items() if isinstance(container, Mapping) else enumerate(container)
    return ((f"{name}.{key}" if name else str(key), item) for key, item in pairs)


def _too_deep(name: str) -> str:
    return (
        f"{_short(name)} is nested too deep: {NESTING.value} levels are read again, and what is in no plain dict takes "
        f"two or more each. Keep it flatter, or set {NESTING.variable} to a higher number, for the load as well"
    )


def _short(name: str) -> str:
    return quoted(name) if name else "the state"
