"""Cutting models into stages and giving them memory: names stay, values do not depend on who holds what."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ray_ckpt.errors import UsageError
from ray_ckpt.parallel.stages import build_on_meta, cut_evenly, materialise, take_stage
from ray_ckpt.recipes.pipeline_to_fsdp.model import PipelineModel
from tests.models import Headed, Perceptron, tied

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("layers", "stages", "counts"), [(4, 4, [1, 1, 1, 1]), (5, 2, [2, 3]), (7, 3, [2, 2, 3]), (3, 1, [3])]
)
def test_stages_are_contiguous_and_even(layers: int, stages: int, counts: list[int]) -> None:
    cut = cut_evenly(PipelineModel(4, layers), stages)
    assert [len(stage) for stage in cut] == counts
    assert [name for stage in cut for name in stage] == [f"layer{i}" for i in range(1, layers + 1)]


def test_too_few_layers_are_refused_with_all_numbers() -> None:
    with pytest.raises(UsageError, match=r"with 3 layers \(layer1, layer2, layer3\) into 4 stages"):
        cut_evenly(PipelineModel(4, 3), 4)


@pytest.mark.parametrize("factory", [lambda: PipelineModel(6, 6), Perceptron], ids=["module", "sequential"])
def test_stages_run_one_after_the_other_are_the_model(factory: type[nn.Module]) -> None:
    whole = build_on_meta(factory)
    stages = []
    for names in cut_evenly(whole, 3):
        stage = take_stage(whole, names)
        materialise(stage, CPU, seed=3)
        stages.append(stage)
    reference = build_on_meta(factory)
    materialise(reference, CPU, seed=3)
    inputs = torch.randn(5, 6)
    hidden = inputs
    for stage in stages:
        hidden = stage(hidden)
    assert torch.equal(hidden, reference(inputs))
    state = {name: tensor for stage in stages for name, tensor in stage.state_dict().items()}
    assert state.keys() == reference.state_dict().keys()
    assert all(torch.equal(tensor, reference.state_dict()[name]) for name, tensor in state.items())


def test_a_stage_holds_memory_for_its_own_layers_only() -> None:
    whole = build_on_meta(lambda: PipelineModel(6, 4))
    stage = take_stage(whole, ["layer2"])
    materialise(stage, CPU, seed=0)
    assert list(stage.state_dict()) == ["layer2.weight", "layer2.bias"]
    assert [name for name, parameter in whole.named_parameters() if not parameter.is_meta] == [
        "layer2.weight",
        "layer2.bias",
    ]


def test_another_seed_gives_other_values() -> None:
    values = []
    for seed in (0, 1):
        model = build_on_meta(lambda: PipelineModel(6, 2))
        materialise(model, CPU, seed)
        values.append(model.get_parameter("layer1.weight").detach())
        assert not torch.equal(model.get_parameter("layer1.weight"), model.get_parameter("layer2.weight"))
    assert not torch.equal(*values)


class NoReset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (tied, "layer2.weight share memory"),
        (Headed, "beside its layers"),
        (lambda: nn.Sequential(NoReset()), r"module '0' \(NoReset\) .* no reset_parameters"),
        (lambda: 3, "not int"),
    ],
)
def test_models_that_could_not_be_restored_are_refused(factory: type[nn.Module], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_on_meta(factory)
