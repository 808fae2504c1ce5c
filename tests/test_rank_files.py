"""Checkpoints of one file per rank, by verl, accelerate and torch_checkpointing: read in any layout, or refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from ray_ckpt import TrainState, load
from ray_ckpt.dcp.reader import ArrowStorageReader
from ray_ckpt.errors import (
    CheckpointNotFoundError,
    FormatError,
    StateMismatchError,
    UnsafeCheckpointError,
)
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.placements import Split, placed_boxes
from ray_ckpt.state.hyperparameters import same
from tests.support import driver, rank_writers
from tests.support.ranks import run_ranks
from tests.test_shards import cases, laid_out

LAYOUTS = {"fsdp2": 2, "fsdp2.tp2": 4, "hsdp": 4, "fsdp1": 2}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    """Layout -> directory in verl's manner, and the whole tensors."""
    found = {}
    for layout, size in LAYOUTS.items():
        directory = tmp_path_factory.mktemp(layout)
        found[layout] = directory, run_ranks(rank_writers.write, size, directory, str(directory), layout)[0]
    return found


@pytest.fixture
def copied(written: Any, tmp_path: Path) -> Path:
    """A copy of verl's directory by two ranks, to damage."""
    shutil.copytree(written["fsdp2"][0], tmp_path / "copy", ignore=shutil.ignore_patterns("store-*"))
    return tmp_path / "copy"


def _as_accelerate(verl: Path) -> None:
    for rank in range(2):
        (verl / f"model_world_size_2_rank_{rank}.pt").rename(verl / f"pytorch_model_fsdp_0_rank{rank}.bin")
        (verl / f"optim_world_size_2_rank_{rank}.pt").rename(verl / f"optimizer_0_rank{rank}.bin")
        (verl / f"extra_state_world_size_2_rank_{rank}.pt").unlink()


def _as_torch_checkpointing(verl: Path) -> None:
    import pickle

    for rank in range(2):
        (verl / f"model_world_size_2_rank_{rank}.pt").rename(verl / f"model_{rank}.pt")
        (verl / f"optim_world_size_2_rank_{rank}.pt").rename(verl / f"my_optimizer_{rank}.pt")
        (verl / f"extra_state_world_size_2_rank_{rank}.pt").unlink()
        torch.save(7, verl / f"step_{rank}.pt")
    # A save that was made without what it calls a resharder tells nothing of its tensors.
    (verl / "metadata.pkl").write_bytes(pickle.dumps({"metadata": {}, "world_size": 2, "version": "2.0"}))


def _loaded(directory: Path, **options: Any) -> dict[str, torch.Tensor]:
    model = rank_writers.net(seed=1)
    optimizer = torch.optim.AdamW(model.parameters())
    load(TrainState(model, optimizer), directory, **({"only": ("model", "optim")} | options))
    assert optimizer.param_groups[0]["lr"] == 0.25 or options
    wholes = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        if state := optimizer.state[parameter]:
            wholes[f"{name} exp_avg"] = state["exp_avg"]
            assert state["step"] == 2
    return wholes


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp2.tp2", "hsdp"])
def test_files_of_ranks_load_into_one_process(written: Any, layout: str) -> None:
    directory, expected = written[layout]
    assert not torch.equal(rank_writers.net(seed=1)[0].weight, expected["0.weight"])
    assert _same(_loaded(directory), expected)


def test_files_of_four_ranks_load_into_two(written: Any, tmp_path: Path) -> None:
    directory, expected = written["fsdp2.tp2"]
    for found in run_ranks(rank_writers.load_sharded, 2, tmp_path, str(directory)):
        assert _same(found, expected)


def test_sharded_tensors_of_fsdp1(written: Any) -> None:
    directory, expected = written["fsdp1"]
    assert _same(_loaded(directory, only=("model",)), expected)


@pytest.mark.parametrize("rename", [_as_accelerate, _as_torch_checkpointing])
def test_the_manners_of_others(written: Any, copied: Path, rename: Any) -> None:
    rename(copied)
    assert _same(_loaded(copied, only=("model", "optim")), written["fsdp2"][1])


def test_a_value_as_a_whole_file(copied: Path) -> None:
    _as_torch_checkpointing(copied)
    assert driver.load({"step": 0}, ArrowStorageReader(copied)) == {"step": 7}


