"""What a load compares, what it can leave out, and what it says: strict or not, casts, parts, other names, dicts."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ray_ckpt
from ray_ckpt.errors import CheckpointError, StateMismatchError, UsageError
from ray_ckpt.format.block_sums import BlockSums, block_size
from ray_ckpt.format.boxes import Box
from ray_ckpt.parallel.stages import take_stage
from ray_ckpt.recipes.model import PipelineModel
from ray_ckpt.state.train_state import TrainState
from ray_ckpt.storage.ranged_reads import LOCAL, REMOTE, Piece, Source, Tuning, cut
from tests.support.ranks import run_ranks
from tests.test_state import fresh, train, trained


def bits(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    """Names under which both hold the same."""
    return {name for name in one.keys() & other.keys() if torch.equal(one[name], other[name])}


class Smaller(PipelineModel):
    """Lacks a layer of the saved model and has another one."""

    def __init__(self) -> None:
        super().__init__(dim=5, layers=1)
        self.head = nn.Linear(5, 2)


def smaller() -> TrainState:
    model = Smaller()
    return TrainState(model, torch.optim.Adam(model.parameters(), lr=0.5))


def test_strict_names_what_is_missing_and_what_is_left_over(tmp_path: Path) -> None:
    ray_ckpt.save(trained(), tmp_path / "run")
    state = smaller()
    before = bits(state)
    with pytest.raises(StateMismatchError, match=r"model\.head\.bias: not saved, wanted float32\[2\]"):
        ray_ckpt.load(state, tmp_path / "run")
    assert len(equal(before, bits(state))) == 4
    assert not state.optimizer.state


def test_not_strict_reports_them_and_leaves_what_is_missing(tmp_path: Path) -> None:
    source, state = trained(), smaller()
    before = bits(state)
    ray_ckpt.save(source, tmp_path / "run")
    report = ray_ckpt.load(state, tmp_path / "run", strict=False)
    assert [name for name in report.missing if name.startswith("model")] == ["model.head.bias", "model.head.weight"]
    assert "optim.param_groups.head.bias" in report.missing
    assert [name for name in report.unexpected if name.startswith("model")] == [
        "model.layer2.bias",
        "model.layer2.weight",
    ]
    assert "optim.state.layer2.bias.step" in report.unexpected
    assert equal(bits(source), bits(state)) == {"layer1.weight", "layer1.bias"}
    assert equal(before, bits(state)) == {"head.weight", "head.bias"}
    assert set(state.optimizer.state) == set(state.model.layer1.parameters())
    # The report travels and can be written down.
    assert pickle.loads(pickle.dumps(report)) == report
    assert dataclasses.asdict(report)["num_bytes"] == 3 * (25 + 5) * 4 + 2 * 4


def test_a_dtype_is_changed_only_when_asked(tmp_path: Path) -> None:
    source = trained()
    ray_ckpt.save(source, tmp_path / "run")
    model = PipelineModel(5, 2).to(torch.bfloat16)
    state = TrainState(model, torch.optim.Adam(model.parameters()))
    with pytest.raises(StateMismatchError, match=r"layer1\.bias: saved float32\[5\], wanted bfloat16\[5\].*cast=True"):
        ray_ckpt.load(state, tmp_path / "run")
    assert not state.optimizer.state
    report = ray_ckpt.load(state, tmp_path / "run", cast=True)
    assert "model.layer1.bias" in report.cast
    assert "optim.state.layer1.bias.exp_avg" in report.cast
    assert "optim.state.layer1.bias.step" not in report.cast
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(torch.bfloat16))
    moment = state.optimizer.state[model.layer1.weight]
    expected = source.optimizer.state[source.model.layer1.weight]
    assert torch.equal(moment["exp_avg"], expected["exp_avg"].to(torch.bfloat16))
    assert (moment["step"].dtype, float(moment["step"])) == (torch.float32, 2.0)


def test_a_part_is_loaded_by_name(tmp_path: Path) -> None:
    source = trained()
    ray_ckpt.save(source, tmp_path / "run")
    model_only = TrainState(fresh().model)
    report = ray_ckpt.load(model_only, tmp_path / "run", only=("model",))
    assert len(equal(bits(source), bits(model_only))) == 4
    assert report.unexpected == ()
    layer = fresh()
    ray_ckpt.load(layer, tmp_path / "run", only=("model.layer1",))
    assert equal(bits(source), bits(layer)) == {"layer1.weight", "layer1.bias"}
    assert not layer.optimizer.state
    optimizer = fresh()
    before = bits(optimizer)
    ray_ckpt.load(optimizer, tmp_path / "run", only=("optim",))
    assert equal(before, bits(optimizer)) == set(before)
    assert [group["lr"] for group in optimizer.optimizer.param_groups] == [0.1, 0.2]
    with pytest.raises(StateMismatchError, match=r"optim\.param_groups.*not wanted.*only=\('model', \.\.\.\)"):
        ray_ckpt.load(TrainState(fresh().model), tmp_path / "run")
    with pytest.raises(UsageError, match=r"only='model' is one text"):
        ray_ckpt.load(layer, tmp_path / "run", only="model")
    for strict in (True, False):
        with pytest.raises(StateMismatchError, match=r"only='optimizer' names nothing that is saved or wanted"):
            ray_ckpt.load(optimizer, tmp_path / "run", only=("model", "optimizer"), strict=strict)
        with pytest.raises(StateMismatchError, match=r"only=\(\) chooses nothing"):
            ray_ckpt.load(optimizer, tmp_path / "run", only=(), strict=strict)


class Renamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = PipelineModel(5, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.encoder(inputs)


@pytest.mark.parametrize("as_mapping", [True, False])
def test_other_names_are_mapped_with_their_optimizer_state(tmp_path: Path, as_mapping: bool) -> None:
    source = trained()
    ray_ckpt.save(source, tmp_path / "run")
    model = Renamed()
    state = TrainState(model, torch.optim.Adam(model.parameters()))
    names = {f"model.{name}": f"model.{name.removeprefix('encoder.')}" for name in model.state_dict()}
    with pytest.raises(StateMismatchError, match=r"model\.encoder\.layer1\.bias: not saved"):
        ray_ckpt.load(state, tmp_path / "run")
    key_map: Any = names if as_mapping else lambda name: name.replace("model.encoder.", "model.")
    ray_ckpt.load(state, tmp_path / "run", key_map=key_map)
    assert [group["lr"] for group in state.optimizer.param_groups] == [0.1, 0.2]
    train(source, 1)
    train(state, 1)
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], tensor)


def test_one_saved_tensor_can_go_to_two_places(tmp_path: Path) -> None:
    source = trained()
    ray_ckpt.save(source, tmp_path / "run")
    target = TrainState(PipelineModel(5, 2))
    key_map = {f"model.layer2.{name}": f"model.layer1.{name}" for name in ("weight", "bias")}
    report = ray_ckpt.load(target, tmp_path / "run", only=("model",), key_map=key_map, strict=False)
    assert report.unexpected == ("model.layer2.bias", "model.layer2.weight")
    assert torch.equal(target.model.layer2.weight, source.model.layer1.weight)
    assert torch.equal(target.model.layer1.weight, source.model.layer1.weight)


def test_another_kind_of_optimizer_is_refused(tmp_path: Path) -> None:
    ray_ckpt.save(trained(), tmp_path / "run")
    model = PipelineModel(5, 2)
    for optimizer, message in (
        (torch.optim.SGD(model.parameters(), momentum=0.9), r"than SGD was saved: it has no 'momentum' for layer1\.w"),
        (torch.optim.AdamW(model.parameters()), r"than AdamW was saved: decoupled_weight_decay=False for layer1\.weig"),
    ):
        with pytest.raises(StateMismatchError, match=message):
            ray_ckpt.load(TrainState(model, optimizer), tmp_path / "run")
        assert not optimizer.state


def test_a_plain_state_dict_is_loaded_in_place(tmp_path: Path) -> None:
    saved = {"a": {"x": torch.arange(4.0), "list": [torch.ones(2), {"n": 1}]}, "b": "text", "step": 7}
    ray_ckpt.save(saved, tmp_path / "run")
    target: dict[str, Any] = {"a": {"x": torch.zeros(4), "list": [torch.zeros(2), {"n": 0}]}, "b": "", "step": 0}
    x = target["a"]["x"]
    report = ray_ckpt.load(target, tmp_path / "run")
    assert target["a"]["x"] is x
    assert x.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert target["a"]["list"][0].tolist() == [1.0, 1.0]
    assert (target["a"]["list"][1], target["b"], target["step"]) == ({"n": 1}, "text", 7)
    assert report.num_bytes == 4 * 4 + 2 * 4
    with pytest.raises(StateMismatchError, match=r"b: saved a value, wanted float32\[1\]; steps: not saved"):
        ray_ckpt.load({"a": target["a"], "b": torch.zeros(1), "steps": 0, "step": 0}, tmp_path / "run")


def test_modules_and_dicts_of_them_are_loaded(tmp_path: Path) -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    ray_ckpt.save({"net": source, "step": 3}, tmp_path / "nested")
    ray_ckpt.save(source, tmp_path / "alone")
    state: dict[str, Any] = {"net": target, "step": 0}
    assert not torch.equal(source.weight, target.weight)
    ray_ckpt.load(state, tmp_path / "nested")
    assert torch.equal(source.weight, target.weight)
    assert state["step"] == 3
    alone = nn.Linear(3, 2)
    ray_ckpt.load(alone, tmp_path / "alone")
    assert torch.equal(source.bias, alone.bias)


def stage(rank: int) -> TrainState:
    model = take_stage(fresh().model, [f"layer{rank + 1}"])
    return TrainState(model, torch.optim.Adam(model.parameters()))


def load_stages(rank: int, directory: str) -> dict[str, Any]:
    """Two stages load what the whole model's owner saved; then they miss each other's leftovers."""
    whole = trained()
    ray_ckpt.save(whole, f"{directory}/run")
    mine = stage(rank)
    report = ray_ckpt.load(mine, f"{directory}/run")
    assert equal(bits(whole), bits(mine)) == {f"layer{rank + 1}.weight", f"layer{rank + 1}.bias"}
    both_first = stage(0)
    with pytest.raises(CheckpointError) as caught:
        ray_ckpt.load(both_first, f"{directory}/run")
    lenient = ray_ckpt.load(stage(0), f"{directory}/run", strict=False)
    odd = stage(0)
    if rank == 1:
        model = nn.Sequential(nn.Linear(5, 5))
        odd = TrainState(model, torch.optim.Adam(model.parameters()))
    with pytest.raises(CheckpointError) as named:
        ray_ckpt.load(odd, f"{directory}/run")
    merged = ray_ckpt.load(odd, f"{directory}/run", strict=False)
    return {
        "report": report,
        "left": str(caught.value),
        "unexpected": lenient.unexpected,
        "named": str(named.value),
        "missing": merged.missing,
    }


def test_what_no_rank_wants_is_found_by_all_together(tmp_path: Path) -> None:
    for found in run_ranks(load_stages, 2, tmp_path, str(tmp_path)):
        assert (found["report"].missing, found["report"].unexpected) == ((), ())
        assert "model.layer2.bias: saved float32[5], not wanted" in found["left"]
        assert {"model.layer2.bias", "model.layer2.weight"} <= set(found["unexpected"])
        assert not [name for name in found["unexpected"] if "layer1" in name]
        # What one rank misses is said by its number, and to all.
        assert found["named"].startswith("load failed on rank 1: StateMismatchError: the checkpoint at /")
        assert "model.0.bias: not saved, wanted float32[5]" in found["named"]
        assert {"model.0.bias", "model.0.weight"} <= set(found["missing"])


@pytest.mark.parametrize("tuning", [LOCAL, REMOTE])
def test_a_block_is_not_read_again_for_each_row_that_lies_in_it(tuning: Tuning) -> None:
    """Half of the columns of a wide matrix: two rows are further apart than what is read over, and in one block."""
    rows, columns = 2048, 28_672
    num_bytes = 2 * rows * columns
    sums = BlockSums(block_size(num_bytes), bytes(8 * 256))
    assert 2 * columns // 2 > LOCAL.max_gap_bytes
    assert sums.block_bytes > 4 * 2 * columns
    source = Source("w", "file", 0, (columns, 1), torch.bfloat16, num_bytes, sums)
    piece = Piece(source, Box((0, columns // 2), (rows, columns // 2)), torch.empty(rows, columns // 2).bfloat16())
    assert sum(found.end - found.start for found in cut([piece], tuning)) < 3 * num_bytes / 2
