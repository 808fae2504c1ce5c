"""verify_by_tasks: the report of verify, made on all CPUs of a cluster; and NaN counted in the same read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from ray_ckpt import NonFinite, VerifyReport, WorkerError, cluster, save, scan_nonfinite, verify
from ray_ckpt.cli.main import cli
from ray_ckpt.cluster import verifying
from tests.support.faulty import CountedReads

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def odd(dtype: torch.dtype, size: int = 1000, *, nan: int = 2, inf: int = 0) -> torch.Tensor:
    real = torch.linspace(-3, 3, size)
    real[7 : 7 + nan] = float("nan")
    real[400 : 400 + inf] = float("-inf")
    return real.to(dtype)


def state() -> dict[str, Any]:
    return {
        "good": torch.ones(300_000),
        "f64": odd(torch.float64, inf=1),
        "f32": odd(torch.float32, 2_000_000, inf=3),
        "bf16": odd(torch.bfloat16, 77, nan=1),
        "f16": odd(torch.float16, 999),
        "c64": torch.complex(odd(torch.float32, 33), torch.ones(33)),
        "e4m3": odd(torch.float8_e4m3fn, 101, nan=3),
        "e5m2": odd(torch.float8_e5m2, 501, inf=2),
        "ints": torch.arange(1000),
        "bools": torch.ones(5, dtype=torch.bool),
        "empty": torch.ones(0),
        "scalar": torch.tensor(float("nan")),
    }


EXPECTED = {
    "f64": NonFinite(2, 1), "f32": NonFinite(2, 3), "bf16": NonFinite(1, 0), "f16": NonFinite(2, 0),
    "c64": NonFinite(2, 0), "e4m3": NonFinite(3, 0), "e5m2": NonFinite(2, 2), "scalar": NonFinite(1, 0),
}  # fmt: skip


def write(kind: str, path: Path) -> tuple[Path, dict[str, NonFinite]]:
    """A checkpoint, and what is to be found in it."""
    if kind == "ours":
        save(state(), path)
    elif kind == "dcp":
        dcp.save(state(), checkpoint_id=path, no_dist=True)
    elif kind == "safetensors":
        path = path.with_suffix(".safetensors")
        safetensors.torch.save_file(state(), path)
    elif kind == "pt":
        path = path.with_suffix(".pt")
        torch.save(state(), path)
    elif kind == "views":
        # Of one storage: a tied part, a column with gaps whose neighbors are odd, a transposed whole.
        path = path.with_suffix(".pt")
        table = odd(torch.float32, 1200, nan=2).reshape(40, 30)
        torch.save({"table": table, "tied": table, "column": table[:, 8], "turned": table.t()}, path)
        whole = NonFinite(2, 0)
        return path, {"table": whole, "tied": whole, "column": NonFinite(1, 0), "turned": whole}
    return path, EXPECTED


KINDS = ["ours", "dcp", "safetensors", "pt", "views"]


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_inf_are_counted_in_the_read_that_checks(tmp_path: Path, kind: str) -> None:
    path, expected = write(kind, tmp_path / "c")
    report = verify(path, scan_nan=True)
    assert dict(report.nonfinite or {}) == expected
    assert dict(scan_nonfinite(path)) == expected
    assert report.damages == ()
    assert not [note for note in report.notes if "NaN" in note]
    assert verify(path).nonfinite is None
    assert f"{len(expected)} of which hold NaN or Inf" in str(report)


def test_no_byte_of_ours_is_read_twice(tmp_path: Path) -> None:
    save({"weight": odd(torch.float32, 3_000_000)}, tmp_path)
    plain, scanned = CountedReads(str(tmp_path)), CountedReads(str(tmp_path))
    verify(plain)
    verify(scanned, scan_nan=True)
    assert scanned.num_bytes == plain.num_bytes > 12_000_000


def flip(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-3_000_000])


def remove(path: Path) -> None:
    next(path.glob("*.distcp")).unlink()


def lie(path: Path) -> None:
    (path / ".metadata").write_bytes(b"nothing")


def same(one: VerifyReport, other: VerifyReport) -> bool:
    return dataclasses.replace(one, seconds=0) == dataclasses.replace(other, seconds=0)


@pytest.mark.usefixtures("local_ray")
class TestByTasks:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_report_is_that_of_one_process(
        self, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(verifying, "TASKS_PER_CPU", 0.5)
        path, _ = write(kind, tmp_path / "c")
        told: list[tuple[int, int]] = []
        report = cluster.verify_by_tasks(path, scan_nan=True, progress=lambda *both: told.append(both))
        assert same(report, verify(path, scan_nan=True))
        assert told[-1] == (report.total_bytes, report.total_bytes)

    @pytest.mark.parametrize("damage", [flip, cut, remove, lie])
    def test_so_are_the_damages(self, tmp_path: Path, damage: Callable[[Path], None]) -> None:
        save(state(), tmp_path, step=4)
        damage(tmp_path / "step-4")
        report = cluster.verify_by_tasks(tmp_path)
        assert report.damages
        assert report.step == 4
        assert same(report, verify(tmp_path))

    def test_a_storage_that_the_nodes_do_not_share_is_no_damage(self) -> None:
        save(state(), "memory://not-shared")
        with pytest.raises(WorkerError, match=r"is not there on this node, but on the driver's"):
            cluster.verify_by_tasks("memory://not-shared")

    def test_the_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        save(state(), tmp_path)
        flip(tmp_path)
        assert cli.main(["verify", str(tmp_path), "--ray", "--scan-nan", "--json"], standalone_mode=False) == 1
        found = json.loads(capsys.readouterr().out)
        assert found["nonfinite"]["f32"] == {"num_nan": 2, "num_inf": 3}
        assert [damage["file"] for damage in found["report"]["damages"]] == [next(tmp_path.glob("*.distcp")).name]


def test_an_address_without_ray_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match="--address is the cluster for --ray"):
        cli.main(["verify", str(tmp_path), "--address", "127.0.0.1:1"], standalone_mode=False)
