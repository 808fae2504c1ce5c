"""Buffers that no checkpoint holds, of models on the meta device: computed by the modules' own means, or named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ray_ckpt
from ray_ckpt import TrainState
from ray_ckpt.errors import StateMismatchError
from tests.support.ranks import run_ranks


class Rotating(nn.Module):
    """Its frequencies are computed by `reset_parameters`, beside random weights and noise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4))
        self.register_buffer("frequencies", torch.empty(4), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        self.frequencies.copy_(torch.arange(4.0) + 1)


class Noisy(Rotating):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.frequencies)


def test_what_a_module_computes_is_computed_again(tmp_path: Path) -> None:
    source = nn.Sequential(Rotating())
    ray_ckpt.save(TrainState(source), tmp_path / "run")
    with torch.device("meta"):
        target = nn.Sequential(Rotating())
    generator = torch.get_rng_state()
    ray_ckpt.load(TrainState(target), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(target[0].frequencies, torch.arange(4.0) + 1)
    assert torch.equal(target[0].weight, source[0].weight)


def test_what_is_random_is_not_made_up(tmp_path: Path) -> None:
    ray_ckpt.save(TrainState(nn.Sequential(Noisy())), tmp_path / "run")
    with torch.device("meta"):
        target = nn.Sequential(Noisy())
    with pytest.raises(StateMismatchError, match=r"0\.frequencies have neither memory nor a place"):
        ray_ckpt.load(TrainState(target), tmp_path / "run")
    assert target[0].weight.is_meta


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, rope_theta=500.0, **sizes))


def output_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.arange(8)[None]).logits
    return logits


def load_sharded(rank: int, path: str) -> torch.Tensor:
    with torch.device("meta"):
        model = llama()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    ray_ckpt.load(TrainState(model), path)
    return output_of(model)


def test_a_model_of_transformers_on_meta_computes_as_the_one_that_was_saved(tmp_path: Path) -> None:
    source = llama()
    ray_ckpt.save(TrainState(source), tmp_path / "run")
    with torch.device("meta"):
        target = llama()
    ray_ckpt.load(TrainState(target), tmp_path / "run")
    expected = output_of(source)
    assert torch.equal(output_of(target), expected)
    for output in run_ranks(load_sharded, 2, tmp_path, str(tmp_path / "run")):
        assert torch.allclose(output, expected, atol=1e-6)
