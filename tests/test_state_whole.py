"""What a checkpoint should hold for what is loaded and does not, is named: nothing is left out in silence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ray_ckpt
from ray_ckpt.errors import FormatError, StateMismatchError
from ray_ckpt.format.record import seal
from ray_ckpt.state.sealing import RECORD
from ray_ckpt.state.train_state import TrainState
from tests.support.ranks import run_ranks


class Loader:
    def __init__(self, position: int) -> None:
        self.position = position

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "inner": {"seen": [self.position]}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def trained(seed: int, steps: int) -> TrainState:
    """Two optimizers, of which one has a parameter that it never stepped."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"first": nn.Linear(3, 4), "second": nn.Linear(4, 2), "unused": nn.Linear(2, 2)})
    adam = torch.optim.Adam([*model["first"].parameters(), *model["unused"].parameters()], lr=0.1, amsgrad=True)
    momentum = torch.optim.SGD(model["second"].parameters(), lr=0.1, momentum=0.9)
    schedulers = {
        "a": torch.optim.lr_scheduler.StepLR(adam, 2),
        "b": torch.optim.lr_scheduler.ExponentialLR(momentum, 0.9),
    }
    for _ in range(steps):
        model["second"](model["first"](torch.rand(2, 3))).sum().backward()
        for each in (adam, momentum, *schedulers.values()):
            each.step()
    return TrainState(
        model,
        [adam, momentum],
        schedulers=schedulers,
        scaler=torch.amp.GradScaler("cpu", init_scale=float(2**steps)),
        step=steps,
        counters={"tokens": steps},
        rng=True,
        dataloader=Loader(steps),
        extra={"sampler": Loader(steps), "best": float(steps)},
    )


def flat(state: TrainState) -> dict[str, Any]:
    return {
        f"{section}.{name}": value for section, leaves in state.state_dict().items() for name, value in leaves.items()
    }


def save_without(state: TrainState, lost: set[str], directory: Path) -> None:
    """Save all but these names."""
    sections = {
        section: {name: value for name, value in leaves.items() if f"{section}.{name}" not in lost}
        for section, leaves in state.state_dict().items()
    }
    ray_ckpt.save(sections, directory)


def test_whatever_entry_is_lost_is_named(tmp_path: Path) -> None:
    source = trained(0, 3)
    one = "optim.param_groups.second.weight."
    names = [name for name in flat(source) if name.startswith(one) or "param_groups" not in name]
    names = [name for name in names if name != f"extra.sampler.{RECORD}"]  # see `test_without_any_record_...`
    for number, name in enumerate(names):
        save_without(source, {name}, tmp_path / str(number))
        target = trained(1, 0)
        with pytest.raises(StateMismatchError) as e:
            ray_ckpt.load(target, tmp_path / str(number))
        assert name in str(e.value)
        assert target.step == 0
        if not name.startswith("optim.param_groups."):
            assert name in ray_ckpt.load(target, tmp_path / str(number), strict=False).missing


def rewritten(directory: Path, edit: Any, *, version: int = 2) -> Path:
    """The record's objects as `edit` leaves them, with a digest of the new record; version 1 has none."""
    record = json.loads((directory / "manifest.json").read_text())
    edit(record["objects"])
    for member in ("digest", *(("metadata_digest", "replaced_metadata") if version == 1 else ())):
        record.pop(member, None)
    text = json.dumps(record | {"version": version}, separators=(",", ":"))
    (directory / "manifest.json").write_text(seal(text) if version > 1 else text)
    return directory


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "record", [f"scaler.state.{RECORD}", f"rng.rank0.{RECORD}", "rng.num_ranks", "dataloader.num_ranks"]
)
def test_a_record_of_names_that_was_removed_by_hand_is_missed(tmp_path: Path, record: str, version: int) -> None:
    ray_ckpt.save(trained(0, 3), tmp_path)
    rewritten(tmp_path, lambda objects: objects.pop(record), version=version)
    target = trained(1, 0)
    with pytest.raises(StateMismatchError) as e:
        ray_ckpt.load(target, tmp_path)
    assert f"{record}: not saved" in str(e.value)
    assert str(tmp_path) in str(e.value)
    assert target.step == 0
    assert ray_ckpt.load(target, tmp_path, strict=False).missing == (record,)


@pytest.mark.parametrize(
    ("record", "value"),
    [
        (f"scaler.state.{RECORD}", {"$tuple": []}),
        (f"scaler.state.{RECORD}", 7),
        ("rng.num_ranks", 0),
        ("rng.num_ranks", "1"),
        ("dataloader.num_ranks", None),
    ],
)
def test_a_record_of_names_that_is_none_is_damage(tmp_path: Path, record: str, value: object) -> None:
    ray_ckpt.save(trained(0, 3), tmp_path)
    rewritten(tmp_path, lambda objects: objects[record].update(value=value))
    target = trained(1, 0)
    for strict in (True, False):
        with pytest.raises(
            FormatError, match=rf"^{tmp_path}: {re.escape(repr(record))} is .*: the checkpoint is damaged"
        ):
            ray_ckpt.load(target, tmp_path, strict=strict)
    assert target.step == 0


