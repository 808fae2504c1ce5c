"""Plain dicts of objects: what has grown comes back whole, with keys of the kind that they were."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ray_ckpt
from ray_ckpt import TrainState
from ray_ckpt.errors import StateMismatchError, UsageError
from ray_ckpt.state.hyperparameters import same


class Holder:
    def __init__(self, state: dict[Any, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[Any, Any]:
        return self.state

    def load_state_dict(self, state: dict[Any, Any]) -> None:
        self.state = state


GROWN: dict[str, tuple[dict[Any, Any], dict[Any, Any]]] = {
    "list of dicts": ({"entries": []}, {"entries": [{"loss": 1.0}, {"loss": 0.5, "at": {"step": 3}}]}),
    "list of tensors": ({"entries": []}, {"entries": [torch.ones(2), torch.zeros(3)]}),
    "dict of tensors": ({"shadow": {}}, {"shadow": {"0.weight": torch.ones(2), "0.bias": torch.ones(1)}}),
    "an empty dict": ({}, {"seen": {}}),
    "empty dicts below": ({}, {"seen": {"a": {"b": {}}}, "order": [{}, OrderedDict()]}),
    "from nothing": ({}, {"metrics": {"mean": torch.ones(2)}, "total": 3}),
    "numbers as keys": ({"buffer": {}}, {"buffer": {10: torch.ones(2), 2: torch.zeros(2)}}),
    "more numbers as keys": ({"buffer": {2: torch.ones(2)}}, {"buffer": {10: torch.ones(2), 2: torch.zeros(2)}}),
    "keys of other kinds": ({}, {(1, "a"): 2, 0.5: "x", True: None, "y": {}, "z": [{}], None: torch.ones(1)}),
    "kinds of dicts": ({}, {"seen": Counter({25: 1}), "order": OrderedDict(b=1, a=2)}),
    "a larger tensor": ({"buffer": torch.zeros(0, 4)}, {"buffer": torch.ones(10, 4)}),
    "a value that became a tensor": ({"mean": 0.0}, {"mean": torch.ones(2)}),
}


@pytest.mark.parametrize("kind", GROWN)
def test_an_object_gets_all_that_was_saved_under_its_name(tmp_path: Path, kind: str) -> None:
    fresh, grown = GROWN[kind]
    ray_ckpt.save({"trainer": Holder(grown), "other": torch.ones(1)}, tmp_path / "run")
    targets = {"trainer": Holder(dict(fresh)), "other": torch.zeros(1)}
    ray_ckpt.load(targets, tmp_path / "run")
    assert same(targets["trainer"].state, grown)
    assert float(targets["other"]) == 1.0
    in_place = Holder(dict(grown))
    ray_ckpt.load({"trainer": in_place, "other": torch.zeros(1)}, tmp_path / "run")
    assert same(in_place.state, grown)


def test_numbers_stay_numbers_in_what_torch_keeps(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizers = [torch.optim.Adam(model.parameters(), lr=lr) for lr in (0.1, 0.2)]
    schedulers = [torch.optim.lr_scheduler.MultiStepLR(optimizer, [25, 7]) for optimizer in optimizers]
    model(torch.ones(1, 2)).sum().backward()
    optimizers[0].step()
    schedulers[0].step()
    ray_ckpt.save({"optim": optimizers[0], "lr": schedulers[0]}, tmp_path / "run")
    ray_ckpt.load({"optim": optimizers[1], "lr": schedulers[1]}, tmp_path / "run")
    assert same(optimizers[1].state_dict(), optimizers[0].state_dict())
    assert schedulers[1].state_dict() == schedulers[0].state_dict()
    ray_ckpt.save({"optim": optimizers[1], "lr": schedulers[1]}, tmp_path / "again")


def test_an_entry_that_was_not_saved_is_still_missed(tmp_path: Path) -> None:
    ray_ckpt.save({"trainer": Holder({"seen": 3, "history": [{"loss": 1.0}]})}, tmp_path / "run")
    with pytest.raises(StateMismatchError, match=r"trainer\.mean: not saved"):
        ray_ckpt.load({"trainer": Holder({"seen": 3, "history": [], "mean": 0.5})}, tmp_path / "run")


def test_a_plain_list_that_has_grown_is_replaced(tmp_path: Path) -> None:
    ray_ckpt.save({"history": [{"loss": 1.0}]}, tmp_path / "run")
    state: dict[str, Any] = {"history": []}
    ray_ckpt.load(state, tmp_path / "run")
    assert state == {"history": [{"loss": 1.0}]}


def test_a_training_state_gives_grown_objects_all_of_it(tmp_path: Path) -> None:
    for name, (fresh, grown) in GROWN.items():
        ray_ckpt.save(TrainState(nn.Linear(2, 2), extra={"trainer": Holder(grown)}), tmp_path / name)
        target = Holder(dict(fresh))
        ray_ckpt.load(TrainState(nn.Linear(2, 2), extra={"trainer": target}), tmp_path / name)
        assert same(target.state, grown)


@pytest.mark.parametrize("fresh", [(), ("a", "b", "c"), ("c", "a", "b")])
@pytest.mark.parametrize("keys", [("b", "a", "c"), (2, 10, 1), ("a", "b", "c")])
def test_an_ordered_dict_keeps_its_order(tmp_path: Path, fresh: tuple[Any, ...], keys: tuple[Any, ...]) -> None:
    fresh = tuple(sorted(keys, key=str)["abc".index(key)] for key in fresh)
    grown = {"within": [OrderedDict((key, torch.ones(1) if key == "c" else number) for number, key in enumerate(keys))]}
    for form in ("plain", "extra"):
        found = Holder({"within": [OrderedDict((key, torch.zeros(1) if key == "c" else 0) for key in fresh)]})
        source, target = (
            {"it": each} if form == "plain" else TrainState(nn.Linear(1, 1), extra={"it": each})
            for each in (Holder(grown), found)
        )
        ray_ckpt.save(source, tmp_path / form)
        ray_ckpt.load(target, tmp_path / form)
        assert str(found.state) == str(grown)


class Named(dict[str, Any]):
    """A dict of somebody's own class."""


