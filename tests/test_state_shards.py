"""Optimizers under FSDP2 that keep plain tensors of their shards, or DTensors and plain tensors side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ray_ckpt
from ray_ckpt import TrainState
from ray_ckpt.errors import CommitError, StateMismatchError
from ray_ckpt.format.torch_internals import local_tensor
from ray_ckpt.state import sealing
from tests.support.ranks import run_ranks


class EightBit(torch.optim.Optimizer):
    """int8 momentum of the local shard, with a scale per block of 8 elements of it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            local, grad = local_tensor(parameter), local_tensor(parameter.grad).flatten()
            state = self.state[parameter]
            if not state:
                num_blocks = -(-local.numel() // 8)
                state.update(codes=torch.zeros(local.numel(), dtype=torch.int8), absmax=torch.ones(num_blocks))
            blocks = state["absmax"].repeat_interleave(8)[: local.numel()]
            momentum = state["codes"].float() / 127 * blocks * 0.9 + grad
            for number, block in enumerate(momentum.split(8) if local.numel() else ()):
                state["absmax"][number] = block.abs().max().clamp(min=1e-9)
            blocks = state["absmax"].repeat_interleave(8)[: local.numel()]
            state["codes"].copy_((momentum / blocks * 127).round())
            local.add_(momentum.view_as(local), alpha=-0.1)


class Scaled(torch.optim.Optimizer):
    """A DTensor beside a `[1]`-shaped preconditioner and a number, both plain and alike on all ranks; and its norm."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            state = self.state[parameter]
            if not state:
                state.update(average=torch.zeros_like(parameter), scale=torch.ones(1), seen=torch.zeros(()))
            state["average"].lerp_(parameter.grad, 0.5)
            state["seen"] += 1
            state["scale"].mul_(torch.tensor([0.5]))
            local_tensor(parameter).add_(local_tensor(state["average"]) * state["scale"])


def sharded(seed: int, optimizer: Any, rows: int = 7) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, rows), nn.Linear(rows, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, optimizer(model.parameters())


def give_gradients(model: nn.Module, alike: bool) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5) if alike else parameter.detach().clone()


def go_on(rank: int, directory: str, kind: Any, alike: bool) -> list[bool]:
    """Whether a fresh optimizer goes on bit for bit where the saved one was."""
    model, optimizer = sharded(0, kind)
    target, fresh = sharded(1, kind)
    give_gradients(model, alike)
    optimizer.step()
    ray_ckpt.save(TrainState(model, optimizer), f"{directory}/{kind.__name__}-{alike}")
    ray_ckpt.load(TrainState(target, fresh), f"{directory}/{kind.__name__}-{alike}")
    # Into what is there, too.
    ray_ckpt.load(TrainState(target, fresh), f"{directory}/{kind.__name__}-{alike}")
    same = []
    for one, other in zip(model.parameters(), target.parameters(), strict=True):
        same.append(sealing.is_same(optimizer.state[one], fresh.state[other]))
        kinds = [{key: type(leaf) for key, leaf in each.items()} for each in (optimizer.state[one], fresh.state[other])]
        same.append(kinds[0] == kinds[1])
    for each, stepped in ((model, optimizer), (target, fresh)):
        give_gradients(each, alike)
        stepped.step()
    pairs = zip(model.parameters(), target.parameters(), strict=True)
    return same + [torch.equal(local_tensor(one), local_tensor(other)) for one, other in pairs]


def each_kind(rank: int, directory: str) -> list[bool]:
    return [
        good for kind in (EightBit, Scaled) for alike in (True, False) for good in go_on(rank, directory, kind, alike)
    ]


def into_fewer(rank: int, directory: str) -> str:
    model, optimizer = sharded(1, EightBit)
    with pytest.raises(StateMismatchError) as e:
        ray_ckpt.load(TrainState(model, optimizer), f"{directory}/EightBit-True")
    return str(e.value)


def test_plain_state_of_shards_comes_back_to_the_same_shards_and_nowhere_else(tmp_path: Path) -> None:
    """From the first save on, alike on all ranks or not."""
    assert all(map(all, run_ranks(each_kind, 2, tmp_path, str(tmp_path))))
    for text in run_ranks(into_fewer, 1, tmp_path, str(tmp_path)):
        assert "the optimizer keeps plain tensors of each shard of 0.weight, which fit no other layout" in text
        assert "0:4,0:6, 4:7,0:6" in text
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 1))
    for alike in (True, False):
        scaled = Scaled(model.parameters())
        assert ray_ckpt.load(TrainState(model, scaled), tmp_path / f"Scaled-{alike}").missing == ()
        state = scaled.state[model[0].weight]
        assert state["scale"].tolist() == [0.5]
        assert state["average"].shape == (7, 6)
        assert not any(isinstance(leaf, DTensor) for leaf in state.values())
        give_gradients(model, alike)
        scaled.step()


def from_one_process(rank: int, directory: str) -> list[bool]:
    model, fresh = sharded(1, Scaled)
    ray_ckpt.load(TrainState(model, fresh), f"{directory}/one")
    good = []
    for parameter in model.parameters():
        state = fresh.state[parameter]
        good += [isinstance(state["average"], DTensor), type(state["scale"]) is type(state["seen"]) is torch.Tensor]
    give_gradients(model, False)
    fresh.step()
    return good


def test_plain_state_of_one_process_is_plain_beside_shards(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 1))
    optimizer = Scaled(model.parameters())
    give_gradients(model, False)
    optimizer.step()
    ray_ckpt.save(TrainState(model, optimizer), tmp_path / "one")
    assert all(map(all, run_ranks(from_one_process, 2, tmp_path, str(tmp_path))))


def step_on_one_rank(rank: int, directory: str) -> list[str]:
    model, optimizer = sharded(0, lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
    texts = []
    for gradient in (None, torch.zeros_like(model[0].weight)):
        give_gradients(model, alike=True)
        if rank == 1:
            model[0].weight.grad = gradient
        optimizer.step()
        try:
            ray_ckpt.save(TrainState(model, optimizer), f"{directory}/{len(texts)}")
            texts.append("saved")
        except CommitError as error:
            texts.append(str(error))
    return texts


def test_state_on_some_ranks_only_is_refused_with_the_ranks(tmp_path: Path) -> None:
    for refused, saved in run_ranks(step_on_one_rank, 2, tmp_path, str(tmp_path)):
        assert "'optim.state.0.weight.momentum_buffer' is not covered exactly once" in refused
        assert "ranks 0 hold parts of it, ranks 1 none" in refused
        assert "give the parameter a gradient on every rank before the step (zeros will do)" in refused
        assert saved == "saved"


def step_without_elements(rank: int, directory: str) -> list[Any]:
    """Rank 1 has no row of the last weight, and no state of it. What a fresh optimizer, and one process, get."""
    model, optimizer = sharded(0, torch.optim.Adam)
    give_gradients(model, alike=True)
    if rank == 1:
        model[1].weight.grad = None
    optimizer.step()
    ray_ckpt.save(TrainState(model, optimizer), f"{directory}/empty")
    target, fresh = sharded(1, torch.optim.Adam)
    report = ray_ckpt.load(TrainState(target, fresh), f"{directory}/empty")
    moments = [each.state[layers[1].weight] for each, layers in ((optimizer, model), (fresh, target))]
    return [report.missing, rank == 1 or sealing.is_same(*moments), fresh.state[target[1].weight]["exp_avg"].shape]


def test_a_rank_without_elements_of_a_parameter_need_not_have_state_of_it(tmp_path: Path) -> None:
    assert run_ranks(step_without_elements, 2, tmp_path, str(tmp_path)) == [[(), True, torch.Size([1, 7])]] * 2
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 1))
    fresh = torch.optim.Adam(model.parameters())
    assert ray_ckpt.load(TrainState(model, fresh), tmp_path / "empty").missing == ()
    assert set(fresh.state[model[1].weight]) == {"step", "exp_avg", "exp_avg_sq"}


def step_unalike(rank: int, directory: str) -> str:
    model, optimizer = sharded(0, torch.optim.Adam)
    for turn in range(2):
        give_gradients(model, alike=True)
        if turn == rank == 1:
            model[0].weight.grad = None
        optimizer.step()
    with pytest.raises(CommitError) as e:
        ray_ckpt.save(TrainState(model, optimizer), f"{directory}/unalike")
    return str(e.value)


def test_another_number_of_steps_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for text in run_ranks(step_unalike, 2, tmp_path, str(tmp_path)):
        assert "'optim.state.0.weight.step' on ranks 0 and 1" in text or "step' on ranks 1 and 0" in text
        assert "give the parameter one on every rank before each step (zeros will do)" in text
