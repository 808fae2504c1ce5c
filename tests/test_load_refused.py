"""A load that an object refuses: before anything is changed, on all ranks; and what is new when it fails later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ray_ckpt
from ray_ckpt import TrainState
from ray_ckpt.errors import CheckpointError, RayCkptError, StateMismatchError
from tests.support.ranks import run_ranks


class Picky:
    """Takes its state only if it is of its own version. Its tensor is changed in place."""

    def __init__(self, version: int, value: float) -> None:
        self.version = version
        self.mean = torch.full((3,), value)
        self.names = [value]

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "names": self.names, "version": self.version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.names[:] = state["names"]
        self.mean.copy_(state["mean"])
        if state["version"] != self.version:
            raise ValueError(f"version {state['version']} is not {self.version}")


class WithExtra(nn.Linear):
    version = 1

    def __init__(self) -> None:
        super().__init__(2, 2)

    def get_extra_state(self) -> dict[str, int]:
        return {"version": self.version}

    def set_extra_state(self, state: dict[str, int]) -> None:
        if state["version"] != self.version:
            raise ValueError(f"version {state['version']} is not {self.version}")


class WithOwnLoad(nn.Linear):
    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        raise ValueError("not today")


def picky_state(version: int, value: float) -> TrainState:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, value)
    nn.init.constant_(model.bias, value)
    optimizer = torch.optim.Adam(model.parameters(), lr=value)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    extra = {"first": Picky(1, value), "second": Picky(version, value)}
    return TrainState(model, optimizer, step=int(value), extra=extra)


def shown(state: TrainState) -> str:
    sections = state.state_dict().items()
    return str(
        sorted((f"{section}.{name}", str(value)) for section, leaves in sections for name, value in leaves.items())
    )


REFUSED = r"\(Picky\) refuses what was saved: ValueError: version 1 is not 2; nothing was changed"


def test_nothing_is_changed_when_an_object_refuses(tmp_path: Path) -> None:
    ray_ckpt.save(picky_state(1, 3.0), tmp_path / "run")
    target = picky_state(2, 5.0)
    before = shown(target)
    with pytest.raises(StateMismatchError, match=r"extra\.second " + REFUSED):
        ray_ckpt.load(target, tmp_path / "run")
    assert shown(target) == before
    with pytest.raises(StateMismatchError, match=REFUSED):
        target.load_state_dict(picky_state(1, 3.0).state_dict())
    assert shown(target) == before
    fitting = picky_state(1, 5.0)
    ray_ckpt.load(fitting, tmp_path / "run")
    assert shown(fitting) == shown(picky_state(1, 3.0))


def test_a_data_loader_that_refuses_is_found_before_the_tensors_are_read(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    ray_ckpt.save(TrainState(nn.Linear(2, 2), dataloader=Picky(1, 3.0)), tmp_path / "run")
    before = model.weight.detach().clone()
    with pytest.raises(StateMismatchError, match=r"dataloader\.rank0 " + REFUSED):
        ray_ckpt.load(TrainState(model, dataloader=Picky(2, 5.0)), tmp_path / "run")
    assert torch.equal(model.weight, before)


def test_a_module_that_refuses_its_extra_state_keeps_its_weights(tmp_path: Path) -> None:
    source, target = nn.Sequential(WithExtra()), nn.Sequential(WithExtra())
    ray_ckpt.save(TrainState(source), tmp_path / "run")
    target[0].version = 2
    before = target[0].weight.detach().clone()
    with pytest.raises(StateMismatchError, match=r"model\.0\._extra_state .* version 1 is not 2; nothing was changed"):
        ray_ckpt.load(TrainState(target), tmp_path / "run")
    assert torch.equal(target[0].weight, before)
    target[0].version = 1
    ray_ckpt.load(TrainState(target), tmp_path / "run")
    assert torch.equal(target[0].weight, source[0].weight)


def test_what_is_new_is_said_when_a_module_refuses_after_the_reading(tmp_path: Path) -> None:
    source, target = nn.Linear(2, 2), WithOwnLoad(2, 2)
    extra = {"first": Picky(1, 3.0)}
    ray_ckpt.save(
        TrainState(source, torch.optim.SGD(source.parameters(), lr=0.1), step=3, extra=extra), tmp_path / "run"
    )
    extra = {"first": Picky(1, 5.0)}
    state = TrainState(target, torch.optim.SGD(target.parameters(), lr=0.2), step=5, extra=extra)
    told = (
        r"model refuses what was saved: ValueError: not today; what the failed load has left: new: extra\.first; "
        r"part old, part new: model; as it was: optim, counters"
    )
    with pytest.raises(CheckpointError, match=told):
        ray_ckpt.load(state, tmp_path / "run")
    assert state.step == 5
    assert extra["first"].names == [3.0]


def test_nothing_is_new_where_what_is_to_be_read_cannot_be_planned(tmp_path: Path) -> None:
    ray_ckpt.save(picky_state(1, 3.0), tmp_path / "run")
    target = picky_state(1, 5.0)
    before = [str(target.model.bias), target.step, str(target.state_dict()["extra"])]
    target.model.weight.untyped_storage().resize_(0)  # as a wrapper frees what lies on other devices
    with pytest.raises(RayCkptError, match=r"nothing was read; of model, optim, what had no memory has some") as caught:
        ray_ckpt.load(target, tmp_path / "run")
    assert "part old, part new" not in str(caught.value)
    assert [str(target.model.bias), target.step, str(target.state_dict()["extra"])] == before


def refused_on_rank_1(rank: int, path: str) -> tuple[str, bool]:
    ray_ckpt.save(picky_state(1, 3.0), path)
    target = picky_state(1 + rank, 5.0)
    before = shown(target)
    try:
        ray_ckpt.load(target, path)
    except RayCkptError as error:
        return str(error), shown(target) == before
    return "loaded", False


def test_all_ranks_keep_what_they_had_when_one_refuses(tmp_path: Path) -> None:
    answers = run_ranks(refused_on_rank_1, 2, tmp_path, str(tmp_path / "run"))
    for told, unchanged in answers:
        assert "load failed on rank 1: StateMismatchError: extra.second (Picky) refuses what was saved" in told
        assert unchanged


@pytest.mark.parametrize("kind", ["model", "extra", "dict"])
def test_a_target_whose_elements_share_a_place_is_refused_before_anything_is_read(tmp_path: Path, kind: str) -> None:
    def state(value: float) -> tuple[nn.Module, Any]:
        model, spread = nn.Linear(2, 2), torch.full((1,), value).expand(3)
        nn.init.constant_(model.weight, value)
        if kind == "model":
            model.register_buffer("spread", spread)
            return model, TrainState(model)
        return model, TrainState(model, extra={"spread": spread}) if kind == "extra" else {"a": model, "spread": spread}

    ray_ckpt.save(state(3.0)[1], tmp_path / "run")
    model, target = state(5.0)
    with pytest.raises(RayCkptError, match="spread' has several elements in one place") as caught:
        ray_ckpt.load(target, tmp_path / "run")
    assert "what the failed load has left" not in str(caught.value)
    assert torch.equal(model.weight, torch.full((2, 2), 5.0))
