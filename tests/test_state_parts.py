"""What a training state holds besides model and optimizer: schedulers, counters, averages, generators, loaders."""

from __future__ import annotations

import itertools
import random
import re
import sys
from collections import Counter, OrderedDict, deque, namedtuple
from collections.abc import Callable, Iterator
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler

import ray_ckpt
from ray_ckpt.errors import CommitError, StateMismatchError, UsageError
from ray_ckpt.state import sealing
from ray_ckpt.state.train_state import TrainState
from tests.support.ranks import run_ranks
from tests.support.states import build, differing, train

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, [Decay(0.9), lambda step: 0.5**step]),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(optimizer, 9)],
        milestones=[2],
    ),
    "one_cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.2], total_steps=20),
    "milestones": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 4, 6], gamma=0.5),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, min_lr=[1e-5, 1e-6]),
}


class Decay:
    """A schedule with state of its own, which LambdaLR saves."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, step: int) -> float:
        return self.rate**step


class Loader:
    """Anything with a position."""

    def __init__(self, position: int = 0) -> None:
        self.position = position

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "workers": [{"seen": self.position}], "epochs": {}, "order": {0: 3}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == Loader(state["position"]).state_dict()
        self.position = state["position"]


class Dealt(DataLoader[int]):
    """Deals samples out to replicas and can be set to any place, as torchdata's stateful loader and sampler do."""

    class Sampler(DistributedSampler[int]):
        start = 0

        def __iter__(self) -> Iterator[int]:
            return itertools.islice(super().__iter__(), self.start, None)

        def state_dict(self) -> dict[str, Any]:
            return {"yielded": self.start}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.start = state["yielded"]

    def __init__(self, replica: int, num_replicas: int) -> None:
        samples = range(36)
        sampler = self.Sampler(samples, num_replicas, replica)  # type: ignore[arg-type]
        super().__init__(samples, batch_size=2, sampler=sampler)  # type: ignore[arg-type]
        self.num_batches = 0

    def take(self, num_batches: int) -> list[int]:
        batches = list(itertools.islice(self, self.num_batches, num_batches))
        self.num_batches += len(batches)
        return torch.cat(batches).tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"_num_yielded": self.num_batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_batches = state.get("_num_yielded", 0)


def dealing(replica: int, num_replicas: int) -> tuple[TrainState, Dealt]:
    loader = Dealt(replica, num_replicas)
    return TrainState(nn.Flatten(), step=3, dataloader=loader, layout=f"dp{num_replicas}"), loader


def scheduled(kind: str, layout: str = "single", seed: int = 0, steps: int = 0) -> tuple[TrainState, Any, nn.Module]:
    bare, module = build(layout, "adam", seed)
    scheduler = SCHEDULERS[kind](bare.optimizer)
    state = TrainState(bare.model, bare.optimizer, schedulers=scheduler)
    for _ in range(steps):
        train(state, module, 1)
        scheduler.step(*([1.0] if kind == "plateau" else []))
    return state, scheduler, module


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_goes_on_where_it_was(tmp_path: Path, kind: str) -> None:
    source, source_scheduler, _ = scheduled(kind, steps=3)
    target, target_scheduler, _ = scheduled(kind, seed=1)
    assert differing([source.snapshot(0)], [target.snapshot(0)])
    ray_ckpt.save(source, tmp_path / "run")
    ray_ckpt.load(target, tmp_path / "run")
    assert differing([source.snapshot(0)], [target.snapshot(0)]) == []
    for _ in range(3):
        for scheduler in (source_scheduler, target_scheduler):
            scheduler.optimizer.step()
            scheduler.step(*([1.0] if kind == "plateau" else []))
    assert source_scheduler.state_dict() == target_scheduler.state_dict()
    assert [g["lr"] for g in source.optimizer.param_groups] == [g["lr"] for g in target.optimizer.param_groups]


def linear(rates: list[float]) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(OrderedDict((f"layer{n}", nn.Linear(3, 3)) for n, _ in enumerate(rates)))
    groups = [{"params": list(layer.parameters()), "lr": rate} for layer, rate in zip(model, rates, strict=True)]
    return model, torch.optim.AdamW(groups)


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()


