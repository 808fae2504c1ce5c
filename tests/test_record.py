"""The record: sealed by a digest of itself, read strictly, and older ones still read."""

from __future__ import annotations

import base64
import json
import random
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import ray_ckpt
from ray_ckpt.errors import FormatError
from ray_ckpt.format import canonical
from ray_ckpt.format.manifest import MANIFEST_NAME, VERSION, Manifest
from ray_ckpt.format.record import parse, parse_each, parse_object, parse_tensor, seal
from tests.support.records import VERSION_1, edit_record, sealed

SAVED = {
    "model": {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([0.5, -1.25], dtype=torch.bfloat16)},
    "optim": {"lr": 0.0003, "betas": (0.9, 0.999), "order": {"a": 1}},
    "step": 7,
    "shape": torch.Size([2, 3]),
}


def blank() -> dict[str, Any]:
    weights = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2, dtype=torch.bfloat16)}
    return {"model": weights, "optim": {"lr": 0.0, "betas": (), "order": {"a": 0}}, "step": 0, "shape": None}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    ray_ckpt.save(SAVED, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def record(run: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((run / MANIFEST_NAME).read_bytes())
    return manifest


# ----------------------------------------------------------------------------------------------------- version 1


def test_a_record_of_version_1_still_loads() -> None:
    state = blank()
    ray_ckpt.load(state, VERSION_1)
    weights, expected = state.pop("model"), dict(SAVED["model"])
    assert {name: value.tolist() for name, value in weights.items()} == {
        name: value.tolist() for name, value in expected.items()
    }
    assert state == {key: value for key, value in SAVED.items() if key != "model"}
    assert Manifest.from_json((VERSION_1 / MANIFEST_NAME).read_bytes()).has_digest is False


def test_verify_says_that_a_record_has_no_digest(run: Path) -> None:
    report = ray_ckpt.verify(VERSION_1)
    assert report.verified
    [note] = report.notes
    assert "has no digest of itself" in note
    assert note in str(report)
    assert ray_ckpt.verify(run).notes == ()


def test_what_version_1_tells_stock_dcp_is_compared_whole(tmp_path: Path) -> None:
    """Names and paths, which nothing in the data files repeats."""
    directory = tmp_path / "run"
    shutil.copytree(VERSION_1, directory)
    text = (directory / MANIFEST_NAME).read_text()
    (directory / MANIFEST_NAME).write_text(text.replace('"path":["optim","lr"]', '"path":["optim","mr"]'))
    [damage] = ray_ckpt.verify(directory).damages
    assert damage.problem == "tells stock DCP something else than manifest.json: its path of optim.lr is another one"


# -------------------------------------------------------------------------------------------------------- digest


def unsealed(manifest: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in manifest.items() if key != "digest"})


BROKEN_SEALS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "one digit of a number": lambda text, _: text.replace("0.0003", "0.0013"),
    "one letter of a name": lambda text, _: text.replace("optim.lr", "optim.mr"),
    "two names swapped": lambda text, _: text.replace("weight", "#").replace("bias", "weight").replace("#", "bias"),
    "a line at the end": lambda text, _: text + "\n",
    "written with other spaces": lambda _, manifest: json.dumps(manifest),
    "the digest": lambda text, manifest: text.replace(manifest["digest"], manifest["digest"][::-1]),
    "a letter of the digest's key": lambda text, _: text.replace('"digest":', '"digesu":'),
    "no digest": lambda _, manifest: unsealed(manifest),
    "no digest, spelt null": lambda _, manifest: json.dumps(manifest | {"digest": None}),
    "said to be of version 1": lambda text, _: text.replace('"version":2', '"version":1'),
    "of version 1 with a digest somewhere": lambda _, manifest: json.dumps(manifest | {"version": 1}),
    "of a later version": lambda _, manifest: sealed(manifest | {"version": VERSION + 1}),
    "cut off": lambda text, _: text[:-1],
}


@pytest.mark.parametrize("broken", BROKEN_SEALS.values(), ids=BROKEN_SEALS)
def test_a_record_that_does_not_fit_its_digest(
    run: Path, record: dict[str, Any], broken: Callable[[str, dict[str, Any]], str]
) -> None:
    text = (run / MANIFEST_NAME).read_text()
    assert broken(text, record) != text
    (run / MANIFEST_NAME).write_text(broken(text, record))
    with pytest.raises(FormatError, match=f"^{run}/manifest.json "):
        ray_ckpt.load(blank(), run)
    with pytest.raises(FormatError):
        ray_ckpt.verify(run)


