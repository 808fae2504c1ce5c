"""Random generators that others have saved: each process goes on with its own, or is told that it does not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ray_ckpt import TrainState, load, save
from ray_ckpt.errors import StateMismatchError, UnsafeCheckpointError
from ray_ckpt.format.foreign_generators import find
from tests.support.ranks import run_ranks


@pytest.fixture(autouse=True)
def _generators() -> Any:
    before = states()
    yield
    random.setstate(before["python"])
    np.random.set_state(before["numpy"])
    torch.set_rng_state(before["torch"])


def states() -> dict[str, Any]:
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def state_with(**options: Any) -> TrainState:
    return TrainState(nn.Linear(2, 2), **{"rng": True} | options)


def write(directory: Path, content: Any, name: str = "rng_state.pth") -> Path:
    directory.mkdir()
    torch.save(nn.Linear(2, 2).state_dict(), directory / "pytorch_model.bin")
    torch.save({}, directory / "optimizer.pt") if not content else torch.save(content, directory / name)
    return directory


def write_own(rank: int, directory: str) -> list[float]:
    """As verl does, and then the numbers that follow. NumPy's state is the same on all ranks."""
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    torch.save(model.state_dict(), Path(directory) / f"model_world_size_2_rank_{rank}.pt")
    torch.save(torch.optim.SGD(model.parameters()).state_dict(), Path(directory) / f"optim_world_size_2_rank_{rank}.pt")
    seed(rank)
    np.random.seed(7)
    rng = {"cpu": torch.get_rng_state(), "numpy": np.random.get_state(), "random": random.getstate()}
    torch.save({"rng": rng}, Path(directory) / f"extra_state_world_size_2_rank_{rank}.pt")
    return draw()


def load_own(rank: int, directory: str) -> tuple[str | None, list[float]]:
    return load(state_with(), directory, only=("model", "rng")).rng, draw()


def test_each_process_has_its_own_again_or_all_are_seeded_anew(tmp_path: Path) -> None:
    expected = run_ranks(write_own, 2, tmp_path, str(tmp_path))
    assert expected[0][0] != expected[1][0]
    assert run_ranks(load_own, 2, tmp_path, str(tmp_path)) == [("restored", numbers) for numbers in expected]
    anew = [load_own(0, str(tmp_path)) for _ in range(2)]
    assert anew[0] == anew[1]
    assert (anew[0][0], anew[0][1] in expected) == ("reseeded", False)


def test_what_was_not_saved_is_told(tmp_path: Path) -> None:
    seed(5)
    directory = write(tmp_path / "run", {"python": random.getstate(), "xla": 3})
    expected = random.random()
    seed(6)
    state = state_with()
    others = [np.random.get_state()[1].tolist(), torch.get_rng_state()]
    report = load(state, directory)
    assert report.rng == "restored; numpy, torch left as it was, as nothing of it was saved"
    assert "random generators left out: rng_state.xla" in report.lost
    assert random.random() == expected
    assert np.random.get_state()[1].tolist() == others[0]
    assert torch.equal(torch.get_rng_state(), others[1])


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"python": (3, (1, 2), None)}, r"rng\.\$rank0\.python is no state of python's random generator"),
        ({"python": 7}, "python's random generator: TypeError"),
        ({"cpu": torch.zeros(3)}, r"torch's random generator: float32\[3\]"),
        ({"numpy": ("MT19937", [1], 0, 0, 0.0)}, "numpy's random generator"),
    ],
    ids=["python", "number", "torch", "numpy"],
)
def test_what_is_no_state_of_a_generator_is_refused(tmp_path: Path, wrong: Any, told: str) -> None:
    directory = write(tmp_path / "run", {"python": random.getstate(), "cpu": torch.get_rng_state()} | wrong)
    before = states()["python"]
    with pytest.raises(StateMismatchError, match=told + r".*strict=False"):
        load(state_with(), directory)
    assert load(state_with(), directory, strict=False).rng == "left as it was"
    assert random.getstate() == before


def test_a_state_of_numpy_with_what_is_no_number_in_it_is_refused(tmp_path: Path) -> None:
    kind, keys, position, has_gauss, cached = np.random.get_state()
    for number, odd in enumerate(((kind, keys, np.int64(3), has_gauss, cached), (kind, keys[:9], position, 0, cached))):
        directory = write(tmp_path / str(number), {"cpu": torch.get_rng_state(), "numpy": odd})
        with pytest.raises(UnsafeCheckpointError, match=r"asks for numpy"):
            load(state_with(), directory)
        assert load(state_with(rng=False), directory).missing == ()


def test_a_state_of_torch_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    saved = {
        "model": nn.Linear(2, 2).state_dict(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": [],  # of a process without devices
    }
    torch.save(saved, tmp_path / "run.pt")
    expected = torch.rand(2)
    state = state_with()
    assert not torch.equal(torch.rand(2), expected)
    assert load(state, tmp_path / "run.pt").rng.startswith("restored; numpy, python left")
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("rng_state_12.cuda.3", ("12", "cuda.3")),
        ("random_states_0.torch_cuda_manual_seed.0", ("0", "cuda.0")),
        ("random_states_0.step", ("0", "")),
        ("rng_states.torch.cuda.1", ("0", "cuda.1")),
        ("rng.1.numpy", ("1", "numpy")),
        ("rng_states.2.numpy", ("2", "numpy")),
        ("numpy_rng_state", ("0", "numpy")),
        ("rng_state", ("0", "torch")),
        ("rng_state.python.1", ("0", "")),
    ],
)
def test_names_of_others(name: str, found: tuple[str, str]) -> None:
    assert find(name) == found


def test_names_of_ours_are_none_of_theirs() -> None:
    assert find("rng.rank0.torch") is find("rng.num_ranks") is find("model.rng_state.weight") is None


class Loader:
    def state_dict(self) -> dict[str, int]:
        return {"at": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


@pytest.mark.parametrize(
    "lacking",
    [
        {"rng": True},
        {"dataloader": Loader()},
        {"scaler": Loader()},
        {"extra": {"note": 1}},
        {"step": 0},
        {"ema": nn.Linear(2, 2)},
    ],
    ids=lambda lacking: next(iter(lacking)),
)
@pytest.mark.parametrize("foreign", [True, False])
def test_the_way_out_where_nothing_was_saved(tmp_path: Path, lacking: dict[str, Any], foreign: bool) -> None:
    if foreign:
        write(tmp_path / "run", {})
    else:
        save(state_with(rng=False), tmp_path / "run")
    name = next(iter(lacking))
    told = rf"not saved.*It has nothing for TrainState\({name}=.*\): without that the rest is loaded"
    with pytest.raises(StateMismatchError, match=told):
        load(state_with(**{"rng": False} | lacking), tmp_path / "run")
    assert load(state_with(rng=False), tmp_path / "run").missing == ()
