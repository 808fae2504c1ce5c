"""The JSON of a manifest: entries <-> text, read strictly, and sealed by a digest of itself.

    {"format": "ray_ckpt", "version": 2, ..., "digest": "<32 hexadecimal digits>"}

The digest is the XXH3-128 of every byte of the file before `,"digest":`; these bytes, as they stand there, are the
canonical ones. It is the last member, so that neither writing nor checking it needs a second look at the JSON: the
file ends with exactly `,"digest":"<32 digits>"}`, and nothing follows. A record that was edited in any way, even in its
spaces, no longer fits its digest. It finds accidents; whoever can write the file can write a digest that fits.

Version 1 had no digest. A digest that is there is checked, whatever the version says.

Strict means: no key twice, no NaN or Infinity, no number outside its type, every key that an entry must have and none
that it must not, so that a damaged key drops nothing silently.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from functools import lru_cache
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any, TypeVar

import xxhash

from ray_ckpt.errors import FormatError
from ray_ckpt.format import values
from ray_ckpt.format.block_sums import BlockSums
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.entries import Chunk, Inline, ObjectEntry, Path, TensorEntry

__all__ = [
    "MISFITS",
    "SEAL_BYTES",
    "MisfitError",
    "digest",
    "dumps",
    "is_sealed",
    "objects_to_json",
    "parse",
    "parse_digest",
    "parse_each",
    "parse_members",
    "parse_object",
    "parse_path",
    "parse_tensor",
    "seal",
    "sealed",
    "size",
    "sizes",
    "tensors_to_json",
    "text",
]

T = TypeVar("T")

_PIECE_CHUNKS = 1 << 12
"""Chunks whose JSON is a piece of the text, apart from those of one tensor."""

_SIZE_LIMIT = 1 << 63
"""Sizes and offsets of files are below this."""

_SEAL = re.compile(rb',"digest":"([0-9a-f]{32})"\}\Z')
SEAL_BYTES = len(',"digest":""}') + 32
"""Size of the end of a record that has a digest."""
_DIGEST = re.compile(r"[0-9a-f]{32}", re.ASCII)
_CHECKSUM = re.compile(r"[0-9a-f]{16}", re.ASCII)

_TENSOR_KEYS = frozenset({"dtype", "shape", "chunks"}), frozenset({"path"})
_PLACE_KEYS = frozenset({"file", "start", "length"})
_BOX_KEYS, _SUM_KEYS = frozenset({"offsets", "sizes"}), frozenset({"data_start", "block_bytes", "checksums"})
_CHUNK_KEYS = _PLACE_KEYS | _BOX_KEYS, _SUM_KEYS | {"transforms", "strides"}
_OUR_CHUNK_KEYS = _PLACE_KEYS | _BOX_KEYS | _SUM_KEYS, frozenset({"transforms", "strides"})
_NUM_OUR_CHUNK_KEYS = len(_OUR_CHUNK_KEYS[0])
_OBJECT_KEYS = _PLACE_KEYS, frozenset({"path", "value", "blob", "checksum", "transforms"})
_OUR_OBJECT_KEYS = _PLACE_KEYS | {"checksum"}, frozenset({"path", "value", "blob", "transforms"})
"""Keys that an entry must have, and those that it may have."""


class MisfitError(ValueError):
    """A part of a record is not what belongs there."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f"{place}: {problem}")
        self.place = place
        """Where it stands, such as `tensors['weight'].chunks[0].start`."""
        self.problem = problem


MISFITS = (MisfitError, FormatError, ValueError, TypeError, KeyError, AttributeError, OverflowError)
"""What reading a part that does not fit may raise."""


# ----------------------------------------------------------------------------------------------------- digest


