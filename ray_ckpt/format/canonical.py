"""A record of ours, read without building its JSON, where it stands exactly as `record.py` writes it.

    read(record)  ->  its members, with entries in place of the JSON of tensors and objects; or None

A record has an entry per tensor and per value, which differ in their names, a few numbers and the checksums: the text
around these is the same in thousands of them. Here each entry is cut at known texts, and what repeats is parsed once,
by `record.py` and as strictly as ever. That takes half of the time and memory that the dicts of JSON do. Where there
are very many chunks, they go into columns (`tensor_table.py`).

None says nothing about the record: it may have been written by another version, have a name that is not plain ASCII,
or be damaged. Whoever gets it reads the record as JSON. Nothing is returned that JSON would not have given: without a
backslash every quotation mark begins or ends a text, and what lies between the known texts is checked to be a plain
name, a number or base64, or goes through `record.py`. No text holds the known ones, as its quotation marks have
backslashes.
"""

from __future__ import annotations

import json
import re
import sys
from binascii import a2b_base64
from collections.abc import Mapping
from functools import partial
from typing import Any, AnyStr, TypeVar

from ray_ckpt.errors import FormatError
from ray_ckpt.format import record, tensor_table
from ray_ckpt.format.block_sums import BlockSums
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.entries import Chunk, ObjectEntry, Path, TensorEntry

__all__ = ["LARGE_BYTES", "read"]

K = TypeVar("K")
T = TypeVar("T")


_TENSORS, _OBJECTS = b',"tensors":{', b'},"objects":{'
_CHECKSUM = b',"checksum":"'
_CHECKSUM_BYTES = len(_CHECKSUM) + 16
_NUMBER = "(0|[1-9][0-9]{0,17})"
_CHUNK = re.compile(
    r'"offsets":\[([0-9,]*)\],"sizes":\[([0-9,]*)\],"file":"([^"]*)",'
    rf'"start":{_NUMBER},"length":{_NUMBER},"data_start":{_NUMBER},"block_bytes":([1-9][0-9]{{0,17}}),'
    r'"checksums":"([A-Za-z0-9+/]*={0,2})"'
)
_TENSOR = re.compile(
    r'"([^"]*)":\{"dtype":"([^"]*","shape":\[[0-9,]*\])(?:,"path":(\["[^]]*"\]|null))?,'
    rf'"chunks":\[\{{{_CHUNK.pattern}\}}\]\}}(?:,(?=")|\Z)'
)
"""What most entries are: one chunk, and a path of names or none."""

LARGE_BYTES = 16 << 20
"""Size of the JSON of tensors, about 70 000 chunks, from which on they are held in columns."""

_MAX_KNOWN = 1 << 16
"""Parsed texts that are kept, so that memory does not grow with texts that do not repeat."""


def read(sealed: bytes, large_bytes: int = LARGE_BYTES) -> dict[str, Any] | None:
    """The members of a record, `tensors` and `objects` as the entries of a `Manifest`; None: read it as JSON.

    Args:
        sealed: the record's bytes, whose digest at the end has been checked.
        large_bytes: from this size on of the tensors' JSON, `tensors` is a `TensorTable`.
    """
    begin, end = sealed.find(_TENSORS), len(sealed) - record.SEAL_BYTES - 1
    middle = sealed.rfind(_OBJECTS, max(0, begin), end)
    if begin < 0 or middle < 0 or sealed[end : end + 1] != b"}" or not sealed.isascii():
        return None
    if sealed.find(b"\\", begin, middle) >= 0:
        return None
    try:
        data = record.parse(sealed[:begin] + b"}")
        if not record.text(data, "attempt") or data.keys() & {"tensors", "objects", "digest"}:
            return None
        is_large = middle - begin >= large_bytes
        data["tensors"] = (tensor_table if is_large else _Tensors()).read(sealed, begin + len(_TENSORS), middle)
        has_escapes = sealed.find(b"\\", middle, end) >= 0
        read_objects = _objects_as_json if has_escapes else _Objects().read
        data["objects"] = read_objects(sealed, middle + len(_OBJECTS), end)
        return data | {"digest": sealed[-34:-2].decode()}
    except (*record.MISFITS, RecursionError):
        return None


def _objects_as_json(data: bytes, at: int, end: int) -> dict[str, ObjectEntry]:
    """The entries between two bytes where a text has an escape: of an umlaut, a quotation mark or a line's end."""
    parsed = record.parse(b'{"objects":{' + data[at:end] + b"}}")
    _expect(parsed.keys() == {"objects"})
    return record.parse_each(parsed, "objects", partial(record.parse_object, ours=True))


