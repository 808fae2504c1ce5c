"""Tensors in columns are what they are as entries, and what is wrong with them is told in the same words."""

from __future__ import annotations

import pickle
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ray_ckpt.errors import CheckpointError
from ray_ckpt.format import canonical
from ray_ckpt.format.block_sums import BlockSums
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.manifest import Chunk, Manifest, TensorEntry
from ray_ckpt.format.record import seal
from ray_ckpt.format.tensor_table import TensorTable

FILES = {f"__{rank}_0-0123456789ab.distcp": 1 << 40 for rank in range(3)}


def tensor(shape: tuple[int, ...], boxes: list[Box], path: tuple[str | int, ...] | None = None) -> TensorEntry:
    """A tensor of float32 in these boxes."""
    chunks = []
    for number, box in enumerate(boxes):
        sums = bytes(range(8)) * -(-4 * box.num_elements // 4096)
        start, file = number * 70_000, list(FILES)[number % len(FILES)]
        chunks.append(Chunk(box, file, start, 4 * box.num_elements + 100, start + 64, BlockSums(4096, sums)))
    return TensorEntry("float32", shape, tuple(chunks), path)


def rows(*lengths: int, width: int = 4) -> list[Box]:
    return [Box((sum(lengths[:number]), 0), (length, width)) for number, length in enumerate(lengths)]


def grid(num_rows: int, num_columns: int) -> list[Box]:
    return [Box((2 * row, 3 * column), (2, 3)) for row in range(num_rows) for column in range(num_columns)]


TENSORS = {
    "whole": tensor((3, 4), [Box.whole((3, 4))], ("whole",)),
    "no.dims": tensor((), [Box((), ())], ("no", "dims")),
    "empty.tensor": tensor((0, 4), [Box.whole((0, 4))], None),
    "list.0": tensor((5,), [Box.whole((5,))], ("list", 0)),
    "deep.a.b.c": tensor((5,), [Box.whole((5,))], ("deep", "a.b", "c")),
    "renamed": tensor((5,), [Box.whole((5,))], ("another", "name")),
    "rows": tensor((7, 4), rows(2, 0, 5), ("rows",)),
    "columns": tensor((2, 6), [Box((0, 0), (2, 1)), Box((0, 1), (2, 5))], ("columns",)),
    "few cells": tensor((4, 6), grid(2, 2), ("few cells",)),
    "many cells": tensor((16, 24), grid(8, 8), ("many cells",)),
    "bricks": tensor((2, 3), [Box((0, 0), (1, 2)), Box((0, 2), (1, 1)), Box((1, 0), (1, 1)), Box((1, 1), (1, 2))], ()),
    "blocks": tensor((5000,), [Box.whole((5000,))], ("blocks",)),
}


def manifest(tensors: dict[str, TensorEntry] | None = None) -> Manifest:
    return Manifest(TENSORS if tensors is None else tensors, {}, FILES, "0123456789ab")


def read(text: str, large_bytes: int) -> Manifest | None:
    """The manifest of a record that is as we write it, in columns or as entries, and not checked."""
    parts = canonical.read(text.encode(), large_bytes)
    return parts and Manifest(parts["tensors"], parts["objects"], parts["files"], parts["attempt"])


def in_columns(text: str) -> Manifest | None:
    return read(text, 0)


def test_columns_give_the_entries() -> None:
    found = in_columns(manifest().to_json())
    assert found is not None
    assert isinstance(found.tensors, TensorTable)
    assert list(found.tensors.items()) == list(TENSORS.items())
    assert found == manifest()
    assert found != manifest({**TENSORS, "whole": TENSORS["rows"]})
    assert found.to_json() == manifest().to_json()
    assert "whole" in found.tensors
    assert "other" not in found.tensors
    assert found.tensors.get("other") is None
    assert pickle.loads(pickle.dumps(found)) == found


def test_many_tensors_are_read_in_windows() -> None:
    """Those of one chunk by the thousand, and what stands between them by itself."""
    tensors = {f"model.layers.{n}": TENSORS["whole"]._replace(path=("model", f"layers.{n}")) for n in range(6000)}
    for number, (name, entry) in enumerate(TENSORS.items()):
        tensors[f"model.layers.{500 * number}"] = entry
        tensors[name] = entry
    tensors |= {f"after.{n}": TENSORS["no.dims"]._replace(path=("after", str(n))) for n in range(6000)}
    text = manifest(tensors).to_json()
    assert len(text) > 2 << 20
    found = in_columns(text)
    assert found is not None
    assert list(found.tensors.items()) == list(tensors.items())
    places = [place for file in FILES for place in found.tensors.places(file)]  # type: ignore[attr-defined]
    assert len(places) == sum(len(entry.chunks) for entry in tensors.values())
    twice = text.replace('"after.77":', '"after.78":')
    assert in_columns(seal(twice.rpartition(',"digest":')[0] + "}")) is None


def test_what_is_usual_is_seen_to_be_right_in_the_columns() -> None:
    """Whatever is not is looked at as ever."""
    found = in_columns(manifest().to_json())
    assert found is not None
    assert isinstance(found.tensors, TensorTable)
    assert set(found.tensors.unproven(FILES)) == {"few cells", "bricks"}
    found.check()


def test_a_record_without_tensors_is_read() -> None:
    found = in_columns(manifest({}).to_json())
    assert found is not None
    assert found.tensors == {}
    found.check()


def problem(check: Callable[[], None]) -> str:
    try:
        check()
    except CheckpointError as error:
        return str(error)
    return ""


def test_what_does_not_hold_together_is_told_as_of_entries() -> None:
    """Numbers and texts of the record are changed by somebody who makes the digest fit."""
    body, _, _ = manifest().to_json().rpartition(',"digest":')
    found = re.compile(r'\b[0-9]{1,18}\b|"float32"|__._0-[0-9a-f]{12}').finditer(body, body.index(',"tensors":'))
    tokens, draw, problems = list(found), random.Random(18), set()
    numbers = [*map(str, (0, 1, 2, 3, 4, 7, 64, 100, 4096, 10**17, 10**18 - 1))]
    for _ in range(600):
        token = draw.choice(tokens)
        texts = ['"int64"', '"strange"', '"bool"'] if token[0][0] == '"' else ["__9_0-0123456789ab"]
        new = draw.choice(numbers if token[0].isdigit() else texts)
        text = seal(body[: token.start()] + new + body[token.end() :] + "}")
        columns, entries = in_columns(text), read(text, canonical.LARGE_BYTES)
        assert (columns is None) is (entries is None)
        if columns is not None and entries is not None:
            assert problem(columns.check) == problem(entries.check)
            problems.add(re.sub(r"[0-9]+|'[^']*'", "", problem(entries.check)))
    assert "" in problems
    assert len(problems) > 8, problems


OPENING = """
import sys
from ray_ckpt.format.manifest import Manifest

def peak():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

before = peak()
record = open(sys.argv[1], "rb").read()
manifest = Manifest.from_json(record)
assert len(manifest.tensors["weight12"].chunks) == 4096
print(len(record), peak() - before)
"""


def test_a_large_record_takes_little_more_memory_than_its_text(tmp_path: Path) -> None:
    """A hundred thousand chunks as entries, or as JSON, take several times as much."""
    weight = tensor((4096, 4), rows(*[1] * 4096), ())
    path = tmp_path / "record"
    path.write_text(manifest({f"weight{number}": weight for number in range(25)}).to_json())
    done = subprocess.run(
        [sys.executable, "-c", OPENING, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    num_bytes, memory = map(int, done.stdout.split())
    assert num_bytes > canonical.LARGE_BYTES
    assert memory < 3 * num_bytes + (32 << 20), memory  # numpy among it
