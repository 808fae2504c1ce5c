"""Cutting models into stages and giving them memory: names stay, values do not depend on who holds what."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ray_ckpt.errors import UsageError
from ray_ckpt.parallel.materialize import allocate, materialize, set_initial_values, tied_names
from ray_ckpt.parallel.stages import build_on_meta, cut_by_names, cut_evenly, parts_of, stages_that_share, take_stage
from ray_ckpt.recipes.model import PipelineModel
from tests.support.models import Headed, Nested, Perceptron, tied

CPU = torch.device("cpu")


def materialize_stage(whole: nn.Module, names: list[str], seed: int) -> nn.Module:
    skeleton, ties = copy.deepcopy(whole), tied_names(whole)
    stage = take_stage(whole, names)
    allocate(stage, CPU, ties)
    set_initial_values(stage, skeleton, ties, seed)
    return stage


@pytest.mark.parametrize(
    ("layers", "stages", "counts"), [(4, 4, [1, 1, 1, 1]), (5, 2, [2, 3]), (7, 3, [2, 2, 3]), (3, 1, [3])]
)
def test_stages_are_contiguous_and_even(layers: int, stages: int, counts: list[int]) -> None:
    cut = cut_evenly(PipelineModel(4, layers), stages)
    assert [len(stage) for stage in cut] == counts
    assert [name for stage in cut for name in stage] == [f"layer{i}" for i in range(1, layers + 1)]


@pytest.mark.parametrize(
    ("widths", "stages", "cut"),
    [
        ([8, 8, 8, 8], 2, ["0 1", "2 3"]),
        ([64, 2, 2, 2], 2, ["0", "1 2 3"]),
        ([2, 2, 2, 64], 2, ["0 1 2", "3"]),
        ([2, 2, 64, 2, 2], 3, ["0 1", "2", "3 4"]),
        ([0, 8, 0, 8, 0], 2, ["0 1", "2 3 4"]),
    ],
)
def test_the_largest_stage_is_as_small_as_can_be(widths: list[int], stages: int, cut: list[str]) -> None:
    model = nn.Sequential(*(nn.Linear(width, width) if width else nn.ReLU() for width in widths))
    assert [" ".join(names) for names in cut_evenly(model, stages)] == cut


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_no_other_cut_has_a_smaller_largest_stage(widths: list[int], data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(widths)))
    model = nn.Sequential(*(nn.Embedding(1, width) if width else nn.ReLU() for width in widths))

    def largest(bounds: tuple[int, ...]) -> int:
        return max(sum(widths[start:end]) for start, end in itertools.pairwise((0, *bounds, len(widths))))

    cut = cut_evenly(model, num_stages)
    assert [name for names in cut for name in names] == parts_of(model)
    found = tuple(itertools.accumulate(map(len, cut[:-1])))
    assert largest(found) == min(map(largest, itertools.combinations(range(1, len(widths)), num_stages - 1)))


def test_an_explicit_cut_names_every_part_once_and_in_order() -> None:
    model = PipelineModel(4, 3)
    assert cut_by_names(model, [["layer1", "layer2"], ["layer3"]]) == [["layer1", "layer2"], ["layer3"]]
    for wrong in ([["layer1"], ["layer3"]], [["layer2", "layer1"], ["layer3"]], [["layer1", "layer2", "layer3"], []]):
        with pytest.raises(UsageError, match=r"must name the parts .* layer1, layer2, layer3"):
            cut_by_names(model, wrong)


def test_parts_may_lie_deeper_and_leave_the_whole_model_whole() -> None:
    whole = build_on_meta(Nested)
    names = [name for name, _ in whole.named_parameters()]
    stages = [materialize_stage(whole, parts, seed=1) for parts in cut_evenly(whole, 3)]
    assert [name for name, _ in whole.named_parameters()] == names
    reference = build_on_meta(Nested)
    materialize(reference, CPU, seed=1)
    assert [list(stage.state_dict()) for stage in stages] == [
        ["inner.first.weight", "inner.blocks.0.weight"],
        ["inner.blocks.1.weight"],
        ["head.weight"],
    ]
    inputs = torch.randn(2, 5)
    hidden = inputs
    for stage in stages:
        hidden = stage(hidden)
    assert torch.equal(hidden, reference(inputs))


def test_parts_that_do_not_exist_are_refused() -> None:
    model = Nested()
    model.pipeline_parts = lambda: ["inner.first", "inner.third"]  # type: ignore[method-assign]
    with pytest.raises(UsageError, match=r"names inner\.third, which do not exist"):
        parts_of(model)


def test_ties_survive_and_are_known_where_a_cut_parts_them() -> None:
    whole = build_on_meta(tied)
    ties = tied_names(whole)
    assert ties == {"layer2.weight": "layer1.weight"}
    assert stages_that_share([["layer1", "layer2"]], ties) == {}
    assert stages_that_share([["layer1"], ["layer2"]], ties) == {"layer2.weight": (1, 0)}
    first, last = (materialize_stage(build_on_meta(tied), [name], seed=0) for name in ("layer1", "layer2"))
    assert torch.equal(first.get_parameter("layer1.weight"), last.get_parameter("layer2.weight"))
    reference = build_on_meta(tied)
    materialize(reference, CPU, seed=0)
    assert reference.get_parameter("layer1.weight") is reference.get_parameter("layer2.weight")
    assert torch.equal(reference.get_parameter("layer1.weight"), first.get_parameter("layer1.weight"))


def test_too_few_layers_are_refused_with_all_numbers() -> None:
    with pytest.raises(UsageError, match=r"with 3 layers \(layer1, layer2, layer3\) into 4 stages"):
        cut_evenly(PipelineModel(4, 3), 4)


@pytest.mark.parametrize("factory", [lambda: PipelineModel(6, 6), Perceptron], ids=["module", "sequential"])
def test_stages_run_one_after_the_other_are_the_model(factory: type[nn.Module]) -> None:
    whole = build_on_meta(factory)
    stages = []
    for names in cut_evenly(whole, 3):
        stages.append(materialize_stage(whole, names, seed=3))
    reference = build_on_meta(factory)
    materialize(reference, CPU, seed=3)
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
    stage = materialize_stage(whole, ["layer2"], seed=0)
    assert list(stage.state_dict()) == ["layer2.weight", "layer2.bias"]
    assert [name for name, parameter in whole.named_parameters() if not parameter.is_meta] == [
        "layer2.weight",
        "layer2.bias",
    ]


def test_another_seed_gives_other_values() -> None:
    values = []
    for seed in (0, 1):
        model = build_on_meta(lambda: PipelineModel(6, 2))
        materialize(model, CPU, seed)
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
        (Headed, "beside its layers"),
        (lambda: nn.Sequential(NoReset()), r"module '0' \(NoReset\) .* no reset_parameters"),
        (lambda: 3, "not int"),
    ],
)
def test_models_that_could_not_be_restored_are_refused(factory: type[nn.Module], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_on_meta(factory)
