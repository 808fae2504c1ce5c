"""verify: every damaged byte of a checkpoint is found and named, and what cannot be known is not claimed."""

from __future__ import annotations

import json
import re
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import ray_ckpt
from ray_ckpt.errors import CheckpointError, CheckpointNotFoundError, FormatError, StorageError
from ray_ckpt.format import canonical
from ray_ckpt.format.manifest import MANIFEST_NAME, Manifest
from ray_ckpt.report import NonFinite, VerifyReport
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.placed import STRETCH_BYTES
from ray_ckpt.storage.places import Counting, Places
from ray_ckpt.storage.store import CheckpointStore
from ray_ckpt.storage.stretches import PIECE_BYTES
from tests.support import faulty, hostile
from tests.support.faulty import Fault, FaultyStorage
from tests.support.ranks import run_ranks
from tests.support.records import edit_record, sealed
from tests.support.s3 import run_s3

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state() -> dict[str, Any]:
    return {
        "weight": torch.arange(1500.0).reshape(50, 30),
        "bias": torch.ones(5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "lr": 0.1,
        "betas": (0.9, 0.999),
        "same_lr": 0.1,
        "object": [torch.float16, "text"],  # only `torch.save` can write it
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    ray_ckpt.save(state(), path)
    return path


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def manifest_of(run: Path) -> Manifest:
    return Manifest.from_json((run / MANIFEST_NAME).read_bytes())


def flip(path: Path, *positions: int) -> None:
    data = bytearray(path.read_bytes())
    for position in positions:
        data[position] ^= 0x40
    path.write_bytes(data)


def owners(manifest: Manifest, position: int) -> set[str]:
    """Names of what lies at a position of the only file."""
    extents = {name: entry for name, tensor in manifest.tensors.items() for entry in tensor.chunks}
    found = {name for name, chunk in extents.items() if chunk.start <= position < chunk.start + chunk.length}
    return found | {
        name for name, entry in manifest.objects.items() if entry.start <= position < entry.start + entry.length
    }


def test_a_whole_checkpoint_is_verified_to_the_last_byte(whole: Path) -> None:
    report = ray_ckpt.verify(whole)
    assert report.verified
    assert (report.damages, report.unchecked, report.damaged) == ((), (), ())
    assert (report.num_files, report.num_tensors, report.num_objects) == (1, 4, 4)
    assert report.total_bytes == sum(path.stat().st_size for path in whole.glob("*.distcp"))
    assert report.uri == str(whole)
    assert str(report).startswith(f"verified: 4 tensors and 4 objects in 1 files of {whole}, ")


def test_a_flipped_bit_is_found_wherever_it_is(run: Path) -> None:
    """In elements, objects, containers and padding alike, and everything that lives there is named."""
    [path] = run.glob("*.distcp")
    manifest, data = manifest_of(run), path.read_bytes()
    positions = {*range(0, len(data), 61), len(data) - 1}
    for chunk in (chunk for tensor in manifest.tensors.values() for chunk in tensor.chunks):
        assert chunk.data_start is not None
        positions |= {chunk.start, chunk.data_start - 1, chunk.start + chunk.length - 1}
        positions |= {min(chunk.data_start, len(data) - 1), min(chunk.start + chunk.length, len(data) - 1)}
    with_owner = 0
    for position in sorted(positions):
        flip(path, position)
        report = ray_ckpt.verify(run)
        assert not report.verified, position
        assert set(report.damaged) == owners(manifest, position), position
        assert all(damage.start <= position < damage.end for damage in report.damages)
        with_owner += bool(report.damaged)
        path.write_bytes(data)
    assert with_owner > 50
    assert with_owner < len(positions), "some of it was padding"
    assert ray_ckpt.verify(run).verified


def test_everything_that_is_damaged_is_named_and_not_just_the_first(tmp_path: Path) -> None:
    large = torch.arange(3_000_000.0)
    ray_ckpt.save({"large": large, "small": torch.ones(3), "other": torch.zeros(9), "lr": 0.5}, tmp_path)
    manifest = manifest_of(tmp_path)
    [chunk], [small] = manifest.tensors["large"].chunks, manifest.tensors["small"].chunks
    assert chunk.checksums is not None
    assert chunk.data_start is not None
    assert small.data_start is not None
    block = chunk.checksums.block_bytes
    flip(tmp_path / chunk.file, *(chunk.data_start + block * k + 5 for k in (0, 7, 8, 200)), small.data_start)
    report = ray_ckpt.verify(tmp_path)
    assert report.damaged == ("large", "small")
    of_large = [damage for damage in report.damages if damage.name == "large"]
    assert [(d.start - chunk.data_start, d.end - chunk.data_start) for d in of_large] == [
        (0, block),
        (7 * block, 9 * block),
        (200 * block, 201 * block),
    ]
    assert re.search(r"DAMAGED: 2 of 3 tensors .*'large': elements differ: checksum [0-9a-f]{16}, saved", str(report))


def test_missing_short_and_long_files_are_named_with_what_is_lost(tmp_path: Path) -> None:
    for rank_files in ("missing", "short", "long"):
        ray_ckpt.save({f"{rank_files}.{n}": torch.full((500,), float(n)) for n in range(3)}, tmp_path / rank_files)
    [missing] = (tmp_path / "missing").glob("*.distcp")
    missing.unlink()
    report = ray_ckpt.verify(tmp_path / "missing")
    assert report.damaged == ("missing.0", "missing.1", "missing.2")
    assert {damage.problem for damage in report.damages} == {"the file is missing"}
    [short] = (tmp_path / "short").glob("*.distcp")
    [last] = manifest_of(tmp_path / "short").tensors["short.2"].chunks
    with short.open("r+b") as file:
        file.truncate(last.start + 700)
    report = ray_ckpt.verify(tmp_path / "short")
    assert report.damaged == ("short.2",)
    assert report.damages[0].name == ""
    assert f"the file has {last.start + 700} bytes, saved with" in report.damages[0].problem
    [long] = (tmp_path / "long").glob("*.distcp")
    with long.open("ab") as file:
        file.write(b"x")
    [damage] = ray_ckpt.verify(tmp_path / "long").damages
    assert damage.file == long.name


def test_a_value_that_was_changed_in_the_manifest_is_found(run: Path) -> None:
    text = (run / MANIFEST_NAME).read_text()
    assert text.count('"value":0.1,') == 2
    (run / MANIFEST_NAME).write_text(sealed(json.loads(text.replace('"value":0.1,', '"value":0.2,', 1))))
    report = ray_ckpt.verify(run)
    assert report.damaged == ("lr",)
    assert report.damages[0].problem == "the value in manifest.json differs from the one in the file"
    data = json.loads(text)
    assert "blob" in data["objects"]["object"]
    data["objects"]["object"]["blob"] = data["objects"]["object"]["blob"][:-8] + "AAAAAAA="
    (run / MANIFEST_NAME).write_text(sealed(data))
    assert ray_ckpt.verify(run).damaged == ("object",)


@pytest.mark.parametrize("how", ["gone", "cut", "of another checkpoint"])
def test_what_stock_dcp_reads_is_verified_too(run: Path, tmp_path: Path, how: str) -> None:
    record = run / ".metadata"
    if how == "gone":
        record.unlink()
    elif how == "cut":
        record.write_bytes(record.read_bytes()[:-20])
    else:
        ray_ckpt.save(state(), tmp_path / "another")
        shutil.copy(tmp_path / "another" / ".metadata", record)
    [damage] = ray_ckpt.verify(run).damages
    assert damage.file == ".metadata"
    assert "stock DCP" in damage.problem


def test_a_manifest_that_is_damaged_is_an_error(run: Path) -> None:
    (run / MANIFEST_NAME).write_text("{")
    with pytest.raises(FormatError):
        ray_ckpt.verify(run)


def test_what_stock_dcp_wrote_is_read_but_not_called_verified(tmp_path: Path) -> None:
    dcp.save({"w": torch.arange(1000.0), "lr": 0.1}, storage_writer=dcp.FileSystemWriter(str(tmp_path)), no_dist=True)
    report = ray_ckpt.verify(tmp_path)
    assert not report.verified
    assert (report.damages, report.unchecked) == ((), ("lr", "w"))
    assert report.total_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.distcp"))
    assert str(report).startswith("read, but not verified: 1 tensors and 1 objects")
    [path] = tmp_path.glob("*.distcp")
    path.write_bytes(path.read_bytes()[:-1])
    assert ray_ckpt.verify(tmp_path).damages


def test_verify_takes_a_step_a_store_or_a_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint"):
        ray_ckpt.verify(tmp_path)
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        ray_ckpt.save({"w": torch.full((9,), float(step))}, store, step=step)
    [path] = (tmp_path / "step-1").glob("*.distcp")
    [chunk] = manifest_of(tmp_path / "step-1").tensors["w"].chunks
    flip(path, chunk.data_start or 0)
    assert ray_ckpt.verify(store).verified
    assert ray_ckpt.verify(str(tmp_path), 1).damaged == ("w",)
    with pytest.raises(CheckpointNotFoundError):
        ray_ckpt.verify(store, 3)


class Vanishing(Storage):
    """Another process deletes the checkpoint when its first file is opened."""

    def perform(self, operation: str, name: str, action: Any) -> Any:
        if operation == "open" and name.endswith(".distcp"):
            shutil.rmtree(self.uri, ignore_errors=True)
        return super().perform(operation, name, action)


def test_a_checkpoint_that_is_deleted_meanwhile_is_not_called_damaged(run: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="was deleted while it was verified"):
        ray_ckpt.verify(Vanishing(run))


def test_what_the_disk_refuses_is_damage_and_a_storage_that_does_not_answer_is_an_error(run: Path) -> None:
    broken = FaultyStorage(str(run), Fault("raises", ("read",), 0, name=".distcp"), 0)
    report = ray_ckpt.verify(broken)
    assert set(report.damaged) >= set(state()) - {"empty"}
    assert "cannot be read: PermissionError" in report.damages[0].problem
    silent = FaultyStorage(str(run), Fault("throttled", ("read",), 0, name=".distcp"), 0)
    assert ray_ckpt.verify(silent).verified
    silent.left = 10**9
    with pytest.raises(StorageError, match="SLOW_DOWN"):
        ray_ckpt.verify(silent)


def test_memory_stays_bounded(tmp_path: Path) -> None:
    ray_ckpt.save({str(n): torch.full((4 << 20,), float(n)) for n in range(6)}, tmp_path)  # 6 x 16 MiB
    tracemalloc.start()
    report = ray_ckpt.verify(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.verified
    assert report.total_bytes > 96 << 20
    assert peak < 4 * PIECE_BYTES + (8 << 20)


def verify_together(rank: int, directory: str) -> list[Any]:
    root = Path(directory)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(90_000.0).reshape(300, 300)
    ray_ckpt.save({"w": distribute_tensor(whole, mesh, [Shard(0)]), f"own{rank}": torch.ones(9)}, root / "run")
    reports = [ray_ckpt.verify(root / "run")]
    if rank == 0:
        for path in (root / "run").glob("*.distcp"):
            [chunk] = [c for c in manifest_of(root / "run").tensors["w"].chunks if c.file == path.name]
            flip(path, (chunk.data_start or 0) + 100)
    dist.barrier()
    reports.append(ray_ckpt.verify(root / "run"))
    faulty.here = rank
    silent = faulty.TravellingStorage(str(root / "run"), Fault("throttled", ("read",), 1, name=".distcp"))
    silent.left = 10**9
    with pytest.raises(CheckpointError) as caught:
        ray_ckpt.verify(silent)
    return [*reports, str(caught.value)]


def test_ranks_share_the_files_and_all_get_the_whole_report(tmp_path: Path) -> None:
    by_rank = run_ranks(verify_together, 3, tmp_path, str(tmp_path))
    good, bad, error = by_rank[0]
    assert by_rank == [[good, bad, error]] * 3
    assert isinstance(good, VerifyReport)
    assert good.verified
    assert good.total_bytes == sum(path.stat().st_size for path in (tmp_path / "run").glob("*.distcp"))
    assert {damage.file for damage in bad.damages} == {path.name for path in (tmp_path / "run").glob("*.distcp")}
    assert bad.damaged == ("w",)
    assert re.match(r"verify failed on rank 1: StorageError: cannot read .*SLOW_DOWN", error)


def scan_together(rank: int, directory: str) -> VerifyReport:
    """Rows of which the first rank has more than the last."""
    whole = torch.arange(70.0).reshape(7, 10)
    whole[2, 9], whole[5, 0] = float("nan"), float("inf")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ray_ckpt.save({"w": distribute_tensor(whole, mesh, [Shard(0)])}, directory)
    return ray_ckpt.verify(directory, scan_nan=True)


def test_nan_is_found_in_every_chunk_of_a_tensor(tmp_path: Path) -> None:
    """Chunks that begin at the same byte of their files, and differ in length."""
    for report in run_ranks(scan_together, 3, tmp_path, str(tmp_path / "run")):
        assert report.verified
        assert report.nonfinite == {"w": NonFinite(1, 1)}


@pytest.mark.parametrize("cut_bytes", [0, 700, 3000])
def test_tensors_in_columns_are_read_as_entries_are(run: Path, cut_bytes: int) -> None:
    """All bytes of a file, once, with the same checksums; also of a file that is too short."""
    text = (run / MANIFEST_NAME).read_bytes()
    for path in run.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size - cut_bytes])
    found = []
    for large_bytes in (0, canonical.LARGE_BYTES):
        parts = canonical.read(text, large_bytes)
        assert parts is not None
        manifest = Manifest(parts["tensors"], parts["objects"], parts["files"], parts["attempt"])
        places = Places(manifest, Storage(str(run)).sizes(manifest.files), Counting(is_asked=True))
        pieces = [piece for file in manifest.files for piece in places.pieces(file)]
        spans = [list(places.stretch(piece).spans) for piece in pieces]
        assert sum(piece.num_bytes for piece in pieces) == sum(s.end - s.start for of_piece in spans for s in of_piece)
        found.append((pieces, spans, [list(places.spans(file)) for file in manifest.files]))
    assert found[0] == found[1]
    assert len(found[0][1][0]) > 10 - cut_bytes // 500


def test_a_long_tensor_is_cut_between_its_blocks(tmp_path: Path) -> None:
    long = torch.arange(20 << 20, dtype=torch.int32)
    ray_ckpt.save({"a": torch.ones(10), "long": long, "z": torch.ones(9)}, tmp_path)
    manifest = manifest_of(tmp_path)
    places = Places(manifest, manifest.files, Counting(is_asked=False))
    [file] = manifest.files
    pieces = list(places.pieces(file))
    assert [piece.end for piece in pieces[:-1]] == [piece.start for piece in pieces[1:]]
    assert (pieces[0].start, pieces[-1].end) == (0, manifest.files[file])
    assert all(piece.num_bytes <= STRETCH_BYTES for piece in pieces)
    read = [span for piece in pieces for span in places.stretch(piece).spans]
    assert [span.end for span in read[:-1]] == [span.start for span in read[1:]]
    [chunk] = manifest.tensors["long"].chunks
    elements = [span.sums for span in read if span.names == ("long",) and span.what == "elements"]
    assert len(elements) > 2
    assert b"".join(sums.sums for sums in elements if sums) == (chunk.checksums and chunk.checksums.sums)
    flip(tmp_path / file, 70 << 20)
    [damage] = ray_ckpt.verify(tmp_path).damages
    assert damage.name == "long"
    assert damage.start <= 70 << 20 < damage.end <= damage.start + (1 << 20)


def test_on_s3_everything_is_read_once(tmp_path: Path) -> None:
    with run_s3() as s3:
        storage = Storage(s3.uri("run"))
        ray_ckpt.save({"w": torch.arange(300_000.0), "lr": 0.1}, storage)
        s3.reset()
        report = ray_ckpt.verify(storage)
        assert report.verified
        assert s3.sent_bytes < 1.1 * report.total_bytes + 20_000


def test_what_lies_over_something_else_is_damaged_and_read_once(tmp_path: Path) -> None:
    ray_ckpt.save({"lr": 0.5, "w": torch.ones(1000)}, tmp_path / "run")

    def lay_over(record: dict[str, Any]) -> None:
        other = dict(record["objects"]["lr"], start=record["objects"]["lr"]["start"] + 1, path=["other"])
        record["objects"]["other"] = other

    edit_record(tmp_path / "run", lay_over)
    damages = ray_ckpt.verify(tmp_path / "run").damages
    assert ("other", "lies over what is before it in the file") in {(d.name, d.problem) for d in damages}


def test_containers_of_a_stock_checkpoint_that_lie_over_each_other_are_read_once(tmp_path: Path) -> None:
    """Twenty thousand of a megabyte each, in a file of one."""
    hostile.KNOWN["objects over each other"](tmp_path)
    report = ray_ckpt.verify(tmp_path)
    assert report.total_bytes < 2 << 20
    assert sum("lies over" in damage.problem for damage in report.damages) == 20_000 - 40
