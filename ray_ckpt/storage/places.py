"""Where everything lies in the files of a checkpoint, and how reading it is cut into pieces of work.

Places(manifest) ── pieces ──> Piece: consecutive bytes of a file      all of them, a few words each
                 ── stretch(piece) ──> Stretch: with all that is known of the bytes, to be read and let go
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from ray_ckpt.errors import FormatError
from ray_ckpt.format import ranges
from ray_ckpt.format.block_sums import BlockSums
from ray_ckpt.format.manifest import Chunk, Manifest, itemsize
from ray_ckpt.format.tensor_table import TensorTable
from ray_ckpt.format.torch_container import container, parse_dtype
from ray_ckpt.report import Damage
from ray_ckpt.storage.nonfinite import may_be_odd
from ray_ckpt.storage.placed import STRETCH_BYTES, Elements, Placed, Span, Stretch, sums_of

__all__ = ["OVERLAP", "Counting", "Piece", "Places"]

OVERLAP = "lies over what is before it in the file"
"""What is wrong with an entry whose bytes are another's too."""


class Counting:
    """Whose NaN and Inf are counted."""

    def __init__(self, *, is_asked: bool) -> None:
        self._is_asked = is_asked

    def of_dtype(self, dtype: str) -> bool:
        """Whether elements of this type are counted: they may be NaN or Inf."""
        return self._is_asked and _may_be_odd(dtype)

    def elements(self, name: str, dtype: str, chunk: Chunk) -> Elements | None:
        """What of a chunk is counted where it lies; None for nothing, or where that is not known."""
        if chunk.data_start is None or not chunk.box.num_elements or not self.of_dtype(dtype) or _is_apart(chunk):
            return None
        return Elements(name, dtype, chunk.data_start, chunk.data_start + chunk.box.num_elements * itemsize(dtype))

    def apart(self, manifest: Manifest) -> Iterator[tuple[str, Chunk]]:
        """Chunks to be read apart, as their bytes are encoded or hold other elements in between."""
        if not self._is_asked or isinstance(manifest.tensors, TensorTable):  # ours are never so
            return
        for name, tensor in manifest.tensors.items():
            if self.of_dtype(tensor.dtype):
                yield from ((name, chunk) for chunk in tensor.chunks if _is_apart(chunk))


def _is_apart(chunk: Chunk) -> bool:
    strides = chunk.strides
    is_dense = strides is None or ranges.span(chunk.box.sizes, strides) == chunk.box.num_elements
    return bool(chunk.transforms) or not is_dense


_may_be_odd = lru_cache(maxsize=256)(may_be_odd)


class Piece(NamedTuple):
    """Consecutive bytes of a file, whose ends lie between spans."""

    file: str
    first: int
    """Number of the first entry of the file of which some bytes lie here."""
    last: int
    """Number of the entry behind the last."""
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


class _Found(NamedTuple):
    """An entry of a file that is not yet looked at."""

    start: int
    end: int
    chunk: int | Chunk | None
    """The chunk, or its number in the table; None for objects."""
    names: tuple[str, ...]
    dtype: str
    sums: BlockSums | None