def test_groups_that_are_split_keep_being_scheduled(tmp_path: Path) -> None:
    """One group of the target over parameters of three rates: after the load its scheduler has to count three."""
    model, optimizer = linear([0.1, 0.2, 0.4])
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    step_once(model, optimizer)
    scheduler.step()
    ray_ckpt.save(TrainState(model, optimizer, schedulers=scheduler), tmp_path / "run")
    target, _ = linear([0.0] * 3)
    one_group = torch.optim.AdamW(target.parameters(), lr=7.0)
    follower = lr_scheduler.LambdaLR(one_group, lambda step: 0.5**step)
    with pytest.raises(
        StateMismatchError, match=r"an LR scheduler counts them: name it in TrainState\(schedulers="
    ) as e:
        ray_ckpt.load(TrainState(target, one_group), tmp_path / "run", only=("model", "optim"))
    assert "layer1.weight, layer1.bias: initial_lr=0.2, lr=0.1" in str(e.value)
    ray_ckpt.load(TrainState(target, one_group, schedulers=follower), tmp_path / "run")
    assert [group["lr"] for group in one_group.param_groups] == [0.05, 0.1, 0.2]
    one_group.step()
    follower.step()
    assert [group["lr"] for group in one_group.param_groups] == [0.025, 0.05, 0.1]


def test_schedulers_of_several_optimizers_go_by_one_name_only_if_they_agree(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model)
    same = [lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in (first, second)]
    ray_ckpt.save(TrainState(model, [first, second], schedulers=same), tmp_path / "two")
    whole = torch.optim.SGD(model.parameters(), lr=0.2)
    ray_ckpt.load(TrainState(model, whole, schedulers=lr_scheduler.ExponentialLR(whole, 0.9)), tmp_path / "two")
    assert [group["lr"] for group in whole.param_groups] == [0.1]
    other = lr_scheduler.StepLR(second, 3)
    with pytest.raises(
        UsageError, match=r"the schedulers '0' of several optimizers differ in 0\.kind.*give them names"
    ):
        TrainState(model, [first, second], schedulers=[same[0], other]).state_dict()
    named = TrainState(model, [first, second], schedulers={"a": same[0], "b": other}).state_dict()
    assert named["schedulers"]["b.step_size"] == 3
    with pytest.raises(UsageError, match="belongs to an optimizer that is not in the state"):
        TrainState(model, first, schedulers=other)


def test_another_kind_of_scheduler_is_refused(tmp_path: Path) -> None:
    ray_ckpt.save(scheduled("milestones", steps=1)[0], tmp_path / "run")
    with pytest.raises(StateMismatchError, match=r"schedulers\.0 was saved by a MultiStepLR, wanted by a SequentialLR"):
        ray_ckpt.load(scheduled("sequential")[0], tmp_path / "run")


