"""Weights that are one: within a module, between pipeline stages, under FSDP2; and models that have no memory yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ray_ckpt
from ray_ckpt.errors import CommitError, StateMismatchError, UsageError
from ray_ckpt.format.snapshot import Snapshot, compare
from ray_ckpt.parallel.stages import take_stage
from ray_ckpt.state.train_state import TrainState
from tests.support.ranks import run_ranks
from tests.support.states import Scaled

TIES = {"head.weight": "embed.weight"}
MIB = 2**20


class Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(37, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 37, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(tokens)))


def state_of(model: nn.Module, steps: int = 0, **options: Any) -> TrainState:
    state = TrainState(model, torch.optim.Adam(model.parameters(), lr=0.1), **options)
    for _ in range(steps):
        model(torch.arange(9)).square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
    return state


def test_a_tied_weight_is_saved_once_and_loaded_into_both(tmp_path: Path) -> None:
    source, target = state_of(Tied(0), steps=2), state_of(Tied(1))
    state = source.state_dict()
    assert list(state["model"]) == ["embed.weight", "body.weight", "body.bias"]
    assert not [name for name in state["optim"] if "head" in name]
    ray_ckpt.save(source, tmp_path / "run")
    ray_ckpt.load(target, tmp_path / "run")
    assert target.model.head.weight is target.model.embed.weight
    assert compare([source.snapshot(0)], [target.snapshot(0)]).mismatches == ()
    # Into a model that does not tie them, by saying so; and one that has them apart misses the second.
    apart = Tied(1)
    apart.head.weight = nn.Parameter(torch.zeros(37, 8))
    with pytest.raises(StateMismatchError, match=r"model\.head\.weight: not saved"):
        ray_ckpt.load(state_of(apart), tmp_path / "run")
    said = state_of(apart, tied=TIES)
    ray_ckpt.load(said, tmp_path / "run")
    assert torch.equal(apart.head.weight, source.model.embed.weight)
    moments = [said.optimizer.state[weight]["exp_avg"] for weight in (apart.embed.weight, apart.head.weight)]
    assert torch.equal(moments[0], moments[1])
    assert moments[0] is not moments[1]
    assert float(moments[0].abs().sum()) > 0


def test_weights_that_were_untied_and_drifted_are_refused() -> None:
    apart = Tied(0)
    apart.head.weight = nn.Parameter(apart.embed.weight.detach().clone())
    assert "head.weight" not in state_of(apart, tied=TIES).state_dict()["model"]
    apart.all_tied_weights_keys = TIES
    assert "head.weight" not in state_of(apart).state_dict()["model"]
    stepped = state_of(apart, steps=1)
    with pytest.raises(UsageError, match=r"tied under 'embed\.weight' are different memory and hold different values"):
        stepped.state_dict()


def stage_of(rank: int, seed: int, steps: int) -> TrainState:
    """The first and the last stage hold a copy each."""
    whole = Tied(seed)
    trained = state_of(whole, steps)
    part = take_stage(whole, (["embed", "body"], ["head"])[rank])
    part.all_tied_weights_keys = TIES
    optimizer = torch.optim.Adam(part.parameters(), lr=0.1)
    optimizer.state.update({parameter: trained.optimizer.state[parameter] for parameter in part.parameters() if steps})
    return TrainState(part, optimizer)


def shards_of(seed: int, steps: int) -> TrainState:
    model = Tied(seed)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return state_of(model, steps)


def tied_ranks(rank: int, directory: str) -> dict[str, Any]:
    """What was saved by stages and by shards, what each loaded of the stages', and what is said of a drift."""
    source, target, shards = stage_of(rank, 0, 2), stage_of(rank, 1, 0), shards_of(1, 0)
    found: dict[str, Any] = {"saved": source.snapshot(rank), "before": target.snapshot(rank)}
    ray_ckpt.save(source, f"{directory}/stages")
    for name, state in (("stages", target), ("shards", shards)):
        ray_ckpt.load(state, f"{directory}/stages")
        found[name] = state.snapshot(rank)
    assert shards.model.head.weight is shards.model.embed.weight
    with torch.no_grad():
        next(iter(source.model.parameters())).add_(rank)
    with pytest.raises(CommitError) as caught:
        ray_ckpt.save(source, f"{directory}/drifted")
    trained = shards_of(0, 2)
    ray_ckpt.save(trained, f"{directory}/shards")
    return {**found, "said": str(caught.value), "trained": trained.snapshot(rank)}