def digest(data: bytes | memoryview) -> str:
    """XXH3-128 of the bytes, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def seal(body: str) -> str:
    """The text of a JSON object, with the digest of itself as its last member.

    Args:
        body: an object with at least one member, without spaces at its end.
    """
    return sealed((body[:-1],)).decode()


def sealed(texts: Iterable[str]) -> bytes:
    """The same of an object without the brace at its end, in pieces: a large one is not held more often than needed."""
    found, pieces = xxhash.xxh3_128(), []
    for text in texts:
        pieces.append(text.encode())
        found.update(pieces[-1])
    return b"".join([*pieces, f',"digest":"{found.hexdigest()}"}}'.encode()])


def is_sealed(record: bytes, where: str) -> bool:
    """Whether the record carries a digest of itself.

    Raises:
        FormatError: it carries one of other bytes.
    """
    found = _SEAL.search(record, max(0, len(record) - SEAL_BYTES))
    if found is None:
        return False
    told, seen = found[1].decode(), digest(memoryview(record)[: found.start()])
    if told != seen:
        raise FormatError(
            f"{where} is damaged: its digest is {seen}, saved with {told}; restore it from a copy, or load an earlier "
            "step"
        )
    return True


# ---------------------------------------------------------------------------------------------------- writing


def dumps(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), allow_nan=False)


def tensors_to_json(tensors: Mapping[str, TensorEntry]) -> Iterator[str]:
    """The text itself, in pieces: `json.dumps` of nested dicts takes four times as long, and there are thousands."""
    held, num_chunks, before = [], 0, "{"
    for name, entry in tensors.items():
        held.append(_tensor_to_json(name, entry))
        num_chunks += len(entry.chunks)
        if num_chunks >= _PIECE_CHUNKS:
            yield before + ",".join(held)
            held, num_chunks, before = [], 0, ","
    yield (before if held or before == "{" else "") + ",".join(held) + "}"


def _tensor_to_json(name: str, entry: TensorEntry) -> str:
    path = "" if entry.path == (name,) else f'"path":{_path_to_json(entry.path)},'
    chunks = ",".join([_chunk_to_json(chunk) for chunk in entry.chunks])
    dtype, shape = _quoted(entry.dtype), _numbers_to_json(entry.shape)
    return f'{_quoted(name)}:{{"dtype":{dtype},"shape":{shape},{path}"chunks":[{chunks}]}}'


def _chunk_to_json(chunk: Chunk) -> str:
    offsets, sizes = _numbers_to_json(chunk.box.offsets), _numbers_to_json(chunk.box.sizes)
    place = f'"file":{_quoted(chunk.file)},"start":{chunk.start},"length":{chunk.length}'
    if chunk.data_start is not None:
        place += f',"data_start":{chunk.data_start}'
    if (sums := chunk.checksums) is not None:
        place += f',"block_bytes":{sums.block_bytes},"checksums":"{base64.b64encode(sums.sums).decode()}"'
    if chunk.transforms:
        place += f',"transforms":{dumps(chunk.transforms)}'
    if chunk.strides is not None:
        place += f',"strides":{_numbers_to_json(chunk.strides)}'
    return f'{{"offsets":{offsets},"sizes":{sizes},{place}}}'


def _path_to_json(path: Path | None) -> str:
    if path is None:
        return "null"
    return f"[{','.join([_quoted(part) if isinstance(part, str) else str(part) for part in path])}]"


@lru_cache(maxsize=4096)
def _numbers_to_json(numbers: tuple[int, ...]) -> str:
    return str(list(numbers)).replace(" ", "")


def objects_to_json(objects: Mapping[str, ObjectEntry]) -> str:
    return dumps({name: _object_to_json(name, entry) for name, entry in objects.items()})


def _object_to_json(name: str, entry: ObjectEntry) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if entry.path != (name,):
        data["path"] = entry.path
    if entry.inline is not None:
        data["value"] = values.encode(entry.inline.value)
    if entry.blob is not None:
        data["blob"] = base64.b64encode(entry.blob).decode()
    data |= {"file": entry.file, "start": entry.start, "length": entry.length}
    if entry.checksum is not None:
        data["checksum"] = f"{entry.checksum:016x}"
    if entry.transforms:
        data["transforms"] = entry.transforms
    return data


# ---------------------------------------------------------------------------------------------------- reading


def parse(record: bytes) -> dict[str, Any]:
    """The members of a record.

    Raises:
        ValueError: it is not UTF-8, not JSON, has a key twice, or holds NaN or Infinity.
        RecursionError: it is nested too deep.
    """
    data = _DECODER.decode(record.decode())
    if type(data) is not dict:
        raise MisfitError("the record", f"is {_shown(data)}, not an object")
    return data


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise MisfitError(repr(twice[:200]), "the key appears twice in one object")
    return data


def _refuse_constant(text: str) -> Any:
    raise MisfitError(text, "is no number of JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
"""One for all: to make it takes longer than to parse an entry."""


def parse_each(data: Mapping[str, Any], section: str, parse_entry: Callable[[str, Any], T]) -> dict[str, T]:
    """The entries of a section, by name.

    Raises:
        MisfitError: it is no object, or an entry does not fit; says where.
    """
    parsed = {}
    for name, entry in _members(data, section).items():
        try:
            parsed[name] = parse_entry(name, entry)
        except MISFITS as error:
            raise _at(f"{section}[{name[:200]!r}]", error) from error
    return parsed


def parse_members(data: Mapping[str, Any], section: str, read: Callable[[Mapping[str, Any], str], T]) -> dict[str, T]:
    """A section whose members are plain values.

    Args:
        read: `text` or `size`.
    """
    found = _members(data, section)
    try:
        return {key: read(found, key) for key in found}
    except MisfitError as error:
        raise MisfitError(f"{section}[{error.place[:200]!r}]", error.problem) from error


def _members(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = data[key]
    if type(found) is not dict:
        raise MisfitError(key, f"is {_shown(found)}, not an object")
    return found


def parse_tensor(name: str, data: Any, *, ours: bool) -> TensorEntry:
    """A tensor's entry.

    Args:
        ours: whether ray_ckpt wrote the data files: then every chunk has checksums.
    """
    if len(data) != 3 + ("path" in data):  # else all of them are read below
        _check_keys(data, *_TENSOR_KEYS)
    chunks = data["chunks"]
    if type(chunks) is not list:
        raise MisfitError("chunks", f"is {_shown(chunks)}, not a list")
    parsed = []
    for number, chunk in enumerate(chunks):
        try:
            parsed.append(_parse_chunk(chunk, ours=ours))
        except MISFITS as error:
            raise _at(f"chunks[{number}]", error) from error
    return TensorEntry(text(data, "dtype"), sizes(data, "shape"), tuple(parsed), parse_path(name, data))


def _parse_chunk(data: Any, *, ours: bool) -> Chunk:
    if not ours or len(data) != _NUM_OUR_CHUNK_KEYS:  # else all keys are read below, and none can be unknown
        _check_keys(data, *(_OUR_CHUNK_KEYS if ours else _CHUNK_KEYS))
    checksums = None
    if "checksums" in data or "block_bytes" in data:
        block_bytes = size(data, "block_bytes")
        if not block_bytes:
            raise MisfitError("block_bytes", "is 0")
        checksums = BlockSums(block_bytes, _parse_base64(data, "checksums"))
    return Chunk(
        box=Box(sizes(data, "offsets"), sizes(data, "sizes")),  # not `shared_box`: tuples can be made to collide
        file=text(data, "file"),
        start=size(data, "start"),
        length=size(data, "length"),
        data_start=size(data, "data_start") if "data_start" in data else None,
        checksums=checksums,
        transforms=_parse_transforms(data) if "transforms" in data else (),
        strides=sizes(data, "strides") if "strides" in data else None,
    )


def parse_object(name: str, data: Any, *, ours: bool) -> ObjectEntry:
    """The entry of a value that is not a tensor.

    Args:
        ours: whether ray_ckpt wrote the data files: then it has a checksum.
    """
    has_value, has_blob = "value" in data, "blob" in data
    if not ours or len(data) != 4 + has_value + has_blob + ("path" in data):  # else all of them are read below
        _check_keys(data, *(_OUR_OBJECT_KEYS if ours else _OBJECT_KEYS))
    if has_value and has_blob:
        raise MisfitError("blob", "stands beside a value, of which it would be another copy")
    checksum = None
    if "checksum" in data:
        if not _CHECKSUM.fullmatch(text(data, "checksum")):
            raise MisfitError("checksum", f"is {_shown(data['checksum'])}, not 16 hexadecimal digits")
        checksum = int(data["checksum"], 16)
    return ObjectEntry(
        file=text(data, "file"),
        start=size(data, "start"),
        length=size(data, "length"),
        inline=Inline(_parse_value(data["value"])) if has_value else None,
        blob=_parse_base64(data, "blob") if has_blob else None,
        checksum=checksum,
        transforms=_parse_transforms(data) if "transforms" in data else (),
        path=parse_path(name, data),
    )


def _parse_value(data: Any) -> Any:
    try:
        return values.decode(data)
    except FormatError as error:
        raise MisfitError("value", str(error)) from error


def parse_path(name: str, data: Any) -> Path | None:
    """`path` is absent when it is the name alone, null when nothing was flattened."""
    if "path" not in data:
        return (name,)
    path = data["path"]
    if path is None:
        return None
    if type(path) is not list or any(type(part) not in (str, int) for part in path):
        raise MisfitError("path", f"is {_shown(path)}, not keys and positions")
    return tuple(path)


def _parse_transforms(data: Mapping[str, Any]) -> tuple[str, ...]:
    transforms = data["transforms"]
    if type(transforms) is not list or any(type(item) is not str for item in transforms):
        raise MisfitError("transforms", f"is {_shown(transforms)}, not a list of texts")
    return tuple(transforms)


def _parse_base64(data: Mapping[str, Any], key: str) -> bytes:
    try:
        return base64.b64decode(text(data, key), validate=True)
    except ValueError as error:
        raise MisfitError(key, f"is not base64: {error}") from error


def parse_digest(data: Mapping[str, Any], key: str) -> str | None:
    """A digest, or null."""
    if data[key] is not None and not _DIGEST.fullmatch(text(data, key)):
        raise MisfitError(key, f"is {_shown(data[key])}, not 32 hexadecimal digits")
    value: str | None = data[key]
    return value


def sizes(data: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Sizes or offsets, one per dim."""
    numbers = data[key]
    if type(numbers) is not list:
        raise MisfitError(key, f"is {_shown(numbers)}, not a list of sizes")
    for number in numbers:
        if type(number) is not int or not 0 <= number < _SIZE_LIMIT:
            raise MisfitError(key, f"holds {_shown(number)}, not a size or an offset")
    return tuple(numbers)


