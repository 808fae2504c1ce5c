"""The verbs in one process, without a process group: what arrives, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

import ray_ckpt
from ray_ckpt.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    IntegrityError,
    StateMismatchError,
    UsageError,
)
from ray_ckpt.format.manifest import MANIFEST_NAME, Manifest
from ray_ckpt.protocol.holdings import Holdings
from ray_ckpt.protocol.host_copy import HostCopy
from ray_ckpt.recipes.model import PipelineModel
from ray_ckpt.state.train_state import TrainState
from tests.support.ranks import run_ranks
from tests.test_state import fresh, train, trained


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    source, target = trained(), fresh()
    report = ray_ckpt.save(source, str(tmp_path / "run"))
    assert report.total_bytes == sum(path.stat().st_size for path in (tmp_path / "run").glob("*.distcp"))
    assert (report.num_files, report.uri) == (1, str(tmp_path / "run"))
    assert source.snapshot(0) != target.snapshot(0)
    ray_ckpt.load(target, str(tmp_path / "run"))
    assert source.snapshot(0) == target.snapshot(0)
    train(source, 2)
    train(target, 2)
    assert source.snapshot(0) == target.snapshot(0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_stock_dcp_wrote_is_loaded_with_every_learning_rate(tmp_path: Path) -> None:
    source, target = trained(), fresh()
    dcp.save(source.state_dict(), storage_writer=FileSystemWriter(tmp_path / "run"), no_dist=True)
    ray_ckpt.load(target, str(tmp_path / "run"))
    assert source.snapshot(0) == target.snapshot(0)


def test_a_second_save_needs_overwrite(tmp_path: Path) -> None:
    first, second = trained(), trained(steps=3)
    ray_ckpt.save(first, str(tmp_path / "run"))
    with pytest.raises(CheckpointExistsError, match="already holds a committed checkpoint"):
        ray_ckpt.save(second, str(tmp_path / "run"))
    target = fresh()
    ray_ckpt.load(target, str(tmp_path / "run"))
    assert first.snapshot(0) == target.snapshot(0)
    ray_ckpt.save(second, str(tmp_path / "run"), overwrite=True)
    target = fresh()
    ray_ckpt.load(target, str(tmp_path / "run"))
    assert second.snapshot(0) == target.snapshot(0)


def test_a_missing_checkpoint_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        ray_ckpt.load(fresh(), str(tmp_path / "nothing"))


def test_steps_of_a_store_are_saved_by_number_and_the_latest_committed_one_is_loaded(tmp_path: Path) -> None:
    states = {step: trained(steps=step) for step in (2, 10, 9)}
    for step, state in states.items():
        report = ray_ckpt.save(state, tmp_path, step=step)
        assert report.uri == str(tmp_path / f"step-{step}")
    # An attempt that was never committed does not count.
    (tmp_path / "step-11").mkdir()
    for given in (tmp_path, ray_ckpt.CheckpointStore(tmp_path)):
        latest, ninth = fresh(), fresh()
        ray_ckpt.load(latest, given)
        ray_ckpt.load(ninth, given, step=9)
        assert latest.snapshot(0) == states[10].snapshot(0)
        assert ninth.snapshot(0) == states[9].snapshot(0)
    assert states[9].snapshot(0) != states[10].snapshot(0)
    with pytest.raises(CheckpointExistsError):
        ray_ckpt.save(states[2], ray_ckpt.CheckpointStore(tmp_path), step=2)
    with pytest.raises(UsageError, match=r"which step of .* is to be saved\? Say save\(\.\.\., step=N\)"):
        ray_ckpt.save(states[2], ray_ckpt.CheckpointStore(tmp_path))
    for step in (11, 12):
        with pytest.raises(CheckpointNotFoundError):
            ray_ckpt.load(fresh(), tmp_path, step=step)


@pytest.mark.parametrize(
    ("dim", "layers", "dtype", "message"),
    [
        (7, 2, torch.float32, r"model\.layer1\.bias: saved float32\[5\], wanted float32\[7\]"),
        (5, 1, torch.float32, r"model\.layer2\.bias: saved float32\[5\], not wanted"),
        (5, 2, torch.bfloat16, r"model\.layer1\.bias: saved float32\[5\], wanted bfloat16\[5\]"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_left_alone(
    tmp_path: Path, dim: int, layers: int, dtype: torch.dtype, message: str
) -> None:
    ray_ckpt.save(trained(), str(tmp_path / "run"))
    model = PipelineModel(dim, layers).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(StateMismatchError, match=message):
        ray_ckpt.load(TrainState(model, torch.optim.Adam(model.parameters())), str(tmp_path / "run"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_more_parameters_than_were_saved_are_refused(tmp_path: Path) -> None:
    ray_ckpt.save(trained(), str(tmp_path / "run"))
    model = PipelineModel(5, 3)
    with pytest.raises(
        StateMismatchError, match=r"model\.layer3\.bias: not saved, wanted float32\[5\]; model\.layer3\.weight"
    ):
        ray_ckpt.load(TrainState(model, torch.optim.Adam(model.parameters())), str(tmp_path / "run"))


def test_a_damaged_byte_is_an_integrity_error_that_names_the_tensor(tmp_path: Path) -> None:
    ray_ckpt.save(trained(), str(tmp_path / "run"))
    flip_a_byte_of(tmp_path / "run", "model.layer2.weight")
    with pytest.raises(IntegrityError, match=r"model\.layer2\.weight"):
        ray_ckpt.load(fresh(), str(tmp_path / "run"))


def flip_a_byte_of(directory: Path, tensor: str) -> None:
    [chunk] = Manifest.from_json((directory / MANIFEST_NAME).read_bytes()).tensors[tensor].chunks
    assert chunk.data_start is not None
    data = bytearray((directory / chunk.file).read_bytes())
    data[chunk.data_start] ^= 1
    (directory / chunk.file).write_bytes(data)


class Unsavable(TrainState):
    def state_dict(self) -> dict[str, Any]:
        raise MemoryError("no room for the optimizer")


def fail_on_rank_1(rank: int, directory: str) -> list[str]:
    """What this rank is told when rank 1 cannot give its state, and when rank 1 cannot take what is loaded."""
    good = trained()
    ray_ckpt.save(good, f"{directory}/good")
    unsavable = good if rank == 0 else Unsavable(good.model, good.optimizer)
    target = fresh()
    if rank == 1:
        model = PipelineModel(7, 2)
        target = TrainState(model, torch.optim.Adam(model.parameters()))
    said = []
    for attempt in (
        lambda: ray_ckpt.save(unsavable, f"{directory}/bad"),
        lambda: ray_ckpt.load(target, f"{directory}/good"),
    ):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        said.append(str(caught.value))
    # Nobody left the collectives: a load that all can do still works.
    last = fresh()
    ray_ckpt.load(last, f"{directory}/good")
    assert last.snapshot(0) == good.snapshot(0)
    return said


def test_every_rank_learns_which_rank_failed_and_none_hangs(tmp_path: Path) -> None:
    for saving, loading in run_ranks(fail_on_rank_1, 2, tmp_path, str(tmp_path), timeout_s=60):
        assert saving == "save failed on rank 1: MemoryError: no room for the optimizer"
        assert loading.startswith("load failed on rank 1: StateMismatchError: the checkpoint at /")
    assert not (tmp_path / "bad").exists()


def save_again_and_again(rank: int, directory: str) -> list[tuple[str, int]]:
    """What became of each save, and how often the ranks' plans or records were gathered for it."""
    gathered = []
    gather = dist.gather_object

    def counted(*args: Any, **kwargs: Any) -> None:
        gathered.append(args)
        gather(*args, **kwargs)

    dist.gather_object = counted
    rows, found = 4, []
    for number, change in enumerate(["", "values", "a shape on rank 1", "values", "taken", "values"]):
        if change == "a shape on rank 1":
            rows += rank
        state = {f"mine{rank}": torch.full((rows, 3), float(number)), "all": torch.full((5,), float(number))}
        target = f"{directory}/{0 if change == 'taken' else number}"
        gathered.clear()
        try:
            report = ray_ckpt.save(state, target)
        except CheckpointExistsError:
            found.append(("exists", len(gathered)))
            continue
        found.append((report.uri, len(gathered)))
        like = {name: torch.full_like(value, -1.0) for name, value in state.items()}
        ray_ckpt.load(like, target, strict=False)
        assert all(torch.equal(like[name], value) for name, value in state.items()), change
    return found


