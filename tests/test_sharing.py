"""Bytes that several ranks want are read once, arrive as they were saved, and fail for all ranks by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_ckpt.protocol.share_plan import Share
from tests.support.ranks import RanksError, run_ranks
from tests.support.s3 import run_s3
from tests.support.sharing_ranks import (
    KINDS,
    NUM_RANKS,
    load_all,
    load_beside_one_that_does_not_read,
    load_beside_one_that_sends_nothing,
    load_damaged,
    load_flipped,
    num_bytes,
    save_rows,
)


def test_every_layout_gets_what_was_saved(tmp_path: Path) -> None:
    target = str(tmp_path / "run")
    run_ranks(save_rows, NUM_RANKS, tmp_path, target)
    run_ranks(load_all, NUM_RANKS, tmp_path, {(kind, True): target for kind in KINDS})


@pytest.mark.slow
def test_an_object_store_is_asked_once_for_every_byte(tmp_path: Path) -> None:
    """How many times the checkpoint was read, by layout, alone and shared."""
    with run_s3() as s3:
        ways: tuple[Share, ...] = ("auto", False)
        names = {(kind, share): f"{kind}-{share}" for kind in KINDS for share in ways}
        run_ranks(save_rows, NUM_RANKS, tmp_path, *(s3.uri(name) for name in names.values()))
        s3.reset()
        run_ranks(load_all, NUM_RANKS, tmp_path, {key: s3.uri(name) for key, name in names.items()})
        sent = {key: s3.sent_below(name) / num_bytes() for key, name in names.items()}
        heads = {key: s3.requests_below(name, "HEAD") for key, name in names.items()}
        manifests = {key: s3.requests_by_path["GET", f"/bucket/{name}/manifest.json"] for key, name in names.items()}
    assert all(sent[kind, "auto"] <= 1.02 for kind in KINDS), sent
    alone = {kind: round(sent[kind, False], 1) for kind in KINDS}
    assert alone == {"ddp": 4.0, "hsdp2x2": 2.0, "columns": 4.0, "mixed": 3.0, "stages": 1.3, "cast": 4.0}
    # One for each of the four files that a rank opens, however many threads read it, and to find the checkpoint.
    assert max(heads.values()) <= NUM_RANKS * 4 + 3, heads
    assert set(manifests.values()) == {1}


def test_damage_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    """Of a rank that reads, before anybody is sent anything."""
    target = tmp_path / "run"
    run_ranks(save_rows, NUM_RANKS, tmp_path, str(target))
    damaged = sorted(target.glob("*.distcp"))[1]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    told = run_ranks(load_damaged, NUM_RANKS, tmp_path, str(target))
    assert len({text.partition("IntegrityError")[2] for text in told}) == 1
    assert all(f"IntegrityError: {damaged.name}" in text or damaged.name in text for text in told), told
    assert sum("failed on rank" in text for text in told) == NUM_RANKS
    damaged.unlink()
    told = run_ranks(load_damaged, NUM_RANKS, tmp_path, str(target))
    assert all("StorageError" in text and damaged.name in text for text in told)


@pytest.mark.slow
def test_no_flipped_bit_is_loaded_by_any_rank(tmp_path: Path) -> None:
    target = tmp_path / "run"
    run_ranks(save_rows, NUM_RANKS, tmp_path, str(target))
    first, *others = run_ranks(load_flipped, NUM_RANKS, tmp_path, str(target), 100)
    assert all(found == first for found in others)
    assert not [outcome for outcome in first if outcome.startswith("wrong")]
    assert len([outcome for outcome in first if outcome.endswith("Error")]) > 50


@pytest.mark.slow
def test_a_rank_that_does_not_read_is_named_and_the_group_goes_on(tmp_path: Path) -> None:
    target = tmp_path / "run"
    run_ranks(save_rows, NUM_RANKS, tmp_path, str(target))
    told = run_ranks(load_beside_one_that_does_not_read, NUM_RANKS, tmp_path, str(target), str(tmp_path / "gate"))
    assert all(text.startswith("load failed on rank 1: not heard of within 6.0 s") for text in told), told


@pytest.mark.slow
def test_a_rank_that_is_lost_amid_a_window_ends_the_wait_of_the_others(tmp_path: Path) -> None:
    target, done = tmp_path / "run", tmp_path / "done"
    done.mkdir()
    run_ranks(save_rows, NUM_RANKS, tmp_path, str(target))
    with pytest.raises(RanksError, match=r"rank 1: died with exit code 0"):
        run_ranks(load_beside_one_that_sends_nothing, NUM_RANKS, tmp_path, str(target), str(done))
    told = {path.name: path.read_text() for path in done.iterdir()}
    assert set(told) == {"0", "2", "3"}
    assert all("rank 1" in text for text in told.values()), told
