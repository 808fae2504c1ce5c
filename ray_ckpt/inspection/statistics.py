"""Numbers about the elements of tensors, read piece by piece: some MiB at a time, whatever a tensor's size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ray_ckpt.format.boxes import Box
from ray_ckpt.format.manifest import Manifest
from ray_ckpt.inspection.contents import tensor_of
from ray_ckpt.inspection.opening import opened_at
from ray_ckpt.progress import Meter, Progress
from ray_ckpt.report import NonFinite
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.nonfinite import may_be_odd
from ray_ckpt.storage.resolve import Target
from ray_ckpt.storage.rewrite import TensorPieces, WantedTensor

__all__ = ["TensorStatistics", "elements_of", "scan_nonfinite", "tensor_statistics"]

_NUM_BINS = 16


@dataclass(frozen=True)
class TensorStatistics:
    """One tensor in numbers. Those of real numbers are of its finite elements, in double precision.

    Example:
        >>> import torch
        >>> from ray_ckpt import save, tensor_statistics
        >>> report = save({"weight": torch.tensor([1.0, 3.0, float("nan")])}, "run/step-1")
        >>> found = tensor_statistics("run/step-1", "weight")
        >>> found.minimum, found.maximum, found.mean, found.std, found.num_nan
        (1.0, 3.0, 2.0, 1.0, 1)
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...], str], ...]
    """Offsets, sizes and file of every chunk."""
    minimum: float | None
    """None when no element is finite; so are the next three."""
    maximum: float | None
    mean: float | None
    std: float | None
    """Square root of the mean squared distance to the mean: of all elements, not an estimate from a sample."""
    num_nan: int
    num_inf: int
    histogram: tuple[tuple[float, float, int], ...]
    """Start, end and number of elements of equal bins from the minimum to the maximum, which is in the last."""


def tensor_statistics(target: Target, name: str, step: int | None = None, *, trusted: bool = False) -> TensorStatistics:
    """Read one tensor of a checkpoint, twice and in a few MiB of memory, and count.

    Example:
        >>> import torch
        >>> from ray_ckpt import save, tensor_statistics
        >>> report = save({"weight": torch.arange(8.0)}, "run/step-1")
        >>> tensor_statistics("run/step-1", "weight").mean
        3.5

    Args:
        target: a checkpoint, whoever wrote it, or a store.
        step: number of the step in the store; by default the highest committed one.
        trusted: as for `verify`.

    Raises:
        UsageError: there is no such tensor.
        IntegrityError: what was read differs from its checksum.
        CheckpointError, StorageError: the checkpoint cannot be read.
    """
    with opened_at(target, step, trusted=trusted) as (opened, _):
        entry = tensor_of(opened.manifest, name, opened.address)

        def pieces() -> Iterator[torch.Tensor]:
            return (_as_real(piece) for _, piece in elements_of(opened.files, opened.manifest, [name]))

        count, total, low, high, num_nan, num_inf = 0, 0.0, math.inf, -math.inf, 0, 0
        for piece in pieces():
            finite, odd = _finite(piece)
            num_nan, num_inf = num_nan + odd.num_nan, num_inf + odd.num_inf
            if finite.numel():
                count, total = count + finite.numel(), total + float(finite.sum())
                low, high = min(low, float(finite.min())), max(high, float(finite.max()))
        mean = total / count if count else None
        squares, bins = 0.0, torch.zeros(_NUM_BINS, dtype=torch.int64)
        if mean is not None:
            for piece in pieces():
                finite, _ = _finite(piece)
                squares += float((finite - mean).square_().sum())
                bins += _binned(finite, low, high)
        chunks = tuple((chunk.box.offsets, chunk.box.sizes, chunk.file) for chunk in entry.chunks)
        return TensorStatistics(
            name=name,
            dtype=entry.dtype,
            shape=entry.shape,
            num_bytes=entry.num_bytes,
            chunks=chunks,
            minimum=low if count else None,
            maximum=high if count else None,
            mean=mean,
            std=math.sqrt(squares / count) if count else None,
            num_nan=num_nan,
            num_inf=num_inf,
            histogram=_histogram(bins.tolist(), low, high) if count else (),
        )