def size(data: Mapping[str, Any], key: str) -> int:
    """A count or offset: an int (not a bool) that fits a file offset."""
    number = data[key]
    if type(number) is not int or not 0 <= number < _SIZE_LIMIT:
        raise MisfitError(key, f"is {_shown(number)}, not a size or an offset")
    return number


def text(data: Mapping[str, Any], key: str) -> str:
    found = data[key]
    if type(found) is not str:
        raise MisfitError(key, f"is {_shown(found)}, not a text")
    return found


def _check_keys(data: Any, required: frozenset[str], optional: frozenset[str]) -> None:
    if type(data) is not dict:
        raise MisfitError("it", f"is {_shown(data)}, not an object")
    if not data.keys() >= required:
        raise _lack(required - data.keys())
    if unknown := data.keys() - required - optional:
        raise MisfitError(min(unknown)[:200], "is no key of this version")


def _lack(missing: Set[str]) -> MisfitError:
    return MisfitError(min(missing), "is missing")


def _at(place: str, error: Exception) -> MisfitError:
    """The error with the place of the part in which it arose."""
    if isinstance(error, MisfitError):
        return MisfitError(place if error.place == "it" else f"{place}.{error.place}", error.problem)
    if isinstance(error, KeyError):
        return MisfitError(f"{place}.{error.args[0]}", "is missing")
    return MisfitError(place, f"{type(error).__name__}: {error}")


def _shown(data: Any) -> str:
    """The start of a value, whose whole may be long."""
    if isinstance(data, (dict, list)):
        return f"a {type(data).__name__} of {len(data)}"
    try:
        return repr(data)[:60]
    except ValueError:  # an int of too many digits to print
        return "a number of thousands of digits"
