"""Training states that others wrote, with their optimizers, loaded into every layout bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_ckpt.format.snapshot import Snapshot
from tests.support import foreign_ranks, states
from tests.support.ranks import run_ranks

FULL: dict[str, dict[str, Any]] = {
    "by index": {},
    "plain.pt": {},
    "lightning.ckpt": {},
    "by name": {},
    "by index, sharded": {},
    "accelerate": {},
    "accelerate, file per rank": {},
    "lightning": {},
}
"""With their optimizers, by what is to be said to `load`."""

WEIGHTS = {name: {"only": ("model",)} for name in ("weights.pt", "weights.safetensors", "prefixed.safetensors")}

LAYOUTS = {"single": 1, "fsdp2x2": 2, "fsdp1x2": 2, "pp2": 2, "fsdp2x3": 3}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Snapshot]]]:
    """The directory, and what each rank held when it was saved, by name."""
    directory = tmp_path_factory.mktemp("foreign")
    alone = run_ranks(foreign_ranks.write_by_one, 1, directory, str(directory))
    held = dict.fromkeys(["by index", "plain.pt", "lightning.ckpt", *WEIGHTS], alone)
    of_two = run_ranks(foreign_ranks.write_by_two, 2, directory, str(directory))
    return directory, held | {name: [of_rank[name] for of_rank in of_two] for name in of_two[0]}


def _model_of(snapshots: list[Snapshot]) -> list[Snapshot]:
    def chosen(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name.startswith("model.")}

    return [replace(each, fingerprints=chosen(each.fingerprints), values=chosen(each.values)) for each in snapshots]


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] if name == "fsdp1x2" else []) for name in LAYOUTS]
)
def test_what_others_wrote_arrives(
    written: tuple[Path, dict[str, list[Snapshot]]], tmp_path: Path, layout: str
) -> None:
    directory, held = written
    loads = {str(directory / name): options for name, options in (FULL | WEIGHTS).items()}
    outcomes = run_ranks(foreign_ranks.load_all, LAYOUTS[layout], tmp_path, layout, loads)
    for name in FULL | WEIGHTS:
        before, after, reports = zip(*(of_rank[str(directory / name)] for of_rank in outcomes), strict=True)
        assert reports[0] is not None, f"{name}: {after[0]}"
        saved = held[name]
        if name in WEIGHTS:
            saved, before, after = _model_of(saved), _model_of(list(before)), _model_of(list(after))
        assert len(states.differing(saved, before)) >= 10, name
        assert states.differing(saved, after) == [], name
        left_out = "counters left out: epoch, global_step; schedulers left out: lr_schedulers"
        assert reports[0].lost == (left_out if name == "lightning" else "")


def test_collided_groups_are_reported_and_the_optimizer_may_keep_its_own(
    written: tuple[Path, dict[str, list[Snapshot]]], tmp_path: Path
) -> None:
    directory, held = written
    path, copy = directory / "collided", directory / "the same"
    copy.symlink_to(path)
    loads: dict[str, dict[str, Any]] = {str(path): {}, str(copy): {"hyperparameters": "from-optimizer"}}
    outcomes = run_ranks(foreign_ranks.load_all, 2, tmp_path, "fsdp2x2", loads)
    for of_rank in outcomes:
        _, error, _ = of_rank[str(path)]
        assert error.startswith("StateMismatchError")
        assert "hyperparameters='from-optimizer'" in error
        assert "several ranks (pipeline stages) saved groups of their own" in error
    before, after, reports = zip(*(of_rank[str(copy)] for of_rank in outcomes), strict=True)
    assert reports[0] is not None, after
    assert "one survived" in reports[0].lost
    differing = states.differing(held["collided"], list(after))
    assert {name.split(":")[0].rpartition(".")[2] for name in differing} == {"lr"}
    assert all(name.startswith("optim.param_groups.") for name in differing)
    # All hyper-parameters are as they were in the target.
    own = {name: value for name, value in before[0].values.items() if name.startswith("optim.param_groups.")}
    assert own
    assert own.items() <= after[0].values.items()


def test_what_does_not_fit_is_refused_by_name(written: tuple[Path, dict[str, list[Snapshot]]], tmp_path: Path) -> None:
    directory, _ = written
    outcomes = run_ranks(foreign_ranks.load_what_does_not_fit, 1, tmp_path, str(directory))[0]
    assert "(Lightning's sharded FSDP checkpoint) does not fit" in outcomes["more in lightning"]
    assert "more: saved a value, not wanted" in outcomes["more in lightning"]
    assert "optim.param_groups.first.0.weight: not saved" in outcomes["weights into an optimizer"]
    assert "in groups of [5, 5] parameters, which are not those" in outcomes["other groups"]
    assert "but its exp_avg" in outcomes["another order"]
    assert outcomes["model alone"] == "loaded"
    assert "neither 'from-checkpoint' nor" in outcomes["unknown option"]
