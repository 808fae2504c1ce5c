"""Comparing what was saved with what was loaded: equal only when every name, bit and value is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ray_ckpt.format.boxes import Box
from ray_ckpt.format.fingerprint import Fingerprint
from ray_ckpt.format.fingerprinting import fingerprint
from ray_ckpt.format.snapshot import ABSENT, Mismatch, Snapshot, compare
from tests.test_fingerprint import fingerprint_part


def rows(whole: torch.Tensor, start: int, end: int) -> Fingerprint:
    """What a rank that holds these rows of a matrix reports."""
    return fingerprint_part(whole, Box((start, 0), (end - start, whole.shape[1])))


WEIGHT = torch.arange(12.0).reshape(4, 3)


@pytest.fixture
def saved() -> list[Snapshot]:
    """Two pipeline stages."""
    return [
        Snapshot(0, {"model.a": fingerprint(WEIGHT)}, {"optim.a.lr": 0.001, "optim.a.betas": (0.9, 0.999)}),
        Snapshot(1, {"model.b": fingerprint(WEIGHT + 1)}, {"optim.b.lr": 0.002}),
    ]


@pytest.fixture
def loaded() -> list[Snapshot]:
    """The same as two FSDP shards of everything."""
    values = {"optim.a.lr": 0.001, "optim.a.betas": (0.9, 0.999), "optim.b.lr": 0.002}
    return [
        Snapshot(rank, {"model.a": rows(WEIGHT, *cut), "model.b": rows(WEIGHT + 1, *cut)}, dict(values))
        for rank, cut in enumerate([(0, 3), (3, 4)])
    ]


def test_equal_states_in_different_layouts_are_equal(saved: list[Snapshot], loaded: list[Snapshot]) -> None:
    comparison = compare(saved, loaded)
    assert comparison.mismatches == ()
    assert (comparison.tensors_compared, comparison.objects_compared) == (2, 3)


def test_a_changed_bit_in_one_shard_is_found(saved: list[Snapshot], loaded: list[Snapshot]) -> None:
    changed = WEIGHT.clone()
    changed.view(torch.int32)[3, 2] ^= 1
    loaded[1].fingerprints["model.a"] = rows(changed, 3, 4)
    [mismatch] = compare(saved, loaded).mismatches
    assert mismatch.name == "model.a"
    assert mismatch.expected == fingerprint(WEIGHT).digest
    assert mismatch.found == fingerprint(changed).digest
    assert mismatch.ranks == (0, 1)


def test_a_missing_shard_is_found(saved: list[Snapshot], loaded: list[Snapshot]) -> None:
    del loaded[1].fingerprints["model.b"]
    [mismatch] = compare(saved, loaded).mismatches
    assert mismatch == Mismatch(
        "model.b",
        fingerprint(WEIGHT + 1).digest,
        "incomplete fingerprint: 3 of 12 elements are missing",
        (0,),
    )


def test_replicas_that_differ_are_found_even_when_both_sides_agree(saved: list[Snapshot]) -> None:
    torn = [*saved, replace(saved[0], rank=2, fingerprints={"model.a": fingerprint(WEIGHT + 5)})]
    [mismatch] = compare(torn, torn).mismatches
    assert mismatch.name == "model.a"
    assert "replicas differ" in mismatch.expected
    assert mismatch.ranks == (0, 2)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [("optim.b.lr", 0.001, "0.001"), ("optim.a.betas", [0.9, 0.999], "[0.9, 0.999]"), ("optim.b.lr", None, "None")],
)
def test_a_changed_value_is_found(
    saved: list[Snapshot], loaded: list[Snapshot], name: str, value: object, found: str
) -> None:
    expected = repr(loaded[0].values[name])
    for snapshot in loaded:
        snapshot.values[name] = value
    assert compare(saved, loaded).mismatches == (Mismatch(name, expected, found, (0, 1)),)


def test_values_on_which_ranks_disagree_are_found(saved: list[Snapshot], loaded: list[Snapshot]) -> None:
    loaded[1].values["optim.b.lr"] = 0.003
    assert compare(saved, loaded).mismatches == (Mismatch("optim.b.lr", "0.002", "0.002 or 0.003", (0, 1)),)


def test_names_on_one_side_only_are_found(saved: list[Snapshot], loaded: list[Snapshot]) -> None:
    del saved[0].fingerprints["model.a"]
    for snapshot in loaded:
        del snapshot.values["optim.a.lr"]
    mismatches = compare(saved, loaded).mismatches
    assert [(m.name, m.expected == ABSENT, m.found == ABSENT, m.ranks) for m in mismatches] == [
        ("model.a", True, False, (0, 1)),
        ("optim.a.lr", False, True, (0,)),
    ]
