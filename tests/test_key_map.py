"""Key maps that join and split tensors: every element once, the optimizer's state with it, in any layout."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ray_ckpt
from ray_ckpt import Saved, TrainState
from ray_ckpt.errors import RayCkptError, StateMismatchError, UsageError
from ray_ckpt.format.boxes import Box, check_cover
from ray_ckpt.format.manifest import Chunk, TensorEntry
from ray_ckpt.format.views import View, evaluate
from tests.support.ranks import run_ranks


class Apart(nn.Module):
    """Projections and experts of their own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.q, self.k = nn.Linear(6, 8), nn.Linear(6, 4)
        self.experts = nn.ModuleList(nn.Linear(6, 3, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x), *(expert(x) for expert in self.experts)], -1)


class Fused(nn.Module):
    """The same in one weight each; the experts' is transposed too."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.qk = nn.Linear(6, 12)
        self.experts = nn.Parameter(torch.randn(4, 6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.qk(x), *(x @ expert for expert in self.experts)], -1)


JOIN = {
    "model.qk.weight": Saved.cat([Saved("model.q.weight"), Saved("model.k.weight")]),
    "model.qk.bias": Saved.cat([Saved("model.q.bias"), Saved("model.k.bias")]),
    "model.experts": Saved.stack([Saved(f"model.experts.{i}.weight") for i in range(4)]).transpose(1, 2),
}
SPLIT = {
    **{f"model.q.{name}": Saved(f"model.qk.{name}").narrow(0, 0, 8) for name in ("weight", "bias")},
    **{f"model.k.{name}": Saved(f"model.qk.{name}").narrow(0, 8, 4) for name in ("weight", "bias")},
    **{f"model.experts.{i}.weight": Saved("model.experts").select(0, i).transpose(0, 1) for i in range(4)},
}


def _trained(model: nn.Module) -> TrainState:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 30).reshape(5, 6) * (step + 1)).square().sum().backward()
        optimizer.step()
    return TrainState(model, optimizer)


def _fused(model: Apart, optimizer: Any, key: str) -> dict[str, torch.Tensor]:
    """What the fused model is to hold: its parameters, or their state."""

    def of(parameter: torch.Tensor) -> torch.Tensor:
        return parameter.detach() if key == "parameter" else optimizer.state[parameter][key]

    return {
        "qk.weight": torch.cat([of(model.q.weight), of(model.k.weight)]),
        "qk.bias": torch.cat([of(model.q.bias), of(model.k.bias)]),
        "experts": torch.stack([of(expert.weight).t() for expert in model.experts]),
    }


def _holds(state: TrainState, expected: dict[str, dict[str, torch.Tensor]]) -> bool:
    def whole(tensor: Any) -> torch.Tensor:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    return all(
        torch.equal(whole(parameter if key == "parameter" else state.optimizer.state[parameter][key]), values[name])
        for key, values in expected.items()
        for name, parameter in state.model.named_parameters()
    )


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState, dict[str, dict[str, torch.Tensor]]]:
    path = tmp_path_factory.mktemp("apart") / "run"
    state = _trained(Apart(0))
    ray_ckpt.save(state, path)
    expected = {key: _fused(state.model, state.optimizer, key) for key in ("parameter", "exp_avg", "exp_avg_sq")}
    return path, state, expected


def _blank(model: nn.Module) -> TrainState:
    return TrainState(model, torch.optim.AdamW(model.parameters()))


def test_what_was_apart_is_joined_and_trains_on_alike(apart: Any) -> None:
    path, state, expected = apart
    target = _blank(Fused(1))
    report = ray_ckpt.load(target, path, key_map=JOIN)
    assert (report.missing, report.unexpected) == ((), ())
    assert _holds(target, expected)
    assert target.optimizer.param_groups[0]["lr"] == 0.125
    assert {float(of["step"]) for of in target.optimizer.state.values()} == {3.0}
    x = torch.randn(2, 6)
    torch.testing.assert_close(target.model(x), state.model(x))


def test_and_split_again(apart: Any, tmp_path: Path) -> None:
    path, state, _ = apart
    fused = _blank(Fused(1))
    ray_ckpt.load(fused, path, key_map=JOIN)
    ray_ckpt.save(fused, tmp_path / "fused")
    again = _blank(Apart(2))
    ray_ckpt.load(again, tmp_path / "fused", key_map=SPLIT)
    for mine, its in zip(again.model.parameters(), state.model.parameters(), strict=True):
        assert torch.equal(mine, its)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(again.optimizer.state[mine][key], state.optimizer.state[its][key])


def _load_sharded(rank: int, path: str, expected: Any) -> bool:
    model = Fused(1)
    fully_shard(model, mesh=init_device_mesh("cpu", (3,)))
    target = _blank(model)
    ray_ckpt.load(target, path, key_map=JOIN)
    return _holds(target, expected)


def test_into_shards(apart: Any, tmp_path: Path) -> None:
    path, _, expected = apart
    assert run_ranks(_load_sharded, 3, tmp_path, str(path), expected) == [True] * 3


def test_from_what_others_wrote(apart: Any, tmp_path: Path) -> None:
    _, state, expected = apart
    save_file(state.model.state_dict(), tmp_path / "model.safetensors")
    target = TrainState(Fused(1))
    ray_ckpt.load(target, tmp_path / "model.safetensors", key_map=JOIN)
    assert _holds(target, {"parameter": expected["parameter"]})


# ------------------------------------------------------------------------------------------------------- refusals


def test_what_is_left_over_is_refused(apart: Any) -> None:
    path, _, _ = apart
    partly = JOIN | {
        "model.qk.weight": Saved.cat(
            [Saved("model.q.weight").narrow(0, 0, 4), Saved("model.q.weight").narrow(0, 4, 4), Saved("model.k.weight")]
        )
    }
    ray_ckpt.load(_blank(Fused(1)), path, key_map=partly)
    less = SPLIT | {"model.k.weight": Saved("model.qk.weight").narrow(0, 8, 3)}
    fused = _blank(Fused(1))
    ray_ckpt.load(fused, path, key_map=JOIN)
    ray_ckpt.save(fused, path.parent / "fused")
    with pytest.raises(StateMismatchError, match=r"model\.k\.weight: saved float32\[3, 6\]"):
        ray_ckpt.load(_blank(Apart(1)), path.parent / "fused", key_map=less)


def test_a_part_of_a_tensor_leaves_a_rest(tmp_path: Path) -> None:
    ray_ckpt.save({"w": torch.arange(12.0).reshape(6, 2)}, tmp_path / "run")
    state = {"w": torch.zeros(4, 2)}
    with pytest.raises(
        StateMismatchError, match=r"w \(as saved\): saved .* \(of which the key map uses a part: 4 of 12"
    ):
        ray_ckpt.load(state, tmp_path / "run", key_map={"w": Saved("w").narrow(0, 0, 4)})
    assert not state["w"].any()
    ray_ckpt.load(state, tmp_path / "run", key_map={"w": Saved("w").narrow(0, 0, 4)}, strict=False)
    assert torch.equal(state["w"], torch.arange(8.0).reshape(4, 2))


def test_an_element_has_one_place(tmp_path: Path) -> None:
    ray_ckpt.save({"w": torch.arange(6.0)}, tmp_path / "run")
    state = {"a": torch.zeros(4), "b": torch.zeros(3)}
    key_map = {"a": Saved("w").narrow(0, 0, 4), "b": Saved("w").narrow(0, 3, 3)}
    with pytest.raises(StateMismatchError, match="uses elements of 'w' more than once"):
        ray_ckpt.load(state, tmp_path / "run", key_map=key_map)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Saved("a").narrow(0, 2, 3), r"\[2, 5\) is no part of a dim of size 4"),
        (Saved("a").select(0, 4), "no index 4"),
        (Saved("a").chunk(3)[0], "4 is not divided by 3"),
        (Saved.cat([Saved("a"), Saved("b")]), "they differ in more than dim 0"),
        (Saved("a").transpose(0, 2), "no dim 2"),
    ],
)
def test_shapes_that_do_not_allow_it(tmp_path: Path, made: Saved, message: str) -> None:
    ray_ckpt.save({"a": torch.zeros(4, 2), "b": torch.zeros(4, 3)}, tmp_path / "run")
    with pytest.raises(StateMismatchError, match=message):
        ray_ckpt.load({"x": torch.zeros(1)}, tmp_path / "run", key_map={"x": made}, strict=False)


def test_joined_parameters_must_agree_in_what_is_not_joined(apart: Any, tmp_path: Path) -> None:
    state = _trained(Apart(0))
    state.optimizer.state[state.model.k.weight]["step"] += 1
    ray_ckpt.save(state, tmp_path / "steps")
    with pytest.raises(StateMismatchError, match=r"optim\.state\.qk\.weight\.step is made of several, which differ"):
        ray_ckpt.load(_blank(Fused(1)), tmp_path / "steps", key_map=JOIN)
    model = Apart(0)
    groups = [
        {"params": list(model.q.parameters()), "lr": 0.5},
        {"params": [p for n, p in model.named_parameters() if n[0] != "q"]},
    ]
    ray_ckpt.save(TrainState(model, torch.optim.SGD(groups, lr=0.25)), tmp_path / "groups")
    target = TrainState(fused := Fused(1), torch.optim.SGD(fused.parameters(), lr=1.0))
    with pytest.raises(StateMismatchError, match=r"optim\.param_groups\.qk\.weight\.lr is made of several"):
        ray_ckpt.load(target, tmp_path / "groups", key_map=JOIN)
    ray_ckpt.load(target, tmp_path / "groups", key_map=JOIN, hyperparameters="from-optimizer")
    assert target.optimizer.param_groups[0]["lr"] == 1.0


def test_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = Apart(0)
    optimizer = torch.optim.Adafactor(model.parameters())
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    ray_ckpt.save(TrainState(model, optimizer), tmp_path / "run")
    fused = Fused(1)
    target = TrainState(fused, torch.optim.Adafactor(fused.parameters()))
    with pytest.raises(StateMismatchError, match="has not the shape of its parameter"):
        ray_ckpt.load(target, tmp_path / "run", key_map=JOIN)
    ray_ckpt.load(target, tmp_path / "run", key_map=JOIN, only=("model",))


def test_a_function_gives_names_only(apart: Any) -> None:
    with pytest.raises(UsageError, match="joins and splits need a mapping"):
        ray_ckpt.load(_blank(Fused(1)), apart[0], key_map=lambda name: JOIN.get(name, name))  # type: ignore[arg-type]


def test_a_key_that_nothing_wants_is_refused(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ray_ckpt.save(TrainState(source), tmp_path / "run")
    swapped = {f"model.{one}.{name}": f"model.{1 - one}.{name}" for one in (0, 1) for name in ("weight", "bias")}
    target = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = target[0].weight.detach().clone()
    misspelt = {key.replace("model.", "modle."): saved for key, saved in swapped.items()}
    with pytest.raises(StateMismatchError, match=r"key_map has modle\.0\.weight; .*, which nothing wants"):
        ray_ckpt.load(TrainState(target), tmp_path / "run", key_map=misspelt)
    assert torch.equal(target[0].weight, before)
    with pytest.raises(StateMismatchError, match=r"key_map has model\.2\.weight, which nothing wants"):
        ray_ckpt.load(TrainState(target), tmp_path / "run", key_map={**swapped, "model.2.weight": "model.0.weight"})
    told = ray_ckpt.load(TrainState(target), tmp_path / "run", key_map=misspelt, strict=False).lost
    assert "key_map has modle.0.weight" in told
    assert torch.equal(target[0].weight, source[0].weight)
    ray_ckpt.load(TrainState(target), tmp_path / "run", key_map=swapped)
    assert torch.equal(target[0].weight, source[1].weight)
    further = {**swapped, "optim.misspelt": "model.0.weight"}
    assert ray_ckpt.load(TrainState(target), tmp_path / "run", key_map=further, only=("model",)).lost == ""


def load_stage(rank: int, path: str) -> tuple[bool, str]:
    """Each rank holds one of two layers, of which the saved names are exchanged."""
    stage = nn.ModuleDict({str(rank): nn.Linear(2, 2)})
    key_map = {f"model.{one}.{name}": f"model.{1 - one}.{name}" for one in (0, 1) for name in ("weight", "bias")}
    ray_ckpt.load(TrainState(stage), path, key_map=key_map)
    return bool((stage[str(rank)].weight == 1 - rank).all()), _refusal(
        stage, path, {**key_map, "model.2.bias": "model.0.bias"}
    )


def _refusal(stage: nn.Module, path: str, key_map: dict[str, str]) -> str:
    try:
        ray_ckpt.load(TrainState(stage), path, key_map=key_map)
    except RayCkptError as error:
        return str(error)
    return ""


def test_a_key_is_wanted_if_any_rank_wants_it(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for number, layer in enumerate(source):
        nn.init.constant_(layer.weight, float(number))
    ray_ckpt.save(TrainState(source), tmp_path / "run")
    for is_right, told in run_ranks(load_stage, 2, tmp_path, str(tmp_path / "run")):
        assert is_right
        assert "key_map has model.2.bias, which nothing wants" in told


# ------------------------------------------------------------------------------------------------- compared with torch


@st.composite
def expressions(draw: st.DrawFn) -> Saved:
    made = [Saved("a"), Saved("b")]
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["narrow", "select", "transpose", "cat", "stack", "chunk"]))
        one = draw(st.sampled_from(made))
        dim = draw(st.integers(-2, 2))
        if kind == "narrow":
            made.append(one.narrow(dim, draw(st.integers(0, 2)), draw(st.integers(1, 3))))
        elif kind == "select":
            made.append(one.select(dim, draw(st.integers(-2, 3))))
        elif kind == "transpose":
            made.append(one.transpose(dim, draw(st.integers(-2, 2))))
        elif kind == "chunk":
            made.append(one.chunk(2, dim)[draw(st.integers(0, 1))])
        else:
            made.append(getattr(Saved, kind)([one, draw(st.sampled_from(made))], dim))
    return made[-1]


def _by_torch(saved: Saved, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    if not saved.operation:
        return tensors[saved.name]
    operands = [_by_torch(operand, tensors) for operand in saved.operands]
    if saved.operation in ("cat", "stack"):
        return getattr(torch, saved.operation)(operands, *saved.arguments)
    if saved.operation == "chunk":
        chunks, dim, index = saved.arguments
        if operands[0].shape[dim] % chunks:
            raise IndexError("chunks of different sizes")
        return operands[0].chunk(chunks, dim)[index]
    return getattr(torch, saved.operation)(operands[0], *saved.arguments)


@given(expressions())
@example(Saved.cat([Saved("a"), Saved("a").select(1, 0)], 1))  # of another number of dims, in which the rest is alike
@settings(max_examples=300, deadline=None)
def test_operations_are_those_of_torch(saved: Saved) -> None:
    tensors = {"a": torch.arange(12.0).reshape(4, 3), "b": torch.arange(100, 112.0).reshape(4, 3)}
    boxes = [Box((row, column), (2, size)) for row in (0, 2) for column, size in ((0, 1), (1, 2))]
    entries = {
        name: TensorEntry("float32", (4, 3), tuple(Chunk(box, name, 0, 0, None) for box in boxes)) for name in tensors
    }
    try:
        expected = _by_torch(saved, tensors)
    except (IndexError, RuntimeError):
        with pytest.raises(StateMismatchError):
            evaluate(saved, lambda name: View.of(entries[name]))
        return
    view = evaluate(saved, lambda name: View.of(entries[name]))
    assert view.shape == tuple(expected.shape)
    assert check_cover(view.shape, [piece.box for piece in view.pieces]) is None
    for piece in view.pieces:
        for place in itertools.product(*map(range, piece.box.sizes)):
            inside = piece.in_chunk(Box(place, (1,) * len(place)))
            source = tuple(a + b for a, b in zip(inside.offsets, piece.chunk.box.offsets, strict=True))
            at = tuple(a + b for a, b in zip(place, piece.box.offsets, strict=True))
            assert expected[at] == tensors[piece.chunk.file][source]
