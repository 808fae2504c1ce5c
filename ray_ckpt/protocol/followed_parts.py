"""A rank that follows what is published: it changes what it holds into the next version, in place.

plan     read what has changed since the version that it holds, if it still holds that; nothing is changed yet
apply    change it, and compare what consists of whole checksum blocks with those of the version
note     remember by digests what it holds now
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from ray_ckpt.errors import CheckpointError
from ray_ckpt.format.boxes import Box, shared_box
from ray_ckpt.format.deltas import Key, identity
from ray_ckpt.format.manifest import Manifest, ObjectEntry
from ray_ckpt.format.memory import extent_bytes, fault, overlapping
from ray_ckpt.format.torch_internals import narrow, set_element
from ray_ckpt.protocol.held_blocks import consists_of_blocks, is_as_saved
from ray_ckpt.protocol.holdings import Holdings, hold
from ray_ckpt.protocol.messages import Item
from ray_ckpt.storage.checkpoint_reader import CheckpointReader
from ray_ckpt.storage.delta_chain import Chain, carry_out
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.staging import bytes_of, host_pieces

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> a dtype of as many, of which bits can be changed."""


@dataclass
class _Change:
    """What has changed in a chunk of the anchor, and where a rank holds some of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    coded: Sequence[tuple[str, torch.Tensor]] = ()
    """Coding and bytes, one for each step."""
    targets: list[tuple[Box, torch.Tensor]] = field(default_factory=list)
    """Box in the chunk, and the elements that the rank holds of it."""


@dataclass
class Plan:
    """What `apply` does. All that has to be read has been."""

    manifest: Manifest
    """What the version is."""
    holdings: Holdings
    changes: dict[Key, _Change] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    num_bytes: int = 0
    """Size of what was read of tensors."""


class FollowedParts:
    """What this rank has fetched last, by digests."""

    def __init__(self) -> None:
        self._identity = ""
        """What the version is; empty where it is none that is known."""
        self._held: Sequence[tuple[Item, bytes]] = ()
        self._next = ""
        """Identity of what was planned last."""

    def plan(self, state: Mapping[str, Any], storage: Storage, record: bytes | None) -> Plan | None:
        """Read what has changed since the version that the state holds.

        None where that is not known, or is no part of the chain, or the state cannot be changed in place: then all of
        it has to be loaded, by the same record.

        Args:
            record: of the version; None for one that another program wrote.

        Raises:
            CheckpointError, StorageError: something of it cannot be read.
        """
        self._next = ""
        if record is None:
            return None
        holdings, reader = hold(state), CheckpointReader(storage)
        stored = reader.read_stored(record)
        self._next = identity(stored)
        manifest, chain = reader.read_manifest(stored), reader.chain
        known = [self._next] if chain is None else chain.identities
        if self._identity not in known or not _can_change(holdings, manifest) or self._held != _digests(holdings):
            return None
        plan = Plan(manifest, holdings)
        if chain is not None:
            self._add_changes(plan, chain, known.index(self._identity))
        objects: dict[str, ObjectEntry] = {
            item.name: manifest.objects[item.name] for item in holdings.items if item.spec is None
        }
        plan.values = reader.read_values(objects)
        return plan

    def _add_changes(self, plan: Plan, chain: Chain, since: int) -> None:
        for item, value in zip(plan.holdings.items, plan.holdings.values, strict=True):
            if item.spec is None:
                continue
            entry, held = plan.manifest.tensors[item.name], shared_box(item.spec.offsets, item.spec.sizes)
            for chunk in entry.chunks:
                common = chunk.box.intersect(held)
                if common is None or not common.num_elements:
                    continue
                change = plan.changes.setdefault((item.name, chunk.box.offsets), _Change(chunk.box.sizes, value.dtype))
                part = narrow(value.detach(), common.within(held).offsets, common.sizes)
                change.targets.append((common.within(chunk.box), part))
        for key, coded in chain.changes(dict.fromkeys(plan.changes, since)).items():
            plan.changes[key].coded = coded
            plan.num_bytes += sum(len(data) for _, data in coded)

    def apply(self, plan: Plan, state: dict[str, Any]) -> None:
        """Change what the rank holds. After a failure it holds no version, and all has to be loaded.

        Raises:
            CheckpointError: it is not what was published.
        """
        self.forget()
        for change in plan.changes.values():
            _change(change)
        for item, value in zip(plan.holdings.items, plan.holdings.values, strict=True):
            if item.spec is None:
                set_element(state, item.path or (item.name,), plan.values[item.name])
                continue
            entry = plan.manifest.tensors[item.name]
            if consists_of_blocks(item.spec, value, entry) and not is_as_saved(item.spec, value, entry):
                raise CheckpointError(
                    f"{item.name} is not what was published, after its changes: something else has changed it "
                    "meanwhile; fetch again, which loads all of it"
                )

    def note(self, state: Mapping[str, Any]) -> None:
        """Remember that the state holds what was planned last."""
        self._held = _digests(hold(state)) if self._next else ()
        self._identity = self._next

    def forget(self) -> None:
        """What is held is no version that is known."""
        self._identity, self._held = "", ()


def _can_change(holdings: Holdings, manifest: Manifest) -> bool:
    """Whether a state has what a version has, each element at one place of its own."""
    places = []
    for item, value in zip(holdings.items, holdings.values, strict=True):
        if item.spec is None:
            if item.name not in manifest.objects:
                return False
            continue
        entry = manifest.tensors.get(item.name)
        if entry is None or (entry.dtype, entry.shape) != (item.spec.dtype, item.spec.shape):
            return False
        if fault(value) or overlapping(value) or value.is_conj() or value.is_neg() or value.itemsize not in _WORDS:
            return False
        if value.numel():
            places.append((str(value.device), value.data_ptr(), value.data_ptr() + extent_bytes(value)))
    places.sort()
    return all(one[0] != other[0] or one[2] <= other[1] for one, other in itertools.pairwise(places))


def _digests(holdings: Holdings) -> Sequence[tuple[Item, bytes]]:
    found = []
    for item, value in zip(holdings.items, holdings.values, strict=True):
        digest = xxhash.xxh3_128()
        if item.spec is not None:
            for _, piece in host_pieces([(item.name, value)]):
                digest.update(piece)
        found.append((item, digest.digest()))
    return found


def _change(change: _Change) -> None:
    whole = torch.zeros(change.shape, dtype=change.dtype)
    is_value = carry_out(change.coded, bytes_of(whole), whole.itemsize)  # else it is what differs
    words = _WORDS[whole.itemsize]
    for box, target in change.targets:
        part = narrow(whole, box.offsets, box.sizes).to(target.device)
        if is_value:
            target.view(words).copy_(part.view(words))
        else:
            target.view(words).bitwise_xor_(part.view(words))
