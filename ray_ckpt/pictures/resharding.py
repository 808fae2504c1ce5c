"""Which rank wrote and which rank reads which bytes of which tensor, from the record and a layout alone.

written    the record: every chunk is in a file, and the file's name says which rank wrote it
read       parts_of_tensors(manifest, layout), as far as that can be told without the model
flows      bytes of all tensors by (writer, reader), or what ranks of a real load have counted
pieces     parts of the largest tensors
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ray_ckpt.format.boxes import Box
from ray_ckpt.format.manifest import Manifest, TensorEntry, itemsize
from ray_ckpt.inspection.contents import rank_of_file
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.parallel.partition import parts_of_tensors, replicas
from ray_ckpt.pictures.contents import Flow, Piece, Reshard, Writer
from ray_ckpt.report import LoadReport
from ray_ckpt.rounding import ceil_div
from ray_ckpt.text import listed
from ray_ckpt.text_units import count

__all__ = ["reshard_of", "writers_of"]

MAX_NAMES = 64
"""Writers, and readers, that are told apart; with more, neighbors are put together."""

MAX_TENSORS = 24
"""Tensors whose pieces are shown."""

MAX_PIECES = 600
"""Pieces that are shown, of all these tensors together."""

_PLANNED = (
    "from the record and the layout alone: stages of about equal bytes, rows sharded evenly, dims of tensor "
    "parallelism as the checkpoint's chunks show them; a model's own cut may differ"
)


def writers_of(manifest: Manifest) -> tuple[Writer, ...]:
    """Who wrote what, in the order of ranks."""
    names = _Names.of_writers(manifest)
    files: dict[str, list[int]] = {}
    for file in sorted(manifest.files, key=_by_rank):
        files.setdefault(names.of[file], []).append(manifest.files[file])
    return tuple(Writer(name, len(sizes), sum(sizes)) for name, sizes in files.items())


def reshard_of(manifest: Manifest, layout: Layout | None, loads: Sequence[LoadReport] = ()) -> Reshard:
    """The picture.

    Args:
        layout: who reads; None shows only who wrote.
        loads: what the ranks of a load into this layout have read, by rank. Where that was this checkpoint, the flows
            are theirs.
    """
    readers = _Readers.of(manifest, layout)
    writers = _Names.of_writers(manifest)
    measured = [report.bytes_by_file for report in loads if report.bytes_by_file.keys() <= manifest.files.keys()]
    num_readers = len(loads) if layout is None else layout.world_size
    is_measured = any(measured) and len(measured) == len(loads) == num_readers
    if is_measured:
        names = _Names.of_ranks(range(len(measured)))
        flows = _measured(measured, writers, names)
        note = "as the ranks of the load have counted them"
    else:
        names = readers.names
        flows = _planned(manifest, writers, readers)
        note = _PLANNED if layout is not None else ""
    pieces, num_left = _pieces(manifest, writers, readers)
    aggregated = [names.aggregated, writers.aggregated]
    if num_left:
        aggregated.append(f"parts are shown of the largest tensors, and not, or not all, of {count(num_left)} others")
    return Reshard(
        target="" if layout is None else str(layout),
        basis="measured" if is_measured else "planned" if layout is not None else "",
        note=note,
        flows=flows,
        pieces=pieces,
        aggregated="; ".join(dict.fromkeys(filter(None, aggregated))),
    )


class _Names(NamedTuple):
    """What ranks or files are called, of which there may be too many to tell apart."""

    of: Mapping[str, str]
    aggregated: str

    @classmethod
    def of_ranks(cls, ranks: Sequence[int]) -> _Names:
        size = ceil_div(len(ranks), MAX_NAMES)
        groups = [ranks[start : start + size] for start in range(0, len(ranks), max(1, size))]
        of = {str(rank): _of_group(group) for group in groups for rank in group}
        return cls(of, f"{len(ranks)} ranks are put together, {size} in one" if size > 1 else "")

    @classmethod
    def of_writers(cls, manifest: Manifest) -> _Names:
        """By file: the rank that wrote it, else the file's own name."""
        files = sorted(manifest.files, key=_by_rank)
        ranks = sorted({rank for file in files if (rank := rank_of_file(file)) is not None})
        by_rank = cls.of_ranks(ranks)
        others = [file for file in files if rank_of_file(file) is None]
        shown = set(others[:MAX_NAMES])
        rest = f"{len(others) - MAX_NAMES} other files"
        of = {
            file: (file if file in shown else rest) if rank is None else by_rank.of[str(rank)]
            for file in files
            for rank in [rank_of_file(file)]
        }
        return cls(of, by_rank.aggregated or (f"{rest} are put together" if len(others) > MAX_NAMES else ""))


