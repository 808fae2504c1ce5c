"""transformers' models whose names and forms differ between files and memory, by their own conversions."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ray_ckpt import TrainState, load, save
from ray_ckpt.errors import UsageError
from ray_ckpt.format.saved import Saved
from ray_ckpt.integrations import transformers as integration
from ray_ckpt.integrations.symbols import Deferred, Symbol
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


# ------------------------------------------------------------------------------------------------------- operations


def _numbers(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def _experts(*kinds: str) -> dict[str, torch.Tensor]:
    return {f"e.{n}.{kind}": _numbers(3, 4) + 100 * n + 1000 * at for n in range(12) for at, kind in enumerate(kinds)}


class _Config:
    num_attention_heads, vocab_size, unpadded_vocab_size = 2, 8, 6

    def get_text_config(self) -> _Config:
        return self


def _sized() -> torch.nn.Module:
    """What operations ask for the shapes and the dtype of its parameters."""
    sizes = {"a": (4, 3), "b": (4, 5), "head": (4, 6)}
    model = torch.nn.ModuleDict({name: torch.nn.Linear(*size) for name, size in sizes.items()})
    model["e"] = torch.nn.Module()
    model["e"].weight = torch.nn.Parameter(torch.empty(2, 4, 3))
    return model


WHOLE = {"w": _numbers(8, 4)}
FUSED = {"qkv": _numbers(24, 4)}
QKV = ["q", "k", "v"]
CAN: dict[str, tuple[str, dict[str, torch.Tensor], list[str], list[str]]] = {
    "chunk": ("Chunk(0)", FUSED, ["qkv"], QKV),
    "split": ("Split(0)", {"ab": WHOLE["w"]}, ["ab"], ["a.weight", "b.weight"]),
    "concatenate": ("Concatenate(1)", {"q": _numbers(6, 4), "k": _numbers(6, 2)}, ["q", "k"], ["qk"]),
    "merge": ("MergeModulelist(0)", _experts("w"), ["e.*.w"], ["e.w"]),
    "merge and concatenate": ("MergeModulelist(0), Concatenate(1)", _experts("g", "u"), ["e.*.g", "e.*.u"], ["e.gu"]),
    "take apart": ("SplitModulelist(0)", {"e.w": _numbers(3, 1, 5)}, ["e.w"], ["e.*.w"]),
    "transpose": ("Transpose(0, 1)", WHOLE, ["w"], ["v"]),
    "transpose what differs": ("Transpose(1, 2, True)", {"e.weight": _numbers(2, 3, 4)}, ["e.weight"], ["e.weight"]),
    "transpose what fits": ("Transpose(1, 2, True)", {"e.weight": _numbers(2, 4, 3)}, ["e.weight"], ["e.weight"]),
    "flat already": ("Conv3dToLinear(1, (1, 2, 2))", WHOLE, ["w"], ["v"]),
    "permute nothing": ("Chunk(0), PermuteForRope(None, ['x'])", FUSED, ["qkv"], QKV),
    "text and vision": ("ErnieFuseAndSplitTextVisionExperts()", _experts("g", "u"), ["e.*.g", "e.*.u"], ["t.e", "v.e"]),
    "unpad": ("Inkling2UnpadVocab()", {"head.weight": _numbers(8, 4)}, ["head.weight"], ["head.weight"]),
}
CANNOT: dict[str, tuple[str, dict[str, torch.Tensor], list[str], list[str]]] = {
    "Interleave": ("Interleave(0)", WHOLE, ["w"], ["v"]),
    "Conv3dToLinear": ("Conv3dToLinear(1, (1, 2, 2))", {"w": _numbers(6, 1, 1, 2, 2)}, ["w"], ["v"]),
    "LinearToConv3d": ("LinearToConv3d(1, (1, 2, 2))", WHOLE, ["w"], ["v"]),
    "PermuteForRope": ("Chunk(0), PermuteForRope(None, ['q'])", FUSED, ["qkv"], QKV),
    "Inkling2UnpadVocab": ("Inkling2UnpadVocab()", {"w": WHOLE["w"].bfloat16()}, ["w"], ["head.weight"]),
    "Inkling2LoopMergeMessageQueries": (
        "Inkling2LoopMergeMessageQueries()",
        {"q": _numbers(4, 3), "k": _numbers(4, 3)},
        ["q", "k"],
        ["m"],
    ),
}


def _convert(case: tuple[str, dict[str, torch.Tensor], list[str], list[str]], *, symbols: bool) -> dict[str, Any]:
    """What transformers makes of the tensors, or of symbols of them."""
    loading = pytest.importorskip("transformers.core_model_loading")
    operations, tensors, sources, targets = case
    converter = loading.WeightConverter(list(sources), list(targets), eval(f"[{operations}]", vars(loading)))
    for name, tensor in tensors.items():
        pattern = next(each for each in sources if re.fullmatch(each.replace("*", r"\d+"), name))
        given = Symbol(Saved(name), tensor.shape, tensor.dtype) if symbols else tensor
        converter.add_tensor(targets[0], name, pattern, Deferred(given))  # type: ignore[arg-type]
    if symbols:
        converter.operations = [integration._Named(operation, targets[0]) for operation in converter.operations]
    made = converter.convert(targets[0], model=_sized(), config=_Config())
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@pytest.mark.parametrize("name", CAN)
def test_a_key_map_makes_what_transformers_makes(tmp_path: Path, name: str) -> None:
    expected = _convert(CAN[name], symbols=False)
    made = {wanted: symbol.saved for wanted, symbol in _convert(CAN[name], symbols=True).items()}
    assert made.keys() == expected.keys()
    save(CAN[name][1], tmp_path)
    found = {wanted: torch.full_like(tensor, -1.0) for wanted, tensor in expected.items()}
    load(found, tmp_path, key_map=made, strict=False)
    assert all(torch.equal(found[wanted], tensor) for wanted, tensor in expected.items())


@pytest.mark.parametrize("operation", CANNOT)
def test_what_a_key_map_cannot_is_refused_by_the_name_of_the_operation(operation: str) -> None:
    assert _convert(CANNOT[operation], symbols=False)
    with pytest.raises(UsageError, match=f"by {operation}, which a key map cannot .*: let transformers load"):
        _convert(CANNOT[operation], symbols=True)


def test_every_operation_is_in_one_of_the_tables() -> None:
    loading = pytest.importorskip("transformers.core_model_loading")
    known = " ".join(case[0] for case in (*CAN.values(), *CANNOT.values()))
    others = {
        *("ConversionOps", "_IdentityOp"),
        # Made of others in the tables, one the inverse of the other, or of dequantizing.
        *("VisionFuseAndPermuteForRope", "VisionUnfuseAndPermuteForRope"),
        *("ErnieSplitAndDecoupleTextVisionExperts", "Inkling2LoopDequantizeExperts"),
    }
    operations = {
        name
        for name, value in vars(loading).items()
        if isinstance(value, type) and issubclass(value, loading.ConversionOps)
    }
    assert {name for name in operations - others if f"{name}(" not in known} == set()


def test_a_symbol_refuses_what_it_does_not_know() -> None:
    symbol = Symbol(Saved("a"), (4, 2), torch.float32)
    with pytest.raises(UsageError, match="it uses flip"):
        torch.flip(symbol, [0])  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="it joins tensors of"):
        torch.cat([symbol, Symbol(Saved("b"), (4, 2), torch.bfloat16)])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="it splits 4 into"):
        symbol.split([1, 2])
    assert str(symbol[1:3, 0].saved) == "select(narrow(a, 0, 1, 2), 1, 0)"
