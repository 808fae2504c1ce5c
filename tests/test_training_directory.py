"""Directories of whole runs, written by transformers' Trainer and accelerate themselves: all of it, or named."""

from __future__ import annotations

import json
import random
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ray_ckpt import TrainState, load, verify
from ray_ckpt.errors import FormatError, RayCkptError, StateMismatchError
from tests.support import foreign_ranks, states, trainer_ranks
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.last(self.norm(self.first(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    return torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "lr": 0.02}], lr=0.1)


def schedule_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    from transformers import get_linear_schedule_with_warmup

    return get_linear_schedule_with_warmup(optimizer, 1, 10)


def write_trainer(root: Path) -> tuple[Net, torch.optim.Optimizer, Any]:
    from transformers import Trainer, TrainingArguments

    model = Net()
    optimizer = optimizer_of(model)
    scheduler = schedule_of(optimizer)
    data = [{"x": torch.full((4,), float(n)), "labels": torch.tensor(n % 3)} for n in range(12)]
    arguments = TrainingArguments(
        output_dir=str(root),
        max_steps=3,
        save_steps=3,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, scheduler)).train()
    return model, optimizer, scheduler


def write_accelerate(root: Path) -> tuple[Net, torch.optim.Optimizer, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = Net()
    optimizer = optimizer_of(model)
    scheduler = schedule_of(optimizer)
    model, wrapped, schedule = accelerator.prepare(model, optimizer, scheduler)
    for _ in range(3):
        accelerator.backward(model(torch.ones(2, 4), torch.tensor([0, 1]))["loss"])
        wrapped.step()
        schedule.step()
        wrapped.zero_grad()
    accelerator.save_state(str(root / "checkpoint-3"))
    accelerator.free_memory()
    return model, optimizer, scheduler


WRITERS: dict[str, Callable[[Path], Any]] = {"transformers": write_trainer, "accelerate": write_accelerate}


@pytest.fixture(scope="module", params=WRITERS)
def written(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("run")
    return request.param, root / "checkpoint-3", *WRITERS[request.param](root)


def same_state(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> bool:
    states = [[optimizer.state[p] for g in optimizer.param_groups for p in g["params"]] for optimizer in (one, other)]
    return all(
        a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
        for a, b in zip(*states, strict=True)
    )


def test_model_optimizer_scheduler_and_counters_arrive(written: Any) -> None:
    kind, directory, model, optimizer, scheduler = written
    other = Net(1)
    fresh = optimizer_of(other)
    schedule = schedule_of(fresh)
    counted: dict[str, Any] = {"step": 0, "counters": {"epoch": 0}} if kind == "transformers" else {}
    state = TrainState(other, fresh, schedulers=schedule, **counted)
    assert not torch.equal(other.last.weight, model.last.weight)
    report = load(state, directory)
    assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))
    assert same_state(fresh, optimizer)
    assert schedule.state_dict() == scheduler.state_dict()
    assert schedule.last_epoch == 3
    assert [group["lr"] for group in fresh.param_groups] == [group["lr"] for group in optimizer.param_groups]
    if kind == "transformers":
        assert state.step == 3
        assert "trainer_state.max_steps" in report.lost or "bookkeeping left out: trainer_state" in report.lost
    assert "random generators (rng=True takes them) left out" in report.lost
    assert report.missing == report.unexpected == ()


def test_random_generators_go_on(written: Any) -> None:
    kind, directory, *_ = written
    name, keys = {
        "transformers": ("rng_state.pth", ("python", "numpy", "cpu")),
        "accelerate": ("random_states_0.pkl", ("random_state", "numpy_random_seed", "torch_manual_seed")),
    }[kind]
    saved = torch.load(directory / name, weights_only=False)
    draw()  # the generators stand where they were saved, unless another test has drawn since
    control = draw()
    model = Net(1)
    report = load(TrainState(model, optimizer_of(model), rng=True), directory)
    assert report.rng == "restored"
    found = draw()
    random.setstate(saved[keys[0]])
    np.random.set_state(saved[keys[1]])
    torch.set_rng_state(saved[keys[2]])
    assert found == draw() != control


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def test_what_the_state_does_not_have_is_named(written: Any) -> None:
    _, directory, model, *_ = written
    other = Net(1)
    report = load(TrainState(other, optimizer_of(other)), directory)
    assert "schedulers left out: schedule" in report.lost
    assert torch.equal(other.last.weight, model.last.weight)


def test_another_scheduler_is_refused_before_anything_changes(written: Any) -> None:
    _, directory, *_ = written
    other = Net(1)
    fresh = optimizer_of(other)
    before = other.last.weight.clone()
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(fresh, 10)
    with pytest.raises(StateMismatchError, match=r"schedulers\.0"):
        load(TrainState(other, fresh, schedulers=cosine), directory)
    assert torch.equal(other.last.weight, before)
    assert not fresh.state


class History:
    """An object that the user registers with accelerate. A fresh one shows none of what it will hold."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {"average": torch.zeros(2), "best": None, "seen": {}}

    def state_dict(self) -> dict[str, Any]:
        return self.kept

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = state


SEEN: dict[str, dict[Any, Any]] = {
    "nested": {"runs": [{"loss": 0.5}, {"loss": 0.25}], "a.b": 1, "a": {"c": [3, 4]}},
    "by number": {3: 0.5},
}


@pytest.mark.parametrize("seen", SEEN)
def test_objects_that_were_registered_with_accelerate(tmp_path: Path, seen: str) -> None:
    from accelerate import Accelerator

    accelerator, model, counter, history = Accelerator(cpu=True), Net(), History(), History()
    accelerator.prepare(model)
    counter.kept = {"average": torch.ones(2), "best": 3, "seen": {}}
    history.kept = {"average": torch.full((2,), 7.0), "best": {"step": 5}, "seen": SEEN[seen]}
    accelerator.register_for_checkpointing(counter, history)
    accelerator.save_state(str(tmp_path / "run"))
    accelerator.free_memory()
    other, others = Net(1), [History(), History()]
    report = load(TrainState(other), tmp_path / "run")
    assert (
        "registered objects (extra={'custom_checkpoint_1': ...} takes one) left out: custom_checkpoint_1."
        in report.lost
    )
    others[0].kept["seen"] = defaultdict(list)
    state = TrainState(other, extra={f"custom_checkpoint_{number}": each for number, each in enumerate(others)})
    if seen == "by number":
        with pytest.raises(StateMismatchError, match=r"nothing tells how extra.*seen.3 was nested"):
            load(state, tmp_path / "run")
        others[1].kept["seen"] = {1: 0.0}
    report = load(state, tmp_path / "run")
    assert others[0].kept["seen"]["new"] == []
    others[0].kept["seen"].clear()
    for found, expected in zip(others, (counter, history), strict=True):
        assert torch.equal(found.kept.pop("average"), expected.kept.pop("average"))
        assert found.kept == expected.kept
    assert "custom_checkpoint" not in report.lost


def test_groups_in_another_order_are_refused(written: Any) -> None:
    _, directory, *_ = written
    other = Net(1)
    fresh = optimizer_of(other)
    fresh.param_groups.reverse()
    with pytest.raises(StateMismatchError):
        load(TrainState(other, fresh, schedulers=schedule_of(fresh)), directory)


def test_verify_reads_all_of_it_and_damage_is_named(written: Any, tmp_path: Path) -> None:
    _, directory, model, optimizer, _ = written
    assert verify(directory).damages == ()
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    file = next(path for path in copy.iterdir() if path.name.startswith("optimizer"))
    data = bytearray(file.read_bytes())
    data[data.index(optimizer.state[model.last.weight]["exp_avg"].numpy().tobytes()) + 5] ^= 1
    file.write_bytes(data)
    [damage] = verify(copy).damages
    assert damage.file == file.name
    file.write_bytes(data[:-40])
    other = Net(1)
    with pytest.raises(FormatError, match=r"optimizer\.(pt|bin)"):
        load(TrainState(other, optimizer_of(other)), copy)


def test_a_model_in_parts(tmp_path: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    model = Net()
    for name, options in {"safe": {}, "bin": {"safe_serialization": False}}.items():
        directory = tmp_path / name
        directory.mkdir()
        save_torch_state_dict(model.state_dict(), directory, max_shard_size=150, **options)
        torch.save(optimizer_of(model).state_dict(), directory / "optimizer.pt")
        other = Net(1)
        load(TrainState(other), directory, only=("model",))
        assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values())), name
        part = sorted(path for path in directory.iterdir() if "-of-" in path.name)[0]
        kept = part.read_bytes()
        part.unlink()
        with pytest.raises(FormatError, match=rf"names {part.name}, which is not there"):
            load(TrainState(other), directory, only=("model",))
        index = next(directory.glob("*.index.json"))
        index_text = index.read_text()
        index.unlink()
        with pytest.raises(FormatError, match=r"lacks part 1 of "):
            load(TrainState(other), directory, only=("model",))
        part.write_bytes(kept)
        other = Net(1)
        load(TrainState(other), directory, only=("model",))  # without the index
        assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values())), name
        entries = json.loads(index_text)
        entries["weight_map"] = dict.fromkeys(entries["weight_map"], part.name)
        index.write_text(json.dumps(entries))
        with pytest.raises(RayCkptError, match=r"which does not hold it"):
            load(TrainState(other), directory, only=("model",))


def test_tied_weights_may_be_saved_under_either_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    class Tied(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

    weight = Tied(0).embed.weight.detach()
    for number, names in enumerate((["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"])):
        save_file({name: weight.clone() for name in names}, tmp_path / f"{number}.safetensors")
        other = Tied(1)
        load(TrainState(other), tmp_path / f"{number}.safetensors")
        assert torch.equal(other.head.weight, weight), names


# ------------------------------------------------------------------------------------------------------ Lightning


def lightning_state(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> dict[str, Any]:
    """`dump_checkpoint` of its checkpoint connector, for a module that keeps the network as `self.model`."""
    return {
        "epoch": 2,
        "global_step": 3,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.ones(()), "dirpath": Path("/x")}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [schedule.state_dict()],
        "hparams_name": "kwargs",
        "hyper_parameters": {"width": 8, "kind": torch.nn.Linear},
    }


def by_name(model: nn.Module, optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Any]:
    state = optimizer.state_dict()
    names = {parameter: f"{prefix}{name}" for name, parameter in model.named_parameters()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    groups = [{**group, "params": [order[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {order[number]: of for number, of in state["state"].items()}, "param_groups": groups}


@pytest.fixture
def lightning_run() -> tuple[Net, torch.optim.Optimizer, Any]:
    model = Net()
    optimizer = optimizer_of(model)
    schedule = schedule_of(optimizer)
    for _ in range(3):
        model(torch.ones(2, 4), torch.tensor([0, 1]))["loss"].backward()
        optimizer.step()
        schedule.step()
    return model, optimizer, schedule


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_lightning_into_the_bare_model(tmp_path: Path, lightning_run: Any, kind: str) -> None:
    import torch.distributed.checkpoint as dcp

    model, optimizer, schedule = lightning_run
    state = lightning_state(model, optimizer, schedule)
    if kind == "whole":
        torch.save(state, tmp_path / "x.ckpt")
    else:
        parts = {"model": state.pop("state_dict"), "optimizer_0": by_name(model, optimizer, "model.")}
        dcp.save(parts, checkpoint_id=tmp_path / "x.ckpt", no_dist=True)
        del state["optimizer_states"]
        torch.save(state, tmp_path / "x.ckpt" / "meta.pt")
    other = Net(1)
    fresh = optimizer_of(other)
    following = schedule_of(fresh)
    counters = {"epoch": 0}
    target = TrainState(other, fresh, schedulers=following, step=0, counters=counters)
    report = load(target, tmp_path / "x.ckpt")
    assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))
    assert same_state(fresh, optimizer)
    assert following.state_dict() == schedule.state_dict()
    assert (target.step, counters) == (3, {"epoch": 2})
    assert all(name in report.lost for name in ("callbacks", "hyper_parameters", "loops"))
    assert verify(tmp_path / "x.ckpt").damages == ()


def test_tied_weights_that_dcp_saved_twice(tmp_path: Path) -> None:
    """As accelerate's FSDP2 directories have them."""
    import torch.distributed.checkpoint as dcp

    model, other = nn.Embedding(5, 4), nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    other["head"].weight = other["embed"].weight
    both = {f"{name}.weight": model.weight.detach().clone() for name in ("embed", "head")}
    dcp.save({"model": both}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0", no_dist=True)
    report = load(TrainState(other), tmp_path)
    assert torch.equal(other["head"].weight, model.weight)
    assert "tied weights are taken from their other name, not from model.head.weight" in report.lost


# ------------------------------------------------------------------------------------------------ other layouts


def test_a_trainer_directory_into_shards_and_stages(tmp_path: Path) -> None:
    held = run_ranks(trainer_ranks.write_as_trainer, 1, tmp_path, str(tmp_path))
    path = str(tmp_path / "checkpoint-2")
    outcomes = run_ranks(foreign_ranks.load_all, 2, tmp_path, "fsdp2x2", {path: {}})
    before, after, reports = zip(*(of_rank[path] for of_rank in outcomes), strict=True)
    assert reports[0] is not None, after[0]
    assert len(states.differing(held, list(before))) >= 10
    assert states.differing(held, list(after)) == []
    # Ranks of a pipeline know the order of their own parameters only, and safetensors sorts its names.
    for of_rank in run_ranks(foreign_ranks.load_all, 2, tmp_path, "pp2", {path: {}}):
        assert "hold parts and do not know their order" in of_rank[path][1]