def _of_group(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def _by_rank(file: str) -> tuple[bool, int, str]:
    rank = rank_of_file(file)
    return rank is None, rank or 0, file


class _Readers(NamedTuple):
    """Who reads what."""

    parts: Mapping[str, tuple[tuple[int, Box], ...]]
    """Tensor -> ranks, and their parts. Tensors that are cut alike have the same tuple."""
    replicas: Mapping[int, tuple[int, ...]]
    """Rank -> the ranks that read the same."""
    names: _Names

    @classmethod
    def of(cls, manifest: Manifest, layout: Layout | None) -> _Readers:
        if layout is None:
            return cls({}, {}, _Names({}, ""))
        parts = parts_of_tensors(manifest, layout)
        return cls(parts, replicas(layout), _Names.of_ranks(range(layout.world_size)))


class _Overlap(NamedTuple):
    """Elements that one file holds of a tensor and that one rank and its replicas read."""

    box: Box
    chunk: int
    """Number of the chunk."""
    reader: int | None


class _Overlaps:
    """Overlaps of tensors, each found once for all that are cut alike: a model has many tensors and few shapes."""

    def __init__(self, readers: _Readers) -> None:
        self._readers = readers
        self._known: dict[object, list[_Overlap]] = {}

    def of(self, name: str, entry: TensorEntry) -> list[_Overlap]:
        parts = self._readers.parts.get(name)
        boxes = tuple(chunk.box for chunk in entry.chunks)
        if parts is None:
            return [_Overlap(box, number, None) for number, box in enumerate(boxes)]
        key = boxes, id(parts)
        if key not in self._known:
            self._known[key] = list(_find_overlaps(boxes, parts))
        return self._known[key]


def _find_overlaps(boxes: Sequence[Box], parts: Sequence[tuple[int, Box]]) -> Iterator[_Overlap]:
    for number, box in enumerate(boxes):
        for rank, wanted in parts:
            if common := box.intersect(wanted):
                yield _Overlap(common, number, rank)


def _planned(manifest: Manifest, writers: _Names, readers: _Readers) -> tuple[Flow, ...]:
    sums: dict[tuple[str, str], int] = defaultdict(int)
    overlaps = _Overlaps(readers)
    for name, entry in manifest.tensors.items() if readers.parts else ():
        size = itemsize(entry.dtype)
        for box, chunk, reader in overlaps.of(name, entry):
            writer = writers.of[entry.chunks[chunk].file]
            for rank in readers.replicas[reader] if reader is not None else ():
                sums[writer, readers.names.of[str(rank)]] += box.num_elements * size
    return _in_order(sums, writers, readers.names)


def _measured(by_rank: Sequence[Mapping[str, int]], writers: _Names, names: _Names) -> tuple[Flow, ...]:
    sums: dict[tuple[str, str], int] = defaultdict(int)
    for rank, by_file in enumerate(by_rank):
        for file, num_bytes in by_file.items():
            sums[writers.of[file], names.of[str(rank)]] += num_bytes
    return _in_order(sums, writers, names)


def _in_order(sums: Mapping[tuple[str, str], int], writers: _Names, readers: _Names) -> tuple[Flow, ...]:
    order = {name: number for number, name in enumerate(dict.fromkeys([*writers.of.values(), *readers.of.values()]))}
    keys = sorted(sums, key=lambda key: (order.get(key[0], len(order)), order.get(key[1], len(order))))
    return tuple(Flow(*key, sums[key]) for key in keys)


def _pieces(manifest: Manifest, writers: _Names, readers: _Readers) -> tuple[tuple[Piece, ...], int]:
    """Parts of the largest tensors, and of how many tensors not all are shown."""
    largest = sorted(manifest.tensors, key=lambda name: -manifest.tensors[name].num_bytes)[:MAX_TENSORS]
    pieces: list[Piece] = []
    found = _Overlaps(readers)
    shown = 0
    for number, name in enumerate(largest):
        entry = manifest.tensors[name]
        overlaps = found.of(name, entry)
        if pieces and len(pieces) + len(overlaps) > MAX_PIECES:
            break
        shown += len(overlaps) <= MAX_PIECES
        pieces += [_piece(number, name, entry, overlap, writers, readers) for overlap in overlaps[:MAX_PIECES]]
    return tuple(pieces), len(manifest.tensors) - shown


def _piece(number: int, name: str, entry: TensorEntry, overlap: _Overlap, writers: _Names, readers: _Readers) -> Piece:
    file = entry.chunks[overlap.chunk].file
    ranks = readers.replicas[overlap.reader] if overlap.reader is not None else ()
    return Piece(
        number=number,
        tensor=name,
        dtype=entry.dtype,
        shape=entry.shape,
        offsets=overlap.box.offsets,
        sizes=overlap.box.sizes,
        num_bytes=overlap.box.num_elements * itemsize(entry.dtype),
        written_by=writers.of[file],
        file=file,
        read_by=listed(list(dict.fromkeys(readers.names.of[str(rank)] for rank in ranks)), at_most=8),
    )
