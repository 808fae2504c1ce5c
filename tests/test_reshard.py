"""Four pipeline stages with Adam saved, FSDP2 shards loaded: through ours and stock DCP in every combination."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ray_ckpt.dcp.reader import ArrowStorageReader
from ray_ckpt.dcp.writer import ArrowStorageWriter
from tests.support.ranks import run_ranks

WIDTH = 37  # does not divide by any number of ranks
NUM_STAGES = 4
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
WRITERS = {"ours": ArrowStorageWriter, "stock": dcp.FileSystemWriter}
READERS = {"ours": ArrowStorageReader, "stock": dcp.FileSystemReader}


def _build(names):
    return torch.nn.Sequential(OrderedDict((name, torch.nn.Linear(WIDTH, WIDTH)) for name in names))


def _step(model, learning_rate):
    """An optimizer with real state: one step with gradients that tell every element apart."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.arange(parameter.numel(), dtype=torch.float32).view_as(parameter) / (number + 3)
    optimizer.step()
    return optimizer


def _stage_names():
    return [f"layer{number}" for number in range(1, NUM_STAGES + 1)]


def _save_stage(rank, directory, writer):
    torch.manual_seed(rank)
    model = _build([_stage_names()[rank]])
    optimizer = _step(model, learning_rate=0.001 * (rank + 1))
    model_state, optimizer_state = get_state_dict(model, optimizer, options=OPTIONS)
    dcp.save({"model": model_state, "optim": optimizer_state}, storage_writer=WRITERS[writer](directory))
    return _flatten({"model": model_state, "optim": optimizer_state})


def _load_shards(rank, directory, reader, world_size):
    model = _build(_stage_names())
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    model_state, optimizer_state = get_state_dict(model, optimizer, options=OPTIONS)
    state = {"model": model_state, "optim": optimizer_state}
    before = _flatten(state)
    dcp.load(state, storage_reader=READERS[reader](directory))
    return before, _flatten(state)


def _flatten(state):
    flat = {}
    for part, entries in state.items():
        for name, value in entries.items():
            if isinstance(value, DTensor):
                value = value.full_tensor()
            flat[f"{part}.{name}"] = value.detach().clone() if isinstance(value, torch.Tensor) else value
    return flat


def _differing(expected, found):
    return sorted(
        name
        for name, value in expected.items()
        if not (torch.equal(value, found[name]) if isinstance(value, torch.Tensor) else value == found[name])
    )


@pytest.mark.parametrize(
    ("world_size", "writer", "reader"),
    [
        (4, "ours", "ours"),
        (3, "ours", "stock"),
        (3, "stock", "ours"),
        pytest.param(3, "ours", "ours", marks=pytest.mark.slow),
        pytest.param(4, "ours", "stock", marks=pytest.mark.slow),
        pytest.param(4, "stock", "ours", marks=pytest.mark.slow),
    ],
)
def test_stages_load_as_shards(tmp_path, writer, reader, world_size):
    directory = str(tmp_path / "checkpoint")
    saved = {}
    for stage in run_ranks(_save_stage, NUM_STAGES, tmp_path, directory, writer):
        saved |= stage
    for before, after in run_ranks(_load_shards, world_size, tmp_path, directory, reader, world_size):
        assert set(_differing(saved, before)) >= {name for name in saved if "weight" in name and "exp_avg" in name}
        assert _differing(saved, after) == []
        assert after["optim.param_groups.layer3.weight.lr"] == 0.003


def test_values_come_from_the_manifest(tmp_path):
    directory = str(tmp_path / "checkpoint")
    run_ranks(_save_stage, NUM_STAGES, tmp_path, directory, "ours")
    manifest = ArrowStorageReader(directory).read_manifest()
    for data_file in manifest.files:
        (tmp_path / "checkpoint" / data_file).unlink()
    values = manifest.values()
    assert [values[f"optim.param_groups.layer{n}.weight.lr"] for n in (1, 2, 3, 4)] == [0.001, 0.002, 0.003, 0.004]
    assert values["optim.param_groups.layer1.bias.betas"] == (0.9, 0.999)
    assert manifest.total_bytes > NUM_STAGES * 3 * WIDTH * WIDTH * 4
