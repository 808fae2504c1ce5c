"""A checkpoint to load from, as RankLoad sees it: what it holds, and the bytes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ray_ckpt.format import translate
from ray_ckpt.format.blob import parse_dtype
from ray_ckpt.format.manifest import Manifest
from ray_ckpt.parallel.claims import KeyMap, Saved, Spec
from ray_ckpt.parallel.state import is_hyperparameter
from ray_ckpt.protocol.filling import fill
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.reader import ArrowStorageReader


class Source:
    """A checkpoint to load from: what it holds, and the bytes of it."""

    def __init__(self, storage: Storage) -> None:
        self._reader = ArrowStorageReader(storage)
        self.manifest = Manifest({}, {}, {})
        self.lost = ""
        """Why the optimizer's hyper-parameters cannot be had from somebody else's checkpoint; empty when they can."""
        self.left_out = ""
        """All that cannot be had from it, and why."""

    @property
    def address(self) -> str:
        return self._reader.checkpoint_id

    def open(self) -> None:
        self.manifest = self._reader.read_manifest()

    @property
    def label(self) -> str:
        """What a message calls it."""
        return f"the checkpoint ({self._reader.kind})" if self._reader.kind else "the checkpoint"

    @property
    def may_be_foreign(self) -> bool:
        """Whether the names in it may need a translation; the same on all ranks."""
        return translate.may_be_foreign(self.manifest)

    def adapt(self, names: translate.Names) -> None:
        """Give everything the name that a training state has for it.

        Raises:
            StateMismatchError: the optimizer's state cannot be told apart by parameter.
        """
        lists: dict[str, Any] = dict.fromkeys(translate.group_lists(self.manifest))
        self.read(lists)
        translation = translate.translate(self.manifest, lists, names)
        self.lost = translation.lost
        self.left_out = "; ".join([*self._reader.notes, *([self.lost] if self.lost else [])])
        self.manifest = translation.manifest

    def drop(self, prefix: str) -> None:
        """Go on as if nothing of that prefix had been saved."""
        tensors = {name: entry for name, entry in self.manifest.tensors.items() if not name.startswith(prefix)}
        objects = {name: entry for name, entry in self.manifest.objects.items() if not name.startswith(prefix)}
        self.manifest = dataclasses.replace(self.manifest, tensors=tensors, objects=objects)

    def saved(
        self,
        needed: Callable[[str], bool],
        only: Sequence[str] | None,
        key_map: KeyMap | None,
        further: Mapping[str, Any] | None = None,
    ) -> Saved:
        """Names, shapes and values.

        Args:
            needed: which of the values are; most stand in the manifest, the others are read here.
            only, key_map: as `Saved` takes them.
            further: values that count as saved.
        """
        manifest = self.manifest
        tensors = {name: Spec(entry.dtype, entry.shape) for name, entry in manifest.tensors.items()}
        values: dict[str, Any] = manifest.values()
        view = Saved(tensors, {}, only=only)
        elsewhere: dict[str, Any] = {
            name: None for name in manifest.objects if name not in values and needed(name) and view.wants(name)
        }
        for name in list(tensors):
            if is_hyperparameter(name) and needed(name):
                spec = tensors.pop(name)
                elsewhere[name] = torch.empty(spec.shape, dtype=parse_dtype(spec.dtype))
        self.read(elsewhere)
        values |= elsewhere | dict(further or {})
        return Saved(tensors, values, layout=manifest.layout, only=only, key_map=key_map)

    def read(self, wanted: dict[str, Any]) -> None:
        """Fill the tensors of these names, and replace what is none by its value."""
        fill(wanted, self._reader, self.manifest)

    def describe(self, name: str) -> str:
        entry = self.manifest.tensors.get(name)
        return "a value" if entry is None else str(Spec(entry.dtype, entry.shape))