def everything(seed: int = 0, **options: Any) -> tuple[TrainState, nn.Module, dict[str, Any]]:
    bare, module = build("single", "adamw", seed)
    things: dict[str, Any] = {
        "scaler": torch.amp.GradScaler("cpu", init_scale=2.0**10 * (seed + 1)),
        "counters": {"tokens": 1000 * seed},
        "ema": AveragedModel(bare.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
        "extra": {"table": torch.full((2, 3), float(seed)), "note": {"seed": seed}, "loader": Loader(seed)},
        "dataloader": Loader(10 + seed),
        **options,
    }
    state = TrainState(bare.model, bare.optimizer, step=5 + seed, **things)
    for _ in range(seed + 1):
        train(state, module, 1)
        if things["ema"] is not None:
            things["ema"].update_parameters(bare.model)
    return state, module, things


def test_everything_comes_back(tmp_path: Path) -> None:
    source, _, given = everything(1)
    target, _, taken = everything(0)
    assert differing([source.snapshot(0)], [target.snapshot(0)])
    ray_ckpt.save(source, tmp_path / "run")
    table = taken["extra"]["table"]
    report = ray_ckpt.load(target, tmp_path / "run")
    assert differing([source.snapshot(0)], [target.snapshot(0)]) == []
    assert (target.step, taken["counters"]) == (6, {"tokens": 1000})
    assert taken["scaler"].state_dict() == given["scaler"].state_dict() != {}
    assert taken["extra"]["table"] is table
    assert table.tolist() == [[1.0] * 3] * 2
    assert taken["extra"]["note"] == {"seed": 1}
    assert (taken["extra"]["loader"].position, taken["dataloader"].position) == (1, 11)
    assert (report.dataloader, report.rng) == ("restored", None)
    ema, expected = taken["ema"].state_dict(), given["ema"].state_dict()
    assert int(ema["n_averaged"]) == 2
    assert all(torch.equal(value, expected[name]) for name, value in ema.items())
    # The names of an average are those of the model.
    assert {name.removeprefix("ema.") for name in source.snapshot(0).fingerprints if name.startswith("ema.")} == {
        *source.model.state_dict(),
        "n_averaged",
    }


@pytest.mark.parametrize("left_out", ["scaler", "ema", "extra", "dataloader"])
def test_what_the_state_lacks_or_the_checkpoint_is_named(tmp_path: Path, left_out: str) -> None:
    names = {"ema": "ema.", "scaler": "scaler.state", "extra": "extra.", "dataloader": "dataloader"}
    whole, part = everything()[0], everything(**{left_out: None})[0]
    ray_ckpt.save(whole, tmp_path / "whole")
    ray_ckpt.save(part, tmp_path / "part")
    with pytest.raises(StateMismatchError, match=rf"{names[left_out]}.*: saved .*, not wanted.*only=\('model'"):
        ray_ckpt.load(part, tmp_path / "whole")
    with pytest.raises(StateMismatchError, match=rf"{names[left_out]}.*: not saved"):
        ray_ckpt.load(whole, tmp_path / "part")


def draw() -> list[Any]:
    return [random.random(), float(np.random.rand()), torch.rand(2).tolist()]


def drawing(position: int, layout: str) -> tuple[TrainState, Loader]:
    model, loader = nn.Linear(2, 2), Loader(position)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return TrainState(model, step=3, rng=True, dataloader=loader, layout=layout), loader


def load_and_draw(directory: str, layout: str) -> tuple[Any, ...]:
    torch.rand(5)
    state, loader = drawing(0, layout)
    report = ray_ckpt.load(state, f"{directory}/run")
    return report.rng, report.dataloader, loader.position, draw()


def random_ranks(rank: int, directory: str) -> dict[str, Any]:
    """What was drawn after the save, and what each load does to this rank's generators and data loader."""
    state, loader = dealing(rank, 2)
    taken = loader.take(3)
    ray_ckpt.save(state, f"{directory}/dealt")
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(rank + 7)
    draw()
    ray_ckpt.save(drawing(rank + 100, "ddp2")[0], f"{directory}/run")
    return {"taken": taken, "drawn": draw(), **{name: load_and_draw(directory, name) for name in ("fsdp2x2", "ddp2")}}


def test_generators_and_loaders_of_each_rank_come_back_in_the_same_layout_only(tmp_path: Path) -> None:
    ranks = run_ranks(random_ranks, 2, tmp_path, str(tmp_path))
    assert ranks[0]["drawn"] != ranks[1]["drawn"]
    for rank, found in enumerate(ranks):
        assert found["ddp2"] == ("restored", "restored", rank + 100, found["drawn"])
    # On fewer ranks, or in a layout of another name, they are seeded anew: each rank for itself, each time alike.
    fewer = load_and_draw(str(tmp_path), "ddp2")
    assert fewer == load_and_draw(str(tmp_path), "ddp2")
    others = [fewer, ranks[1]["fsdp2x2"]]
    for other in (*others, ranks[0]["fsdp2x2"]):
        assert (other[0], other[2]) == ("reseeded", 0)
        assert re.match(
            r"left as it was: nothing tells what the 2 ranks .* samples of the running epoch again", other[1]
        )
        assert other[3] not in [found["drawn"] for found in ranks]
    assert others[0][3] != others[1][3]
    taken = ranks[0]["taken"] + ranks[1]["taken"]
    for num_replicas in (1, 2, 3, 9):
        states = [dealing(replica, num_replicas) for replica in range(num_replicas)]
        reports = [ray_ckpt.load(state, tmp_path / "dealt") for state, _ in states]
        again = 12 % num_replicas
        note = f"restored; {again} samples come again" if again else "restored"
        assert all(str(report.dataloader).startswith(note) for report in reports)
        rest = [sample for _, loader in states for sample in loader.take(18)]
        assert sorted(Counter(rest + taken).values()) == [1] * (36 - again) + [2] * again


def disagreeing(rank: int, directory: str) -> str:
    state = TrainState(nn.Linear(2, 2), step=rank)
    state.model.load_state_dict({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)})
    with pytest.raises(CommitError) as caught:
        ray_ckpt.save(state, f"{directory}/run")
    return str(caught.value)


