"""The tensors of a large record of ours, in columns: an entry is made when it is asked for, and not kept.

    read(record, begin, end) ──> TensorTable       names, and a column per fact of a chunk
    table[name]              ──> TensorEntry
    table.unproven(files)    ──> the tensors that a look at the columns does not show to hold together

A million chunks as entries take a gigabyte and the time to make them; as columns a tenth of both. Nothing is read here
that JSON would not give: every text matches printable ASCII without backslash and quotation mark, so that each
quotation mark begins or ends one; every number is one of JSON's; and what repeats goes through `record.py`.
"""

from __future__ import annotations

import re
from binascii import a2b_base64
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

from ray_ckpt.errors import FormatError
from ray_ckpt.format import record
from ray_ckpt.format.block_sums import BlockSums
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.entries import Chunk, Path, TensorEntry, itemsize
from ray_ckpt.format.limits import check_shape

if TYPE_CHECKING:
    import numpy as np

    Column = np.ndarray[Any, np.dtype[np.int64]]

__all__ = ["TensorTable", "outlines", "read"]

_TEXT = r"[ !#-\[\]-~]*"
_NUMBER = "(?:0|[1-9][0-9]{0,17})"
_NUMBERS = "([0-9,]*)"
_NO_NUMBERS = re.compile(rb"(?:\A|,)(?:0[0-9]|,|\Z)|[0-9]{19}")
"""What such a text has where it is no list of numbers of at most 18 digits, as JSON has them."""
_CHUNK = (
    rf'\{{"offsets":\[{_NUMBERS}\],"sizes":\[{_NUMBERS}\],"file":"({_TEXT})","start":({_NUMBER}),'
    rf'"length":({_NUMBER}),"data_start":({_NUMBER}),"block_bytes":([1-9][0-9]{{0,17}}),'
    r'"checksums":"([A-Za-z0-9+/]*={0,2})"\}'
)
_HEAD = (
    rf'"({_TEXT})":\{{("dtype":"{_TEXT}","shape":\[[0-9,]*\])'
    rf'(?:,"path":(null|\[(?:"{_TEXT}"|[0-9,])*\]))?,"chunks":\['
)
_TENSOR_HEAD = re.compile(_HEAD.encode())
_ANY_CHUNK = re.compile(rf"{_CHUNK}(?:,(?=\{{)|(?=\]\}}))".encode())
_USUAL = re.compile(rf'({_HEAD}{_CHUNK}\]\}}(?:,(?=")|\Z))'.encode())
"""A tensor of one chunk, and the comma before the next."""

_HEAD_TEXTS, _CHUNK_TEXTS = _TENSOR_HEAD.groups, _ANY_CHUNK.groups

_WINDOW_BYTES = 1 << 20
"""Size of the text whose tensors are taken apart together."""

_HELD = 1 << 17
"""Texts of chunks that are held before they are put into columns."""


def read(data: bytes, begin: int, end: int) -> TensorTable:
    """The tensors whose entries stand between two bytes of a record: `"name":{"dtype":...},"other":...`.

    Raises:
        FormatError: they do not stand there as they are written.
        record.MISFITS: something is not what belongs there.
    """
    reading, at, tried = _Reading(), begin, begin
    while at < end:
        if at >= tried and _USUAL.match(data, at, end):
            # Where a window has something else in it, it is tried once, and then read tensor by tensor.
            tried = end if end - at <= _WINDOW_BYTES else data.rfind(b'}]},"', at, at + _WINDOW_BYTES) + len(b"}]}")
            if _read_usual(data, at, tried, reading):
                at = tried + (tried < end)
                continue
        at = _read_tensor(data, at, end, reading)
        if len(reading.chunks) >= _HELD:
            reading.flush()
    reading.flush()
    return TensorTable(reading)


def _read_usual(data: bytes, at: int, stop: int, reading: _Reading) -> bool:
    """Read the tensors of a window if all have one chunk; returns whether they have."""
    found = list(chain.from_iterable(_USUAL.findall(data, at, stop)))
    whole, *texts = (found[number :: _USUAL.groups] for number in range(_USUAL.groups))
    if not whole or sum(map(len, whole)) != stop - at:  # else nothing stands between them
        return False
    reading.flush()
    reading.add(texts, [1] * len(whole))
    return True