def scan_nonfinite(
    target: Target,
    step: int | None = None,
    *,
    trusted: bool = False,
    progress: Progress | None = None,
) -> Mapping[str, NonFinite]:
    """The tensors of a checkpoint that hold NaN or Inf, in the order of the record.

    Example:
        >>> import torch
        >>> from ray_ckpt import save, scan_nonfinite
        >>> report = save({"good": torch.ones(2), "bad": torch.tensor([1.0, float("inf")])}, "run/step-1")
        >>> dict(scan_nonfinite("run/step-1"))
        {'bad': NonFinite(num_nan=0, num_inf=1)}

    Args:
        target: a checkpoint, whoever wrote it, or a store.
        step: number of the step in the store; by default the highest committed one.
        trusted: as for `verify`.
        progress: called with the bytes of the tensors that were read, and of all that will be.

    Raises:
        CheckpointError, StorageError: the checkpoint cannot be read.
    """
    with opened_at(target, step, trusted=trusted) as (opened, _):
        tensors = opened.manifest.tensors
        names = [name for name, entry in tensors.items() if may_be_odd(entry.dtype)]
        meter, found = Meter(progress), dict[str, NonFinite]()
        meter.expect(sum(tensors[name].num_bytes for name in names))
        for name, piece in elements_of(opened.files, opened.manifest, names):
            real = _as_real(piece, double=False)
            num_nan, num_inf = int(real.isnan().sum()), int(real.isinf().sum())
            if num_nan or num_inf:
                found[name] = found.get(name, NonFinite(0, 0)) + NonFinite(num_nan, num_inf)
            meter.add(piece.nbytes)
        meter.end()
        return found


def elements_of(files: Storage, manifest: Manifest, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and consecutive elements, row-major, of these tensors one after the other. A piece, of at most
    `rewrite.BATCH_BYTES`, is valid until the next one is asked for."""
    order = list(names)
    wanted = {
        number: WantedTensor(name, entry.dtype, Box.whole(entry.shape), entry.chunks)
        for number, (name, entry) in enumerate((name, manifest.tensors[name]) for name in order)
    }
    for (number, like), data in TensorPieces(files).pieces(wanted):
        if len(data):
            yield order[number], torch.frombuffer(data, dtype=torch.uint8).view(like.dtype)


def _as_real(piece: torch.Tensor, *, double: bool = True) -> torch.Tensor:
    """The elements as real numbers; of complex ones both parts. Those of 8 bits are widened, as torch asks."""
    if piece.is_complex():
        piece = torch.view_as_real(piece).flatten()
    if double:
        return piece.to(torch.float64)
    return piece.to(torch.float32) if piece.dtype.itemsize == 1 else piece


def _finite(piece: torch.Tensor) -> tuple[torch.Tensor, NonFinite]:
    is_finite = piece.isfinite()
    if bool(is_finite.all()):
        return piece, NonFinite(0, 0)
    return piece[is_finite], NonFinite(int(piece.isnan().sum()), int(piece.isinf().sum()))


def _binned(finite: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Elements per bin; all in the first where they are equal."""
    if not high > low:
        return torch.bincount(torch.zeros(finite.numel(), dtype=torch.int64), minlength=_NUM_BINS)
    place = finite.div(2).sub_(low / 2).div_(high / 2 - low / 2)  # halved, as the span may be no finite number
    return torch.bincount(place.mul_(_NUM_BINS).long().clamp_(0, _NUM_BINS - 1), minlength=_NUM_BINS)


def _histogram(bins: list[int], low: float, high: float) -> tuple[tuple[float, float, int], ...]:
    if not high > low:
        return ((low, high, bins[0]),)
    edges = [low * (1 - part / _NUM_BINS) + high * (part / _NUM_BINS) for part in range(_NUM_BINS + 1)]
    return tuple((start, end, number) for start, end, number in zip(edges, edges[1:], bins, strict=False))
