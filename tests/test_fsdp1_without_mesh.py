"""FSDP1 as most scripts make it, without a device mesh: saved and loaded as with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

import ray_ckpt
from ray_ckpt import TrainState
from ray_ckpt.errors import UsageError
from tests.support.ranks import run_ranks
from tests.support.subclasses import RowInt8, same


def made(seed: int, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    inner = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.BatchNorm1d(7), nn.Linear(7, 3))
    model = FullyShardedDataParallel(inner, device_id=torch.device("cpu"), **options)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss = model(torch.arange(20.0).reshape(4, 5)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def save_and_load(rank: int, path: str, options: dict[str, Any]) -> tuple[list[float], list[float], bool]:
    if options.get("sharding_strategy") == ShardingStrategy.HYBRID_SHARD:
        rows, columns = [[dist.new_group(ranks) for ranks in grid] for grid in (([0, 1], [2, 3]), ([0, 2], [1, 3]))]
        options = {**options, "process_group": (rows[rank // 2], columns[rank % 2])}
    model, optimizer = made(0, **options)
    step(model, optimizer)
    ray_ckpt.save(TrainState(model, optimizer), path)
    other, fresh = made(1, **options)
    first = step(made(1, **options)[0], optimizer)
    ray_ckpt.load(TrainState(other, fresh), path)
    bare = all(module._device_mesh is None for module in FullyShardedDataParallel.fsdp_modules(model))
    expected = [step(model, optimizer) for _ in range(3)]
    assert first != expected[0]
    return expected, [step(other, fresh) for _ in range(3)], bare


OPTIONS = {
    "original parameters": (2, {"use_orig_params": True}),
    "flat parameters": (2, {"use_orig_params": False}),
    "not sharded": (2, {"use_orig_params": True, "sharding_strategy": ShardingStrategy.NO_SHARD}),
    "hybrid": (4, {"use_orig_params": True, "sharding_strategy": ShardingStrategy.HYBRID_SHARD}),
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_what_is_loaded_trains_on_as_what_was_saved(tmp_path: Path, kind: str) -> None:
    num_ranks, options = OPTIONS[kind]
    for expected, found, bare in run_ranks(save_and_load, num_ranks, tmp_path, str(tmp_path / "run"), options):
        assert found == expected
        assert bare
    plain = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.BatchNorm1d(7), nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.5)
    ray_ckpt.load(TrainState(plain, optimizer), tmp_path / "run")
    assert [step(plain, optimizer) for _ in range(3)] == pytest.approx(expected)


def quantized(seed: int, *, is_ignored: bool) -> nn.Module:
    """With a frozen weight of int8 codes and scales, as adapters are trained on."""
    torch.manual_seed(seed)
    inner = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    inner[0].weight = nn.Parameter(RowInt8.of(torch.randn(7, 5)), requires_grad=False)
    ignored = {"ignored_states": [inner[0].weight]} if is_ignored else {}
    return FullyShardedDataParallel(inner, device_id=torch.device("cpu"), use_orig_params=True, **ignored)


def save_quantized(rank: int, path: str) -> None:
    with pytest.raises(UsageError, match=r"'0.weight' is a RowInt8, of which FSDP1 has flattened the values"):
        TrainState(quantized(0, is_ignored=False)).state_dict()
    model, other = quantized(0, is_ignored=True), quantized(1, is_ignored=True)
    assert not same(other[0].weight.data, model[0].weight.data)
    ray_ckpt.save(TrainState(model), path)
    ray_ckpt.load(TrainState(other), path)
    assert same(other[0].weight.data, model[0].weight.data)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_tensor_of_others_that_was_flattened_is_refused_before_it_is_saved(tmp_path: Path) -> None:
    run_ranks(save_quantized, 2, tmp_path, str(tmp_path / "run"))