def test_ranks_that_count_differently_are_refused(tmp_path: Path) -> None:
    assert "'counters.step' on ranks" in run_ranks(disagreeing, 2, tmp_path, str(tmp_path))[0]


class Norm(IntEnum):
    COLS = 1
    ROWS = 2


class Mode(Enum):
    EAGER = "eager"


class Point(NamedTuple):
    x: int
    y: Any


@pytest.mark.parametrize(
    "value",
    [
        {"a": {}, "b": [], "c": (), "d": None},
        {"text": {"deep": [{"x": 1, 2: (3, [4, {}])}]}},
        [1.5, float("inf"), "$tuple", ("$tensor", 0), ["$dict", 1]],
        Counter({3: 1, 5: 2}),
        OrderedDict([("z", 1), ("a.b", b"\0\xff")]),
        {1, 2, 3},
        {"dotted.key": 1, "": 2, "$tagged": 3},
        {"size": torch.Size([2, 3])},
        {"queue": deque([1, (2, [3])], maxlen=5), "endless": deque()},
        {"norm": Norm.ROWS, "name": Mode.EAGER, "point": [Point(1, (2, None))]},
        {"set": frozenset({1, 2}), "number": 1 - 2j},
        {
            "a": np.float64(0.1),
            "b": [np.float32(0.1), np.float16(-0.0), np.uint8(255)],
            "c": {np.int64(1): np.bool_(1)},
        },
        {"a": np.complex64(1 / 3 + 2j), "half": np.float16("inf")},
    ],
)
def test_nested_state_is_packed_exactly(value: Any) -> None:
    packed = sealing.pack("name", value)
    unpacked = sealing.unpack("name", packed)
    assert unpacked == value
    assert repr(unpacked) == repr(value)
    assert all(not isinstance(leaf, dict) for leaf in packed.values())


def test_a_named_value_is_refused_where_its_class_is_another_now(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = sealing.pack("name", {"norm": Norm.ROWS, "point": Point(1, 2)})
    monkeypatch.setattr(sys.modules[__name__], "Norm", IntEnum("Norm", {"COLS": 1, "ROWS": 3}))
    with pytest.raises(StateMismatchError, match=r"'name\.norm' was saved as member ROWS = 2 of the enum tests\."):
        sealing.unpack("name.norm", packed)
    monkeypatch.setattr(sys.modules[__name__], "Point", namedtuple("Point", "y x"))
    with pytest.raises(StateMismatchError, match=r"'name\.point' was saved as the named tuple .* of x, y, which"):
        sealing.unpack("name.point", packed)


def test_tensors_as_keys_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"'name\.moments' has tensors for keys, by which nothing is found after a load"
    ):
        sealing.pack("name", {"moments": {torch.ones(1): 1}})


def test_tensors_within_lists_are_packed_as_tensors() -> None:
    tensors = [torch.arange(3), torch.ones(2)]
    packed = sealing.pack("name", {"a": tensors, "b": tensors[0]})
    assert packed["name.a.$1"] is tensors[1]
    unpacked = sealing.unpack("name", packed)
    assert unpacked["a"][0] is unpacked["b"] is tensors[0]


