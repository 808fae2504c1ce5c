"""inspect(target): what one checkpoint holds, in the order in which a person asks.

    sections           the first part of each name: model, optim, ...; counts and bytes
    modules            a tree of the model's names, numbered siblings of one shape folded into one line (modules.py)
    hyper-parameters   by group: parameters whose values are all equal
    values             schedulers, counters and all other plain values
    files              who wrote what

From the record alone: no data file is read, and one of our checkpoints needs no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray_ckpt.errors import UsageError
from ray_ckpt.format.manifest import Manifest, TensorEntry, itemsize
from ray_ckpt.format.tensor_table import outlines
from ray_ckpt.inspection.opening import opened_at
from ray_ckpt.storage.resolve import Target

__all__ = [
    "CheckpointContents",
    "FileContents",
    "ParameterGroup",
    "Section",
    "TensorContents",
    "inspect",
    "rank_of_file",
    "tensor_of",
]

_HYPERPARAMETER = re.compile(r"(?P<group>.*?\bparam_groups\.(?P<parameter>.+))\.(?P<key>[^.]+)")
_RANK = re.compile(r"(?:.*/)?__(\d+)_\d+(?:-[0-9a-f]+)?\.distcp")


@dataclass(frozen=True)
class TensorContents:
    """One tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...], str], ...]
    """Offsets, sizes and file of every chunk."""


@dataclass(frozen=True)
class Section:
    """Everything whose name begins with one word, such as `model` or `optim`."""

    name: str
    num_tensors: int
    num_elements: int
    num_bytes: int
    num_values: int
    """Values that are not tensors."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with the same hyper-parameters."""

    values: Mapping[str, Any]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class FileContents:
    """A data file."""

    name: str
    num_bytes: int
    rank: int | None
    """The rank that wrote it; None when its name does not say."""
    num_tensors: int
    """Tensors of which it holds a part."""
    num_values: int


@dataclass(frozen=True)
class CheckpointContents:
    """What one checkpoint holds.

    Example:
        >>> import torch
        >>> from ray_ckpt import inspect, save
        >>> report = save({"model": {"weight": torch.ones(2, 3)}, "step": 7}, "run/step-7")
        >>> contents = inspect("run/step-7")
        >>> contents.manifest.total_bytes == report.total_bytes, contents.values()
        (True, {'step': 7})
    """

    uri: str
    """The checkpoint, without credentials and options."""
    step: int | None
    """Its step in the store; None where the target is no store."""
    kind: str
    """`ray_ckpt`, or what program wrote it."""
    notes: tuple[str, ...]
    """What of it cannot be read, and why."""
    manifest: Manifest

    def sections(self) -> tuple[Section, ...]:
        """Counts and bytes by section, the largest first."""
        sums: dict[str, list[int]] = {}
        for name, dtype, shape, _ in outlines(self.manifest.tensors):
            row, num_elements = sums.setdefault(_section(name), [0, 0, 0, 0]), math.prod(shape)
            row[0] += 1
            row[1] += num_elements
            row[2] += num_elements * itemsize(dtype)
        for name in self.manifest.objects:
            sums.setdefault(_section(name), [0, 0, 0, 0])[3] += 1
        return tuple(sorted((Section(name, *row) for name, row in sums.items()), key=lambda s: (-s.num_bytes, s.name)))

    def groups(self) -> tuple[ParameterGroup, ...]:
        """Hyper-parameters by group: parameters whose values are all equal are one."""
        by_parameter: dict[str, dict[str, Any]] = {}
        for name, value in self.manifest.values().items():
            if match := _HYPERPARAMETER.fullmatch(name):
                by_parameter.setdefault(match["parameter"], {})[match["key"]] = value
        grouped: dict[str, tuple[dict[str, Any], list[str]]] = {}
        for parameter, values in by_parameter.items():
            key = json.dumps(values, sort_keys=True, default=repr)
            grouped.setdefault(key, (values, []))[1].append(parameter)
        return tuple(ParameterGroup(values, tuple(names)) for values, names in grouped.values())

    def values(self) -> dict[str, Any]:
        """Plain values that are no hyper-parameters: schedulers, counters, the step."""
        return {name: value for name, value in self.manifest.values().items() if not _HYPERPARAMETER.fullmatch(name)}

    def files(self) -> tuple[FileContents, ...]:
        """Who wrote what, by file name."""
        tensors: dict[str, set[str]] = {file: set() for file in self.manifest.files}
        values = dict.fromkeys(self.manifest.files, 0)
        for name, entry in self.manifest.tensors.items():
            for chunk in entry.chunks:
                tensors[chunk.file].add(name)
        for entry_of_value in self.manifest.objects.values():
            values[entry_of_value.file] += 1
        return tuple(
            FileContents(file, size, rank_of_file(file), len(tensors[file]), values[file])
            for file, size in sorted(self.manifest.files.items())
        )

    def tensors(self) -> Iterator[TensorContents]:
        """Every tensor, in the order of the record."""
        return (_tensor(name, entry) for name, entry in self.manifest.tensors.items())

    def tensor(self, name: str) -> TensorContents:
        """One tensor.

        Raises:
            UsageError: there is none of that name; names similar ones.
        """
        return _tensor(name, tensor_of(self.manifest, name, self.uri))


def inspect(target: Target, step: int | None = None, *, trusted: bool = False) -> CheckpointContents:
    """What a checkpoint holds, by its record alone.

    Example:
        >>> import torch
        >>> from ray_ckpt import inspect, save
        >>> report = save({"model": {"weight": torch.ones(2, 3)}}, "run", step=1)
        >>> inspect("run").tensor("model.weight").shape
        (2, 3)

    Args:
        target: a checkpoint, whoever wrote it, or a store.
        step: number of the step in the store; by default the highest committed one.
        trusted: as for `verify`.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointError, StorageError: its record is damaged, or the storage does not answer.
    """
    with opened_at(target, step, trusted=trusted) as (opened, number):
        return CheckpointContents(opened.address, number, opened.kind, opened.notes, opened.manifest)


def tensor_of(manifest: Manifest, name: str, where: str) -> TensorEntry:
    """The entry of a tensor.

    Raises:
        UsageError: there is none of that name; names similar ones.
    """
    if name in manifest.tensors:
        return manifest.tensors[name]
    import difflib

    ends = [known for known in manifest.tensors if known.endswith(f".{name}")][:3]
    close = ends or difflib.get_close_matches(name, list(manifest.tensors)[:20_000], n=3)
    advice = f"did you mean {', '.join(close)}?" if close else "`ray-ckpt inspect --tree` shows the names"
    raise UsageError(f"{where} has no tensor {name!r}: {advice}")


def _tensor(name: str, entry: TensorEntry) -> TensorContents:
    chunks = tuple((chunk.box.offsets, chunk.box.sizes, chunk.file) for chunk in entry.chunks)
    return TensorContents(name, entry.dtype, entry.shape, entry.num_bytes, chunks)


def _section(name: str) -> str:
    return name.partition(".")[0]


def rank_of_file(file: str) -> int | None:
    """The rank that wrote a data file; None when its name does not say."""
    match = _RANK.fullmatch(file)
    return int(match[1]) if match else None
