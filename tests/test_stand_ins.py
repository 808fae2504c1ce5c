"""What a pickle names stays a name: plain state is made by our own code, the rest lies there until it is wanted."""

from __future__ import annotations

import argparse
import array
import collections
import datetime
import enum
import io
import logging
import os
import pathlib
import pickle
import random
import re
import zoneinfo
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner import SavePlan

import ray_ckpt
from ray_ckpt.errors import FormatError, UnsafeCheckpointError, UsageError
from ray_ckpt.format import boxes, dcp_metadata, limits
from ray_ckpt.format.boxes import Box, check_cover
from ray_ckpt.format.limits import Limit
from ray_ckpt.format.pickle_reader import Unpickler
from ray_ckpt.format.stand_ins import Instance, Name
from ray_ckpt.format.torch_internals import ExtensionRegistry
from ray_ckpt.storage.checkpoint_reader import CheckpointReader
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.objects import Decoder
from ray_ckpt.text import quoted

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


class Color(enum.Enum):
    RED = 1


class Nested(dict):  # type: ignore[type-arg]
    """A dict of somebody's own."""


class lower_case:
    """A class that is spelled like a function."""


HARMLESS: dict[str, Any] = {
    "arguments": argparse.Namespace(lr=0.1, out=pathlib.Path("/runs")),
    "color": Color.RED,
    "path": pathlib.Path("/runs/1"),
    "number": np.float64(0.5),
    "array": np.arange(3),
    "when": datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc),
    "plan": SavePlan([]),
    "own": Nested(a=1),
    "queue": collections.deque([1, 2]),
    "pattern": re.compile("a+"),
    "numbers": array.array("d", [1.0]),
    "lower": lower_case(),
    "zone": zoneinfo.ZoneInfo("UTC"),
    "log": logging.getLogger("ray_ckpt"),
}


def read(data: bytes, **more: Any) -> Any:
    return Unpickler(data, "a pickle", constant=lambda name: None, makers={}, **more).load()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_come_back_as_pickle_itself_reads_them(protocol: int) -> None:
    shared = [1]
    value = {
        "numbers": [0, 255, 65536, -1, 2**31, -(2**70), 0.5, float("inf"), 1 + 2j, True, None],
        "texts": ["", "ä" * 300, "\x00", b"", b"\xff" * 300, bytearray(b"ab")],
        "containers": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), set("ab"), frozenset({1}), {}, {(1, "a"): 2, 2: 3}),
        "shared": [shared, shared],
        "ordered": collections.OrderedDict(a=1),
        "counter": collections.Counter("aab"),
        "default": collections.defaultdict(list, a=[1]),
    }
    found = read(pickle.dumps(value, protocol))
    assert found == value
    assert type(found["ordered"]) is collections.OrderedDict
    assert found["shared"][0] is found["shared"][1]


def test_whatever_has_a_name_becomes_a_stand_in() -> None:
    found = read(pickle.dumps([HARMLESS["arguments"], Color.RED, Color, os.system, Nested(a=[1])]))
    arguments, red, color, function, nested = found
    assert (type(arguments), arguments.name, arguments.state["lr"]) == (Instance, "argparse.Namespace", 0.1)
    assert (type(red), type(color), color.text) == (Instance, Name, f"{__name__}.Color")
    assert (type(function), function.text) == (Name, "posix.system")
    assert (type(nested), nested.items) == (Instance, ["a", [1]])


def test_harmless_objects_lie_in_a_file_until_they_are_wanted(tmp_path: Path) -> None:
    torch.save(
        {"model": {"weight": torch.arange(6.0)}, "lr": 0.1, "list": [1, Color.RED], **HARMLESS}, tmp_path / "x.pt"
    )
    reader = CheckpointReader(tmp_path / "x.pt")
    manifest = reader.read_manifest()
    assert manifest.values() == {"lr": 0.1}
    assert {*manifest.objects} == {"lr", "list", *HARMLESS}
    assert reader.read_values({"lr": manifest.objects["lr"]}) == {"lr": 0.1}
    for name, cls in {"arguments": "argparse.Namespace", "color": "Color", "list": "Color", "own": "Nested"}.items():
        with pytest.raises(UnsafeCheckpointError, match=rf"'{name}' cannot be read.*{cls}.*weights_only=False"):
            reader.read_values({name: manifest.objects[name]})


