"""What optimizers and other objects keep, of any kind: saved as it is and given back as it was, or refused by name."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import ray_ckpt
from ray_ckpt import TrainState
from ray_ckpt.errors import StateMismatchError, UsageError
from ray_ckpt.state.hyperparameters import same, without_numpy


class Keeping(torch.optim.Optimizer):
    """Keeps what it is told to, and steps by the sum of it."""

    def __init__(self, params: Any, keep: Callable[[torch.Tensor], dict[Any, Any]], **defaults: Any) -> None:
        super().__init__(params, {"lr": 0.1, **defaults})
        self.keep = keep

    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if not self.state[parameter]:
                self.state[parameter].update(self.keep(parameter))


STATES: dict[str, Callable[[torch.Tensor], dict[Any, Any]]] = {
    "lists of tensors": lambda p: {"step": 3, "Q": [torch.rand(d) for d in p.shape], "order": ()},
    "numbers as keys": lambda p: {"blocks": {0: torch.rand(2), 1: torch.rand(3)}, "pending": {}},
    "dots in keys": lambda p: {"stats.mean": torch.rand(2), "exp_avg": torch.rand_like(p)},
    "nested": lambda p: {"a": {"b": {"c": torch.rand(2), "d": None}}, "seen": {4, 5}},
    "numbers of numpy": lambda p: {"scale": numpy.float64(0.5), "dtype": torch.bfloat16},
    "small numbers of numpy": lambda p: {
        "float32": numpy.float32(0.1),
        "nested": {"float16": [numpy.float16(1 / 3)], "uint8": (numpy.uint8(255),)},
        "complex64": numpy.complex64(1 / 3 + 2j),
    },
}


@pytest.mark.parametrize("kind", STATES)
def test_state_comes_back_as_it_was(tmp_path: Path, kind: str) -> None:
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    rates = {"betas": (torch.tensor(0.9), torch.tensor(0.5)), "rate": numpy.int64(7)}
    keep = Keeping(models[0].parameters(), STATES[kind], **rates)
    fresh = Keeping(models[1].parameters(), STATES[kind], betas=(torch.tensor(0.1), torch.tensor(0.2)), rate=3)
    keep.step()
    ray_ckpt.save(TrainState(models[0], keep), tmp_path / "run")
    assert ray_ckpt.load(TrainState(models[1], fresh), tmp_path / "run").missing == ()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert same(fresh.state[other], {key: without_numpy(value) for key, value in keep.state[one].items()})
    assert [float(beta) for beta in fresh.param_groups[0]["betas"]] == pytest.approx([0.9, 0.5])
    assert fresh.param_groups[0]["rate"] == 7
    # What is there is read in place, and everything is there now.
    ray_ckpt.load(TrainState(models[1], fresh), tmp_path / "run")


def turned(seed: int, dims: tuple[int, ...]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A convolution, and an optimizer whose state lies in memory as its parameter, densely, and in another order."""
    torch.manual_seed(seed)
    model = nn.Conv2d(4, 6, 3, bias=False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = Keeping(
        model.parameters(),
        lambda p: {
            "exp_avg": torch.rand_like(p),
            "flat": torch.rand(p.shape),
            "Q": [torch.rand(5, 7).permute(dims), torch.rand(1, 5, 7).transpose(1, 2)],
        },
    )
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("is_fresh", [True, False])
def test_state_lies_in_memory_as_it_did(tmp_path: Path, is_fresh: bool) -> None:
    """A product with a transposed matrix may differ in the last bit from one with its contiguous copy."""
    (model, optimizer), (target, other) = turned(0, (1, 0)), turned(1, (0, 1))
    if is_fresh:
        other.state.clear()
    ray_ckpt.save(TrainState(model, optimizer), tmp_path / "run")
    ray_ckpt.load(TrainState(target, other), tmp_path / "run")
    [state], [loaded] = optimizer.state.values(), other.state.values()
    assert same(loaded, state)
    assert loaded["exp_avg"].stride() == (36, 1, 12, 4)
    assert loaded["flat"].stride() == (36, 9, 3, 1)
    assert loaded["Q"][0].stride() == (1, 7)
    assert loaded["Q"][1].stride()[1:] == (1, 7)
    there = loaded["Q"][0]
    ray_ckpt.load(TrainState(target, other), tmp_path / "run")
    assert next(iter(other.state.values()))["Q"][0].data_ptr() == there.data_ptr()


def test_state_that_belongs_to_no_parameter_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[0, (2, 2)] = {"steps": 3}  # type: ignore[index]
    with pytest.raises(UsageError, match=r"SGD keeps state under \(0, \(2, 2\)\), which is not one of its parameters"):
        ray_ckpt.save(TrainState(model, optimizer), tmp_path / "run")


@pytest.mark.parametrize("extra", [{"data": {"x": 1}, "data.seed": 3}, {"a": [torch.ones(1)], "a.$0": 5}])
def test_names_within_names_are_refused(tmp_path: Path, extra: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"extra\['\S+\.\S+'\] lies within extra\['\w+'\]"):
        ray_ckpt.save(TrainState(nn.Linear(2, 2), extra=extra), tmp_path / "run")
    apart = {"data": {"x": 1}, "data-seed": 3, "data2.seed": 4}
    ray_ckpt.save(TrainState(nn.Linear(2, 2), extra=apart), tmp_path / "apart")


def test_two_models_of_one_set_of_names_are_refused_equal_or_not(tmp_path: Path) -> None:
    policy, target = nn.Linear(2, 2), nn.Linear(2, 2)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"two of the 2 modules have a parameter 'weight': .* nn\.ModuleDict"):
            ray_ckpt.save(TrainState([policy, target]), tmp_path / "run")
        target.load_state_dict(policy.state_dict())