@pytest.mark.parametrize("form", ["plain", "extra"])
@pytest.mark.parametrize("factory", [list, int, None])
def test_a_dict_that_makes_its_items_still_makes_them(tmp_path: Path, form: str, factory: Any) -> None:
    def state_of(holder: Holder) -> Any:
        return {"it": holder} if form == "plain" else TrainState(nn.Linear(2, 2), extra={"it": holder})

    grown = {"seen": defaultdict(factory, {"a": [1], "b": torch.ones(2)}), "within": {"x": {3: defaultdict(factory)}}}
    ray_ckpt.save(state_of(Holder(grown)), tmp_path / "run")
    found = Holder({"seen": defaultdict(factory), "within": {}})
    ray_ckpt.load(state_of(found), tmp_path / "run")
    assert same(found.state, grown)
    for one in (found.state["seen"], found.state["within"]["x"][3]):
        assert (type(one), one.default_factory) == (defaultdict, factory)


def test_a_dict_of_a_class_that_nothing_records_is_of_the_class_that_the_object_shows(tmp_path: Path) -> None:
    made = defaultdict(lambda: 7, {"a": 1})
    ray_ckpt.save({"it": Holder({"named": Named(a=1, b=2), "made": made, "plain": {"a": 1}})}, tmp_path / "run")
    found = Holder({"named": Named(), "made": defaultdict(lambda: 8), "plain": Counter()})
    ray_ckpt.load({"it": found}, tmp_path / "run")
    assert found.state["named"] == {"a": 1, "b": 2}
    assert {name: type(value) for name, value in found.state.items()} == {
        "named": Named,
        "made": defaultdict,
        "plain": dict,
    }
    assert (found.state["made"], found.state["made"]["z"]) == ({"a": 1, "z": 8}, 8)
    with pytest.raises(UsageError, match="defaultdict"):
        ray_ckpt.save(TrainState(nn.Linear(2, 2), extra={"it": Holder({"made": made})}), tmp_path / "refused")


def test_equal_lists_stay_lists_of_their_own(tmp_path: Path) -> None:
    """What is equal in a checkpoint is one object in memory while it is read; what a load gives is not."""

    def lists() -> dict[str, Any]:
        return {"seen": [], "kept": [], "pairs": ([], []), "count": 1}

    holder, extra, plain = Holder(lists()), {"a": [], "b": [], "of": Holder(lists())}, {"x": {"a": [], "b": []}}
    weight = nn.Parameter(torch.ones(2))
    model = nn.ParameterDict({"weight": weight})
    optimizer = torch.optim.SGD([weight], momentum=0.9)
    optimizer.state[weight] = {"momentum_buffer": torch.ones(2), **lists()}
    ray_ckpt.save(TrainState(model, optimizer, extra=extra), tmp_path / "state")
    ray_ckpt.save({"holder": holder, "plain": plain}, tmp_path / "plain")
    ray_ckpt.load(TrainState(model, optimizer, extra=extra), tmp_path / "state")
    ray_ckpt.load({"holder": holder, "plain": plain}, tmp_path / "plain")
    for found in (holder.state, extra, extra["of"].state, optimizer.state[weight], plain["x"]):
        of_all = [value for value in [*found.values(), *found.get("pairs", ())] if isinstance(value, list)]
        assert len(of_all) >= 2
        assert len({id(value) for value in of_all}) == len(of_all)


@pytest.mark.parametrize("form", ["in a dict", "in a list", "beside a tensor"])
def test_an_object_that_is_not_at_the_top_is_refused(tmp_path: Path, form: str) -> None:
    """It would be pickled, and a trusted load would put another object in its place and leave it as it is."""
    forms: dict[str, Callable[[Any], Any]] = {
        "in a dict": lambda it: {"at": it},
        "in a list": lambda it: [it],
        "beside a tensor": lambda it: [torch.ones(2), {"at": it}],
    }
    made = forms[form]
    with pytest.raises(UsageError, match=r"'run.*' is or holds a Linear, whose state_dict is asked for at the top"):
        ray_ckpt.save({"run": made(nn.Linear(2, 2))}, tmp_path / "refused")
    assert not (tmp_path / "refused" / "manifest.json").exists()
    ray_ckpt.save({"run": made(nn.Linear), "alone": nn.Linear}, tmp_path / "class")  # the class itself has no state
    ray_ckpt.save({"run": made(3)}, tmp_path / "saved")
    with pytest.raises(UsageError, match="is or holds a Linear"):
        ray_ckpt.load({"run": made(nn.Linear(2, 2))}, tmp_path / "saved", trusted=True)
