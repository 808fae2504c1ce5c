"""diff(left, right): what differs between two checkpoints, whatever layouts saved them.

names, shapes, dtypes   by their records
elements                by the fingerprints where both records have them by one formula, else both are read side by
                        side, piece by piece: two buffers of `rewrite.BATCH_BYTES` a side, whatever the sizes
values                  those that are not tensors, as `torch.save` would write them anew
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ray_ckpt.errors import UnsafeCheckpointError
from ray_ckpt.format.fingerprint import formula_of
from ray_ckpt.format.torch_internals import ExtensionRegistry
from ray_ckpt.inspection.opening import Opened, opened_at
from ray_ckpt.inspection.statistics import elements_of
from ray_ckpt.progress import Meter, Progress
from ray_ckpt.storage.objects import Decoder, saved_object
from ray_ckpt.storage.resolve import Target
from ray_ckpt.storage.rewrite import TensorPieces
from ray_ckpt.text import quoted

__all__ = ["DiffReport", "TensorDifference", "diff"]


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that both checkpoints hold, and that differs.

    Example:
        >>> from ray_ckpt import TensorDifference
        >>> TensorDifference("weight", "shape", "[2]", "[3]").what
        'shape'
    """

    name: str
    what: str
    """`shape`, `dtype` or `elements`."""
    left: str = ""
    """Its shape or dtype in the first checkpoint; empty for elements."""
    right: str = ""
    num_different: int | None = None
    """Number of elements whose bits differ; None where only fingerprints were compared."""
    max_absolute: float | None = None
    """Largest distance between two elements; infinite where one is NaN; None unless it was asked for."""
    max_relative: float | None = None
    """Largest distance, as a part of the larger of the two magnitudes."""