def test_without_any_record_a_checkpoint_loads_as_those_of_first_versions_do(tmp_path: Path) -> None:
    source = trained(0, 3)
    records = {name for name in flat(source) if name.endswith((RECORD, "num_ranks"))}
    assert len(records) == 6
    save_without(source, records, tmp_path / "first")
    save_without(source, {f"extra.sampler.{RECORD}"}, tmp_path / "plain")  # which may have been a plain dict
    for checkpoint in ("first", "plain"):
        target = trained(1, 0)
        assert ray_ckpt.load(target, tmp_path / checkpoint).missing == ()
        assert flat(target).keys() == flat(source).keys()
        assert flat(target)["extra.sampler.position"] == 3


def test_nothing_is_missed_of_what_was_never_there(tmp_path: Path) -> None:
    """Parameters without a step have no state, in a checkpoint of ours and in one without our records."""
    source = trained(0, 3)
    assert "optim.state.unused.weight.step" not in flat(source)
    ray_ckpt.save(source, tmp_path / "ours")
    save_without(source, {name for name in flat(source) if ".kinds." in name}, tmp_path / "bare")
    for checkpoint in ("ours", "bare"):
        assert ray_ckpt.load(trained(1, 0), tmp_path / checkpoint).missing == ()
        assert ray_ckpt.load(trained(1, 2), tmp_path / checkpoint).missing == ()


@pytest.mark.parametrize("key", ["state.first.bias.exp_avg", "state.second.weight.momentum_buffer"])
def test_without_records_the_other_parameters_of_the_optimizer_tell(tmp_path: Path, key: str) -> None:
    source = trained(0, 3)
    if key.startswith("state.second"):
        # If that were its only key, it would look like a parameter that was never stepped.
        source.optimizers[1].state[source.model["second"].weight]["other"] = torch.zeros(4)
    kinds = {name for name in flat(source) if ".kinds." in name}
    save_without(source, {*kinds, f"optim.{key}"}, tmp_path / "run")
    with pytest.raises(StateMismatchError, match=rf"optim\.{key}: not saved"):
        ray_ckpt.load(trained(1, 0), tmp_path / "run")


def test_all_state_of_one_parameter_is_missed(tmp_path: Path) -> None:
    source = trained(0, 3)
    lost = {name for name in flat(source) if name.startswith("optim.state.first.bias.")}
    assert len(lost) == 4
    save_without(source, lost, tmp_path / "run")
    assert set(ray_ckpt.load(trained(1, 0), tmp_path / "run", strict=False).missing) == lost


def lose_generators_of(rank: int, lost: int, directory: Path) -> list[str]:
    state = TrainState(nn.Linear(2, 2), rng=True)
    sections = state.state_dict()
    if rank == lost:
        sections["rng"] = {name: value for name, value in sections["rng"].items() if not name.startswith("rank")}
    ray_ckpt.save(sections, directory)
    report = ray_ckpt.load(state, directory, strict=False)
    return list(report.missing)


def test_a_rank_whose_generators_are_lost_is_named(tmp_path: Path) -> None:
    assert run_ranks(lose_generators_of, 2, tmp_path, 1, tmp_path / "run") == [["rng.rank1"]] * 2


def test_another_kind_of_optimizer_is_refused_unless_asked(tmp_path: Path) -> None:
    """RAdam has all hyper-parameters and state that Adam has: only its name tells."""
    model = nn.Linear(2, 2)
    adam = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.ones(2)).sum().backward()
    adam.step()
    ray_ckpt.save(TrainState(model, adam), tmp_path / "run")
    other = torch.optim.RAdam(model.parameters(), lr=0.2)
    with pytest.raises(
        StateMismatchError, match=r"another kind of optimizer than RAdam was saved: Adam for weight, bias"
    ):
        ray_ckpt.load(TrainState(model, other), tmp_path / "run")
    assert not other.state
    ray_ckpt.load(TrainState(model, other), tmp_path / "run", strict=False)
    assert torch.equal(other.state[model.weight]["exp_avg"], adam.state[model.weight]["exp_avg"])


class Lion(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.0})


@pytest.mark.parametrize(
    ("saved", "wanted", "telling"),
    [(torch.optim.Adam, torch.optim.RAdam, "amsgrad"), (torch.optim.AdamW, Lion, "amsgrad, eps")],
)
def test_without_a_record_the_hyperparameters_tell_another_kind(
    tmp_path: Path, saved: Any, wanted: Any, telling: str
) -> None:
    model = nn.Linear(2, 2)
    adam = saved(model.parameters(), lr=0.1)
    model(torch.ones(2)).sum().backward()
    adam.step()
    source = TrainState(model, adam)
    save_without(source, {name for name in flat(source) if ".kinds." in name}, tmp_path / "run")
    expected = rf"another kind of optimizer than {wanted.__name__} was saved, as it has {telling} for"
    with pytest.raises(StateMismatchError, match=expected):
        ray_ckpt.load(TrainState(model, wanted(model.parameters(), lr=0.2)), tmp_path / "run")
    ray_ckpt.load(TrainState(model, saved(model.parameters(), lr=0.2)), tmp_path / "run")