def test_ranks_whose_plans_have_not_changed_need_not_tell_them_again(tmp_path: Path) -> None:
    """One round less; any change on any rank, and anything that speaks against the save, is told to all."""
    for found in run_ranks(save_again_and_again, 3, tmp_path, str(tmp_path)):
        assert [number for _, number in found] == [2, 1, 2, 1, 1, 1]
        assert [uri == "exists" for uri, _ in found] == [False, False, False, False, True, False]
    attempts = {Manifest.from_json((tmp_path / n / MANIFEST_NAME).read_bytes()).attempt for n in "01235"}
    assert len(attempts) == 5


def leave_a_replica_to_rank_1(rank: int, directory: str) -> list[int]:
    """Rank 1 begins as at the save before, without the replica, and learns that rank 0 no longer holds it.

    How often this rank has copied its state, by save.
    """
    copied = [0, 0, 0]
    take = HostCopy.take

    def counted(*args: Any) -> Holdings:
        copied[step] += 1
        return take(*args)

    HostCopy.take = counted  # type: ignore[method-assign]
    state = {"replica": torch.zeros(5), f"mine{rank}": torch.zeros(1 + 1000 * rank)}
    for step in range(3):
        if (rank, step) == (0, 2):
            del state["replica"]
        for tensor in state.values():
            tensor.add_(1.0)
        handle = ray_ckpt.save(state, directory, step=step, blocking=False)
        for tensor in state.values():
            tensor.mul_(-1.0)  # what is saved must be a copy
        handle.result(timeout_s=30.0)
        for tensor in state.values():
            tensor.mul_(-1.0)
    return copied


def test_a_rank_that_went_ahead_copies_again_when_the_others_have_changed(tmp_path: Path) -> None:
    assert run_ranks(leave_a_replica_to_rank_1, 2, tmp_path, str(tmp_path / "run")) == [[1, 1, 1], [1, 1, 2]]
    for step, writer in enumerate([0, 0, 1]):
        [chunk] = ray_ckpt.CheckpointStore(tmp_path / "run").manifest(step).tensors["replica"].chunks
        assert chunk.file.startswith(f"__{writer}_")
        like = {"replica": torch.zeros(5), "mine0": torch.zeros(1), "mine1": torch.zeros(1001)}
        ray_ckpt.load(like, tmp_path / "run", step=step)
        assert all(torch.equal(value, torch.full_like(value, step + 1.0)) for value in like.values())
