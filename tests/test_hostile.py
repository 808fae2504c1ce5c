"""Checkpoints that mean harm, each read in a process of its own: one error of ours, in seconds, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ray_ckpt
from ray_ckpt.errors import RayCkptError
from tests.support import amplified, hostile
from tests.support.isolated import Outcome, Readers

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

MAX_SECONDS, MAX_HELD_BYTES = 5.0, 512 << 20
BATCH = 20

KNOWN = hostile.KNOWN | amplified.KNOWN


@pytest.fixture(scope="module")
def readers() -> Iterator[Readers]:
    with Readers() as readers:
        yield readers


def wrong(outcome: Outcome) -> bool:
    """Whether a read ended otherwise than it may, whatever the bytes."""
    return not (
        outcome.is_ours
        and outcome.seconds < MAX_SECONDS
        and outcome.held_bytes < MAX_HELD_BYTES
        and len(outcome.message) < 2000
        and outcome.message.isprintable()
    )


def test_each_known_kind_ends_in_an_error_of_ours(readers: Readers, tmp_path: Path) -> None:
    tasks = []
    for number, write in enumerate(KNOWN.values()):
        (tmp_path / str(number) / "step-1").mkdir(parents=True)
        tasks.append(("load", write(tmp_path / str(number) / "step-1")))
    outcomes = dict(zip(KNOWN, readers.read(tasks), strict=True))
    assert {name: outcome for name, outcome in outcomes.items() if wrong(outcome)} == {}
    assert {name for name, outcome in outcomes.items() if outcome.kind == "loaded"} == hostile.HARMLESS


@pytest.mark.parametrize("verb", ["verify", "save", "clean"])
def test_other_verbs_read_records_as_carefully(readers: Readers, tmp_path: Path, verb: str) -> None:
    tasks = []
    for name in (
        "memo index",
        "deep key",
        "wide key",
        "FIFO as a record",
        "sparse record",
        "deep record",
        "diagonal chunks",
    ):
        (tmp_path / name / "step-1").mkdir(parents=True)
        tasks.append((verb, hostile.KNOWN[name](tmp_path / name / "step-1")))
    outcomes = dict(zip(tasks, readers.read(tasks), strict=True))
    assert {task: outcome for task, outcome in outcomes.items() if wrong(outcome)} == {}


def test_a_record_may_claim_any_length_of_a_file(tmp_path: Path) -> None:
    """`verify` compares what lies between the entries with zeros, as many as there are bytes."""

    def claim(record: dict[str, Any]) -> None:
        record["files"] = dict.fromkeys(record["files"], 1 << 60)

    report = ray_ckpt.verify(hostile.rewritten(claim)(tmp_path))
    assert any("saved with 1152921504606846976" in damage.problem for damage in report.damages)


@pytest.mark.parametrize("name", ["\ud800", "x" * 5000, "\x1b[2J"])
def test_a_record_may_name_files_that_no_file_system_has(tmp_path: Path, name: str) -> None:
    def rename(record: dict[str, Any]) -> None:
        record["files"] = dict.fromkeys([name], sum(record["files"].values()))
        for entry in (*record["tensors"]["model.w"]["chunks"], *record["objects"].values()):
            entry["file"] = name

    state = {"model": {"w": torch.zeros(2, 3)}, "lr": 0.0}
    with pytest.raises(RayCkptError) as raised:
        ray_ckpt.load(state, hostile.rewritten(rename)(tmp_path))
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("kind", hostile.KINDS)
@pytest.mark.parametrize("count", [10, pytest.param(400, marks=pytest.mark.slow)])
def test_made_up_checkpoints(readers: Readers, tmp_path: Path, kind: str, count: int) -> None:
    for first in range(0, count, BATCH):
        numbers = range(first, min(first + BATCH, count))
        tasks = [("load", hostile.make(kind, number, tmp_path / str(number))) for number in numbers]
        outcomes = dict(zip(numbers, readers.read(tasks), strict=True))
        assert {number: outcome for number, outcome in outcomes.items() if wrong(outcome)} == {}