class Places:
    """What lies in the files of a checkpoint.

    Args:
        sizes: bytes of the files that are there.
    """

    def __init__(self, manifest: Manifest, sizes: Mapping[str, int], counting: Counting) -> None:
        self._manifest, self._sizes, self._counting = manifest, sizes, counting
        self._is_ours = bool(manifest.attempt)
        self._table = manifest.tensors if isinstance(manifest.tensors, TensorTable) else None
        self._found: dict[str, list[_Found]] = {file: [] for file in sorted(manifest.files)}
        self._last: tuple[str, list[_Found], list[_Found]] = "", [], []
        for name, tensor in manifest.tensors.items() if self._table is None else ():
            for chunk in tensor.chunks:
                place = _Found(chunk.start, chunk.start + chunk.length, chunk, (name,), tensor.dtype, None)
                self._found[chunk.file].append(place)
        shared: dict[tuple[str, int, int, int | None], list[str]] = {}
        for name, entry in manifest.objects.items():
            shared.setdefault((entry.file, entry.start, entry.length, entry.checksum), []).append(name)
        for (file, start, length, checksum), names in shared.items():
            sums = None if checksum is None else BlockSums(max(1, length), checksum.to_bytes(8, "little"))
            self._found[file].append(_Found(start, start + length, None, tuple(names), "", sums))

    def pieces(self, file: str) -> Iterator[Piece]:
        """All bytes of a file as it is, as far as the manifest knows of them."""
        entries, _ = self._entries(file)
        length, begin, first, last, behind = min(self._manifest.files[file], self._sizes.get(file, 0)), 0, 0, 0, 0
        for number, entry in enumerate(entries):
            for end in self._ends(entry):
                if end > length:
                    break
                if end - begin > STRETCH_BYTES and last > begin:
                    yield Piece(file, first, behind, begin, last)
                    begin, first = last, number
                last, behind = max(last, end), number + 1
        end = last if entries and entries[-1].end > length else length
        if end > begin:
            yield Piece(file, first, behind, begin, end)

    def stretch(self, piece: Piece) -> Stretch:
        """All that is known of a piece."""
        entries = tuple([self._placed(found) for found in self._entries(piece.file)[0][piece.first : piece.last]])
        size = self._sizes.get(piece.file, 0)
        return Stretch(piece.file, piece.start, piece.end, entries, size, self._is_ours)

    def spans(self, file: str) -> Iterator[Span]:
        """Everything that a file has had, by position."""
        for of_all in self._entries(file):
            for found in of_all:
                yield from self._placed(found).spans

    def overlaps(self, file: str) -> Iterator[Damage]:
        """What lies over something else, of which no save is guilty."""
        for found in self._entries(file)[1]:
            for name in found.names or ("",):
                yield Damage(file, found.start, found.end, name, OVERLAP)

    def unchecked(self) -> set[str]:
        """Names of what has no checksum that could be compared. In a table everything has."""
        found = (found for of_file in self._found.values() for found in of_file)
        return {name for place in found if not _has_sums(place) for name in place.names}

    def _ends(self, entry: _Found) -> Iterator[int]:
        """Where a stretch may end."""
        if entry.end - entry.start <= STRETCH_BYTES:
            yield entry.end
        else:
            yield from (span.end for span in self._placed(entry).spans)

    def _entries(self, file: str) -> tuple[list[_Found], list[_Found]]:
        """The entries of a file by position, and apart from them those that lie over one before them."""
        last = self._last
        if last[0] != file:
            last = self._last = file, *_without_overlaps(sorted(self._all(file), key=lambda found: found[:2]))
        return last[1:]

    def _all(self, file: str) -> Iterator[_Found]:
        yield from self._found[file]
        for start, end, number in self._table.places(file) if self._table is not None else ():
            yield _Found(start, end, number, (), "", None)

    def _placed(self, found: _Found) -> Placed:
        start, end, chunk, names, dtype, sums = found
        if isinstance(chunk, int):
            assert self._table is not None, "else there are no numbers"
            name, dtype, chunk = self._table.chunk(chunk)
            names = (name,)
        if chunk is None:
            return Placed(start, end, names, start, end, sums)
        elements, sums = self._counting.elements(names[0], dtype, chunk), chunk.checksums
        if sums is None or chunk.data_start is None:
            return Placed(start, end, names, start, end, None, None, None, elements)
        data_start, data_end = chunk.data_start, chunk.data_start + chunk.box.num_elements * itemsize(dtype)
        head, tail = _framing(dtype, chunk.box.sizes, data_start - start, chunk.length)
        return Placed(start, end, names, data_start, data_end, sums, head, tail, elements)


def _has_sums(found: _Found) -> bool:
    chunk = found.chunk
    if not isinstance(chunk, Chunk):
        return found.sums is not None
    return chunk.checksums is not None and chunk.data_start is not None


def _without_overlaps(entries: list[_Found]) -> tuple[list[_Found], list[_Found]]:
    kept: list[_Found] = []
    over: list[_Found] = []
    at = 0
    for entry in entries:
        if entry.start < min(at, entry.end):
            over.append(entry)
        else:
            kept.append(entry)
            at = max(at, entry.end)
    return kept, over


@lru_cache(maxsize=4096)
def _framing(
    dtype: str, sizes: tuple[int, ...], head_bytes: int, num_bytes: int
) -> tuple[BlockSums | None, BlockSums | None]:
    """What stands before and after the elements, which follows from dtype and shape alone."""
    try:
        wrapping = container(parse_dtype(dtype), sizes)
    except FormatError:  # a dtype of a later torch
        return None, None
    if (len(wrapping.head), wrapping.length) != (head_bytes, num_bytes):
        return None, None
    return sums_of(wrapping.head), sums_of(wrapping.tail)
