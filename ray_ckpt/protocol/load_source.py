"""A checkpoint to load from, as RankLoad sees it: what it holds, and the bytes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ray_ckpt.errors import StateMismatchError, UsageError
from ray_ckpt.format import translate
from ray_ckpt.format.boxes import Box, shared_box
from ray_ckpt.format.manifest import Manifest, ObjectEntry, TensorEntry
from ray_ckpt.format.memory import fault, overlapping
from ray_ckpt.format.rearrange import rearrange
from ray_ckpt.format.saved import Saved
from ray_ckpt.format.torch_container import parse_dtype
from ray_ckpt.format.torch_internals import narrow, set_element
from ray_ckpt.format.views import Piece, View
from ray_ckpt.format.wanted_names import Names
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.protocol.holdings import hold
from ray_ckpt.protocol.messages import TensorSpec
from ray_ckpt.state.load_plan import KeyMap, SavedState, Spec
from ray_ckpt.state.train_state import is_hyperparameter
from ray_ckpt.storage.checkpoint_reader import CheckpointReader, TensorReads, Wanted
from ray_ckpt.storage.chunk_sources import SavedChunk
from ray_ckpt.storage.files import Storage


class LoadSource:
    """A checkpoint to load from: what it holds, and the bytes of it.

    Args:
        trusted: as `CheckpointReader` takes it.
    """

    def __init__(self, storage: Storage, *, trusted: bool = False) -> None:
        self._reader = CheckpointReader(storage, trusted=trusted)
        self.manifest = Manifest({}, {}, {})
        self._is_adapted = False
        """Whether it is another program's, under our names."""
        self.lost = ""
        """Why another program's checkpoint lacks the optimizer's hyper-parameters; empty when it has them."""
        self._views: Mapping[str, View] = {}
        """What a key map makes of other tensors, by name."""
        self._rests: Mapping[str, str] = {}
        """What a key map leaves of tensors that it uses a part of."""
        self.left_out = ""
        """Everything that cannot be loaded from it, and why."""
        self.bytes_by_file: dict[str, int] = {}
        """Bytes of tensors that were read from each file."""

    @property
    def address(self) -> str:
        return self._reader.address

    def open(self, record: bytes | Manifest | None = None) -> None:
        self.manifest = self._reader.read_manifest(record)

    @property
    def label(self) -> str:
        """What a message calls it."""
        kind = f" ({self._reader.kind})" if self._reader.kind else ""
        return f"the checkpoint at {self.address}{kind}"

    @property
    def may_be_foreign(self) -> bool:
        """Whether the names in it may need a translation; the same on all ranks."""
        return translate.may_be_foreign(self.manifest)

    def adapt(self, names: Names) -> None:
        """Rename everything to what a `TrainState` calls it.

        Raises:
            StateMismatchError: the optimizer's state cannot be told apart by parameter.
        """
        lists: dict[str, Any] = dict.fromkeys(translate.group_lists(self.manifest))
        self.read(lists)
        translation = translate.translate(self.manifest, lists, names)
        self._is_adapted = not self.manifest.has_own_names
        self.lost = translation.lost
        self.left_out = "; ".join([*self._reader.notes, *translation.left_out, *([self.lost] if self.lost else [])])
        self.manifest = translation.manifest

    def rearrange(self, key_map: Mapping[str, Saved], *, with_optimizer: bool) -> None:
        """Join and split tensors, and the optimizer's with them.

        Raises:
            StateMismatchError: shapes do not allow it, or what is joined has different optimizer state.
        """
        rearranged = rearrange(self.manifest, key_map, self.read, with_optimizer=with_optimizer)
        self.manifest, self._views, self._rests = rearranged.manifest, rearranged.views, rearranged.rests

    def drop(self, prefix: str) -> None:
        """Ignore everything in the checkpoint whose name has this prefix."""
        tensors = {name: entry for name, entry in self.manifest.tensors.items() if not name.startswith(prefix)}
        objects = {name: entry for name, entry in self.manifest.objects.items() if not name.startswith(prefix)}
        self.manifest = dataclasses.replace(self.manifest, tensors=tensors, objects=objects)

    def saved(
        self,
        needed: Callable[[str], bool],
        only: Sequence[str] | None,
        key_map: KeyMap | None,
        further: Mapping[str, Any] | None = None,
    ) -> SavedState:
        """Names, shapes and values.

        Args:
            needed: which of the values are; most stand in the manifest, the others are read here.
            only, key_map: as `SavedState` takes them.
            further: values that count as saved.
        """
        manifest = self.manifest
        tensors = {name: Spec(entry.dtype, entry.shape) for name, entry in manifest.tensors.items()}
        values: dict[str, Any] = manifest.values()
        view = SavedState(tensors, {}, only=only)
        elsewhere: dict[str, Any] = {
            name: None for name in manifest.objects if name not in values and needed(name) and view.wants(name)
        }
        for name in list(tensors):
            if is_hyperparameter(name) and needed(name):
                spec = tensors.pop(name)
                elsewhere[name] = torch.empty(spec.shape, dtype=parse_dtype(spec.dtype))
        counted = [name for name, spec in tensors.items() if self._is_counter(name, spec)]
        for name in counted:
            spec = tensors.pop(name)
            elsewhere[name] = torch.empty(spec.shape, dtype=parse_dtype(spec.dtype))
        self.read(elsewhere)
        elsewhere |= {name: elsewhere[name].item() for name in counted}
        values |= elsewhere | dict(further or {})
        paths = {name: entry.path for name, entry in manifest.tensors.items() if entry.path is not None}
        paths |= {name: entry.path for name, entry in manifest.objects.items() if entry.path is not None}
        return SavedState(tensors, values, layout=manifest.layout, paths=paths, only=only, key_map=key_map)

    def _is_counter(self, name: str, spec: Spec) -> bool:
        """Whether a tensor is a counter of another program's, such as torchtitan's: we have them as numbers."""
        return self._is_adapted and name.startswith("counters.") and spec.shape in ((), (1,))

    def read(self, state: dict[str, Any]) -> None:
        """Load this rank's part of a state dict: tensors in place, everything else by replacing it.

        A tensor whose dtype differs from the saved one is cast.

        Args:
            state: name -> tensor (plain, DTensor, ShardedTensor), or something else.

        Raises:
            StateMismatchError: the checkpoint lacks something of that name, or it has another shape.
            UsageError: a tensor has no memory of its own.
            StorageError, FormatError, IntegrityError: as the reader raises them.
        """
        if not state:
            return
        with collector_paused():
            wanted, objects = _want(state, self.manifest, self._views)
        self._count(wanted)
        self._reader.read_tensors(wanted)
        for name, value in self._reader.read_values({name: entry for name, (_, entry) in objects.items()}).items():
            set_element(state, objects[name][0], value)

    def plan(self, targets: dict[str, Any]) -> TensorReads:
        """What has to be read to fill the tensors of these names. It counts as read."""
        with collector_paused():
            wanted, _ = _want(targets, self.manifest, self._views)
        self._count(wanted)
        return self._reader.plan_tensors(wanted)

    def _count(self, wanted: Sequence[Wanted]) -> None:
        for (_, dtype, chunk), box, _ in wanted:
            num_bytes = box.num_elements * dtype.itemsize
            self.bytes_by_file[chunk.file] = self.bytes_by_file.get(chunk.file, 0) + num_bytes

    def describe(self, name: str) -> str:
        entry = self.manifest.tensors.get(name)
        rest = f" (of which the key map uses a part: {self._rests[name]})" if name in self._rests else ""
        return "a value" if entry is None else f"{Spec(entry.dtype, entry.shape)}{rest}"


