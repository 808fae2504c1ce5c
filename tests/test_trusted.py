"""Code runs from a checkpoint when `trusted=True` asks for it, and only then; what nobody wants is not looked at."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner

from ray_ckpt import convert, diff, export, inspect, load, resume, save, scan_nonfinite, tensor_statistics, verify
from ray_ckpt.cli.main import cli
from ray_ckpt.errors import StateMismatchError, UnsafeCheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Attack:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.path), 0o777, True)


def write_stock(directory: Path, flag: Path) -> None:
    """A stock checkpoint whose `.metadata` runs code when it is unpickled."""
    dcp.save({"weight": torch.arange(6.0)}, checkpoint_id=directory, no_dist=True)
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.planner_data["more"] = Attack(flag)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


READERS: dict[str, Callable[..., object]] = {
    "load": lambda path, **options: load({"weight": torch.zeros(6)}, path, **options),
    "verify": verify,
    "inspect": inspect,
    "tensor_statistics": lambda path, **options: tensor_statistics(path, "weight", **options),
    "scan_nonfinite": scan_nonfinite,
    "diff": lambda path, **options: diff(path, path, **options),
    "export": lambda path, **options: export(path, path.parent / "exported", to="dcp", **options),
    "convert": lambda path, **options: convert(path, path.parent / "converted", **options),
}


@pytest.mark.parametrize("name", READERS)
def test_metadata_runs_nothing_unless_it_is_trusted(tmp_path: Path, name: str) -> None:
    flag = tmp_path / "flag"
    write_stock(tmp_path / "at", flag)
    with pytest.raises(UnsafeCheckpointError, match=r"makedirs.*say trusted=True"):
        READERS[name](tmp_path / "at")
    assert not flag.exists()
    READERS[name](tmp_path / "at", trusted=True)
    assert flag.exists()  # the attack works


@pytest.mark.parametrize("command", ["inspect", "verify", "diff", "export --to dcp", "import"])
def test_the_command_has_it_too(tmp_path: Path, command: str) -> None:
    write_stock(tmp_path / "at", tmp_path / "flag")
    arguments = [*command.split(), str(tmp_path / "at")]
    if command not in ("inspect", "verify"):
        arguments.append(str(tmp_path / ("at" if command == "diff" else "target")))
    refused = CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert isinstance(refused.exception, UnsafeCheckpointError)
    assert not (tmp_path / "flag").exists()
    assert CliRunner().invoke(cli, [*arguments, "--trusted"], standalone_mode=False).return_value == 0
    assert (tmp_path / "flag").exists()


@pytest.mark.parametrize("writer", ["ours", "stock"])
def test_an_object_is_made_when_it_is_trusted(tmp_path: Path, writer: str) -> None:
    saved = {"weight": torch.arange(6.0), "arguments": argparse.Namespace(lr=0.5)}
    save(saved, tmp_path, 3) if writer == "ours" else dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    state: dict[str, Any] = {"weight": torch.zeros(6), "arguments": None}
    with pytest.raises(UnsafeCheckpointError, match=r"'arguments' would run argparse.Namespace.*say trusted=True"):
        load(state, tmp_path)
    assert not state["weight"].any()
    if writer == "ours":
        resume(state, tmp_path, trusted=True)
    else:
        load(state, tmp_path, trusted=True)
    assert state["arguments"].lr == 0.5
    assert state["weight"].tolist() == list(range(6))


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


@pytest.mark.parametrize("key_map", [None, {"w": "weight"}, lambda name: "weight" if name == "w" else name])
def test_objects_that_a_dict_does_not_ask_for_are_not_read(tmp_path: Path, key_map: Any) -> None:
    counter = Counter()
    counter.count = 7
    saved = {"weight": torch.arange(6.0), "arguments": argparse.Namespace(), "nested": {"a": 1, "b": Counter}}
    save({**saved, "counter": counter}, tmp_path)
    name = "weight" if key_map is None else "w"
    state: dict[str, Any] = {name: torch.zeros(6), "nested": {"a": 0}, "counter": Counter()}
    report = load(state, tmp_path, key_map=key_map, strict=False)
    assert report.unexpected == ("arguments", "nested.b")
    assert (state[name].tolist(), state["nested"], state["counter"].count) == (list(range(6)), {"a": 1}, 7)
    with pytest.raises(StateMismatchError, match=r"arguments: saved a value, not wanted"):
        load(state, tmp_path, key_map=key_map)
