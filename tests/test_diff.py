"""diff: checkpoints of different layouts and programs are compared by content, and what differs is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ray_ckpt import IntegrityError, SaveHandle, diff, fingerprint, save
from ray_ckpt.storage.checkpoint_reader import CheckpointReader
from tests.support.foreign import weights
from tests.support.ranks import run_ranks
from tests.test_cli import call, flip

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state(**changed: Any) -> dict[str, Any]:
    big = torch.arange(6_000_000.0)  # more than a piece
    return {"big": big, "nan": torch.tensor([float("nan")]), "lr": 0.1, "list": [torch.ones(2)], **changed}


def save_sharded(rank: int, path: str, dim: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    sharded = {
        name: distribute_tensor(value, mesh, [Shard(min(dim, value.ndim - 1))]) if value.ndim else value
        for name, value in weights().items()
    }
    save(sharded, path)


def test_layouts_do_not_matter(tmp_path: Path) -> None:
    run_ranks(save_sharded, 2, tmp_path, str(tmp_path / "rows"), 0)
    run_ranks(save_sharded, 2, tmp_path, str(tmp_path / "columns"), 1)
    save(weights(), tmp_path / "whole")
    dcp.save(weights(), checkpoint_id=tmp_path / "stock", no_dist=True)
    safetensors.torch.save_file(weights(), tmp_path / "file.safetensors")
    torch.save(weights(), tmp_path / "file.pt")
    for other in ("columns", "whole", "stock", "file.safetensors", "file.pt"):
        report = diff(tmp_path / "rows", tmp_path / other)
        assert report.equal, other
        assert report.num_equal == len(weights())
    one = weights()
    one["layer61.weight"][60, 112] += 1
    save(one, tmp_path / "changed")
    report = diff(tmp_path / "rows", tmp_path / "changed", values=True)
    [found] = report.tensors
    assert (found.name, found.num_different) == ("layer61.weight", 1)
    assert found.max_absolute == pytest.approx(1, rel=1e-5)


def save_with_fingerprints(rank: int, path: str, dim: int | None, blocking: bool) -> None:
    """Sharded along a dim, or replicated; one name is replicated anyway."""
    mesh = init_device_mesh("cpu", (2,))
    placement = Replicate() if dim is None else Shard(dim)
    matrix, steps = torch.arange(7 * 9.0).reshape(7, 9), torch.arange(3)
    state = {"matrix": distribute_tensor(matrix, mesh, [placement]), "steps": steps}
    saved = save(state, path, fingerprints=True, blocking=blocking)
    if isinstance(saved, SaveHandle):
        state["matrix"].zero_()
        saved.result(timeout_s=60)


def test_with_fingerprints_no_tensor_is_read(tmp_path: Path) -> None:
    matrix, steps = torch.arange(7 * 9.0).reshape(7, 9), torch.arange(3)
    save({"matrix": matrix, "steps": steps}, tmp_path / "whole", fingerprints=True)
    assert CheckpointReader(tmp_path / "whole").read_manifest().fingerprints == {
        "matrix": fingerprint(matrix).digest,
        "steps": fingerprint(steps).digest,
    }
    for number, (dim, blocking) in enumerate([(0, True), (1, False), (None, True)]):
        run_ranks(save_with_fingerprints, 2, tmp_path, str(tmp_path / f"{number}"), dim, blocking)
        report = diff(tmp_path / "whole", tmp_path / f"{number}")
        assert (report.equal, report.num_by_fingerprint, report.bytes_read) == (True, 2, 0)
    matrix[6, 8] = -1
    save({"matrix": matrix, "steps": steps}, tmp_path / "changed", fingerprints=True)
    report = diff(tmp_path / "whole", tmp_path / "changed")
    assert ([found.name for found in report.tensors], report.bytes_read) == (["matrix"], 0)
    save({"matrix": matrix, "steps": steps}, tmp_path / "without")
    report = diff(tmp_path / "changed", tmp_path / "without")
    assert (report.equal, report.num_by_fingerprint) == (True, 0)
    assert report.bytes_read == 2 * (matrix.nbytes + steps.nbytes)


def test_what_differs_is_named(tmp_path: Path) -> None:
    save(state(), tmp_path / "a")
    changed = state()["big"]
    changed[5_999_999] = -1
    other = state(big=changed, lr=0.2, list=[torch.zeros(2)], more=torch.ones(1))
    save(other, tmp_path / "b")
    code, text = call("diff", tmp_path / "a", tmp_path / "b", "--values")
    assert code == 1
    assert "only right: more" in text
    assert "1 elements, at most 6e+06 apart, relative 1" in text
    assert "value differs: lr: 0.1 / 0.2" in text
    assert call("diff", tmp_path / "a", tmp_path / "a")[0] == 0


@pytest.mark.parametrize(
    ("left", "right", "what"),
    [
        (torch.ones(2), torch.ones(3), "shape"),
        (torch.ones(2), torch.ones(2).half(), "dtype"),
        (torch.ones(2), "text", "dtype"),
        (torch.zeros(2), -torch.zeros(2), "elements"),
        (torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64) * 2j, "elements"),
        (torch.ones(2).to(torch.float8_e4m3fn), torch.zeros(2).to(torch.float8_e4m3fn), "elements"),
        (torch.tensor([True]), torch.tensor([False]), "elements"),
    ],
)
def test_kinds_of_difference(tmp_path: Path, left: Any, right: Any, what: str) -> None:
    save({"x": left}, tmp_path / "a")
    save({"x": right}, tmp_path / "b")
    for values in (False, True):
        assert [found.what for found in diff(tmp_path / "a", tmp_path / "b", values=values).tensors] == [what]


def test_damage_is_an_error_and_no_difference(tmp_path: Path) -> None:
    save(state(), tmp_path / "a")
    save(state(), tmp_path / "b")
    flip(tmp_path / "b")
    with pytest.raises(IntegrityError):
        diff(tmp_path / "a", tmp_path / "b")
