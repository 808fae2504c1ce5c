"""Directories of Megatron-core and DeepSpeed: what is read of them, and what is named that is not."""

from __future__ import annotations

import argparse
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

import ray_ckpt
from ray_ckpt import Saved, TrainState
from ray_ckpt.errors import FormatError, StateMismatchError, UnsafeCheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


class MCoreSavePlan:
    """Stands for a class that only Megatron has."""


def _megatron(directory: Path) -> None:
    """Layers stacked along a first dim, a record with plans in it, and the common part beside."""
    state = {"decoder.layers.mlp.weight": torch.arange(24.0).reshape(4, 2, 3), "embedding.weight": torch.ones(5, 2)}
    dcp.save(state, checkpoint_id=directory)
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=True)
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.planner_data = planner.create_local_plan()
    metadata.all_local_plans = [planner.create_local_plan(), MCoreSavePlan()]
    metadata.mcore_data = {"decoder.layers.mlp.weight": {"nd_reformulated_orig_global_shape": (4, 2, 3)}}
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save({"iteration": 7, "args": argparse.Namespace(lr=0.5)}, directory / "common.pt")


def _stack() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(3, 2, bias=False) for _ in range(4))
    model.embedding = nn.Embedding(5, 2)
    return model


def test_stacked_layers_of_megatron_by_a_key_map(tmp_path: Path) -> None:
    _megatron(tmp_path)
    stacked = Saved("model.decoder.layers.mlp.weight")
    key_map = {f"model.layers.{layer}.weight": stacked.select(0, layer) for layer in range(4)}
    model = _stack()
    ray_ckpt.load(TrainState(model), tmp_path, key_map=key_map, only=("model",))
    for layer in range(4):
        assert torch.equal(model.layers[layer].weight, torch.arange(24.0).reshape(4, 2, 3)[layer])
    assert (model.embedding.weight == 1).all()
    common = {"common": {"iteration": 0}}
    ray_ckpt.load(common, tmp_path, only=("common.iteration",))
    assert common["common"]["iteration"] == 7
    with pytest.raises(UnsafeCheckpointError, match=r"argparse\.Namespace"):
        ray_ckpt.load({"common": {"args": None}}, tmp_path, strict=False)
    with pytest.raises(StateMismatchError, match=r"common\.iteration"):
        ray_ckpt.load(TrainState(model), tmp_path, key_map=key_map)


@pytest.mark.parametrize("key", ["exp_avg", "fp32_param"])
def test_optimizer_state_by_its_key_first_is_refused_by_name(tmp_path: Path, key: str) -> None:
    """Otherwise a load that is not strict leaves the optimizer without any."""
    dcp.save({"weight": torch.ones(2, 3), f"optimizer.state.{key}.weight": torch.ones(2, 3)}, checkpoint_id=tmp_path)
    rates = {"params": [0], "lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "step": 3}
    torch.save({"optimizer": {"optimizer": {"param_groups": [rates]}}}, tmp_path / "common.pt")
    model = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for strict in (True, False):
        with pytest.raises(StateMismatchError, match=r"below optimizer\.state\. is Megatron-core's.*Load the model"):
            ray_ckpt.load(TrainState(model, optimizer), tmp_path, strict=strict)
    assert optimizer.param_groups[0]["lr"] == 0.1
    ray_ckpt.load(TrainState(model, optimizer), tmp_path, only=("model",))
    assert (model.weight == 1).all()
    state = {"optimizer": {"state": {key: {"weight": torch.zeros(2, 3)}}}}
    ray_ckpt.load(state, tmp_path, only=(f"optimizer.state.{key}.weight",))
    assert (state["optimizer"]["state"][key]["weight"] == 1).all()


def _deepspeed(directory: Path, *, names: tuple[str, ...] = ("mp_rank_00_model_states.pt",)) -> nn.Module:
    model = nn.Linear(3, 2)
    step = directory / "global_step10"
    step.mkdir(parents=True)
    for name in names:
        torch.save({"module": model.state_dict(), "ds_version": "0.18", "lr_scheduler": {"x": 1}}, step / name)
    torch.save({"optimizer_state_dict": {}}, step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (directory / "latest").write_text("global_step10")
    (directory / "zero_to_fp32.py").write_text("")
    return model


def test_the_module_of_zero_1_and_2_is_read(tmp_path: Path) -> None:
    saved = _deepspeed(tmp_path)
    for target in (tmp_path, tmp_path / "global_step10"):
        model = nn.Linear(3, 2)
        report = ray_ckpt.load(TrainState(model), target, only=("model",))
        assert torch.equal(model.weight, saved.weight)
        assert "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt" in report.lost
        assert "zero_to_fp32.py" in report.lost
    model = nn.Linear(3, 2)
    with pytest.raises(StateMismatchError, match=r"optim\.param_groups"):
        ray_ckpt.load(TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1)), tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("zero_pp_rank_0_mp_rank_00_model_states.pt",), "ZeRO-3"),
        (("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"), "the models of 2 ranks"),
    ],
)
def test_what_is_not_read_says_the_way_out(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    _deepspeed(tmp_path, names=names)
    with pytest.raises(FormatError, match=message) as caught:
        ray_ckpt.load(TrainState(nn.Linear(3, 2)), tmp_path)
    assert "python zero_to_fp32.py . OUTPUT" in str(caught.value)


def test_latest_stays_inside(tmp_path: Path) -> None:
    _deepspeed(tmp_path)
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(FormatError, match=r"names '\.\./elsewhere', which is no directory there"):
        ray_ckpt.load(TrainState(nn.Linear(3, 2)), tmp_path)


def _safetensors(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(model.state_dict(), path / "model.safetensors")


WRITERS: dict[str, Callable[[nn.Module, Path], None]] = {
    ".metadata": lambda model, path: dcp.save({"model": model.state_dict()}, checkpoint_id=path, no_dist=True),
    "model.safetensors": _safetensors,
    "pytorch_model.bin": lambda model, path: torch.save(model.state_dict(), path / "pytorch_model.bin"),
    "pytorch_model_fsdp_0": lambda model, path: dcp.save(
        {"model": model.state_dict()}, checkpoint_id=path / "pytorch_model_fsdp_0", no_dist=True
    ),
    "model_world_size_1_rank_0.pt": lambda model, path: torch.save(
        model.state_dict(), path / "model_world_size_1_rank_0.pt"
    ),
    "pytorch_model_fsdp_0_rank0.bin": lambda model, path: torch.save(
        model.state_dict(), path / "pytorch_model_fsdp_0_rank0.bin"
    ),
}


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(WRITERS, 2)))
def test_of_several_models_in_one_directory_one_is_read_and_the_others_are_named(
    tmp_path: Path, one: str, other: str
) -> None:
    models = {name: nn.Linear(3, 2) for name in (one, other)}
    for name, model in models.items():
        WRITERS[name](model, tmp_path)
    target = nn.Linear(3, 2)
    report = ray_ckpt.load(TrainState(target), tmp_path)
    [read] = [name for name, model in models.items() if torch.equal(model.weight, target.weight)]
    [left] = models.keys() - {read}
    assert f"{left} left out, as " in report.lost
    assert f"{read} left out" not in report.lost
    assert any(f"{left} left out, as " in note for note in ray_ckpt.inspect(tmp_path).notes)