def test_a_digest_is_checked_whatever_the_version_says(record: dict[str, Any]) -> None:
    """A record of version 1 that has one, as none was written."""
    old = {key: value for key, value in record.items() if key not in ("digest", "metadata_digest")} | {"version": 1}
    text = seal(json.dumps(old))
    assert Manifest.from_json(text).has_digest
    with pytest.raises(FormatError, match="its digest is"):
        Manifest.from_json(text.replace("0.0003", "0.0013"))


# -------------------------------------------------------------------------------------------------------- strict


def chunk(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["tensors"]["model.weight"]["chunks"][0]
    return found


def rename(data: dict[str, Any], old: str, new: str) -> None:
    data[new] = data.pop(old)


CHUNK = r"tensors\['model.weight'\].chunks\[0\]"
LR = r"objects\['optim.lr'\]"

MISFITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a chunk without checksums": (lambda m: chunk(m).pop("checksums"), f"{CHUNK}.checksums: is missing"),
    "a damaged key of checksums": (lambda m: rename(chunk(m), "checksums", "checksumt"), f"{CHUNK}.checksums: is miss"),
    "neither checksums nor blocks": (
        lambda m: [chunk(m).pop(key) for key in ("checksums", "block_bytes")],
        f"{CHUNK}.block_bytes: is missing",
    ),
    "a chunk without data_start": (lambda m: chunk(m).pop("data_start"), f"{CHUNK}.data_start: is missing"),
    "an object without checksum": (
        lambda m: m["objects"]["optim.lr"].pop("checksum"),
        f"{LR}.checksum: is missing",
    ),
    "a damaged key of a value": (
        lambda m: rename(m["objects"]["optim.lr"], "value", "walue"),
        f"{LR}.walue: is no key",
    ),
    "a damaged key of a path": (
        lambda m: rename(m["tensors"]["model.weight"], "path", "qath"),
        r"tensors\['model.weight'\].qath: is no key",
    ),
    "a value and a blob": (lambda m: m["objects"]["optim.lr"].update(blob=""), f"{LR}.blob: stands beside a value"),
    "a bool as a size": (
        lambda m: m["tensors"]["model.weight"].update(shape=[True, 3]),
        r"tensors\['model.weight'\].shape: holds True",
    ),
    "a float as a size": (lambda m: chunk(m).update(length=1577.0), f"{CHUNK}.length: is 1577.0"),
    "a size past 63 bits": (lambda m: chunk(m).update(start=2**63), f"{CHUNK}.start: is 9223372036854775808"),
    "a bool as a version": (lambda m: m.update(version=True), "version is True"),
    "a bool in a path": (lambda m: m["objects"]["optim.lr"].update(path=["optim", True]), f"{LR}.path: is"),
    "a text as sizes": (lambda m: chunk(m).update(sizes="23"), f"{CHUNK}.sizes: is '23', not a list"),
    "a checksum with a prefix": (
        lambda m: m["objects"]["optim.lr"].update(checksum="0x0000000000000a"),
        f"{LR}.checksum: is .*16 hexadecimal",
    ),
    "half a checksum more": (
        lambda m: chunk(m).update(checksums=base64.b64encode(bytes(12)).decode()),
        "checksums of 12 bytes",
    ),
    "a fingerprint that is a number": (lambda m: m["fingerprints"].update(weight=5), r"fingerprints\['weight'\]: is 5"),
    "a file size that is a text": (lambda m: m["files"].update(x="9"), r"files\['x'\]: is '9'"),
    "a member that is missing": (lambda m: m.pop("layout"), "it lacks layout"),
    "chunks that are an object": (
        lambda m: m["tensors"]["model.weight"].update(chunks={"0": chunk(m)}),
        r"tensors\['model.weight'\].chunks: is a dict of 1, not a list",
    ),
}


