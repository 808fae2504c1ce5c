"""convert: what others wrote becomes ours, with checksums, and loads as before; what is cut off goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ckpt import (
    CheckpointExistsError,
    CheckpointStore,
    IntegrityError,
    TrainState,
    UsageError,
    convert,
    diff,
    export,
    load,
    save,
    verify,
)
from tests.conftest import REPOSITORY
from tests.support import states
from tests.support.conversions import die_at, files_of
from tests.support.foreign import weights
from tests.support.ranks import RanksError, run_ranks
from tests.support.s3 import run_s3
from tests.test_cli import flip
from tests.test_export import FOREIGN, write_foreign

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*is deprecated")


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_others_wrote_becomes_ours(kind: str, tmp_path: Path) -> None:
    source = write_foreign(kind, tmp_path / "source")
    convert(source, tmp_path / "ours")
    assert diff(source, tmp_path / "ours").equal
    assert verify(tmp_path / "ours").verified
    assert not verify(source).verified
    before = flip(tmp_path / "ours")
    assert [damage.file for damage in verify(tmp_path / "ours").damages] == [before]


def test_it_loads_as_the_source_does(tmp_path: Path) -> None:
    """An optimizer by index, schedulers and counters under others' names: translated as those of the source are."""
    state, module = states.build("single", "adamw", seed=3)
    states.train(state, module, steps=2)
    scheduler = torch.optim.lr_scheduler.StepLR(state.optimizer, 3)
    content = {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "global_step": 2,
    }
    torch.save(content, tmp_path / "script.pt")
    convert(tmp_path / "script.pt", tmp_path / "ours")
    found = []
    for path in (tmp_path / "script.pt", tmp_path / "ours"):
        fresh, _ = states.build("single", "adamw", seed=5)
        fresh = TrainState(
            fresh.model, fresh.optimizer, schedulers=torch.optim.lr_scheduler.StepLR(fresh.optimizer, 3), step=0
        )
        report = load(fresh, path)
        assert fresh.step == 2
        found.append((fresh.snapshot(0), report.lost))
    assert states.differing([found[0][0]], [found[1][0]]) == []
    assert found[0][1] == found[1][1]


def test_a_target_that_is_taken_stays(tmp_path: Path) -> None:
    save(weights(), tmp_path / "taken")
    torch.save(weights(), tmp_path / "file.pt")
    before = files_of(tmp_path / "taken")
    with pytest.raises(CheckpointExistsError, match="already; give another place"):
        convert(tmp_path / "file.pt", tmp_path / "taken")
    with pytest.raises(UsageError, match="is the source"):
        convert(tmp_path / "taken", tmp_path / "taken")
    (tmp_path / "link").symlink_to(tmp_path / "taken")
    with pytest.raises(UsageError, match="is the source"):
        convert(tmp_path / "taken", tmp_path / "link")
    assert files_of(tmp_path / "taken") == before