@dataclass(frozen=True)
class DiffReport:
    """What differs between two checkpoints.

    Example:
        >>> import torch
        >>> from ray_ckpt import diff, save
        >>> reports = [save({"weight": torch.ones(3), "lr": lr}, f"run/{lr}") for lr in (0.1, 0.2)]
        >>> report = diff("run/0.1", "run/0.2")
        >>> report.equal, report.values
        (False, {'lr': ('0.1', '0.2')})
    """

    left: str
    """The first checkpoint, without credentials and options."""
    right: str
    only_left: tuple[str, ...]
    """Names that only the first one holds, sorted."""
    only_right: tuple[str, ...]
    tensors: tuple[TensorDifference, ...]
    values: Mapping[str, tuple[str, str]]
    """Names of other values that differ, such as hyper-parameters -> both values as text, cut to 80 characters."""
    uncompared: tuple[str, ...]
    """Values that cannot be loaded safely, and whose bytes differ."""
    num_equal: int
    """Tensors that are the same, bit for bit."""
    num_by_fingerprint: int
    """Tensors of which no byte was read, as both records have their fingerprints."""
    bytes_read: int
    """Bytes of tensors that were read, in both together."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.only_left or self.only_right or self.tensors or self.values or self.uncompared)


def diff(
    left: Target,
    right: Target,
    *,
    left_step: int | None = None,
    right_step: int | None = None,
    values: bool = False,
    trusted: bool = False,
    progress: Progress | None = None,
) -> DiffReport:
    """Compare two checkpoints by name, whatever layouts or programs wrote them.

    Example:
        >>> import torch
        >>> from ray_ckpt import diff, save
        >>> reports = [save({"weight": torch.ones(3) * scale}, "run", step=scale) for scale in (1, 2)]
        >>> report = diff("run", "run", left_step=1, right_step=2, values=True)
        >>> [(found.name, found.num_different, found.max_absolute) for found in report.tensors]
        [('weight', 3, 1.0)]

    Args:
        left: a checkpoint, or a store.
        right: another one.
        left_step: number of the step in the store; by default the highest committed one.
        right_step: as `left_step`.
        values: also measure by how much elements differ, which reads every tensor whose fingerprints differ.
        trusted: as for `verify`, of both.
        progress: called with the bytes that were read and all that will be, of one of the two.

    Raises:
        CheckpointNotFoundError: one of them is not there.
        IntegrityError: what was read differs from its checksum.
        CheckpointError, StorageError: one of them cannot be read.
    """
    with (
        opened_at(left, left_step, trusted=trusted) as (one, _),
        opened_at(right, right_step, trusted=trusted) as (other, _),
    ):
        names = _names(one), _names(other)
        differing, alike = _by_records(one, other)
        printed = {
            name: one.manifest.fingerprints[name] == other.manifest.fingerprints[name]
            for name in alike
            if name in one.manifest.fingerprints
            and name in other.manifest.fingerprints
            and formula_of(one.manifest.fingerprints[name]) == formula_of(other.manifest.fingerprints[name])
        }
        to_read = [name for name in alike if name not in printed or (values and not printed[name])]
        elements = _by_elements(one, other, to_read, progress, measure=values)
        for name in alike:
            if name in elements:
                differing.append(elements[name])
            elif not printed.get(name, True) and name not in to_read:
                differing.append(TensorDifference(name, "elements"))
        different_values, uncompared = _by_values(one, other)
        return DiffReport(
            left=one.address,
            right=other.address,
            only_left=tuple(sorted(names[0] - names[1])),
            only_right=tuple(sorted(names[1] - names[0])),
            tensors=tuple(differing),
            values=different_values,
            uncompared=uncompared,
            num_equal=len(one.manifest.tensors.keys() & other.manifest.tensors.keys()) - len(differing),
            num_by_fingerprint=len(alike) - len(to_read),
            bytes_read=2 * sum(one.manifest.tensors[name].num_bytes for name in to_read),
        )


def _names(opened: Opened) -> set[str]:
    return {*opened.manifest.tensors, *opened.manifest.objects}


def _by_records(one: Opened, other: Opened) -> tuple[list[TensorDifference], list[str]]:
    """Tensors whose shapes or dtypes differ, and names of those whose elements are to be compared.

    A name that is a tensor in one and another value in the other counts as a tensor of another dtype.
    """
    differing: list[TensorDifference] = []
    alike: list[str] = []
    for name, entry in one.manifest.tensors.items():
        found = other.manifest.tensors.get(name)
        if found is None:
            if name in other.manifest.objects:
                differing.append(TensorDifference(name, "dtype", entry.dtype, "no tensor"))
        elif entry.shape != found.shape:
            differing.append(TensorDifference(name, "shape", str(list(entry.shape)), str(list(found.shape))))
        elif entry.dtype != found.dtype:
            differing.append(TensorDifference(name, "dtype", entry.dtype, found.dtype))
        else:
            alike.append(name)
    differing += [
        TensorDifference(name, "dtype", "no tensor", entry.dtype)
        for name, entry in other.manifest.tensors.items()
        if name in one.manifest.objects
    ]
    return differing, alike


def _by_elements(
    one: Opened, other: Opened, names: Sequence[str], progress: Progress | None, *, measure: bool
) -> dict[str, TensorDifference]:
    """Both are cut into the same pieces, as shapes and dtypes are equal and the names come in one order."""
    found: dict[str, TensorDifference] = {}
    meter = Meter(progress)
    meter.expect(sum(one.manifest.tensors[name].num_bytes for name in names))
    pieces = elements_of(one.files, one.manifest, names), elements_of(other.files, other.manifest, names)
    for (name, left), (_, right) in zip(*pieces, strict=True):
        if not torch.equal(left.view(torch.uint8), right.view(torch.uint8)):
            found[name] = _joined(found.get(name), _compare(name, left, right, measure=measure))
        meter.add(left.nbytes)
    meter.end()
    return found


def _compare(name: str, left: torch.Tensor, right: torch.Tensor, *, measure: bool) -> TensorDifference:
    width = left.dtype.itemsize
    is_different = (left.view(torch.uint8) != right.view(torch.uint8)).view(-1, width).any(dim=1)
    num_different = int(is_different.sum())
    if not measure:
        return TensorDifference(name, "elements", num_different=num_different)
    wide = torch.complex128 if left.is_complex() else torch.float64
    a, b = left[is_different].to(wide), right[is_different].to(wide)
    is_same = (a == b) | (a.isnan() & b.isnan())  # as 0 and -0, or NaN of other bits
    distance = (a - b).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(is_same, 0.0)
    relative = (distance / torch.maximum(a.abs(), b.abs())).nan_to_num(nan=torch.inf).masked_fill(is_same, 0.0)
    largest = float(distance.max()), float(relative.max())
    return TensorDifference(name, "elements", "", "", num_different, *largest)


def _joined(before: TensorDifference | None, piece: TensorDifference) -> TensorDifference:
    if before is None:
        return piece
    pairs = (before.max_absolute, piece.max_absolute), (before.max_relative, piece.max_relative)
    largest = (None if a is None or b is None else max(a, b) for a, b in pairs)
    return TensorDifference(
        piece.name, piece.what, "", "", (before.num_different or 0) + (piece.num_different or 0), *largest
    )


def _by_values(one: Opened, other: Opened) -> tuple[dict[str, tuple[str, str]], tuple[str, ...]]:
    names = [name for name in one.manifest.objects if name in other.manifest.objects]
    left, right = _comparable(one, names), _comparable(other, names)
    different: dict[str, tuple[str, str]] = {}
    uncompared: list[str] = []
    for name in names:
        if left[name][0] == right[name][0]:
            continue
        texts = left[name][1], right[name][1]
        if "" in texts:
            uncompared.append(name)
        else:
            different[name] = texts
    return different, tuple(uncompared)


def _comparable(opened: Opened, names: Sequence[str]) -> dict[str, tuple[bytes, str]]:
    """Name -> the value as `torch.save` writes it, and as text, which is empty where it cannot be loaded safely."""
    entries = {number: (name, opened.manifest.objects[name]) for number, name in enumerate(names)}
    decoder, found = Decoder(ExtensionRegistry(), trusted=False), dict[str, tuple[bytes, str]]()
    for number, saved in TensorPieces(opened.files).objects(entries):
        name = names[number]
        try:
            value = saved.inline.value if saved.inline is not None else decoder.load(saved.container, name)
        except UnsafeCheckpointError:
            found[name] = saved.container, ""
        else:
            found[name] = saved_object(value).container, quoted(value)
    return found