def test_a_weight_shared_by_two_stages_is_saved_once_and_loads_anywhere(tmp_path: Path) -> None:
    ranks = run_ranks(tied_ranks, 2, tmp_path, str(tmp_path))
    saved, before, stages, shards, trained = (
        [rank[name] for rank in ranks] for name in ("saved", "before", "stages", "shards", "trained")
    )
    assert compare(saved, before).mismatches
    assert compare(saved, stages).mismatches == ()
    assert compare(saved, shards).mismatches == ()
    assert "'model.embed.weight' on ranks" in ranks[0]["said"]
    whole = state_of(Tied(1))
    ray_ckpt.load(whole, tmp_path / "stages")
    assert compare(saved, [whole.snapshot(0)]).mismatches == ()
    ray_ckpt.load(whole, tmp_path / "shards")
    assert compare(trained, [whole.snapshot(0)]).mismatches == ()


# ------------------------------------------------------------------------------------------- no memory yet


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Tied(0)


def test_a_module_without_memory_gets_it_by_the_load(tmp_path: Path) -> None:
    source = state_of(Tied(0), steps=2)
    ray_ckpt.save(source, tmp_path / "run")
    target = state_of(on_meta())
    assert "model" not in target.state_dict()
    ray_ckpt.load(target, tmp_path / "run")
    assert target.model.head.weight is target.model.embed.weight
    assert compare([source.snapshot(0)], [target.snapshot(0)]).mismatches == ()
    # What misses stays without.
    partly = on_meta()
    partly.more = nn.Linear(2, 2, device="meta")
    report = ray_ckpt.load(TrainState(partly), tmp_path / "run", only=("model",), strict=False)
    assert report.missing == ("model.more.bias", "model.more.weight")
    assert partly.more.weight.is_meta
    assert not partly.body.weight.is_meta


def test_what_another_rank_holds_stays_on_the_meta_device(tmp_path: Path) -> None:
    ray_ckpt.save(state_of(Tied(0), steps=1), tmp_path / "run")
    model = on_meta()
    model.body = nn.Linear(8, 8)
    report = ray_ckpt.load(TrainState(model, torch.optim.Adam(model.body.parameters())), tmp_path / "run", strict=False)
    assert model.embed.weight.is_meta
    assert "model.embed.weight" in report.unexpected
    assert report.missing == ()


def test_a_buffer_that_nobody_saved_is_not_left_to_chance(tmp_path: Path) -> None:
    ray_ckpt.save({"model": Scaled(3).state_dict()}, tmp_path / "run")
    with torch.device("meta"):
        model = Scaled(3)
    with pytest.raises(StateMismatchError, match=r"shift have neither memory nor a place in the checkpoint"):
        ray_ckpt.load(TrainState(model), tmp_path / "run")
    assert model.factor.is_meta
    model.shift = torch.zeros(3)
    ray_ckpt.load(TrainState(model), tmp_path / "run")
    assert float(model.factor.sum()) > 3.0


def large(width: int, layers: int) -> nn.Module:
    return nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)], Scaled(width))


def sharded_on_meta(width: int, layers: int) -> TrainState:
    with torch.device("meta"):
        model = large(width, layers)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # Not persistent, so no checkpoint has it; other buffers get their memory by the load, as the parameters do.
    model[-1].shift = torch.zeros(width)
    # Made before there is memory: the parameters stay the ones that it knows.
    return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def save_large(directory: str, width: int, layers: int) -> Snapshot:
    state = TrainState(model := large(width, layers), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number + 1)
    state.optimizer.step()
    ray_ckpt.save(state, f"{directory}/{width}")
    return state.snapshot(0)


def load_large(rank: int, directory: str, width: int, layers: int) -> tuple[Snapshot, int, int]:
    """What arrived, how many bytes of it this rank holds, and by how much its memory peaked."""
    state = sharded_on_meta(width, layers)
    before = memory("VmRSS")
    report = ray_ckpt.load(state, f"{directory}/{width}")
    peak = memory("VmHWM") - before
    state.model(torch.ones(1, width)).sum().backward()
    state.optimizer.step()
    again = sharded_on_meta(width, layers)
    ray_ckpt.load(again, f"{directory}/{width}")
    return again.snapshot(rank), report.num_bytes, peak


def memory(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(key))


@pytest.mark.parametrize(("width", "layers"), [(2048, 8), (61, 2)])
def test_a_sharded_model_on_meta_takes_the_memory_of_its_shard(tmp_path: Path, width: int, layers: int) -> None:
    """128 MiB of parameters and as much momentum in the large case; the small one does not divide by its ranks."""
    saved = [save_large(str(tmp_path), width, layers)]
    num_ranks = 2 if width > 61 else 3
    loaded = run_ranks(load_large, num_ranks, tmp_path, str(tmp_path), width, layers)
    assert compare(saved, [snapshot for snapshot, _, _ in loaded]).mismatches == ()
    for _, num_bytes, peak in loaded:
        share = 2 * 4 * layers * -(-width // num_ranks) * width
        assert num_bytes <= share + 8 * width
        assert peak <= share + 64 * MIB
