"""What no reader knows is named with what it may be; run folders lead to their latest step."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import ray_ckpt
from ray_ckpt import TrainState
from ray_ckpt.errors import CheckpointNotFoundError, FormatError, RayCkptError, StateMismatchError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

DIRECTORIES = {
    "checkpoint-500/x": r"holds checkpoint-500: a run folder of transformers' Trainer",
    "snapshots/abc/model.safetensors": r"Hugging Face's cache: name the folder of one revision",
    "zero_to_fp32.py": r"DeepSpeed's: merge it once by its own zero_to_fp32\.py",
    "_CHECKPOINT_METADATA": r"Orbax or TensorStore",
    "model.weights.h5": r"Keras",
    "model-q4.gguf": r"GGUF, quantized for llama\.cpp",
    "model.nemo": r"NeMo's archive: unpack it",
    "weights.tar.gz": r"an archive: unpack it",
    "iter_0000100/x": r"Megatron's: name an iter_<N>",
    "step-3/x": r"a run folder; its steps were not finished",
    "notes.md": r"it holds notes\.md, which no reader here knows",
    "model_index.json": r"a pipeline of diffusers: name the directory of one",
    "late.ckpt": r"name the file",
}


@pytest.mark.parametrize("name", DIRECTORIES)
@pytest.mark.parametrize("verb", ["load", "verify"])
def test_a_directory_of_something_else_is_named(tmp_path: Path, name: str, verb: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointNotFoundError, match=DIRECTORIES[name]) as raised:
        _ = ray_ckpt.verify(tmp_path) if verb == "verify" else ray_ckpt.load(TrainState(nn.Linear(2, 2)), tmp_path)
    assert len(str(raised.value)) < 2000


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF\x03\0\0\0rest", r"it is GGUF"),
        (b"\x89HDF\r\n\x1a\nrest", r"HDF5, as Keras writes"),
        (b"\x1f\x8b\x08rest", r"compressed by gzip"),
        (tar(), r"an archive by tar \(a \.nemo is one, too\)"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"git lfs pull"),
        (b"<!DOCTYPE html>", r"a web page"),
        (b"", r"it is empty"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        ray_ckpt.load(TrainState(nn.Linear(2, 2)), tmp_path / "file")


# ------------------------------------------------------------------------------------------- torchtitan's run folder


def titan_state(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, step: int) -> dict[str, Any]:
    """As torchtitan saves: the model's names at the top, a flat optimizer, one scheduler, its loader's bytes."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    flat: dict[str, Any] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state[parameter].items():
                flat[f"state.{names[parameter]}.{key}"] = value
            for key, value in group.items():
                if key != "params":
                    flat[f"param_groups.{names[parameter]}.{key}"] = value
    return {
        **model.state_dict(),
        "optimizer": flat,
        "lr_scheduler": schedule.state_dict(),
        "dataloader": {"dp_rank_0": b"of rank 0", "dp_rank_1": b"of rank 1", "world_size": 2},
        "train_state": {"step": torch.tensor(step, dtype=torch.int32), "ntokens_seen": torch.tensor(100 * step)},
    }


class Loader:
    """A loader of rank 1 as torchtitan's is: it shows its own part, and takes it out of everybody's."""

    def __init__(self) -> None:
        self.loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"dp_rank_1": b"fresh", "world_size": 2}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


def run_of(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


@pytest.fixture(scope="module")
def titan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, torch.optim.Optimizer, Any]:
    root = tmp_path_factory.mktemp("outputs")
    model, optimizer, schedule = run_of(0)
    for step in (5, 10):
        model(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
        schedule.step()
        state = titan_state(model, optimizer, schedule, step)
        dcp.save(state, checkpoint_id=root / "checkpoint" / f"step-{step}", no_dist=True)
    (root / "checkpoint" / "step-15").mkdir()  # cut off
    (root / "checkpoint" / "step-15" / "__0_0.distcp").write_bytes(b"half")
    return root, model, optimizer, schedule


@pytest.mark.parametrize("below", ["", "checkpoint", "checkpoint/step-10"])
def test_the_latest_finished_step_of_a_run_folder(titan: Any, below: str) -> None:
    root, model, optimizer, schedule = titan
    other, fresh, following = run_of(1)
    loader, counters = Loader(), {"ntokens_seen": 0}
    state = TrainState(other, fresh, schedulers=following, step=0, counters=counters, dataloader=loader)
    assert not torch.equal(other[0].weight, model[0].weight)
    report = ray_ckpt.load(state, root / below)
    assert report.step == (None if below.endswith("10") else 10)
    assert torch.equal(other[0].weight, model[0].weight)
    assert torch.equal(fresh.state[other[1].bias]["exp_avg_sq"], optimizer.state[model[1].bias]["exp_avg_sq"])
    assert following.state_dict() == schedule.state_dict()
    assert (state.step, counters) == (10, {"ntokens_seen": 1000})
    assert loader.loaded == {"dp_rank_0": b"of rank 0", "dp_rank_1": b"of rank 1", "world_size": 2}
    assert ray_ckpt.verify(root / below).damages == ()


def test_damage_in_a_run_folder_is_named(titan: Any, tmp_path: Path) -> None:
    import shutil

    root, *_ = titan
    shutil.copytree(root, tmp_path / "copy")
    file = tmp_path / "copy/checkpoint/step-10/__0_0.distcp"
    file.write_bytes(file.read_bytes()[:3000])
    other, fresh, _ = run_of(1)
    assert ray_ckpt.verify(tmp_path / "copy").damages
    with pytest.raises(RayCkptError, match=r"__0_0\.distcp"):
        ray_ckpt.load(TrainState(other, fresh), tmp_path / "copy")


def test_a_load_of_nothing_at_all_is_an_error(tmp_path: Path) -> None:
    torch.save({"quite": torch.ones(3), "other": torch.ones(2)}, tmp_path / "x.pt")
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    with pytest.raises(StateMismatchError, match=r"nothing would be loaded: .* holds other, quite;"):
        ray_ckpt.load(TrainState(model), tmp_path / "x.pt", strict=False)
    assert torch.equal(model.weight, before)
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "part.pt")
    assert ray_ckpt.load(TrainState(model), tmp_path / "part.pt", strict=False).missing == ("model.bias",)
