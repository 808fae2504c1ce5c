"""Every command on checkpoints of all layouts, and on those of other programs: whole ones, and damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ray_ckpt.parallel.layout import Layout
from tests.support import conversions, foreign_ranks
from tests.support.command_calls import call
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]

QUICK = ("pp2", "fsdp2x2")
"""Layouts that `make test` has time for."""

LAYOUTS = (*QUICK, "tp2", "fsdp1x2", "ddp2", "pp2.tp2", "fsdp2x2.tp2", "pp2.fsdp2x2", "hsdp2x2", "fsdp2x3")

BY_ONE = ("by index", "plain.pt", "lightning.ckpt", "weights.pt", "weights.safetensors")
BY_TWO = ("by name", "by index, sharded", "accelerate", "accelerate, file per rank", "lightning")
UNCHECKED = ("weights.safetensors",)
"""Forms without any checksum: a flipped bit is not seen there, but by who compares."""


def slow_unless(quick: tuple[str, ...], names: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


EVERY = [*slow_unless(QUICK, LAYOUTS), *slow_unless((), BY_ONE + BY_TWO)]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of one state in this layout, which is saved when it is first asked for."""
    root = tmp_path_factory.mktemp("ours")
    run_ranks(conversions.save_trained, 1, root, str(root))

    def at(layout: str) -> Path:
        if not (root / layout).exists():
            run_ranks(conversions.save_again, Layout.parse(layout).world_size, root, str(root), [layout])
        return root / layout

    return at


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What another program wrote; all of it is written when some is first asked for."""
    root = tmp_path_factory.mktemp("others")

    def at(name: str) -> Path:
        if not (root / name).exists():
            run_ranks(foreign_ranks.write_by_one, 1, root, str(root))
            run_ranks(foreign_ranks.write_by_two, 2, root, str(root), timeout_s=120)
        return root / name

    return at


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, name: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint, and the weights that it holds."""
    at = request.getfixturevalue("ours" if name in LAYOUTS else "others")
    return at(name), torch.load(at("weights.pt"), weights_only=True)


def data_of(*arguments: object) -> Any:
    code, text = call(*arguments, "--json")
    assert code == 0, text
    return json.loads(text)


@pytest.mark.parametrize("name", EVERY)
def test_looking(checkpoint: tuple[Path, dict[str, torch.Tensor]], name: str) -> None:
    path, weights = checkpoint
    [step] = data_of("ls", path)["steps"]
    assert not step["damage"]
    assert step["layout"] == (name if name in LAYOUTS else None)
    found = data_of("inspect", path)
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    names = {weight: [n for n in tensors if n == weight or n.endswith(f".{weight}")] for weight in weights}
    for weight, value in weights.items():
        tensor = tensors[min(names[weight], key=len)]
        assert (tensor["dtype"], tensor["shape"]) == (str(value.dtype).removeprefix("torch."), list(value.shape))
    assert sum(section["num_bytes"] for section in found["sections"]) == sum(t["num_bytes"] for t in tensors.values())
    for view in ("--tree", "--files", "--layout"):
        assert call("inspect", path, view)[0] == 0
    weight = max(weights, key=lambda weight: weights[weight].numel())
    statistics = data_of("inspect", path, "--tensor", min(names[weight], key=len))
    assert statistics["mean"] == pytest.approx(float(weights[weight].double().mean()), rel=1e-9)
    assert statistics["maximum"] == float(weights[weight].max())
    checked = data_of("verify", path)
    assert (checked["report"]["damages"], checked["verified"]) == ([], name in LAYOUTS)


@pytest.mark.parametrize("name", slow_unless(QUICK, LAYOUTS))
def test_one_state_is_the_same_in_every_layout(ours: Callable[[str], Path], name: str) -> None:
    report = data_of("diff", ours("single"), ours(name), "--values")
    assert report["equal"]
    assert report["report"]["num_equal"] == len(data_of("inspect", ours(name))["tensors"]) > 20


@pytest.mark.parametrize("name", EVERY)
def test_a_way_out_and_a_way_in(checkpoint: tuple[Path, dict[str, torch.Tensor]], name: str, tmp_path: Path) -> None:
    path, weights = checkpoint
    only = () if name in ("weights.pt", "weights.safetensors") else ("--only", "model")
    for form, target in (("safetensors", "out"), ("torch", "state.pt"), ("dcp", "stock")):
        code, text = call("export", path, tmp_path / target, "--to", form, *only)
        assert code == 0, text
    assert call("import", path, tmp_path / "ours")[0] == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight for weight, value in weights.items() if torch.equal(found[weight], value)} == weights.keys()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    model = next((state[part] for part in ("model", "model_state_dict", "state_dict") if part in state), state)
    assert {weight for weight, value in weights.items() if torch.equal(model[weight], value)} == weights.keys()
    assert data_of("verify", tmp_path / "ours")["verified"]
    assert data_of("diff", path, tmp_path / "ours")["equal"]
    assert data_of("ls", tmp_path / "stock")["steps"][0]["damage"] == ""


# ------------------------------------------------------------------------------------------------------ damaged ones


def largest_file(path: Path) -> Path:
    return max((file for file in [path, *path.rglob("*")] if file.is_file()), key=lambda file: file.stat().st_size)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [flip, cut, remove])
@pytest.mark.parametrize("name", EVERY)
def test_damage_is_named_and_leaves_nothing(
    checkpoint: tuple[Path, dict[str, torch.Tensor]], name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    whole, _ = checkpoint
    path = tmp_path / name
    shutil.copy(whole, path) if whole.is_file() else shutil.copytree(whole, path)
    file = largest_file(path)
    damage(file)
    unseen = damage is flip and name in UNCHECKED
    for arguments in (
        ["verify", path],
        ["export", path, tmp_path / "state.pt", "--to", "torch"],
        ["import", path, tmp_path / "ours"],
    ):
        code, text = call(*arguments)
        assert code == (0 if unseen else 1), arguments
        if not unseen:
            # Of a file that is gone beside others of its kind, the rank is named.
            assert file.name in text or (damage is remove and "rank 0" in text), arguments
            assert not (tmp_path / "state.pt").exists()
            assert not (tmp_path / "ours" / "manifest.json").exists()
    assert call("diff", whole, path)[0] == 1
    if damage is not flip:  # which only those see that read everything
        code, text = call("ls", path)
        assert code == 1
        assert file.name in text or "rank 0" in text
