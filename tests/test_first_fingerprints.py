"""Records of earlier versions have fingerprints by the first formula: everything that compares by them still does.

`data/first-fingerprints` was saved by a version that knew no other.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ray_ckpt import CompareReport, Manifest, TrainState, compare, convert, diff, export, load, save, verify
from ray_ckpt.errors import FormatError, StateMismatchError
from ray_ckpt.format.fingerprint import CURRENT, FIRST, formula_of
from ray_ckpt.format.fingerprinting import fingerprint_by
from ray_ckpt.storage.checkpoint_reader import CheckpointReader
from tests.support.ranks import run_ranks
from tests.support.trainable import adapted, trained

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SAVED = Path(__file__).parent / "data" / "first-fingerprints"


def state_of(saved: Path = SAVED) -> dict[str, torch.Tensor]:
    entries = CheckpointReader(saved).read_manifest().tensors
    state = {name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype)) for name, entry in entries.items()}
    load(state, saved)
    return state


def rewritten(at: Path, fingerprints: dict[str, str]) -> None:
    """Give a record other fingerprints."""
    record = at / "manifest.json"
    manifest = dataclasses.replace(Manifest.from_json(record.read_bytes()), fingerprints=fingerprints)
    record.write_bytes(manifest.to_bytes())


def test_an_old_record_loads_and_its_fingerprints_are_what_they_were() -> None:
    state, recorded = state_of(), CheckpointReader(SAVED).read_manifest().fingerprints
    assert {formula_of(digest) for digest in recorded.values()} == {FIRST}
    assert recorded == {name: fingerprint_by(FIRST, value).digest for name, value in state.items()}
    assert not verify(SAVED).damages


def test_old_and_new_fingerprints_stand_apart_in_a_record(tmp_path: Path) -> None:
    """What knows the first formula alone must not compare by it what is summed up by another."""
    old, new = CheckpointReader(SAVED).read_manifest().fingerprints, fingerprint_by(CURRENT, torch.ones(3)).digest
    save({"float32": torch.ones(3), "bool": torch.ones(2)}, tmp_path)
    rewritten(tmp_path, {"float32": new, "bool": old["bool"]})
    text = (tmp_path / "manifest.json").read_text()
    assert f'"fingerprints":{{"bool":"{old["bool"]}"}}' in text
    assert f'"fingerprints_2":{{"float32":"{new}"}}' in text
    assert Manifest.from_json(text).fingerprints == {"float32": new, "bool": old["bool"]}


@pytest.mark.parametrize("to", ["safetensors", "torch", "dcp"])
def test_an_old_record_is_exported_with_its_proof(to: str, tmp_path: Path) -> None:
    state = {name: value for name, value in state_of().items() if to != "safetensors" or not value.is_complex()}
    save(state, tmp_path / "run")
    digests = {name: fingerprint_by(FIRST, value).digest for name, value in state.items()}
    rewritten(tmp_path / "run", digests)
    export(tmp_path / "run", tmp_path / "out" / "x", to=to)
    rewritten(tmp_path / "run", {**digests, "bool": fingerprint_by(FIRST, ~state["bool"]).digest})
    with pytest.raises(FormatError, match="'bool' differs from the fingerprint in the source's record"):
        export(tmp_path / "run", tmp_path / "bad" / "x", to=to)


def test_a_copy_keeps_old_fingerprints(tmp_path: Path) -> None:
    convert(SAVED, tmp_path / "copy")
    copied = CheckpointReader(tmp_path / "copy").read_manifest().fingerprints
    assert copied == CheckpointReader(SAVED).read_manifest().fingerprints


def test_diff_reads_what_was_summed_up_by_another_formula(tmp_path: Path) -> None:
    state = state_of()
    save(state, tmp_path / "new", fingerprints=True)
    state["bool"][3] ^= True
    save(state, tmp_path / "changed", fingerprints=True)
    report = diff(SAVED, tmp_path / "new")
    assert (report.equal, report.num_by_fingerprint) == (True, 0)
    assert report.bytes_read > 0
    assert [each.name for each in diff(SAVED, tmp_path / "changed").tensors] == ["bool"]
    assert diff(SAVED, SAVED).num_by_fingerprint == len(state)


def compare_columns(rank: int, change: bool) -> CompareReport:
    state: dict[str, Any] = state_of()
    if change:
        state["float32"][3, 11] += 1
    state["float32"] = distribute_tensor(state["float32"], init_device_mesh("cpu", (2,)), [Shard(1)])
    return compare(state, str(SAVED))


def test_columns_are_compared_with_an_old_record(tmp_path: Path) -> None:
    for change in (False, True):
        for report in run_ranks(compare_columns, 2, tmp_path, change):
            assert report.equal == (not change)
            assert report.unknown == ()
            assert dict(report.differing) == ({"float32": "other elements"} if change else {})


def test_the_base_of_adapters_is_compared_with_an_old_record(tmp_path: Path) -> None:
    model, optimizer = trained(adapted(0))
    state = TrainState(model, optimizer, step=3, trainable_only=True)
    save(state, tmp_path)
    old = {name: fingerprint_by(FIRST, value).digest for name, value in state.frozen().items()}
    assert old
    rewritten(tmp_path, old)
    again = adapted(0)
    target = TrainState(again, torch.optim.AdamW(again.parameters()), step=0, trainable_only=True)
    assert load(target, tmp_path).base == f"{len(old)} frozen tensors are those of the save"
    name = next(iter(old))
    rewritten(tmp_path, {**old, name: fingerprint_by(FIRST, state.frozen()[name] + 1).digest})
    with pytest.raises(StateMismatchError, match=name.removeprefix("model.").replace(".", r"\.")):
        load(target, tmp_path)
