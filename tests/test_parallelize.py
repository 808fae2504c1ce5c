"""Laying models across ranks: what each rank holds, what stays tied, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from ray_ckpt.errors import UsageError
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.parallel.parallelize import check_fits, parallelize
from ray_ckpt.parallel.stages import build_on_meta
from tests.support.decoders import MODELS, OddPerceptron, llama, mixtral
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")


def values_under(rank: int, name: str, texts: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """What every rank's model holds in these layouts, gathered, by the names of the whole model."""
    found = {}
    for text in texts:
        parallel = parallelize(build_on_meta(MODELS[name]), Layout.parse(text), CPU, seed=3)
        found[text] = {
            key.removeprefix("module.").replace("_fsdp_wrapped_module.", ""): whole(value)
            for chunk in parallel.chunks
            for key, value in (chunk.state_dict() if not text.startswith("fsdp1") else fsdp1_state(chunk)).items()
        }
    return found


def fsdp1_state(model: nn.Module) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return get_model_state_dict(model)


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()


@pytest.mark.parametrize("name", ["perceptron", pytest.param("llama", marks=pytest.mark.slow)])
def test_every_layout_starts_from_the_same_values(tmp_path: Path, name: str) -> None:
    [alone] = run_ranks(values_under, 1, tmp_path, name, ["single"])
    expected = alone["single"]
    assert len({value.double().sum().item() for value in expected.values()}) > 5
    texts = ["fsdp1x4", "fsdp2x4", "hsdp2x2", "tp4", "fsdp2x2.tp2", "pp4", "pp2.tp2", "pp2.fsdp2x2"]
    by_rank = run_ranks(values_under, 4, tmp_path, name, texts)
    for text in texts:
        names = set()
        for found in by_rank:
            names |= found[text].keys()
            for key, value in found[text].items():
                assert torch.equal(value, expected[key]), f"{text}: {key}"
        assert names == expected.keys(), text


def shares(rank: int, texts: list[str]) -> dict[str, dict[str, Any]]:
    """How much of the model's parameters a rank holds, and whether the tied ones are one."""
    found = {}
    for text in texts:
        parallel = parallelize(build_on_meta(llama), Layout.parse(text), CPU, seed=None)
        [chunk] = parallel.chunks
        local = [p.to_local() if isinstance(p, DTensor) else p for p in chunk.parameters()]
        found[text] = {
            "elements": sum(p.numel() for p in local),
            "meta": any(p.is_meta for p in local),
            "tied": chunk.get_parameter("lm_head.weight") is chunk.get_parameter("model.embed_tokens.weight"),
            "rotary": float(chunk.get_buffer("model.rotary_emb.inv_freq").sum()),
        }
    return found


def test_a_rank_holds_its_share_and_tied_weights_stay_one(tmp_path: Path) -> None:
    total = sum(p.numel() for p in llama().parameters())
    rotary = float(llama().get_buffer("model.rotary_emb.inv_freq").sum())
    texts = ["fsdp2x4", "hsdp2x2", "fsdp2x2.tp2"]
    for rank in run_ranks(shares, 4, tmp_path, texts):
        for text, parts in zip(texts, (4, 2, 4), strict=True):
            # Each of some fifty small tensors may be a row larger than its even share.
            assert total / parts / 1.2 < rank[text]["elements"] < total / parts * 1.2, text
            assert rank[text]["tied"], text
            assert not rank[text]["meta"], text
            # What is no parameter and is not saved has its value all the same.
            assert rank[text]["rotary"] == pytest.approx(rotary)


def experts_under(rank: int, text: str) -> list[tuple[tuple[int, ...], tuple[int, ...], bool]]:
    parallel = parallelize(build_on_meta(mixtral), Layout.parse(text), CPU, seed=0)
    [chunk] = parallel.chunks
    parameter = chunk.get_parameter("model.layers.0.mlp.experts.down_proj")
    assert isinstance(parameter, DTensor)
    return [(tuple(parameter.shape), tuple(parameter.to_local().shape), Shard(0) in parameter.placements)]


def test_experts_are_shared_out(tmp_path: Path) -> None:
    assert run_ranks(experts_under, 2, tmp_path, "ep2") == [[((4, 32, 52), (2, 32, 52), True)]] * 2


class Planless(OddPerceptron):
    tp_plan = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("factory", "text", "message"),
    [
        (OddPerceptron, "cp2", "context parallel splits activations"),
        (OddPerceptron, "fsdp1x2.tp2", "FSDP1 does not combine with other axes; use fsdp2"),
        (OddPerceptron, "pp2.ddp2", "DDP does not combine with other axes; use hsdpRx1"),
        (mixtral, "tp2.ep2", "combine ep with fsdp2 or pp"),
        (Planless, "tp2", r"Planless has no tp_plan\(\)"),
        (OddPerceptron, "pp7", "with 6 layers .* into 7 stages"),
        (OddPerceptron, "ep2", "OddPerceptron has no layer of experts"),
        (mixtral, "ep3", "the 4 experts of MixtralExperts cannot be shared out among 3 ranks"),
    ],
)
def test_what_cannot_be_laid_out_is_refused_by_name(factory: type[nn.Module], text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_fits(build_on_meta(factory), Layout.parse(text))


def refusals(rank: int) -> list[str]:
    messages = []
    for text, options in [
        ("fsdp2x3", {}),
        ("pp2", {"stages": [["0", "1"], ["2", "3", "4"]]}),
        ("pp2", {"stages": [["0", "1", "2", "3", "4", "5"]]}),
    ]:
        try:
            parallelize(build_on_meta(OddPerceptron), Layout.parse(text), CPU, seed=0, **options)
        except UsageError as error:
            messages.append(str(error))
    dist.barrier()
    return messages


def test_what_does_not_fit_the_ranks_is_refused_with_all_numbers(tmp_path: Path) -> None:
    for messages in run_ranks(refusals, 2, tmp_path):
        world, names, stages = messages
        assert "fsdp2x3 needs 3 ranks" in world
        assert "but there are 2" in world
        assert "must name the parts of OddPerceptron once each, in order" in names
        assert "pp2 has 2 pipeline stages, but the cut has 1" in stages


def test_without_a_process_group_there_is_one_line() -> None:
    with pytest.raises(UsageError, match="join one first"):
        parallelize(build_on_meta(OddPerceptron), Layout(), CPU, seed=0)
