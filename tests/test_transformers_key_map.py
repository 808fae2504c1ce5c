"""transformers' models whose names and forms differ between files and memory, by their own conversions."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ray_ckpt import TrainState, load
from ray_ckpt.errors import UsageError
from ray_ckpt.format.saved import Saved
from ray_ckpt.integrations import transformers as integration
from tests.support.ranks import run_ranks


def _mixtral(seed: int, device: str = "cpu") -> Any:
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM

    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=11,  # 10 comes after 9, not after 1
    )
    with torch.device(device):
        return MixtralForCausalLM(config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """What `save_pretrained` writes, in the files' form, and what it is in memory."""
    pytest.importorskip("transformers.conversion_mapping")
    directory = tmp_path_factory.mktemp("mixtral")
    model = _mixtral(0)
    model.save_pretrained(directory, max_shard_size="20KB")
    return directory, dict(model.state_dict())


def test_fused_experts_are_made_of_the_files(saved: Any) -> None:
    path, expected = saved
    assert (path / "model.safetensors.index.json").exists()
    model = _mixtral(1)
    made = integration.key_map(model, path)
    assert len(list(made["model.model.layers.0.mlp.experts.gate_up_proj"].names())) == 22  # type: ignore[union-attr]
    load(TrainState(model), path, key_map=made)
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, expected[name])] == []


def _load_sharded(rank: int, path: str) -> dict[str, torch.Tensor]:
    warnings.simplefilter("ignore")
    model = _mixtral(1)
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    load(TrainState(model), path, key_map=integration.key_map(model, path))
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


def test_into_shards(saved: Any, tmp_path: Path) -> None:
    path, expected = saved
    for found in run_ranks(_load_sharded, 2, tmp_path, str(path)):
        assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def test_what_a_key_map_cannot_is_refused_by_name() -> None:
    symbol = integration._Symbol(Saved("a"))
    with pytest.raises(UsageError, match="converts by flip, which a key map cannot"):
        torch.flip(symbol, [0])  # type: ignore[call-overload]
    with pytest.raises(UsageError, match=r"converts by \.view of a tensor"):
        symbol.view(2)
