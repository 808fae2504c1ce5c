"""fill(state, reader, manifest): the bytes that this rank's part of a state wants, straight from the manifest.

    state ── hold ──> boxes of tensors, names of values      (as a save looks through it)
    box x saved chunks ── intersect, once per pair of boxes ──> reader.read_tensors
    names ──> reader.read_values ──> into the state

No rank has to ask another, and none of DCP's plans is made: with 10 000 tensors those take longer than the reading.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint._traverse import set_element

from ray_ckpt.collector import collector_paused
from ray_ckpt.errors import StateMismatchError, UsageError
from ray_ckpt.format.blob import parse_dtype
from ray_ckpt.format.boxes import Box, shared_box
from ray_ckpt.format.manifest import Manifest, ObjectEntry, TensorEntry
from ray_ckpt.protocol.holdings import hold
from ray_ckpt.protocol.messages import TensorSpec
from ray_ckpt.storage.locate import SavedChunk
from ray_ckpt.storage.reader import ArrowStorageReader, Wanted


def fill(state: dict[str, Any], reader: ArrowStorageReader, manifest: Manifest) -> None:
    """Load this rank's part of a state dict: tensors in place, everything else by replacing it.

    A tensor whose dtype differs from the saved one is cast.

    Args:
        state: nested dicts and lists of tensors (plain, DTensor, ShardedTensor) and other things.
        manifest: what `reader.read_manifest` returned.

    Raises:
        StateMismatchError: the checkpoint lacks something of that name, or it has another shape.
        UsageError: a tensor has no memory of its own.
        StorageError, FormatError, IntegrityError: as the reader raises them.
    """
    with collector_paused():
        wanted, objects = _want(state, manifest)
    reader.read_tensors(wanted)
    for name, value in reader.read_values({name: entry for name, (_, entry) in objects.items()}).items():
        set_element(state, objects[name][0], value)


def _want(
    state: dict[str, Any], manifest: Manifest
) -> tuple[list[Wanted], dict[str, tuple[tuple[str | int, ...], ObjectEntry]]]:
    holdings = hold(state)
    overlaps = _Overlaps()
    wanted: list[Wanted] = []
    objects = {}
    for (name, path, spec), value in zip(holdings.items, holdings.values, strict=True):
        if spec is not None:
            entry = _tensor_entry(manifest, name, spec)
            wanted += _want_tensor(name, entry, spec, value, overlaps)
        elif name in manifest.objects:
            objects[name] = (path or (name,), manifest.objects[name])
        else:
            raise StateMismatchError(f"the checkpoint has no value {name!r}, which the state asks for")
    return wanted, objects


def _tensor_entry(manifest: Manifest, name: str, spec: TensorSpec) -> TensorEntry:
    entry = manifest.tensors.get(name)
    if entry is None or entry.shape != spec.shape:
        found = "no such tensor" if entry is None else f"it as {entry.dtype}{list(entry.shape)}"
        raise StateMismatchError(f"the state asks for {name!r} of shape {list(spec.shape)}; the checkpoint has {found}")
    return entry


def _want_tensor(
    name: str, entry: TensorEntry, spec: TensorSpec, target: torch.Tensor, overlaps: _Overlaps
) -> Iterator[Wanted]:
    if target.is_meta:
        raise UsageError(f"{name!r} is on the meta device: materialise it, or leave it out of the state")
    dtype = parse_dtype(entry.dtype)
    for chunk in entry.chunks:
        overlap = overlaps.of(chunk.box, spec)
        if overlap is None:
            continue
        part = target.detach() if target.requires_grad else target
        if not overlap.is_all_of_target:
            part = narrow_tensor_by_index(part, overlap.target_offsets, overlap.box.sizes)
        yield Wanted(SavedChunk(name, dtype, chunk), overlap.box, part)


class _Overlap(NamedTuple):
    """What a saved chunk has of what a rank holds."""

    box: Box
    """In the chunk's own coordinates."""
    target_offsets: tuple[int, ...]
    """Of the same elements, in what the rank holds."""
    is_all_of_target: bool


class _Overlaps:
    """Overlaps of a load, each pair of boxes computed once: a model has thousands of tensors of a few shapes."""

    def __init__(self) -> None:
        self._known: dict[tuple[Box, TensorSpec], _Overlap | None] = {}

    def of(self, saved: Box, held: TensorSpec) -> _Overlap | None:
        key = saved, held
        if key not in self._known:
            self._known[key] = _overlap(saved, shared_box(held.offsets, held.sizes))
        return self._known[key]


def _overlap(saved: Box, held: Box) -> _Overlap | None:
    common = saved.intersect(held)
    if common is None:
        return None
    return _Overlap(common.within(saved), common.within(held).offsets, common.sizes == held.sizes)