def test_harmless_objects_lie_in_stock_metadata_where_nothing_is_needed_of_them(tmp_path: Path) -> None:
    dcp.save({"weight": torch.arange(6.0)}, checkpoint_id=tmp_path)
    path = tmp_path / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for planner_data in (HARMLESS, Color.RED, SavePlan([]), argparse.Namespace()):
        metadata.planner_data = planner_data
        assert [*dcp_metadata.to_manifest(dcp_metadata.loads(pickle.dumps(metadata))).tensors] == ["weight"]
    metadata.planner_data = {"weight": Color.RED}
    with pytest.raises(UnsafeCheckpointError, match=r"Color.*trusted=True"):
        dcp_metadata.to_manifest(dcp_metadata.loads(pickle.dumps(metadata)))
    metadata.planner_data, metadata.state_dict_metadata["weight"] = None, SavePlan([])
    with pytest.raises(UnsafeCheckpointError, match=r"SavePlan.*trusted=True"):
        dcp_metadata.loads(pickle.dumps(metadata))


def test_a_call_of_an_unknown_function_is_refused_even_where_nobody_wants_it(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path}/flag",)

    torch.save({"weight": torch.zeros(2), "x": [Attack()]}, tmp_path / "x.pt")
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.system"):
        CheckpointReader(tmp_path / "x.pt").read_manifest()
    assert not (tmp_path / "flag").exists()


def test_objects_are_read_as_torch_load_reads_them() -> None:
    decoder = Decoder(ExtensionRegistry(), trusted=False)
    ordered = collections.OrderedDict(a=1)
    ordered._metadata = 2  # type: ignore[attr-defined]
    values = [
        torch.Size([1, 2]),
        torch.bfloat16,
        [torch.arange(3), {"x": torch.ones(2)}],
        ordered,
        io.BytesIO(b"abc"),
        b"",
    ]
    for value in values:
        stream = io.BytesIO()
        torch.save(value, stream)
        found = decoder.load(stream.getvalue(), "value")
        with torch.serialization.safe_globals([io.BytesIO, bytes]):
            stream.seek(0)
            reference = torch.load(stream, weights_only=True)
        assert type(found) is type(reference)
        assert str(found) == str(reference) or type(value) is io.BytesIO
        assert getattr(found, "__dict__", {}) == getattr(reference, "__dict__", {})


# ------------------------------------------------------------------------------------------------------ limits


def test_a_limit_is_named_with_the_variable_that_raises_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dcp.save({"weight": torch.arange(6.0)}, checkpoint_id=tmp_path)
    data = (tmp_path / ".metadata").read_bytes()
    monkeypatch.setenv("RAY_CKPT_MAX_PICKLE_OPERATIONS", "20")
    with pytest.raises(FormatError, match=r"the limit is 20\. .*RAY_CKPT_MAX_PICKLE_OPERATIONS to a higher number"):
        dcp_metadata.loads(data)
    monkeypatch.setenv("RAY_CKPT_MAX_PICKLE_OPERATIONS", "2000")
    assert dcp_metadata.loads(data)
    monkeypatch.setenv("RAY_CKPT_MAX_PICKLE_OPERATIONS", "many")
    with pytest.raises(UsageError, match="RAY_CKPT_MAX_PICKLE_OPERATIONS='many' is no number"):
        dcp_metadata.loads(data)


def test_a_record_is_measured_before_it_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b" " * 1000)
    monkeypatch.setattr(limits, "RECORD_BYTES", Limit("record_bytes", 999, "bytes"))
    with pytest.raises(FormatError, match=r"has 1000 bytes; the limit is 999\..*RAY_CKPT_MAX_RECORD_BYTES"):
        Storage(tmp_path).read_bytes("manifest.json")
    monkeypatch.setenv("RAY_CKPT_MAX_RECORD_BYTES", "1000")
    assert len(Storage(tmp_path).read_bytes("manifest.json")) == 1000


def test_a_quote_is_short_and_printable_whatever_it_quotes() -> None:
    endless: list[Any] = []
    endless.append(endless)
    wide: Any = 1
    for _ in range(60):
        wide = (wide, wide)
    for value in (
        "x" * 10**6,
        "\x1b[2J\n",
        b"\x00" * 10**6,
        10**5000,
        endless,
        wide,
        {"a": "b" * 1000},
        list(range(10**5)),
    ):
        assert len(quoted(value)) <= 80
        assert quoted(value).isprintable()
    assert quoted("model.weight") == "'model.weight'"


def test_messages_are_one_printable_line_that_keeps_its_end() -> None:
    message = str(FormatError(f"\x1b[2J{'x' * 10**6}\n: do this"))
    assert len(message) < 2000
    assert message.isprintable()
    assert message.startswith(r"\x1b[2Jxxx")
    assert message.endswith(r"xxx\n: do this")


# ------------------------------------------------------------------------------------------------------- cover


