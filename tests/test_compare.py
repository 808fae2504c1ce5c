"""compare: whether ranks hold, in whatever layout, what a checkpoint holds, by checksums and fingerprints alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ray_ckpt import CheckpointStore, CompareReport, TrainState, UsageError, compare, load, save
from tests.support.ranks import run_ranks


def whole() -> dict[str, Any]:
    return {"model": {"matrix": torch.arange(7 * 9.0).reshape(7, 9), "bias": torch.arange(3)}, "lr": 0.1}


def compare_sharded(rank: int, path: str, dim: int | None, flipped_on: int | None) -> CompareReport:
    """Sharded along a dim, or replicated; one bit of one rank's part may be flipped."""
    mesh = init_device_mesh("cpu", (2,))
    state = whole()
    matrix = distribute_tensor(state["model"]["matrix"], mesh, [Replicate() if dim is None else Shard(dim)])
    if flipped_on == rank:
        matrix.to_local().view(torch.int32)[-1, -1] ^= 1
    state["model"]["matrix"] = matrix
    return compare(state, path)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_layouts_do_not_matter_and_one_bit_does(tmp_path: Path, dim: int | None) -> None:
    save(whole(), tmp_path / "saved", fingerprints=True)
    for rank in (None, 0, 1):
        reports = run_ranks(compare_sharded, 2, tmp_path, str(tmp_path / "saved"), dim, rank)
        assert reports[0] == reports[1]
        assert reports[0].equal == (rank is None)
        assert set(reports[0].differing) == (set() if rank is None else {"model.matrix"})
        assert reports[0].num_compared == 3
    if dim is None:
        assert "replicas differ" in reports[0].differing["model.matrix"]


def test_a_flipped_bit_in_any_of_ten_thousand_tensors_is_found(tmp_path: Path) -> None:
    state = {f"layer{number}.weight": torch.full((16,), float(number)) for number in range(10_000)}
    save(state, tmp_path / "saved", fingerprints=True)
    assert compare(state, tmp_path / "saved").equal
    name = random.Random(0).choice(sorted(state))
    state[name].view(torch.int32)[7] ^= 1 << 5
    assert compare(state, tmp_path / "saved").differing == {name: "other elements"}


def test_what_else_can_differ_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(whole(), store, 1, fingerprints=True)
    state = whole()
    state["model"]["matrix"] = state["model"]["matrix"].double()
    state["model"]["bias"] = torch.arange(4)
    state |= {"lr": 0.2, "new": torch.ones(2)}
    report = compare(state, store)
    assert report.step == 1
    assert report.differing == {
        "model.matrix": "float64[7, 9] instead of float32[7, 9]",
        "model.bias": "int64[4] instead of int64[3]",
        "lr": "another value",
    }
    assert (report.unexpected, report.missing) == (("new",), ())
    assert str(report).startswith(f"NOT EQUAL to {tmp_path / 'step-1'} (step 1): differ: lr (another value), model.")
    del state["model"]["matrix"]
    assert compare(state, store).missing == ("model.matrix",)
    assert compare({"lr": 0.1}, store, only=("lr",)).equal
    with pytest.raises(UsageError, match="one text"):
        compare({"lr": 0.1}, store, only="lr")


def large() -> dict[str, Any]:
    """A row has as many bytes as a checksum block."""
    return {"matrix": torch.arange(64 * 1024.0).reshape(64, 1024), "half": torch.arange(6000).bfloat16()}


def compare_blocks(rank: int, path: str, flipped_on: int | None) -> list[CompareReport]:
    """Without fingerprints: whole blocks, in rows of two ranks; parts of blocks, in columns."""
    mesh, reports = init_device_mesh("cpu", (2,)), []
    for dim in (0, 1):
        state = large()
        matrix = distribute_tensor(state["matrix"], mesh, [Shard(dim)])
        if flipped_on == rank:
            matrix.to_local().view(torch.int32)[-1, -1] ^= 1
        reports.append(compare({**state, "matrix": matrix}, path))
    return reports


def test_whole_blocks_are_compared_by_the_checksums_of_any_checkpoint(tmp_path: Path) -> None:
    save(large(), tmp_path / "saved")
    for flipped_on in (None, 0, 1):
        [(rows, columns), others] = run_ranks(compare_blocks, 2, tmp_path, str(tmp_path / "saved"), flipped_on)
        assert others == [rows, columns]
        assert rows.equal == (flipped_on is None)
        assert rows.differing == ({} if flipped_on is None else {"matrix": "other elements"})
        # What only fingerprints tell is not said to be equal.
        assert (columns.equal, columns.unknown, dict(columns.differing)) == (False, ("matrix",), {})


def test_every_bit_of_whole_blocks_counts(tmp_path: Path) -> None:
    save(large(), tmp_path / "saved")
    random.seed(1)
    for name, byte in [(name, random.randrange(large()[name].nbytes)) for name in ("matrix", "half") for _ in range(9)]:
        state = large()
        assert compare(state, tmp_path / "saved").equal
        state[name].view(torch.uint8).view(-1)[byte] ^= 1 << byte % 8
        assert compare(state, tmp_path / "saved").differing == {name: "other elements"}


def compare_a_part(rank: int, path: str) -> CompareReport:
    state = large()
    return compare({"matrix": state["matrix"]} if rank == 0 else {"half": state["half"]}, path)


def compare_replicas(rank: int, path: str) -> CompareReport:
    state = large()
    state["half"][rank] += rank
    return compare(state, path)


def test_what_no_rank_holds_is_missing_and_replicas_have_to_agree(tmp_path: Path) -> None:
    save({**large(), "other": torch.ones(3)}, tmp_path / "saved")
    for report in run_ranks(compare_a_part, 2, tmp_path, str(tmp_path / "saved")):
        assert (report.missing, dict(report.differing)) == (("other",), {})
    for report in run_ranks(compare_replicas, 2, tmp_path, str(tmp_path / "saved")):
        assert "replicas differ" in report.differing["half"]


def test_a_train_state_equals_what_it_loaded_until_it_steps(tmp_path: Path) -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer, TrainState]:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        optimizer = torch.optim.Adam(model.parameters())
        return model, optimizer, TrainState(model, optimizer, step=3)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()

    model, optimizer, state = build()
    train(model, optimizer)
    save(state, tmp_path / "saved", fingerprints=True)
    other_model, other_optimizer, other = build()
    assert not compare(other, tmp_path / "saved").equal
    load(other, tmp_path / "saved")
    assert compare(other, tmp_path / "saved").equal
    train(other_model, other_optimizer)
    assert "optim.state.0.weight.exp_avg" in compare(other, tmp_path / "saved").differing