def _read_tensor(data: bytes, at: int, end: int, reading: _Reading) -> int:
    """Read a tensor of any number of chunks; returns where the next one begins."""
    head = _TENSOR_HEAD.match(data, at, end)
    if head is None:
        raise FormatError("not as it is written")
    at, before = head.end(), len(reading.chunks)
    for chunk in _ANY_CHUNK.finditer(data, at, end):
        if chunk.start() != at:
            break
        reading.chunks += chunk.groups()
        at = chunk.end()
    reading.heads += head.groups()
    reading.held_counts.append((len(reading.chunks) - before) // _CHUNK_TEXTS)
    _expect(reading.held_counts[-1] and data[at : at + 2] == b"]}")
    at += 2
    _expect(at == end or data[at : at + 2] == b',"')
    return at + 1


class _Reading:
    """What was read so far."""

    def __init__(self) -> None:
        import numpy as np  # here, because commands that open small records go without

        self._np = np
        self.heads: list[Any] = []
        """Name, dtype and shape, and path of each tensor that is in no column yet."""
        self.chunks: list[bytes] = []
        """The texts of each chunk that is in no column yet."""
        self.held_counts: list[int] = []
        """Number of chunks of each of these tensors."""
        self.counts: list[int] = []
        """Number of chunks of each tensor."""
        self.index: dict[str, int] = {}
        self.specs: list[tuple[str, tuple[int, ...]]] = []
        """Dtypes and shapes that differ."""
        self.spec_of: list[int] = []
        self.cuts: list[tuple[int, ...]] = []
        self.odd_paths: dict[int, Path | None] = {}
        self.files: list[str] = []
        self.columns: dict[str, list[Column]] = {name: [] for name in _COLUMNS}
        self.sums = bytearray()
        self._spec_ids: dict[bytes, int] = {}
        self._file_ids: dict[bytes, int] = {}
        self._known_cuts: dict[tuple[int, ...], tuple[int, ...]] = {}

    def flush(self) -> None:
        """Put what is held as texts into columns."""
        if self.heads:
            heads = [self.heads[number::_HEAD_TEXTS] for number in range(_HEAD_TEXTS)]
            chunks = [self.chunks[number::_CHUNK_TEXTS] for number in range(_CHUNK_TEXTS)]
            self.add([*heads, *chunks], self.held_counts)
            self.heads.clear()
            self.chunks.clear()
            self.held_counts = []

    def add(self, texts: Sequence[Sequence[Any]], counts: Sequence[int]) -> None:
        """Put texts into columns.

        Args:
            texts: what `_HEAD` finds of each tensor, and what `_CHUNK` finds of each chunk.
            counts: number of chunks of each tensor.
        """
        self._add_tensors(*texts[:_HEAD_TEXTS])
        self._add_chunks(*texts[_HEAD_TEXTS:])
        self.counts += counts

    def _add_tensors(self, names: Sequence[bytes], specs: Sequence[bytes], paths: Sequence[bytes | None]) -> None:
        first, ids = len(self.index), self._spec_ids
        self.index.update(zip(b"\n".join(names).decode().split("\n"), range(first, first + len(names)), strict=True))
        _expect(len(self.index) == first + len(names))
        self.spec_of += [ids[text] if text in ids else self._add_spec(text) for text in specs]
        given, once = [path for path in paths if path], b'","'
        as_paths = b'["%s"]' % b'"]["'.join(names)
        if len(given) == len(names) and b"".join(given).replace(once, b".") == as_paths:
            # Every path is its name, cut at dots; mostly at one.
            self.cuts += [
                self._known_cuts.setdefault((cut := path.index(once) - 2,), (cut,))
                if path.count(once) == 1
                else self._cut(name, path, first)
                for name, path in zip(names, given, strict=True)
            ]
            return
        numbers = range(first, first + len(names))
        self.cuts += [
            self._cut(name, path, number) if path else ()
            for name, path, number in zip(names, paths, numbers, strict=True)
        ]

    def _add_spec(self, text: bytes) -> int:
        entry = record.parse_tensor("", record.parse(b"{" + text + b',"chunks":[]}'), ours=True)
        self._spec_ids[text] = len(self.specs)
        self.specs.append((entry.dtype, entry.shape))
        return len(self.specs) - 1

    def _cut(self, name: bytes, path: bytes, number: int) -> tuple[int, ...]:
        """Where a path cuts the name, at dots; of any other path nothing, as it is kept itself."""
        parts = path[2:-2].split(b'","')
        if b".".join(parts) == name and path[:2] == b'["' and path[-2:] == b'"]':
            cuts = tuple(accumulate(map(len, parts[:-1]), lambda cut, length: cut + 1 + length))
            return self._known_cuts.setdefault(cuts, cuts)
        self.odd_paths[number] = record.parse_path(name.decode(), record.parse(b'{"path":' + path + b"}"))
        return ()

    def _add_chunks(
        self, offsets: Sequence[bytes], sizes: Sequence[bytes], files: Sequence[bytes], *others: Sequence[bytes]
    ) -> None:
        *numbers, sums = others
        num_dims = [text.count(b",") + 1 if text else 0 for text in offsets]
        _expect(num_dims == [text.count(b",") + 1 if text else 0 for text in sizes])
        boxes = b",".join([text for box in zip(offsets, sizes, strict=True) for text in box if text])
        _expect(not boxes or not _NO_NUMBERS.search(boxes))
        decoded, ids = [a2b_base64(text) for text in sums], self._file_ids
        self.sums += b"".join(decoded)
        of_columns = (
            [ids[text] if text in ids else self._add_file(text) for text in files],
            num_dims,
            map(len, decoded),
        )
        for name, values in zip(("file", "num_dims", "num_sums"), of_columns, strict=True):
            self.columns[name].append(self._np.fromiter(values, self._np.int64, len(offsets)))
        for name, texts in zip(_NUMBER_COLUMNS, (*map(b",".join, numbers), boxes), strict=True):
            self.columns[name].append(self._np.fromstring(texts, self._np.int64, sep=","))

    def _add_file(self, text: bytes) -> int:
        self._file_ids[text] = len(self.files)
        self.files.append(text.decode())
        return len(self.files) - 1


_NUMBER_COLUMNS = "start", "length", "data_start", "block_bytes", "boxes"
_COLUMNS = "file", "num_dims", "num_sums", *_NUMBER_COLUMNS


class TensorTable(Mapping[str, TensorEntry]):
    """Name -> entry, in the order of the record."""

    def __init__(self, reading: _Reading) -> None:
        import numpy as np

        self._index, self._names = reading.index, list(reading.index)
        self._specs, self._spec_of = reading.specs, reading.spec_of
        self._cuts, self._odd_paths = reading.cuts, reading.odd_paths
        self._files, self._sums = reading.files, bytes(reading.sums)
        found = {name: np.concatenate(parts or [np.zeros(0, np.int64)]) for name, parts in reading.columns.items()}
        self._file, self._start, self._length = found["file"], found["start"], found["length"]
        self._data_start, self._block_bytes = found["data_start"], found["block_bytes"]
        self._num_dims, self._boxes = found["num_dims"], found["boxes"]
        """The offsets and then the sizes of each chunk."""
        self._first = np.concatenate([[0], np.cumsum(np.array(reading.counts, np.int64))])
        """Number of each tensor's first chunk; those of a tensor follow each other."""
        self._box_at = np.concatenate([[0], np.cumsum(2 * self._num_dims)])
        self._by_file: dict[str, Column] | None = None
        """File -> numbers of its chunks, by position, once somebody has asked."""
        self._sums_at = np.concatenate([[0], np.cumsum(found["num_sums"])])

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __getitem__(self, name: str) -> TensorEntry:
        number = self._index[name]
        dtype, shape = self._specs[self._spec_of[number]]
        chunks = range(self._first.item(number), self._first.item(number + 1))
        return TensorEntry(dtype, shape, tuple([self._chunk(chunk) for chunk in chunks]), self._path(name, number))

    def _path(self, name: str, number: int) -> Path | None:
        if number in self._odd_paths:
            return self._odd_paths[number]
        cuts = self._cuts[number]
        begins, ends = (0, *[cut + 1 for cut in cuts]), (*cuts, len(name))
        return tuple([name[begin:end] for begin, end in zip(begins, ends, strict=True)])

    def _chunk(self, number: int) -> Chunk:
        at, num_dims = self._box_at.item(number), self._num_dims.item(number)
        box = self._boxes[at : at + 2 * num_dims].tolist()
        begin, end = self._sums_at.item(number), self._sums_at.item(number + 1)
        return Chunk(
            Box(tuple(box[:num_dims]), tuple(box[num_dims:])),
            self._files[self._file.item(number)],
            self._start.item(number),
            self._length.item(number),
            self._data_start.item(number),
            BlockSums(self._block_bytes.item(number), self._sums[begin:end]),
        )

    def outlines(self) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
        """Name, dtype, shape and number of chunks of each tensor."""
        import numpy as np

        for name, spec, num_chunks in zip(self._names, self._spec_of, np.diff(self._first).tolist(), strict=True):
            yield (name, *self._specs[spec], num_chunks)

    # ------------------------------------------------------------------------------------------------- by file

    def places(self, file: str) -> Iterator[tuple[int, int, int]]:
        """The first byte, the end and the number of each chunk whose container is in a file, by position."""
        if self._by_file is None:
            import numpy as np

            order = np.lexsort((self._start, self._file))
            ends = np.cumsum(np.bincount(self._file, minlength=len(self._files)))
            self._by_file = dict(zip(self._files, np.split(order, ends[:-1]), strict=True)) if self._files else {}
        chunks = self._by_file.get(file, self._file[:0])
        starts = self._start[chunks]
        return zip(starts.tolist(), (starts + self._length[chunks]).tolist(), chunks.tolist(), strict=True)

    def chunk(self, number: int) -> tuple[str, str, Chunk]:
        """Name and dtype of a chunk's tensor, and the chunk."""
        tensor = self._first.searchsorted(number, "right").item() - 1
        return self._names[tensor], self._specs[self._spec_of[tensor]][0], self._chunk(number)

    # ------------------------------------------------------------------------------------------------- checks

    def unproven(self, files: Mapping[str, int]) -> Iterator[str]:
        """The tensors that have to be looked at one by one: all others lie in these files and are covered exactly once.

        Args:
            files: data file -> its bytes.
        """
        import numpy as np

        spec_of = np.array(self._spec_of, np.int64)
        num_chunks = np.diff(self._first)
        proven = np.array([_is_possible(*spec) for spec in self._specs], bool)[spec_of]
        spec_of_chunk = np.repeat(spec_of, num_chunks)
        for num_dims in {len(shape) for _, shape in self._specs}:
            is_of_dims = np.array([len(shape) == num_dims for _, shape in self._specs], bool)
            tensors = np.flatnonzero(is_of_dims[spec_of] & proven)
            for some in _batches(tensors, num_chunks):
                proven[some] = self._are_proven(some, num_chunks[some], num_dims, spec_of_chunk, files)
        fine = proven.tolist()
        return (name for name, number in self._index.items() if not fine[number])

    def _are_proven(
        self, tensors: Column, num_chunks: Column, num_dims: int, spec_of_chunk: Column, files: Mapping[str, int]
    ) -> Any:
        """Of tensors with so many dims: a truth value of each."""
        import numpy as np

        firsts = np.cumsum(num_chunks) - num_chunks
        chunks = np.repeat(self._first[tensors] - firsts, num_chunks) + np.arange(num_chunks.sum())
        specs = spec_of_chunk[chunks]
        shapes = np.array([shape if len(shape) == num_dims else (0,) * num_dims for _, shape in self._specs], np.int64)
        shapes = shapes.reshape(len(self._specs), num_dims)[specs]
        fits = self._num_dims[chunks] == num_dims
        numbers = np.minimum(self._box_at[chunks, None] + np.arange(2 * num_dims), max(0, len(self._boxes) - 1))
        boxes = self._boxes[numbers] if num_dims else np.zeros((len(chunks), 0), np.int64)
        offsets, sizes = boxes[:, :num_dims], boxes[:, num_dims:]
        fits &= (offsets + sizes <= shapes).all(axis=1)
        widths = np.array([_width(dtype) for dtype, _ in self._specs], np.int64)[specs]
        fits &= self._have_room(chunks, sizes.prod(axis=1), widths, files)
        fits = np.logical_and.reduceat(fits, firsts)
        covered = _follow(offsets, sizes, shapes, firsts, num_chunks)
        for number in np.flatnonzero(fits & ~covered & (num_chunks >= _MANY)).tolist():
            those = slice(firsts[number], firsts[number] + num_chunks[number])
            covered[number] = _are_grid(offsets[those], sizes[those], shapes[firsts[number]])
        return fits & covered

    def _have_room(self, chunks: Column, num_elements: Column, widths: Column, files: Mapping[str, int]) -> Any:
        """Whether chunks lie in their files, and elements in their containers with as many checksums as blocks.

        Numbers in a record have at most 18 digits, so that the sum of two fits a word.
        """
        import numpy as np

        sizes = np.array([files.get(file, -1) for file in self._files], np.int64)[self._file[chunks]]
        ends, data_starts = self._start[chunks] + self._length[chunks], self._data_start[chunks]
        has_room = (ends <= sizes) & (self._start[chunks] <= data_starts) & (data_starts <= ends)
        has_room &= num_elements <= np.maximum(0, ends - data_starts) // widths
        data_bytes = np.where(has_room, num_elements, 0) * widths
        num_sums = self._sums_at[chunks + 1] - self._sums_at[chunks]
        return has_room & (num_sums == 8 * -(-data_bytes // self._block_bytes[chunks]))


def outlines(tensors: Mapping[str, TensorEntry]) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Name, dtype, shape and number of chunks of each tensor. Of a table no entries are made for it."""
    if isinstance(tensors, TensorTable):
        return tensors.outlines()
    return ((name, entry.dtype, entry.shape, len(entry.chunks)) for name, entry in tensors.items())


_MANY = 64
"""Chunks of a tensor, from which on numpy is faster than a look at each."""

_BATCH = 1 << 16
"""Chunks that are checked together, apart from those of one tensor."""


def _batches(tensors: Column, num_chunks: Column) -> Iterator[Column]:
    import numpy as np

    total = np.cumsum(num_chunks[tensors])
    if len(tensors):
        yield from np.split(tensors, np.flatnonzero(np.diff(total // _BATCH)) + 1)


def _follow(offsets: Column, sizes: Column, shapes: Column, firsts: Column, num_chunks: Column) -> Any:
    """Of tensors whose boxes lie within their shapes: whether these cover them, one behind the other in one dim."""
    import numpy as np

    if not offsets.shape[1]:
        return num_chunks == 1
    is_cut = np.logical_or.reduceat(sizes != shapes, firsts)
    dims = np.repeat(is_cut.argmax(axis=1), num_chunks)[:, None]
    begins, lengths = (np.take_along_axis(of_all, dims, 1)[:, 0] for of_all in (offsets, sizes))
    wanted = np.zeros_like(begins)
    wanted[1:] = begins[:-1] + lengths[:-1]
    wanted[firsts] = 0
    lasts = firsts + num_chunks - 1
    reaches_end = begins[lasts] + lengths[lasts] == np.take_along_axis(shapes, dims, 1)[lasts, 0]
    return (is_cut.sum(axis=1) <= 1) & np.logical_and.reduceat(begins == wanted, firsts) & reaches_end


def _are_grid(offsets: Column, sizes: Column, shape: Column) -> bool:
    """Whether boxes are the cells of a grid over a shape, each of them once."""
    import numpy as np

    cells, num_cells = np.zeros(len(offsets), np.int64), 1
    for dim, length in enumerate(shape.tolist()):
        begins, places = np.unique(offsets[:, dim], return_inverse=True)
        num_cells *= len(begins)
        lengths = np.diff([*begins.tolist(), length])
        if begins[0] or num_cells > len(offsets) or (sizes[:, dim] != lengths[places]).any():
            return False
        cells = cells * len(begins) + places
    return num_cells == len(offsets) == len(np.unique(cells))


def _is_possible(dtype: str, shape: Sequence[int]) -> bool:
    try:
        check_shape(shape, "")
    except FormatError:
        return False
    return _width(dtype) > 0


def _width(dtype: str) -> int:
    """Bytes of an element; 0 where the dtype's name does not tell."""
    try:
        return itemsize(dtype)
    except FormatError:
        return 0


def _expect(condition: object) -> None:
    if not condition:
        raise FormatError("not as it is written")