def grid(rng: random.Random, shape: tuple[int, ...], depth: int, offsets: tuple[int, ...] | None = None) -> list[Box]:
    """A tensor cut at random, again and again."""
    offsets = offsets or (0,) * len(shape)
    dim = rng.randrange(len(shape))
    if not depth or shape[dim] < 2:
        return [Box(offsets, shape)]
    cut = rng.randrange(1, shape[dim])
    first = (*shape[:dim], cut, *shape[dim + 1 :])
    second = (*shape[:dim], shape[dim] - cut, *shape[dim + 1 :])
    moved = (*offsets[:dim], offsets[dim] + cut, *offsets[dim + 1 :])
    return grid(rng, first, depth - 1, offsets) + grid(rng, second, depth - 1, moved)


@pytest.mark.parametrize("seed", range(30))
def test_boxes_cover_a_tensor_exactly_when_each_element_is_in_one(seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.randrange(1, 12) for _ in range(rng.randrange(1, 5)))
    good = grid(rng, shape, 4)
    rng.shuffle(good)
    assert check_cover(shape, good) is None
    assert "missing" in (check_cover(shape, good[1:]) or "") or len(good) == 1
    assert check_cover(shape, [*good, good[0]]) is not None
    other = rng.choice(good)
    moved = [*good[1:], Box(other.offsets, good[0].sizes)]
    counts = np.zeros(shape, dtype=int)
    for box in moved:
        counts[tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))] += 1
    if all(box.fits(shape) for box in moved):
        assert (check_cover(shape, moved) is None) == bool((counts == 1).all())


def test_as_many_elements_as_wanted_are_no_cover() -> None:
    """Two overlap where two are missing: their numbers add up."""
    quarters = [Box((0, 0), (2, 2)), Box((0, 2), (2, 2)), Box((2, 0), (2, 2)), Box((1, 1), (2, 2))]
    assert "overlap" in (check_cover((4, 4), quarters) or "")


def test_thousands_of_boxes_that_are_hard_to_tell_apart_are_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "_MAX_COMPARED", 1000)
    diagonal = [Box((place, 3000 - place), (3000, 1)) for place in range(3000)]
    assert "are missing" in (check_cover((6000, 6000), diagonal) or "")


# ------------------------------------------------------------------------------------------------------- links


def test_links_work_inside_and_of_the_directory_itself(tmp_path: Path) -> None:
    dcp.save({"weight": torch.arange(6.0)}, checkpoint_id=tmp_path / "a")
    data = tmp_path / "a" / "__0_0.distcp"
    data.rename(tmp_path / "a" / "elsewhere")
    data.symlink_to("elsewhere")
    (tmp_path / "b").symlink_to("a")
    target = {"weight": torch.zeros(6)}
    dcp.load(target, storage_reader=dcp.FileSystemReader(tmp_path / "a"))
    for path in (tmp_path / "a", tmp_path / "b"):
        reader = CheckpointReader(path)
        assert [*reader.read_manifest().tensors] == ["weight"]
        assert reader.files.read_bytes("__0_0.distcp") == (tmp_path / "a" / "elsewhere").read_bytes()
    torch.save({"weight": torch.arange(6.0)}, tmp_path / "real.pt")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.pt").symlink_to(tmp_path / "real.pt")
    with pytest.raises(UnsafeCheckpointError, match=r"is a link to .*real\.pt, which leaves"):
        CheckpointReader(tmp_path / "c" / "x.pt").read_manifest()


def test_a_part_of_a_checkpoint_may_not_lie_elsewhere_but_a_step_of_a_store_may(tmp_path: Path) -> None:
    dcp.save({"weight": torch.arange(6.0)}, checkpoint_id=tmp_path / "elsewhere")
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "pytorch_model_fsdp_0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeCheckpointError, match=r"\.metadata is a link to"):
        CheckpointReader(tmp_path / "accelerate").read_manifest()
    ray_ckpt.save({"weight": torch.arange(6.0)}, tmp_path / "ours")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "step-3").symlink_to(tmp_path / "ours")
    state = {"weight": torch.zeros(6)}
    ray_ckpt.load(state, tmp_path / "store")
    assert state["weight"].tolist() == [0, 1, 2, 3, 4, 5]
    assert [*ray_ckpt.CheckpointStore(tmp_path / "store").manifest(3).tensors] == ["weight"]


def test_a_snapshot_of_the_hub_consists_of_links_to_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "f00d").write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
    assert Storage(snapshot).read_bytes("model.safetensors") == b"weights"
    (snapshot / "other").symlink_to("../../../secret")
    (tmp_path / "secret").write_bytes(b"secret")
    with pytest.raises(UnsafeCheckpointError):
        Storage(snapshot).read_bytes("other")
