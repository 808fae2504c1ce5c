"""Lists in the optimizer state of others, whose items were saved one by one, as the sealed values that we save.

    state.0.Q.0, state.0.Q.1   ->   optim.state.weight.Q, which says that it is a list of two, .Q.$0 and .Q.$1

Dicts with names for keys need none of it: ours are flattened just so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_ckpt.errors import StateMismatchError
from ray_ckpt.format.manifest import Inline, Manifest, ObjectEntry, Path, TensorEntry
from ray_ckpt.text import quoted

__all__ = ["below", "seal_lists"]


def seal_lists(
    manifest: Manifest, place: str, keys: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, ObjectEntry]]:
    """
    Args:
        place: our name of the state of one parameter.
        keys: saved name -> key in that state, of everything in it.

    Returns:
        Saved name -> our name, empty for what a sealed value holds; and the sealed values by name.

    Raises:
        StateMismatchError: the state is nested in a way that its names do not tell.
    """
    new: dict[str, str] = {}
    lists: dict[str, dict[Path, str]] = {}
    for old, key in keys.items():
        path = _path_of(manifest, old, key)
        at = next((at for at, part in enumerate(path) if type(part) is int), None)
        if at is None:
            if any(part.isdecimal() for part in path[1:] if isinstance(part, str)):
                raise _nested(place, key)
            new[old] = f"{place}.{key}" if key else place
        else:
            lists.setdefault(".".join((place, *map(str, path[:at]))), {})[path[at:]] = old
    sealed = {}
    for name, items in lists.items():
        sealing = _Sealing(manifest, name, items)
        sealed[name] = ObjectEntry(next(iter(manifest.files)), 0, 0, inline=Inline(sealing.seal(())))
        new |= sealing.new
    return new, sealed


def below(manifest: Manifest, name: str, new: str) -> Path:
    """The path of an entry under a new name, which ends as its own path does: with as many parts of it as fit."""
    path = _entry(manifest, name).path or ()
    for start in range(len(path)):
        rest = ".".join(map(str, path[start:]))
        if new.endswith(f".{rest}"):
            return (new[: -len(rest) - 1], *path[start:])
    return tuple(new.split("."))


def _entry(manifest: Manifest, name: str) -> TensorEntry | ObjectEntry:
    return manifest.tensors.get(name) or manifest.objects[name]


def _path_of(manifest: Manifest, name: str, key: str) -> Path:
    """The last parts of the path of an entry, those that the key is made of."""
    path = _entry(manifest, name).path or ()
    for start in range(len(path) - 1, -1, -1):
        if ".".join(map(str, path[start:])) == key:
            return path[start:]
    return tuple(key.split("."))


def _nested(place: str, key: str) -> StateMismatchError:
    return StateMismatchError(
        f"the state {quoted(key)} at {quoted(place)} is nested so that its names do not tell what it was: load the "
        "model alone, by only=('model',), or save that state as a list or a dict with names for keys"
    )


class _Sealing:
    """One list, sealed: tensors become names of their own."""

    def __init__(self, manifest: Manifest, name: str, items: Mapping[Path, str]) -> None:
        self._manifest = manifest
        self._name = name
        self._items = items
        self.new: dict[str, str] = {}

    def seal(self, path: Path) -> Any:
        if path in self._items:
            return self._leaf(self._items[path], path)
        parts = list(dict.fromkeys(item[len(path)] for item in self._items if item[: len(path)] == path))
        if all(type(part) is int for part in parts):
            if sorted(parts, key=int) != list(range(len(parts))):
                raise _nested(self._name, f"list with {len(parts)} items")
            return "$list", tuple(self.seal((*path, part)) for part in range(len(parts)))
        if any(type(part) is int or str(part).isdecimal() for part in parts):
            raise _nested(self._name, ".".join(map(str, path)))
        return "$dict", tuple((part, self.seal((*path, part))) for part in parts)

    def _leaf(self, old: str, path: Path) -> Any:
        if old in self._manifest.tensors:
            number = sum(1 for name in self.new.values() if name)
            self.new[old] = f"{self._name}.${number}"
            return "$tensor", number
        entry = self._manifest.objects[old]
        if entry.inline is None or not isinstance(entry.inline.value, (bool, int, float, str, type(None))):
            raise _nested(self._name, ".".join(map(str, path)))
        self.new[old] = ""
        return entry.inline.value