def _want(
    state: dict[str, Any], manifest: Manifest, views: Mapping[str, View]
) -> tuple[list[Wanted], dict[str, tuple[tuple[str | int, ...], ObjectEntry]]]:
    holdings = hold(state)
    overlaps = _Overlaps()
    wanted: list[Wanted] = []
    objects = {}
    for (name, path, spec), value in zip(holdings.items, holdings.values, strict=True):
        if spec is not None:
            entry = _tensor_entry(manifest, name, spec)
            if name in views:
                wanted += _want_view(name, views[name], spec, value, overlaps)
            else:
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
    if wrong := fault(target) or overlapping(target):
        raise UsageError(f"{name!r} {wrong}")
    dtype = parse_dtype(entry.dtype)
    for chunk in entry.chunks:
        overlap = overlaps.of(chunk.box, spec)
        if overlap is None:
            continue
        part = target.detach() if target.requires_grad else target
        if not overlap.is_all_of_target:
            part = narrow(part, overlap.target_offsets, overlap.box.sizes)
        yield Wanted(SavedChunk(name, dtype, chunk), overlap.box, part)


def _want_view(name: str, view: View, spec: TensorSpec, target: torch.Tensor, overlaps: _Overlaps) -> Iterator[Wanted]:
    dtype = parse_dtype(view.dtype)
    for piece in view.pieces:
        overlap = overlaps.of(piece.box, spec)
        if overlap is not None:
            part = narrow(target.detach(), overlap.target_offsets, overlap.box.sizes)
            yield Wanted(SavedChunk(name, dtype, piece.chunk), piece.in_chunk(overlap.box), _in_chunk(part, piece))


def _in_chunk(part: torch.Tensor, piece: Piece) -> torch.Tensor:
    """A part of the target with the dims of the chunk that it is read from."""
    dims = [dim for dim in piece.dims if dim is not None]
    made = [dim for dim in range(part.dim()) if dim not in dims]
    part = part.permute([*dims, *made])
    for _ in made:
        part = part.select(-1, 0)
    for dim, of in enumerate(piece.dims):
        if of is None:
            part = part.unsqueeze(dim)
    return part


class _Overlap(NamedTuple):
    """The elements that a saved chunk and a rank's part of the tensor have in common."""

    box: Box
    """The elements in the chunk's coordinates."""
    target_offsets: tuple[int, ...]
    """Where the same elements begin in the rank's part."""
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