def test_what_each_rank_has_of_its_own_has_its_rank_in_the_name(written: Any, copied: Path) -> None:
    wanted = {"extra_state": {f"rank{rank}": {"rng": torch.zeros(3, dtype=torch.int64)} for rank in range(2)}}
    found = driver.load(wanted, ArrowStorageReader(copied))["extra_state"]
    assert [found[f"rank{rank}"]["rng"].tolist() for rank in range(2)] == [[0] * 3, [1] * 3]
    assert _same(_loaded(copied, only=None), written["fsdp2"][1])


def test_verls_scheduler_arrives_and_what_has_no_place_is_named(tmp_path: Path) -> None:
    first, second = run_ranks(rank_writers.write_as_verl, 2, tmp_path, str(tmp_path))
    differing = {name for name in first if not torch.equal(first[name], second[name])}
    assert differing == {"1.running_mean", "1.running_var"}
    for has_scheduler in (True, False):
        model = rank_writers.normed(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
        scheduler = rank_writers.decayed(optimizer)
        report = load(TrainState(model, optimizer, schedulers=scheduler if has_scheduler else ()), tmp_path)
        assert _same(dict(model.state_dict()), first)
        assert optimizer.param_groups[0]["lr"] == 0.0625
        assert scheduler.last_epoch == (2 if has_scheduler else 0)
        assert report.missing == report.unexpected == ()
        assert "model.1.running_mean, model.1.running_var: ranks have seen other batches, and the first" in report.lost
        assert "random generators (rng=True takes them) left out: extra_state.r" in report.lost
        assert ("schedulers left out: extra_state.lr_scheduler." in report.lost) != has_scheduler
    other = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    with pytest.raises(StateMismatchError, match="schedulers"):
        load(TrainState(model, optimizer, schedulers=other), tmp_path)


def test_each_ranks_own_data_loader(tmp_path: Path) -> None:
    """All of its state, what is the same on all ranks too, in the form that the loader shows."""
    run_ranks(rank_writers.write_loaders, 2, tmp_path, str(tmp_path))
    for rank, (state, note) in enumerate(run_ranks(rank_writers.load_loaders, 2, tmp_path, str(tmp_path), None)):
        assert same(state, rank_writers.Loader(10 + rank).state)
        assert note == "restored"
    for num_ranks, layout in ((1, None), (2, "fsdp2x2")):
        for state, note in run_ranks(rank_writers.load_loaders, num_ranks, tmp_path, str(tmp_path), layout):
            assert same(state, rank_writers.Loader().state)
            assert note is not None
            assert note.startswith("left as it was: nothing tells what the 2 ranks that saved it")


def _write_every_placement(rank: int, directory: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    tensors = {
        f"t{number}": laid_out(_whole(shape), mesh, placements) for number, (shape, placements) in enumerate(cases())
    }
    torch.save(tensors, Path(directory) / f"model_world_size_4_rank_{rank}.pt")


def _whole(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def test_every_placement(tmp_path: Path) -> None:
    run_ranks(_write_every_placement, 4, tmp_path, str(tmp_path))
    expected = {f"t{number}": _whole(shape) for number, (shape, _) in enumerate(cases())}
    found = driver.load(
        {"model": {name: torch.full_like(value, -1) for name, value in expected.items()}}, ArrowStorageReader(tmp_path)
    )["model"]
    assert len(expected) > 100
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]


# ---------------------------------------------------------------------------------------------------------- refusals


def _refusal(directory: Path, error: type[Exception] = FormatError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        _loaded(directory, **options)
    assert len(str(caught.value)) < 2000
    return str(caught.value)


def test_a_missing_file_is_missed(copied: Path) -> None:
    (copied / "optim_world_size_2_rank_1.pt").unlink()
    assert "by 2 ranks lacks the optim of rank 1" in _refusal(copied)


def test_a_missing_last_file_is_missed_where_names_do_not_count(copied: Path) -> None:
    _as_accelerate(copied)
    for name in ("pytorch_model_fsdp_0_rank1.bin", "optimizer_0_rank1.bin"):
        (copied / name).unlink()
    message = _refusal(copied)
    assert "'model.0.weight'" in message
    assert "30 of 60 elements are missing; no file of rank 1" in message


def test_files_of_several_sizes_are_refused(copied: Path) -> None:
    shutil.copy(copied / "model_world_size_2_rank_0.pt", copied / "model_world_size_4_rank_0.pt")
    assert "saves by 2, 4 ranks" in _refusal(copied)


def test_a_file_of_a_save_in_another_layout_is_refused(written: Any, copied: Path) -> None:
    shutil.copy(written["fsdp2.tp2"][0] / "model_world_size_4_rank_1.pt", copied / "model_world_size_2_rank_1.pt")
    message = _refusal(copied)
    assert "model_world_size_2_rank_1.pt" in message
    assert "of different numbers of ranks" in message


def test_the_same_shard_twice_is_refused(copied: Path) -> None:
    shutil.copy(copied / "model_world_size_2_rank_0.pt", copied / "model_world_size_2_rank_1.pt")
    assert "elements are missing" in _refusal(copied)


def test_a_file_of_another_step_is_refused(written: Any, copied: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    run_ranks(_write_later, 2, tmp_path, str(other))
    shutil.copy(other / "optim_world_size_2_rank_1.pt", copied)
    message = _refusal(copied)
    assert "'optim.state.0.step' is not sharded, and differs between optim_world_size_2_rank_0.pt and" in message


def _write_later(rank: int, directory: str) -> None:
    model = rank_writers.parallel("fsdp2", seed=0)
    optimizer = rank_writers._steps(model)
    for state in optimizer.state.values():
        state["step"] += 1
    torch.save(optimizer.state_dict(), Path(directory) / f"optim_world_size_2_rank_{rank}.pt")


def test_replicas_that_differ_are_refused(written: Any, tmp_path: Path) -> None:
    """Rank 1 of the second replica is of another save."""
    shutil.copytree(written["hsdp"][0], tmp_path / "copy", ignore=shutil.ignore_patterns("store-*"))
    other = tmp_path / "other"
    other.mkdir()
    run_ranks(_write_other_replica, 4, tmp_path, str(other))
    shutil.copy(other / "model_world_size_4_rank_3.pt", tmp_path / "copy")
    message = _refusal(tmp_path / "copy")
    assert "which should be replicas: they are of two saves" in message
    assert "model_world_size_4_rank_3.pt" in message


def _write_other_replica(rank: int, directory: str) -> None:
    model = rank_writers.parallel("hsdp", seed=5)
    torch.save(model.state_dict(), Path(directory) / f"model_world_size_4_rank_{rank}.pt")


def test_one_file_alone_points_to_its_directory(copied: Path) -> None:
    message = _refusal(copied / "model_world_size_2_rank_0.pt", only=("model",))
    assert "holds one rank's part of '0.weight'" in message
    assert "name the directory" in message


def test_flat_state_that_nobody_placed_is_refused(copied: Path) -> None:
    for rank in range(2):
        flat = {"state": {0: {"exp_avg": torch.full((4,), rank)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
        torch.save(flat, copied / f"optim_world_size_2_rank_{rank}.pt")
    assert "FSDP1's flat parameters" in _refusal(copied)


def test_unknown_classes_are_refused_by_name_and_never_imported(copied: Path) -> None:
    for rank in range(2):
        torch.save({"odd": _Odd(), "rng": torch.zeros(2)}, copied / f"extra_state_world_size_2_rank_{rank}.pt")
    _loaded(copied)
    with pytest.raises(UnsafeCheckpointError, match=r"tests\.test_rank_files\._Odd"):
        driver.load({"extra_state": {"odd": None}}, ArrowStorageReader(copied))


class _Odd:
    pass


def test_metadata_of_something_else(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "x_0.pt")
    (tmp_path / "metadata.pkl").write_bytes(b"\x80\x04}.")
    with pytest.raises(FormatError, match=r"metadata\.pkl is none of torch_checkpointing's"):
        load({}, tmp_path)


def test_numbered_files_without_metadata(written: Any, copied: Path, tmp_path: Path) -> None:
    _as_torch_checkpointing(copied)
    (copied / "metadata.pkl").unlink()
    assert _same(_loaded(copied, only=("model", "optim")), written["fsdp2"][1])
    epochs = tmp_path / "epochs"
    epochs.mkdir()
    for epoch in range(2):
        torch.save({"weight": torch.full((2,), epoch)}, epochs / f"epoch_{epoch}.pt")
    with pytest.raises(CheckpointNotFoundError, match=r"name the file: epoch_0\.pt, epoch_1\.pt"):
        load({"weight": torch.zeros(2)}, epochs)


def test_sizes_that_no_shard_has_cost_nothing() -> None:
    assert placed_boxes((1 << 60,), [Split(0, 1 << 20, 3)]) == [(Box((3 << 40,), (1 << 40,)), (0,))]
    with pytest.raises(FormatError, match="more than 100000 boxes"):
        placed_boxes((1 << 40,), [Split(0, 2, 0, 1 << 40)])
    with pytest.raises(FormatError, match="more than 100000 boxes"):
        placed_boxes((1 << 10, 1 << 10), [Split(0, 2, 0, 512), Split(1, 2, 0, 512)])
