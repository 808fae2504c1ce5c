"""Does what ranks hold now equal a checkpoint? By checksums and fingerprints: nothing is gathered, nothing is read.

each rank    Comparing(state, only, manifest)
each rank    needing      tensors of which it has parts that are no whole blocks of the record (held_blocks.py)
one of them               what any rank needs fingerprints of is compared by them on all
each rank    held         compared blocks; sums over its boxes; digests of its objects
one of them  compare_with adds up, and names what differs
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful

from ray_ckpt.errors import FormatError, UsageError
from ray_ckpt.format.boxes import Box, check_cover, shared_box
from ray_ckpt.format.fingerprint import Fingerprint, by_name, formula_of, merge
from ray_ckpt.format.manifest import Manifest
from ray_ckpt.format.memory import fault
from ray_ckpt.format.wanted_names import is_below
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.protocol.held_blocks import consists_of_blocks, is_as_saved
from ray_ckpt.protocol.holdings import fingerprint_sum, hold
from ray_ckpt.protocol.messages import TensorSpec
from ray_ckpt.report import CompareReport
from ray_ckpt.storage.objects import SavedObject, saved_object


@dataclass(frozen=True)
class Held:
    """What one rank holds, as plain data."""

    blocks: dict[str, dict[Box, bool]] = field(default_factory=dict)
    """Name -> part that was compared block by block -> whether it is what was saved."""
    tensors: dict[str, Fingerprint] = field(default_factory=dict)
    """Name -> fingerprints of the others."""
    kinds: dict[str, str] = field(default_factory=dict)
    """Name -> dtype and shape, where they are not those of the record, or nothing tells more."""
    objects: dict[str, int] = field(default_factory=dict)
    """Name -> checksum of what would be saved."""


def _wanted(name: str, only: Sequence[str] | None) -> bool:
    return only is None or any(is_below(name, chosen) for chosen in only)


class Comparing:
    """One rank's side of a comparison.

    Raises:
        UsageError: a tensor has no bits of its own.
    """

    def __init__(self, state: Stateful | Mapping[str, Any], only: Sequence[str] | None, manifest: Manifest) -> None:
        self._manifest = manifest
        with collector_paused():
            holdings = hold(state.state_dict() if isinstance(state, Stateful) else state)
            found = zip(holdings.items, holdings.values, strict=True)
            self._items = [(item, value) for item, value in found if _wanted(item.name, only)]
        for item, value in self._items:
            if item.spec is not None and (wrong := fault(value)):
                raise UsageError(f"{item.name!r} {wrong}")

    def needing(self) -> frozenset[str]:
        """The tensors of which this rank holds something that only a fingerprint tells."""
        known = self._manifest.tensors
        return frozenset(
            item.name
            for item, value in self._items
            if item.spec is not None and item.name in known
            if not consists_of_blocks(item.spec, value, known[item.name])
        )

    def held(self, by_fingerprint: Collection[str]) -> Held:
        """Compare, and take fingerprints.

        Args:
            by_fingerprint: the tensors that any rank needs fingerprints of.
        """
        held = Held()
        with collector_paused():
            for item, value in self._items:
                if item.spec is None:
                    saved = value if isinstance(value, SavedObject) else saved_object(value)
                    held.objects[item.name] = saved.checksum
                else:
                    self._add(held, item.name, item.spec, value, by_fingerprint)
        return held

    def _add(
        self, held: Held, name: str, spec: TensorSpec, value: torch.Tensor, by_fingerprint: Collection[str]
    ) -> None:
        entry, box = self._manifest.tensors.get(name), shared_box(spec.offsets, spec.sizes)
        if entry is None or (spec.dtype, spec.shape) != (entry.dtype, entry.shape):
            held.kinds[name] = f"{spec.dtype}{list(spec.shape)}"
        elif name not in by_fingerprint:
            held.blocks.setdefault(name, {})[box] = is_as_saved(spec, value, entry)
        elif name not in self._manifest.fingerprints:
            held.kinds[name] = ""
        else:
            formula = formula_of(self._manifest.fingerprints[name])
            part = Fingerprint(spec.dtype, spec.shape, {box: fingerprint_sum(spec, value, formula)}, formula)
            held.tensors[name] = merge([held.tensors[name], part]) if name in held.tensors else part


def compare_with(manifest: Manifest, of_ranks: Sequence[Held], only: Sequence[str] | None = None) -> CompareReport:
    """What differs between a record and what all ranks hold."""
    tensors = by_name(rank.tensors for rank in of_ranks)
    blocks: dict[str, list[Mapping[Box, bool]]] = {}
    kinds: dict[str, str] = {}
    objects: dict[str, set[int]] = {}
    for rank in of_ranks:
        for name, found in rank.blocks.items():
            blocks.setdefault(name, []).append(found)
        for name, kind in rank.kinds.items():
            kinds[name] = kinds.get(name) or kind
        for name, checksum in rank.objects.items():
            objects.setdefault(name, set()).add(checksum)
    named = {name for name in (*manifest.tensors, *manifest.objects) if _wanted(name, only)}
    held_here = tensors.keys() | blocks.keys() | kinds.keys()
    here = held_here | objects.keys()
    differing: dict[str, str] = {}
    unknown = []
    for name in sorted(named & here):
        if name in manifest.tensors and name in held_here:
            entry = manifest.tensors[name]
            if kinds.get(name):
                differing[name] = f"{kinds[name]} instead of {entry.dtype}{list(entry.shape)}"
            elif name in kinds:
                unknown.append(name)
            elif reason := (
                _difference(manifest.fingerprints[name], tensors[name])
                if name in tensors
                else _differing_blocks(entry.shape, blocks[name])
            ):
                differing[name] = reason
        elif name in manifest.objects and name in objects:
            saved = manifest.objects[name].checksum
            if saved is None:
                unknown.append(name)
            elif objects[name] != {saved}:
                differing[name] = "another value" if len(objects[name]) == 1 else "ranks hold different values"
        else:
            differing[name] = "a tensor on one side, an object on the other"
    return CompareReport(
        uri="",
        num_compared=len(named & here) - len(unknown),
        differing=differing,
        missing=tuple(sorted(named - here)),
        unexpected=tuple(sorted(here - named)),
        unknown=tuple(unknown),
    )


def _difference(recorded: str, parts: Sequence[Fingerprint]) -> str:
    try:
        digest = merge(parts).digest
    except FormatError as error:
        return str(error)
    return "" if digest == recorded else "other elements"


def _differing_blocks(shape: tuple[int, ...], found: Sequence[Mapping[Box, bool]]) -> str:
    equal: dict[Box, set[bool]] = {}
    for of_rank in found:
        for box, is_equal in of_rank.items():
            equal.setdefault(box, set()).add(is_equal)
    for box, answers in equal.items():
        if len(answers) > 1:
            return f"replicas differ in the part at {box.offsets} of size {box.sizes}"
    if not all(answers == {True} for answers in equal.values()):
        return "other elements"
    problem = check_cover(shape, list(equal))
    return f"incomplete: {problem}" if problem else ""
