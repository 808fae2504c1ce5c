"""Names with wrappers and prefixes in them, and state that is nested: found by what they mean, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_ckpt import TrainState, load
from ray_ckpt.errors import RayCkptError, StateMismatchError
from ray_ckpt.format.spelling import spell

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module", "_forward_module._orig_mod")


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))


def trained(seed: int) -> tuple[Net, torch.optim.Optimizer]:
    model = Net(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 + seed)
    sum(parameter.square().sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return model, optimizer


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict by name, as `get_optimizer_state_dict` has it."""
    state, names = optimizer.state_dict(), [name for name, _ in model.named_parameters()]
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[number]: of for number, of in state["state"].items()}, "param_groups": groups}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("prefix", ["", "net."])
def test_wrappers_mean_nothing_anywhere_in_a_name(tmp_path: Path, wrapper: str, prefix: str) -> None:
    def wrapped(name: str) -> str:
        return prefix + name.replace("layers.1.", f"layers.1.{wrapper}.").replace("embed", f"{wrapper}.embed")

    model, optimizer = trained(0)
    state = named_state(model, optimizer)
    state["state"] = {wrapped(name): value for name, value in state["state"].items()}
    state["param_groups"][0]["params"] = [wrapped(name) for name in state["param_groups"][0]["params"]]
    torch.save({"model": {wrapped(n): v for n, v in model.state_dict().items()}, "opt": state}, tmp_path / "x.pt")
    other = Net(1)
    fresh = torch.optim.AdamW(other.parameters(), lr=3.0)
    assert not torch.equal(other.embed.weight, model.embed.weight)
    load(TrainState(other, fresh), tmp_path / "x.pt")
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(fresh.state[ours]["exp_avg"], optimizer.state[theirs]["exp_avg"])


def test_a_component_of_the_model_may_be_called_as_a_wrapper() -> None:
    wanted = ["module.fc.weight", "fc.weight"]
    assert spell(["ddp.module.module.fc.weight", "ddp.module.fc.weight"], wanted).wanted == {
        "ddp.module.module.fc.weight": "module.fc.weight",
        "ddp.module.fc.weight": "fc.weight",
    }
    assert spell(["fc.weight"], ["module.fc.weight"]).wanted == {"fc.weight": "module.fc.weight"}


def test_two_names_that_differ_by_wrappers_alone_are_refused() -> None:
    with pytest.raises(StateMismatchError, match=r"each of which may be layers\.weight"):
        spell(["layers._orig_mod.weight", "layers.module.weight"], ["layers.weight"])


NESTED = {
    "list": lambda p: {"step": 1, "Q": [torch.eye(size) + 1 for size in p.shape]},
    "dict": lambda p: {"step": 1, "shampoo": {"L": torch.ones(3), "deep": {"R": torch.zeros(2)}}},
    "list of dicts": lambda p: {"blocks": [{"L": torch.ones(2), "k": 3}, {"L": torch.ones(1), "k": 4}]},
    "list of lists": lambda p: {"ggt": [[torch.ones(2)], [torch.ones(1), torch.zeros(1)]]},
    "list of numbers": lambda p: {"step": 1, "betas": [0.1, 0.2]},
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize("alone", [False, True])
def test_nested_state_arrives_as_it_was(tmp_path: Path, kind: str, alone: bool) -> None:
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    optimizer, fresh = (torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, other))
    for parameter in model.parameters():
        optimizer.state[parameter] = NESTED[kind](parameter)
    whole = {"model": model.state_dict(), "optim": optimizer.state_dict()}
    torch.save(whole["optim"] if alone else whole, tmp_path / "x.pt")
    load(TrainState(other, fresh), tmp_path / "x.pt", only=("optim",) if alone else None)
    assert not same({"weight": 1}, fresh.state[other.weight])
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert same(optimizer.state[theirs], fresh.state[ours])


def test_nesting_that_names_do_not_tell_is_refused_by_name(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight] = {"blocks": {0: torch.ones(2), 1: torch.ones(2)}}
    torch.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, tmp_path / "x.pt")
    fresh = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RayCkptError, match=r"'blocks\.0' at 'optim\.state\.weight' is nested"):
        load(TrainState(model, fresh), tmp_path / "x.pt")


def test_an_optimizer_alone_is_compared_with_the_live_shapes(tmp_path: Path) -> None:
    _, optimizer = trained(0)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other = Net(1)
    swapped = torch.optim.AdamW(list(other.parameters())[::-1], lr=3.0)
    with pytest.raises(StateMismatchError, match=r"number 0 would be 'layers\.1\.bias'"):
        load(TrainState(other, swapped), tmp_path / "optimizer.pt", only=("optim",))
    assert not swapped.state


@pytest.mark.parametrize(
    ("wanted", "written"),
    [
        ("base.0.lora_A.default.weight", "base.0.lora_A.weight"),
        ("base.0.lora_embedding_B.default", "base.0.lora_embedding_B"),
        ("base.0.lora_magnitude_vector.mine.weight", "base.0.lora_magnitude_vector"),
        ("base.1.modules_to_save.mine.weight", "base.1.weight"),
        ("base.2.ia3_l.default", "base.2.ia3_l"),
        ("base.3.modules_to_save.default.lora_A.default.weight", "base.3.lora_A.weight"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_files_of_adapters_leave_out_what_an_adapter_is_called(wanted: str, written: str, prefix: str) -> None:
    others = {"base.9.lora_A.default.weight": "base.9.lora_A.weight"}
    saved = [prefix + name for name in (written, *others.values())]
    assert spell(saved, [wanted, *others]).wanted == dict(zip(saved, [wanted, *others], strict=True))
    # What is there under its own name is meant by it.
    both = [prefix + wanted, prefix + written]
    assert spell(both, [wanted]).wanted == {prefix + wanted: wanted}


def test_a_model_that_merely_has_such_names_is_read_by_them() -> None:
    names = ["lora_A.weight", "lora_A.bias", "other.weight"]
    assert spell(names, names).wanted == {name: name for name in names}
    assert spell(["lora_A.x.weight"], ["lora_A.weight"]).wanted == {}