def test_a_store_is_no_target_without_a_step(tmp_path: Path) -> None:
    save({"model": weights()}, tmp_path / "run", step=3)
    torch.save(weights(), tmp_path / "file.pt")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=r"is a store, with step 3: give target_step="):
        convert(tmp_path / "file.pt", tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before
    convert(tmp_path / "file.pt", tmp_path / "run", target_step=4)
    assert CheckpointStore(tmp_path / "run").steps() == (3, 4)


def test_a_damaged_source_is_named_and_nothing_committed(tmp_path: Path) -> None:
    torch.save({"w": torch.randn(300, 70)}, tmp_path / "file.pt")
    data = bytearray((tmp_path / "file.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "file.pt").write_bytes(data)
    with pytest.raises(IntegrityError, match="w"):
        convert(tmp_path / "file.pt", tmp_path / "ours")
    assert list((tmp_path / "ours").iterdir()) == []


def test_a_value_that_could_run_code_is_left_out_by_name(tmp_path: Path) -> None:
    import argparse

    torch.save({"model": weights(), "args": argparse.Namespace(lr=1)}, tmp_path / "file.pt")
    report = convert(tmp_path / "file.pt", tmp_path / "ours")
    assert [text for text in report.left_out if "args" in text and "Namespace" in text]
    assert diff(tmp_path / "ours", tmp_path / "file.pt").only_right == ("args",)


def _end(to: str, source: str, target: Path) -> Any:
    """Go on, or begin."""
    if to == "ours":
        return convert(source, target)
    return export(source, str(target), to=to, **({} if to == "torch" else {"max_shard_bytes": 20_000}))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["safetensors", "torch", "dcp", "ours"])
def test_killed_at_any_operation_it_ends_with_the_same_bytes(to: str, tmp_path: Path) -> None:
    save({"model": weights(), "lr": 0.1}, tmp_path / "run")
    source = str(tmp_path / "run")
    reference = tmp_path / "reference" / "x"
    _end(to, source, reference)
    whole = reference.parent if to == "torch" else reference
    [total] = run_ranks(die_at, 1, tmp_path, to, source, str(tmp_path / "counted" / "x"), None)
    is_single = to == "torch"
    assert is_single or total > 20
    partial = kept = 0
    for number in range(1, 10_000):
        target = tmp_path / f"at{number}" / "x"
        try:
            run_ranks(die_at, 1, tmp_path, to, source, str(target), number)
        except RanksError:
            pass
        else:
            break  # more than there are
        place = target.parent if is_single else target
        left = set(files_of(place)) if place.exists() else set()
        commit = {
            "safetensors": "model.safetensors.index.json",
            "torch": "x",
            "dcp": ".metadata",
            "ours": "manifest.json",
        }
        if commit[to] in left:  # then it is a whole already
            assert {name: files_of(place)[name] for name in files_of(whole)} == files_of(whole)
        else:
            partial += 1
        if (
            "ray_ckpt-export.json" in left or "x.ray_ckpt-export.json" in left
        ):  # another export does not take the remainder for its own
            with pytest.raises(CheckpointExistsError):
                export(source, str(target), to="torch" if is_single else "dcp", rename=[("layer", "part")])
        is_done = commit[to] in left and not any(name.endswith("export.json") for name in left)
        report = None if is_done else _end(to, source, target)
        kept += bool(report and report.kept)
        assert files_of(place) == files_of(whole), number
    assert partial > 5
    assert kept > 5 or is_single


@pytest.mark.slow
def test_remote_targets_and_sources(tmp_path: Path) -> None:
    save({"model": weights(), "lr": 0.1}, tmp_path / "run")
    with run_s3() as server:
        export(tmp_path / "run", server.uri("weights"), to="safetensors", max_shard_bytes=20_000)
        export(tmp_path / "run", server.uri("one"), to="safetensors")
        export(server.uri("weights"), server.uri("dir/state.pt"), to="torch")
        export(server.uri("dir/state.pt"), server.uri("stock"), to="dcp")
        convert(server.uri("stock"), server.uri("ours"))
        assert verify(server.uri("ours")).verified
        for name in ("weights", "one", "dir/state.pt", "stock"):
            assert diff(server.uri(name), server.uri("ours")).num_equal in (0, len(weights())), name
        convert(server.uri("ours"), tmp_path / "back")
        load(found := {name: torch.zeros_like(value) for name, value in weights().items()}, tmp_path / "back")
        assert all(torch.equal(found[name], value) for name, value in weights().items())


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_tasks_write_the_same_files(tmp_path: Path) -> None:
    save({"model": weights(), "lr": 0.1}, tmp_path / "run")
    for to in ("safetensors", "torch", "dcp"):
        for ray in (False, True):
            options = {} if to == "torch" else {"max_shard_bytes": 20_000}
            export(tmp_path / "run", str(tmp_path / to / str(ray)), to=to, ray=ray, **options)
    convert(tmp_path / "run", tmp_path / "ours" / "False")
    convert(tmp_path / "run", tmp_path / "ours" / "True", ray=True)
    for to in ("safetensors", "dcp", "ours"):
        assert files_of(tmp_path / to / "True") == files_of(tmp_path / to / "False")
    assert (tmp_path / "torch" / "True").read_bytes() == (tmp_path / "torch" / "False").read_bytes()


def test_a_remainder_whose_source_has_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "file.pt")
    with pytest.raises(RanksError):
        run_ranks(die_at, 1, tmp_path, "safetensors", str(tmp_path / "file.pt"), str(tmp_path / "out"), 40)
    assert list((tmp_path / "out").glob("*export.json"))
    changed = weights()
    changed["scale"] += 1
    torch.save(changed, tmp_path / "file.pt")
    with pytest.raises(CheckpointExistsError, match="what was left of another attempt"):
        export(tmp_path / "file.pt", str(tmp_path / "out"), to="safetensors", max_shard_bytes=20_000)


def test_a_finished_file_that_was_damaged_meanwhile_is_written_again(tmp_path: Path) -> None:
    save({"model": weights()}, tmp_path / "run")
    export(tmp_path / "run", str(tmp_path / "good"), to="safetensors", max_shard_bytes=20_000)
    [total] = run_ranks(die_at, 1, tmp_path, "safetensors", str(tmp_path / "run"), str(tmp_path / "counted"), None)
    with pytest.raises(RanksError):
        run_ranks(die_at, 1, tmp_path, "safetensors", str(tmp_path / "run"), str(tmp_path / "out"), total - 5)
    [first, *_] = sorted((tmp_path / "out").glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    report = export(tmp_path / "run", str(tmp_path / "out"), to="safetensors", max_shard_bytes=20_000)
    assert first.name not in report.kept
    assert report.kept
    assert files_of(tmp_path / "out") == files_of(tmp_path / "good")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_gibibyte_takes_bounded_memory(tmp_path: Path) -> None:
    """In one tensor, so that nothing but pieces of it fit."""
    save({"model": {"w": torch.zeros(1 << 14, 1 << 14)}}, tmp_path / "run")
    assert_bounded(tmp_path / "run", 1 << 30)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_gibibytes_take_bounded_memory(tmp_path: Path) -> None:
    """In tensors of 64 MiB, whose fingerprints are in the record."""
    weight = torch.randn(1 << 12, 1 << 12)
    save({"model": {f"layers.{number}.weight": weight for number in range(64)}}, tmp_path / "run", fingerprints=True)
    assert_bounded(tmp_path / "run", 4 << 30)


def assert_bounded(source: Path, num_bytes: int) -> None:
    """That all forms are written in less than 512 MiB, torch included: one process each."""
    for what in ("safetensors", "torch", "dcp", "safetensors, bf16", "import"):
        target = source.with_name("target")
        arguments = [sys.executable, "-m", "benchmarks.exporting", "--run", what, source, target]
        done = subprocess.run(arguments, cwd=REPOSITORY, check=True, capture_output=True, text=True, timeout=600)
        assert json.loads(done.stdout)["memory_mib"] < 512, what
        files = [target] if target.is_file() else list(target.iterdir())
        assert sum(file.stat().st_size for file in files) > num_bytes * (0.49 if "bf16" in what else 1), what
        for file in files:
            file.unlink()
        if target.exists():
            target.rmdir()