@pytest.mark.parametrize("as_saved", [True, False], ids=["as we write it", "with spaces"])
@pytest.mark.parametrize(("change", "place"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_named_with_its_place(
    run: Path, change: Callable[[dict[str, Any]], object], place: str, as_saved: bool
) -> None:
    edit_record(run, change, as_saved=as_saved)
    with pytest.raises(FormatError, match=f"^{run}/manifest.json.*{place}"):
        ray_ckpt.load(blank(), run)


NO_JSON: dict[str, tuple[str, str, str]] = {
    "a key twice": ('"step":{', '"optim.lr":{', "optim.lr.*twice"),
    "a member twice": ('"files":{', '"files":{},"files":{', "files.*twice"),
    "a key of a value twice": ('"value":0.0003', '"value":{"a":1,"a":1}', "'a': .*twice"),
    "NaN": ("0.0003", "NaN", "NaN: is no number of JSON"),
    "Infinity": ("0.0003", "Infinity", "Infinity: is no number of JSON"),
    "-Infinity": ("0.0003", "-Infinity", "Infinity: is no number of JSON"),
    "a number past the largest float": ("0.0003", "1e999", f"{LR}.value: a number is too large"),
    "one within a tuple": ("0.999", "-1e999", "optim.betas.*value: a number is too large"),
    "digits without end": ("0.0003", "9" * 5000, "ValueError"),
    "no UTF-8": ("0.0003", '"\udcff"', "UnicodeDecodeError"),
    "deep nesting": ("0.0003", "[" * 100_000, "RecursionError"),
}


@pytest.mark.parametrize(("old", "new", "problem"), NO_JSON.values(), ids=NO_JSON)
def test_json_is_read_strictly(run: Path, old: str, new: str, problem: str) -> None:
    body = (run / MANIFEST_NAME).read_text().rpartition(',"digest":')[0] + "}"
    assert body.count(old) == 1
    changed = body.replace(old, new)
    text = changed if "\udcff" in new else seal(changed)
    (run / MANIFEST_NAME).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(FormatError, match=f"^{run}/manifest.json.*{problem}"):
        ray_ckpt.load(blank(), run)


# ------------------------------------------------------------------------------------------ as we write it, and JSON


def many_kinds() -> dict[str, Any]:
    """Names and values of which some are written in ways that others are not."""
    names = ("plain", "with.dots", "with [brackets], and commas", "with {braces}")
    tensors: dict[str, Any] = {name: torch.ones(2, 3) for name in names}
    values = {
        "tuple": (0.9, 0.999),
        "nested": {"a": [1, (2, None)]},
        "none": None,
        "text": "x},y",
        "size": torch.Size([1]),
    }
    return {"tensors": tensors, "list": [torch.zeros(0), torch.tensor(1.5)], "values": values, "bare": torch.ones(3)}


@pytest.mark.parametrize("strange", ["", "\u00fc", "\\", '"'], ids=["ASCII", "umlaut", "backslash", "quotation mark"])
def test_a_record_as_we_write_it_holds_what_its_json_does(tmp_path: Path, strange: str) -> None:
    ray_ckpt.save(many_kinds() | {f"x{strange}": torch.ones(2), f"y{strange}": strange}, tmp_path / "run")
    text = (tmp_path / "run" / MANIFEST_NAME).read_bytes()
    with_spaces = sealed(json.loads(text))
    for large_bytes in (0, canonical.LARGE_BYTES):  # in columns, and as entries
        assert (canonical.read(text, large_bytes) is None) is bool(strange)
    assert canonical.read(with_spaces.encode()) is None
    assert Manifest.from_json(text) == Manifest.from_json(with_spaces)
    assert {f"x{strange}", f"y{strange}"} <= {*Manifest.from_json(text).tensors, *Manifest.from_json(text).objects}


@pytest.mark.parametrize("strange", ["\u00fc", "\\", 'a "quoted" text', "two\nlines", '"},"objects":{"'])
def test_escapes_in_values_leave_the_tensors_as_they_are(tmp_path: Path, strange: str) -> None:
    ray_ckpt.save(many_kinds() | {"note": strange, f"of {strange}": 1}, tmp_path / "run")
    text = (tmp_path / "run" / MANIFEST_NAME).read_bytes()
    for large_bytes in (0, canonical.LARGE_BYTES):
        assert canonical.read(text, large_bytes) == as_json(text)
    assert Manifest.from_json(text).values()["note"] == strange


@pytest.mark.parametrize("large_bytes", [0, canonical.LARGE_BYTES], ids=["columns", "entries"])
def test_no_changed_record_is_read_as_something_that_its_json_is_not(tmp_path: Path, large_bytes: int) -> None:
    """Changed by somebody who makes the digest fit."""
    ray_ckpt.save(many_kinds(), tmp_path / "run")
    body, _, _ = (tmp_path / "run" / MANIFEST_NAME).read_text().rpartition(',"digest":')
    parts = sorted({*re.findall(r'"[^"]*"|[0-9.]+|.', body)})
    pieces = [*parts, "\\", '\\"', "\\u0022", "\n", "\0", " ", "-1", "00", "1e3", '":{"', '"},"', "]},", "]},{", "},{"]
    draw, num_read = random.Random(14), 0
    for _ in range(3000):
        at, length, piece = draw.randrange(1, len(body)), draw.choice([0, 1, 1, 2, 30]), draw.choice(pieces)
        text = seal(body[:at] + piece + body[at + length :] + "}").encode()
        read = canonical.read(text, large_bytes)
        if read is not None:
            num_read += 1
            assert read == as_json(text)
    assert num_read > 100


def as_json(text: bytes) -> dict[str, Any]:
    data = parse(text)
    tensors, objects = partial(parse_tensor, ours=True), partial(parse_object, ours=True)
    return data | {"tensors": parse_each(data, "tensors", tensors), "objects": parse_each(data, "objects", objects)}
