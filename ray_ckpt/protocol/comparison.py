"""Does what ranks hold now equal a checkpoint? By fingerprints and digests: nothing is gathered, and no bytes are read.

each rank    held(state) -> Held             sums over its boxes, digests of its objects
one of them  compare(location, [Held, ...])  adds up, and names what differs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.stateful import Stateful

from ray_ckpt.errors import FormatError, UsageError
from ray_ckpt.format.boxes import shared_box
from ray_ckpt.format.fingerprint import Fingerprint, by_name, merge
from ray_ckpt.format.memory import fault
from ray_ckpt.format.wanted_names import is_below
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.protocol.holdings import fingerprint_sum, hold
from ray_ckpt.report import CompareReport
from ray_ckpt.storage.checkpoint_reader import CheckpointReader
from ray_ckpt.storage.objects import SavedObject, saved_object
from ray_ckpt.storage.resolve import Location


@dataclass(frozen=True)
class Held:
    """What one rank holds, as plain data."""

    tensors: Mapping[str, Fingerprint]
    objects: Mapping[str, int]
    """Name -> checksum of what would be saved."""


def _wanted(name: str, only: Sequence[str] | None) -> bool:
    return only is None or any(is_below(name, chosen) for chosen in only)


def held(state: Stateful | Mapping[str, Any], only: Sequence[str] | None) -> Held:
    """Fingerprints of what this rank holds.

    Raises:
        UsageError: a tensor has no bits of its own.
    """
    with collector_paused():
        holdings = hold(state.state_dict() if isinstance(state, Stateful) else state)
        parts: dict[str, Fingerprint] = {}
        objects: dict[str, int] = {}
        for (name, _, spec), value in zip(holdings.items, holdings.values, strict=True):
            if not _wanted(name, only):
                continue
            if spec is None:
                objects[name] = (value if isinstance(value, SavedObject) else saved_object(value)).checksum
                continue
            if wrong := fault(value):
                raise UsageError(f"{name!r} {wrong}")
            box = shared_box(spec.offsets, spec.sizes)
            part = Fingerprint(spec.dtype, spec.shape, {box: fingerprint_sum(spec, value)})
            parts[name] = merge([parts[name], part]) if name in parts else part
    return Held(parts, objects)


def compare(location: Location, of_ranks: Sequence[Held], only: Sequence[str] | None) -> CompareReport:
    """What differs between a checkpoint and what all ranks hold."""
    manifest = CheckpointReader(location.storage).read_manifest()
    tensors = by_name(rank.tensors for rank in of_ranks)
    objects: dict[str, set[int]] = {}
    for rank in of_ranks:
        for name, checksum in rank.objects.items():
            objects.setdefault(name, set()).add(checksum)
    named = {name for name in (*manifest.tensors, *manifest.objects) if _wanted(name, only)}
    here = tensors.keys() | objects.keys()
    differing: dict[str, str] = {}
    unknown = []
    for name in sorted(named & here):
        if name in manifest.tensors and name in tensors:
            recorded = manifest.fingerprints.get(name)
            if recorded is None:
                unknown.append(name)
            elif reason := _difference(recorded, tensors[name]):
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
        uri=location.storage.address,
        num_compared=len(named & here) - len(unknown),
        differing=differing,
        missing=tuple(sorted(named - here)),
        unexpected=tuple(sorted(here - named)),
        unknown=tuple(unknown),
        step=location.step,
    )


def _difference(recorded: str, parts: Sequence[Fingerprint]) -> str:
    try:
        digest = merge(parts).digest
    except FormatError as error:
        return str(error)
    if digest == recorded:
        return ""
    same_kind = digest.rpartition(":")[0] == recorded.rpartition(":")[0]
    return "other elements" if same_kind else f"{digest.rpartition(':')[0]} instead of {recorded.rpartition(':')[0]}"
