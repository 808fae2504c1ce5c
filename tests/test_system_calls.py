"""System calls that fail, lie or kill while a checkpoint is saved, replaced or removed: nothing good is lost by any."""

from __future__ import annotations

import shutil

import pytest

from tests.support.shim import ACTIONS, has_compiler, running_shim

pytestmark = pytest.mark.skipif(not has_compiler(), reason="needs gcc on Linux, to preload a shim of the C library")

OURS = {"StorageError", "CommitError"}
AT_ONE_CALL = [action for action in ACTIONS if action in ("killed", "EIO", "ENOSPC", "short", "lies")]


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    with running_shim(tmp_path_factory.mktemp("shim")) as process:
        yield process


@pytest.fixture
def prepared(shim, tmp_path):
    """Makes a step of a store, as a copy of one that a scenario has made."""
    made = {}

    def prepare(scenario, name):
        if scenario and scenario not in made:
            made[scenario] = tmp_path / "made" / scenario
            made[scenario].parent.mkdir(exist_ok=True)
            assert shim.run(scenario, made[scenario]).end == "done"
        step = tmp_path / name / "step-5"
        step.parent.mkdir()
        if scenario:
            shutil.copytree(made[scenario], step)
        return step

    return prepare


def _problem(shim, step, before, action, at, *, step_was_stock):
    """What is wrong after a save of version 2 over version `before`, if anything.

    A `.metadata` that stock DCP wrote is left to stand by a clean-up: it may be of a later save by stock DCP.
    """
    outcome = shim.run("save", step, action, at)
    if outcome.end not in {"done", "killed", *OURS}:
        return f"ended by {outcome}"
    found = shim.run("examines", step)
    if found.end != "done":
        return f"cannot be read: {found}"
    ours, stock = found.value["before"]
    allowed = [(2, 2)] if outcome.end == "done" else [(before, before), (before, 2), (2, before), (2, 2)]
    if (ours, stock) not in allowed or (ours == 2 and stock is None):
        return f"{outcome.end}: ours reads {ours}, stock {stock}"
    if found.value["after"] != [ours, ours] and not (step_was_stock and found.value["after"] == [2, 1]):
        return f"{outcome.end}: {ours} and {stock} were read before clean(), {found.value['after']} after it"
    return None


def _problems(shim, prepared, scenario, action, stride=1):
    before = 1 if scenario else None
    step = prepared(scenario, "counted")
    total = shim.run("save", step).calls
    assert total > 10
    found = {}
    for at in range(1, total + 1, stride):
        step = prepared(scenario, f"{action}-{at}")
        found[at] = _problem(shim, step, before, action, at, step_was_stock=scenario == "saves_stock")
        shutil.rmtree(step.parent)
    return {at: problem for at, problem in found.items() if problem}


def test_killed_at_some_calls_of_an_overwrite(shim, prepared):
    assert _problems(shim, prepared, "saves_first", "killed", stride=4) == {}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("action", AT_ONE_CALL)
@pytest.mark.parametrize("scenario", [None, "saves_first", "saves_stock"])
def test_every_call_of_a_save(shim, prepared, scenario, action):
    assert _problems(shim, prepared, scenario, action) == {}


@pytest.mark.parametrize("action", ["full", "full of names"])
def test_a_full_disk_can_be_relieved_and_loses_nothing(shim, tmp_path, action):
    store = tmp_path / "run"
    assert shim.run("saves_steps", store).end == "done"
    assert shim.run("save", store / "step-3", action).end == "StorageError"
    assert shim.run("cleans", store, action).end == "done"
    assert shim.run("reads_steps", store).value == {"1": [1, 1], "2": [2, 2], "3": [3, 3]}
    pinned = shim.run("pins", store, action)
    assert (pinned.end, pinned.value) == ("done", [2]) if action == "full" else pinned.end == "StorageError"
    pruned = shim.run("prunes", store, action)
    assert (pruned.end, pruned.value) == ("done", [1] if action == "full" else [1, 2])
    assert shim.run("deletes", store, action).end == "done"
    assert shim.run("reads_steps", store).value == ({"2": [2, 2]} if action == "full" else {})


def test_a_file_system_that_cannot_sync_directories(shim, tmp_path):
    assert shim.run("saves_first", tmp_path / "a", "no directory sync").end == "done"
    assert shim.run("reads", tmp_path / "a").value == [1, 1]


@pytest.mark.parametrize("action", ["", "no renameat2", "neither renameat2 nor link"])
def test_one_of_two_writers_wins_on_any_file_system(shim, tmp_path, action):
    assert shim.run("loses_a_race", tmp_path / "a", action).end == "CheckpointExistsError"
    assert shim.run("reads", tmp_path / "a").value == [1, 1]
    assert not list((tmp_path / "a").glob("*.tmp"))
    assert shim.run("save", tmp_path / "a", action).end == "done"
    assert shim.run("reads", tmp_path / "a").value == [2, 2]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("action", ["killed", "EIO", "ENOSPC"])
@pytest.mark.parametrize("scenario", ["prunes", "deletes"])
def test_every_call_of_a_removal(shim, tmp_path, scenario, action):
    """Steps are there whole or not at all, and the highest one that no delete was asked for stays."""
    shim.run("saves_steps", tmp_path / "made")
    shutil.copytree(tmp_path / "made", tmp_path / "counted")
    for at in range(1, shim.run(scenario, tmp_path / "counted").calls + 1):
        store = tmp_path / str(at)
        shutil.copytree(tmp_path / "made", store)
        assert shim.run(scenario, store, action, at).end in {"done", "killed", *OURS}
        for _ in range(2):
            found = shim.run("reads_steps", store).value
            assert all(versions == [int(step), int(step)] for step, versions in found.items()), at
            assert ("3" in found) if scenario == "prunes" else {"1", "2"} <= found.keys()
            assert shim.run("cleans", store).end == "done"
        shutil.rmtree(store)