@pytest.mark.parametrize(
    "value",
    [
        {"a": [object()]},
        {"a": np.datetime64("2026-01-01")},
        {"a": {"b": {1.5: Path()}}},
        {"a": Enum("Local", {"X": 1}).X},  # type: ignore[attr-defined]
        {"a": deque([slice(3)])},
    ],
)
def test_what_no_reader_would_get_back_is_refused_by_name(value: Any) -> None:
    with pytest.raises(UsageError, match=r"'name\.a.*' is a .*, which cannot be saved so that any reader gets it back"):
        sealing.pack("name", value)


def sharded_average(rank: int, directory: str) -> dict[str, torch.Tensor]:
    """An average kept by hand under FSDP2, and what it was in whole."""
    state, module = build("fsdp2x3", "sgd", seed=0)
    average = {name: tensor.detach().clone() for name, tensor in state.model.named_parameters()}
    train(state, module, 1)
    for name, parameter in state.model.named_parameters():
        average[name].lerp_(parameter.detach(), 0.1)
    ray_ckpt.save(TrainState(state.model, ema=average, extra={"shards": average["second.weight"]}), f"{directory}/run")
    return {name: tensor.full_tensor() for name, tensor in average.items()}


def test_sharded_averages_and_extras_load_whole(tmp_path: Path) -> None:
    expected = run_ranks(sharded_average, 3, tmp_path, str(tmp_path))[0]
    bare, _ = build("single", "sgd", seed=1)
    average = {name: torch.zeros_like(parameter) for name, parameter in bare.model.named_parameters()}
    extra = {"shards": torch.zeros(113, 61)}
    ray_ckpt.load(TrainState(bare.model, ema=average, extra=extra), tmp_path / "run")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in average.items())
    assert torch.equal(extra["shards"], expected["second.weight"])


class Kept:
    """A data loader that shows what it was given."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


@pytest.mark.parametrize(
    ("saved", "fresh"),
    [
        ({"n": 3, "workers": {"last": [{"at": 1}, {"at": torch.ones(2)}]}}, {"n": 0, "workers": {}}),
        ({"n": 3, "workers": [{"at": [{"x": 1}]}]}, {"n": 0, "workers": None}),
        ({"n": 3, "workers": ({"at": 1}, {"at": 2})}, {"n": 0, "workers": ()}),
        ({"n": 3, "a.b": 4, "a": {"c": 5}}, {"n": 0}),
        ({"n": 3, "workers": {5: 1, 6: {"x": 2}}}, {"n": 0, "workers": {1: 0}}),
    ],
)
def test_the_state_of_others_loaders_keeps_its_form(tmp_path: Path, saved: Any, fresh: Any) -> None:
    torch.save({"model": nn.Linear(2, 2).state_dict(), "dataloader": saved}, tmp_path / "run.pt")
    loader = Kept(fresh)
    report = ray_ckpt.load(TrainState(nn.Linear(2, 2), dataloader=loader), tmp_path / "run.pt")
    assert repr(loader.state) == repr(saved) != repr(fresh)
    assert report.dataloader == "restored"


def test_what_may_have_had_numbers_for_keys_is_refused(tmp_path: Path) -> None:
    saved = {"n": 3, "workers": {5: 1}}
    torch.save({"model": nn.Linear(2, 2).state_dict(), "dataloader": saved}, tmp_path / "run.pt")
    loader = Kept({"n": 0, "workers": {}})
    state = TrainState(nn.Linear(2, 2), dataloader=loader)
    with pytest.raises(StateMismatchError, match=r"nothing tells how dataloader\.workers\.5 was nested"):
        ray_ckpt.load(state, tmp_path / "run.pt")
    report = ray_ckpt.load(state, tmp_path / "run.pt", strict=False)
    assert report.dataloader == "left as it was"
    assert loader.state == {"n": 0, "workers": {}}


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.eye(2).to_sparse_csr(), r"tensor of layout torch\.sparse_csr"),
        (lambda: torch.eye(2).to_sparse_bsr((2, 2)), r"tensor of layout torch\.sparse_bsr"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested tensor"),
    ],
)
def test_state_without_strides_is_refused_by_name(tmp_path: Path, make: Callable[[], torch.Tensor], kind: str) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight]["odd"] = make()
    with pytest.raises(UsageError, match=rf"'optim\.state\.weight\.odd' is a {kind}"):
        ray_ckpt.save(TrainState(model, optimizer), tmp_path)
