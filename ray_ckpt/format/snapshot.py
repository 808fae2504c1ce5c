"""What ranks hold, as plain data, and how what was saved compares with what was loaded.

every rank  ->  Snapshot     fingerprints of its parts of tensors, values of everything else
the driver  ->  compare(saved, loaded) -> mismatches     adds the parts up and compares by name
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray_ckpt.errors import FormatError
from ray_ckpt.format.fingerprint import Fingerprint, merge

ABSENT = "absent"
"""Stands for a name that one side does not have."""


@dataclass(frozen=True)
class Snapshot:
    """What one rank holds."""

    rank: int
    fingerprints: dict[str, Fingerprint]
    """Flat name -> fingerprint of this rank's part of the tensor."""
    values: dict[str, Any]
    """Flat name -> value of everything that is not a tensor."""


@dataclass(frozen=True)
class Mismatch:
    """A name whose saved and loaded values differ."""

    name: str
    expected: str
    found: str
    ranks: tuple[int, ...]
    """The ranks that hold the loaded value; when there is none, those that saved it."""


@dataclass(frozen=True)
class Comparison:
    tensors_compared: int
    objects_compared: int
    mismatches: tuple[Mismatch, ...]


@dataclass(frozen=True)
class _Held:
    """What all ranks together hold under one name."""

    text: str
    """Equal texts mean equal bits, unless the parts contradict each other."""
    ranks: tuple[int, ...]
    consistent: bool


def compare(saved: Sequence[Snapshot], loaded: Sequence[Snapshot]) -> Comparison:
    """Compare what all ranks saved with what all ranks loaded, name by name and bit for bit.

    A tensor whose parts do not cover it exactly once, or whose replicas differ, is a mismatch whatever the other side
    holds. So is a value on which ranks disagree.
    """
    tensors = _compare_names(_held_tensors(saved), _held_tensors(loaded))
    values = _compare_names(_held_values(saved), _held_values(loaded))
    return Comparison(
        tensors_compared=len(tensors),
        objects_compared=len(values),
        mismatches=tuple(mismatch for mismatch in tensors + values if mismatch is not None),
    )


def _held_tensors(snapshots: Sequence[Snapshot]) -> dict[str, _Held]:
    holders: dict[str, dict[int, Fingerprint]] = {}
    for snapshot in snapshots:
        for name, fingerprint in snapshot.fingerprints.items():
            holders.setdefault(name, {})[snapshot.rank] = fingerprint
    return {name: _merge_parts(parts) for name, parts in holders.items()}


def _merge_parts(parts: dict[int, Fingerprint]) -> _Held:
    try:
        return _Held(merge(parts.values()).digest, tuple(sorted(parts)), consistent=True)
    except FormatError as error:
        return _Held(str(error), tuple(sorted(parts)), consistent=False)


def _held_values(snapshots: Sequence[Snapshot]) -> dict[str, _Held]:
    holders: dict[str, dict[int, str]] = {}
    for snapshot in snapshots:
        for name, value in snapshot.values.items():
            holders.setdefault(name, {})[snapshot.rank] = repr(value)
    return {
        name: _Held(" or ".join(sorted(set(texts.values()))), tuple(sorted(texts)), len(set(texts.values())) == 1)
        for name, texts in holders.items()
    }


def _compare_names(saved: dict[str, _Held], loaded: dict[str, _Held]) -> list[Mismatch | None]:
    """One entry per name on either side: None where both hold the same."""
    return [_compare_one(name, saved.get(name), loaded.get(name)) for name in sorted(saved.keys() | loaded.keys())]


def _compare_one(name: str, saved: _Held | None, loaded: _Held | None) -> Mismatch | None:
    if saved and loaded and saved.consistent and loaded.consistent and saved.text == loaded.text:
        return None
    ranks = loaded.ranks if loaded else saved.ranks if saved else ()
    return Mismatch(name, saved.text if saved else ABSENT, loaded.text if loaded else ABSENT, ranks)