class _Tensors:
    def __init__(self) -> None:
        self._specs: dict[str, TensorEntry] = {}
        self._boxes: dict[tuple[str, str], Box] = {}
        self._files: dict[str, str] = {}

    def read(self, data: bytes, at: int, end: int) -> dict[str, TensorEntry]:
        """The entries between two bytes: `"name":{"dtype":"float32","shape":[2],"chunks":[{...}]},"other":...`."""
        found: dict[str, TensorEntry] = {}
        text = data[at:end].decode()
        at, end = 0, len(text)
        while at < end:
            usual = _TENSOR.match(text, at)
            if usual is None:
                at = self._read_entry(text, at, end, found)
                continue
            name, spec, path, *chunk = usual.groups()
            _expect(name.isprintable() and name not in found)
            entry = self._specs.get(spec) or self._parse_spec(spec)
            found[name] = TensorEntry(entry.dtype, entry.shape, (self._make_chunk(*chunk),), _path(name, path))
            at = usual.end()
        return found

    def _read_entry(self, text: str, at: int, end: int, found: dict[str, TensorEntry]) -> int:
        """Read any entry; returns where the next one begins."""
        stop = text.find(']},"', at, end)
        if stop < 0:
            stop = end - 2
            _expect(text[stop:end] == "]}")
        name, _, rest = text[at:stop].partition('":{"dtype":"')
        head, _, chunks = rest.partition(',"chunks":[{')
        spec, _, path = head.partition(',"path":')
        name = _name(name, found)
        entry = self._specs.get(spec) or self._parse_spec(spec)
        _expect(chunks[-1:] == "}")
        parsed = tuple([self._chunk(chunk) for chunk in chunks[:-1].split("},{")])
        found[name] = TensorEntry(entry.dtype, entry.shape, parsed, _path(name, path))
        return _after(text, stop + len("]}"), end)

    def _parse_spec(self, text: str) -> TensorEntry:
        entry = record.parse_tensor("", record.parse(f'{{"dtype":"{text},"chunks":[]}}'.encode()), ours=True)
        _expect(entry.path == ("",) and not entry.chunks)
        return _keep(self._specs, text, entry)

    def _chunk(self, text: str) -> Chunk:
        match = _CHUNK.fullmatch(text)
        if match is None:
            raise FormatError("not as it is written")
        return self._make_chunk(*match.groups())

    def _make_chunk(
        self, offsets: str, sizes: str, file: str, start: str, length: str, data_start: str, block_bytes: str, sums: str
    ) -> Chunk:
        box = self._boxes.get((offsets, sizes)) or self._parse_box(offsets, sizes)
        file = self._files.get(file) or self._parse_file(file)
        checksums = BlockSums(int(block_bytes), a2b_base64(sums))
        return Chunk(box, file, int(start), int(length), int(data_start), checksums)

    def _parse_box(self, offsets: str, sizes: str) -> Box:
        return _keep(self._boxes, (offsets, sizes), Box(_numbers(offsets), _numbers(sizes)))

    def _parse_file(self, text: str) -> str:
        return _keep(self._files, text, record.text(record.parse(f'{{"file":"{text}"}}'.encode()), "file"))


class _Objects:
    def __init__(self) -> None:
        self._known: dict[str, ObjectEntry] = {}
        """Entries by their text without name and path: equal values lie at the same place."""

    def read(self, data: bytes, at: int, end: int) -> dict[str, ObjectEntry]:
        """The entries between two bytes: `"name":{"value":1,"file":...,"checksum":"0123456789abcdef"},"other":...`."""
        found: dict[str, ObjectEntry] = {}
        while at < end:
            last = data.find(_CHECKSUM, at, end)
            stop = last + _CHECKSUM_BYTES + len('"}')
            _expect(last >= 0 and data[stop - 2 : stop] == b'"}')
            name, _, rest = data[at:stop].decode().partition('":{')
            path, body = _path_and_body(rest)
            name = _name(name, found)
            entry = self._known.get(body) or self._parse(body)
            found[name] = ObjectEntry._make((*entry[:7], _path(name, path), ""))  # `_replace` takes four times as long
            at = _after(data, stop, end)
        return found

    def _parse(self, text: str) -> ObjectEntry:
        entry = record.parse_object("", record.parse(f"{{{text}".encode()), ours=True)
        _expect(entry.path == ("",))
        return _keep(self._known, text, entry)


def _after(data: AnyStr, at: int, end: int) -> int:
    """Where the next entry begins, after one that ends here."""
    _expect(at == end or (data[at : at + 1] in (",", b",") and at + 1 < end))
    return at + 1


def _path_and_body(text: str) -> tuple[str, str]:
    """The path's JSON, empty if there is none, and all that follows it."""
    key = '"path":'
    if not text.startswith(key):
        return "", text
    path, _, body = text[len(key) :].partition(',"' if text.startswith("null", len(key)) else '],"')
    return path if path == "null" else f"{path}]", f'"{body}'


def _name(text: str, found: Mapping[str, Any]) -> str:
    """The name of a text that is `"name`."""
    name = text[1:]
    _expect(text[:1] == '"' and '"' not in name and name.isprintable() and name not in found)
    return name


def _path(name: str, text: str | None) -> Path | None:
    """Most paths are the name, cut at some of its dots."""
    if not text:
        return (name,)
    if text == "null":
        return None
    parts = text[2:-2].split('","')
    if text[:2] == '["' and text[-2:] == '"]' and ".".join(parts) == name:
        return (sys.intern(parts[0]), *parts[1:])
    return record.parse_path(name, record.parse(f'{{"path":{text}}}'.encode()))


def _numbers(text: str) -> tuple[int, ...]:
    """Digits and commas."""
    return record.sizes({"numbers": json.loads(f"[{text}]")}, "numbers")


def _keep(known: dict[K, T], key: K, value: T) -> T:
    if len(known) < _MAX_KNOWN:
        known[key] = value
    return value


def _expect(condition: object) -> None:
    if not condition:
        raise FormatError("not as it is written")