class Metadata(nn.Linear):
    """Extra state that grows: a tensor of another size, or a stream."""

    as_stream = False
    seen: bytes = b""

    def get_extra_state(self) -> Any:
        return io.BytesIO(self.seen) if self.as_stream else torch.tensor(list(self.seen), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        self.seen = state.read() if self.as_stream else bytes(state.tolist())


@pytest.mark.parametrize("as_stream", [False, True])
def test_extra_state_need_not_be_as_large_as_what_is_there(tmp_path: Path, as_stream: bool) -> None:
    source, target = nn.Sequential(Metadata(2, 2)), nn.Sequential(Metadata(2, 2))
    for model in (source, target):
        model[0].as_stream = as_stream
    source[0].seen = b"123"
    ray_ckpt.save(TrainState(source), tmp_path / "run")
    ray_ckpt.load(TrainState(target), tmp_path / "run")
    assert target[0].seen == b"123"


class Derived(nn.Linear):
    """Shows an entry beside its weight that is no attribute, and its weight under another name."""

    takes_it = True

    def __init__(self) -> None:
        super().__init__(2, 2, bias=False)
        self.scales = torch.ones(2)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination |= {f"{prefix}inner.weight": self.weight.detach(), f"{prefix}weight.absmax": self.scales + 0}

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        self.weight.data.copy_(state[f"{prefix}inner.weight"])
        if self.takes_it:
            self.scales = state[f"{prefix}weight.absmax"].clone()


def test_what_hooks_make_of_a_module_goes_through_its_own_load_state_dict(tmp_path: Path) -> None:
    source, target = nn.Sequential(Derived()), nn.Sequential(Derived())
    source[0].scales.fill_(7.0)
    ray_ckpt.save(TrainState(source), tmp_path / "run")
    ray_ckpt.load(TrainState(target), tmp_path / "run")
    assert torch.equal(source[0].weight, target[0].weight)
    assert torch.equal(source[0].scales, target[0].scales)
    target[0].scales, target[0].takes_it = torch.ones(2), False
    with pytest.raises(StateMismatchError, match=r"Sequential does not show what was read as 0\.weight\.absmax"):
        ray_ckpt.load(TrainState(target), tmp_path / "run")


def test_memory_is_put_on_the_module_that_owns_it(tmp_path: Path) -> None:
    """Within a wrapper for activation checkpointing, whose entries have the names of what it wraps."""
    source = nn.Sequential(checkpoint_wrapper(nn.BatchNorm1d(3)))
    source[0].running_mean.fill_(5.0)
    ray_ckpt.save(TrainState(source), tmp_path / "run")
    with torch.device("meta"):
        target = nn.Sequential(checkpoint_wrapper(nn.BatchNorm1d(3)))
    ray_ckpt.load(TrainState(target), tmp_path / "run")
    assert not any(tensor.is_meta for tensor in target.state_dict().values())
    assert torch.equal(target[0].running_mean, torch.full((3,), 5.0))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrent_module_on_meta_is_loaded_with_its_optimizer(tmp_path: Path, kind: Any) -> None:
    """It holds weak references to its weights, and a list of them besides."""
    source = kind(4, 5, 2)
    ray_ckpt.save(TrainState(source, torch.optim.SGD(source.parameters(), lr=0.1)), tmp_path / "run")
    with torch.device("meta"):
        target = kind(4, 5, 2)
    optimizer = torch.optim.SGD(target.parameters(), lr=0.2)
    ray_ckpt.load(TrainState(target, optimizer), tmp_path / "run")
    inputs = torch.ones(3, 4)
    assert torch.equal(source(inputs)[0], target(inputs)[0])
    target(inputs)[0].sum().backward()
    optimizer.step()
    assert not torch.equal(source(inputs)[0], target(inputs)[0])


class Renamed(nn.Module):
    """Its hooks show its weight under a name that is no attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_state_dict_post_hook(_rename)
        self.register_load_state_dict_pre_hook(_rename_back)


def _rename(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state[f"{prefix}old.weight"] = state.pop(f"{prefix}inner.weight")


def _rename_back(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    if f"{prefix}old.weight" in state:
        state[f"{prefix}inner.weight"] = state.pop(f"{prefix}old.weight")


def test_what_hooks_rename_on_the_meta_device_is_refused_with_the_way_out(tmp_path: Path) -> None:
    source, target = nn.Sequential(Renamed()), nn.Sequential(Renamed())
    ray_ckpt.save(TrainState(source), tmp_path / "run")
    ray_ckpt.load(TrainState(target), tmp_path / "run")
    assert torch.equal(source[0].inner.weight, target[0].inner.weight)
    with torch.device("meta"):
        bare = nn.Sequential(Renamed())
    with pytest.raises(StateMismatchError, match=r"0\.old\.weight are on the meta device, .* by to_empty"):
        ray_ckpt.load(TrainState(bare), tmp_path / "run")
    assert bare[0].inner.bias.is_meta
    ray_ckpt.load(TrainState(bare.to_empty(device="cpu")), tmp_path / "run")
    assert torch.equal(source[0].inner.weight, bare[0].inner.weight)


def test_a_lazy_module_is_refused_until_it_has_a_shape(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'0\.weight' of a lazy module has no shape yet"):
        ray_ckpt.save(TrainState(nn.Sequential(nn.LazyLinear(3))), tmp_path / "run")
