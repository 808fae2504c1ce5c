"""The reshard job: its plan, its files, its memory, and the whole of it on a real Ray."""

from __future__ import annotations

import contextlib
import io
import math
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file

from ray_ckpt.cluster import tasks
from ray_ckpt.cluster.tasks import run_tasks
from ray_ckpt.dcp.reader import ArrowStorageReader
from ray_ckpt.dcp.writer import ArrowStorageWriter
from ray_ckpt.errors import DIED, CheckpointExistsError, GroupTimeoutError, IntegrityError, UsageError, WorkerError
from ray_ckpt.format.boxes import Box, check_cover
from ray_ckpt.format.fingerprinting import fingerprint
from ray_ckpt.format.manifest import MANIFEST_NAME, Chunk, Manifest, TensorEntry
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.parallel.partition import partition
from ray_ckpt.progress import Meter
from ray_ckpt.recipes.reshard import job
from ray_ckpt.recipes.screen import Screen
from ray_ckpt.storage import rewrite as rewriting
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.rewrite import WantedTensor, rewrite
from tests.conftest import REPOSITORY
from tests.support import driver, task_functions
from tests.support.clusters import wait_until
from tests.support.ranks import run_ranks
from tests.support.s3 import run_s3

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

SIZES = (37, 61, 113)


def _state() -> dict[str, Any]:
    """A model with Adam's state and hyper-parameters, in sizes that divide by nothing."""
    generator = torch.Generator().manual_seed(3)
    model, optim = {}, {}
    for rows, columns in zip(SIZES, (*SIZES[1:], SIZES[0]), strict=True):
        for name, shape in ((f"layer{rows}.weight", (rows, columns)), (f"layer{rows}.bias", (rows,))):
            model[name] = torch.randn(shape, generator=generator)
            optim[f"state.{name}.exp_avg"] = torch.randn(shape, generator=generator)
            optim[f"state.{name}.step"] = torch.tensor(float(rows))
            optim[f"param_groups.{name}.lr"] = rows / 1000
            optim[f"param_groups.{name}.betas"] = (0.9, 0.99)
    model["half"] = torch.randn(5, 3, 2, generator=generator).to(torch.bfloat16)
    model["empty"] = torch.empty(0, 4)
    return {"model": model, "optim": optim, "size": torch.Size([2, 3]), "step": 7}


def _blank() -> dict[str, Any]:
    state = _state()
    return {
        part: {name: torch.ones_like(value) if isinstance(value, torch.Tensor) else None for name, value in of.items()}
        if isinstance(of, dict)
        else None
        for part, of in state.items()
    }


def _differing(found: dict[str, Any]) -> list[str]:
    def flat(state: dict[str, Any]) -> dict[str, Any]:
        names = {f"{part}.{name}": value for part in ("model", "optim") for name, value in state[part].items()}
        return {**names, "size": state["size"], "step": state["step"]}

    expected, values = flat(_state()), flat(found)
    return [
        name
        for name, value in expected.items()
        if not (torch.equal(value, values[name]) if isinstance(value, torch.Tensor) else value == values[name])
    ]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    fingerprints = {f"model.{name}": fingerprint(value).digest for name, value in _state()["model"].items()}
    writer = ArrowStorageWriter(tmp_path / "source", layout="single", fingerprints=fingerprints)
    driver.save([_state()], [writer])
    return tmp_path / "source"


# ------------------------------------------------------------------------------------------------------ the plan


def _manifest(shapes: dict[str, tuple[int, ...]], cuts: dict[str, list[Box]] | None = None) -> Manifest:
    tensors = {}
    for name, shape in shapes.items():
        boxes = (cuts or {}).get(name) or [Box.whole(shape)]
        chunks = tuple(Chunk(box, "f", 0, 1 << 40, None) for box in boxes)
        tensors[name] = TensorEntry("float32", shape, chunks)
    return Manifest(tensors, {}, {"f": 1 << 40})


layouts = st.sampled_from(
    ["single", "fsdp2x2", "fsdp1x3", "hsdp2x2", "ddp2", "tp4", "fsdp2x2.tp2", "pp2.fsdp2x2.tp2", "pp3x2", "tp3.ep2"]
)


@given(layouts, st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=6))
def test_every_element_goes_to_exactly_one_rank(text: str, shapes: list[list[int]]) -> None:
    manifest = _manifest({f"t{number}": tuple(shape) for number, shape in enumerate(shapes)})
    layout = Layout.parse(text)
    parts = partition(manifest, layout)
    assert all(0 <= rank < layout.world_size for rank in parts)
    for name, tensor in manifest.tensors.items():
        boxes = [boxes[name] for boxes in parts.values() if name in boxes]
        assert boxes, name
        assert check_cover(tensor.shape, boxes) is None


def test_rows_are_cut_as_torch_cuts_them() -> None:
    parts = partition(_manifest({"w": (37, 4)}), Layout.parse("fsdp2x4"))
    rows = [(boxes["w"].offsets[0], boxes["w"].sizes[0]) for boxes in parts.values()]
    assert [size for _, size in rows] == [len(chunk) for chunk in torch.empty(37).chunk(4)]


def test_tensor_parallel_cuts_inside_of_data_parallel_rows() -> None:
    """FSDP2 over TP along rows shards the TP shard: rank (shard 1, tp 0) has the second half of the first half."""
    parts = partition(_manifest({"w": (8, 4)}), Layout.parse("fsdp2x2.tp2"))
    layout = Layout.parse("fsdp2x2.tp2")
    assert parts[layout.rank({"dp_shard": 1, "tp": 0})]["w"] == Box((2, 0), (2, 4))
    assert parts[layout.rank({"dp_shard": 0, "tp": 1})]["w"] == Box((4, 0), (2, 4))


def test_the_dim_that_the_source_was_cut_along_is_kept() -> None:
    columns = [Box((0, 0), (8, 2)), Box((0, 2), (8, 2))]
    parts = partition(_manifest({"w": (8, 4)}, {"w": columns}), Layout.parse("fsdp2x2.tp2"))
    assert sorted(boxes["w"] for boxes in parts.values()) == sorted(
        Box((row, column), (4, 2)) for row in (0, 4) for column in (0, 2)
    )


def test_stages_are_contiguous_and_balanced_and_keep_a_parameters_state_with_it() -> None:
    shapes: dict[str, tuple[int, ...]] = {f"model.layer{n}.weight": (10, 10) for n in range(8)}
    shapes |= {f"optim.state.layer{n}.weight.exp_avg": (10, 10) for n in range(8)}
    parts = partition(_manifest(shapes), Layout.parse("pp4"))
    assert [sorted(boxes) for boxes in parts.values()] == [
        sorted(
            name
            for n in (2 * stage, 2 * stage + 1)
            for name in (f"model.layer{n}.weight", f"optim.state.layer{n}.weight.exp_avg")
        )
        for stage in range(4)
    ]
    interleaved = partition(_manifest(shapes), Layout.parse("pp2x2"))
    assert {name for name in interleaved[0] if name.startswith("model")} == {
        f"model.layer{n}.weight" for n in (0, 1, 4, 5)
    }


# ------------------------------------------------------------------------------------------------------ one file


def _copy(rank: int, source: str, target: str) -> tuple[int, int]:
    """Copy the one tensor of a checkpoint. Returns its bytes, and by how many the memory in use has grown at most."""
    manifest = ArrowStorageReader(source).read_manifest()
    [(name, entry)] = manifest.tensors.items()
    wanted = WantedTensor(name, entry.dtype, Box.whole(entry.shape), entry.chunks)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rewrite(Storage(source), Storage(target), "copy", {}, {0: wanted})
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return entry.num_bytes, grown


@pytest.mark.parametrize("writer", [ArrowStorageWriter, pytest.param(dcp.FileSystemWriter, marks=pytest.mark.slow)])
def test_memory_is_bounded_whatever_the_size_of_a_tensor(tmp_path: Path, writer: Any) -> None:
    weight = torch.arange(40_000_000.0).reshape(8000, 5000)
    dcp.save({"weight": weight}, storage_writer=writer(str(tmp_path / "source")))
    [(num_bytes, grown)] = run_ranks(_copy, 1, tmp_path, str(tmp_path / "source"), str(tmp_path / "target"))
    assert num_bytes == 160_000_000
    assert grown < 64 << 20
    copied = torch.load(tmp_path / "target" / "copy", weights_only=True, mmap=True)
    assert torch.equal(copied, weight)


def test_pieces_smaller_than_a_row_and_columns_come_out_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewriting, "BATCH_BYTES", 400)
    weight = torch.randn(9, 11, 13)
    save_file({"weight": weight}, tmp_path / "x.safetensors")
    [entry] = ArrowStorageReader(tmp_path / "x.safetensors").read_manifest().tensors.values()
    box = Box((2, 1, 3), (6, 10, 9))
    wanted = {0: WantedTensor("weight", "float32", box, entry.chunks)}
    rewrite(Storage(tmp_path), Storage(tmp_path), "copy", {}, wanted)
    assert torch.equal(torch.load(tmp_path / "copy", weights_only=True), weight[2:8, 1:11, 3:12])


def test_a_damaged_byte_of_the_source_is_found(saved: Path, tmp_path: Path) -> None:
    entry = ArrowStorageReader(saved).read_manifest().tensors["model.layer61.weight"]
    [chunk] = entry.chunks
    _damage(saved / chunk.file, chunk.data_start)
    wanted = {0: WantedTensor("model.layer61.weight", entry.dtype, Box.whole(entry.shape), entry.chunks)}
    with pytest.raises(IntegrityError, match=r"layer61\.weight"):
        rewrite(Storage(saved), Storage(tmp_path), "copy", {}, wanted)


def _damage(path: Path, position: int | None) -> None:
    content = bytearray(path.read_bytes())
    content[position or 0] ^= 1
    path.write_bytes(content)


# ------------------------------------------------------------------------------------------------------ the job

SCREEN = Screen(Console(file=io.StringIO()))


def _reshard(source: Path | str, to: str, target: Path | str, *, overwrite: bool = False) -> Manifest:
    """The job in this process, on this module's Ray, whose workers it shares with the other tests."""
    with contextlib.ExitStack() as holds:
        prepared = job.prepare(job.Options(str(source), to, str(target), overwrite), SCREEN, holds)
        job.rewrite(prepared, 60, SCREEN)
        job.commit(prepared, SCREEN)
    return ArrowStorageReader(target).read_manifest()


def _run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "jobs/reshard.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=REPOSITORY,
        check=False,
    )


@pytest.mark.jobs
@pytest.mark.usefixtures("local_ray")
def test_a_rewritten_checkpoint_is_the_same_for_everybody(saved: Path, tmp_path: Path) -> None:
    """The command, as a process of its own."""
    target, address = tmp_path / "target", ray.get_runtime_context().gcs_address
    done = _run_script("--address", address, "--source", saved, "--to", "fsdp2x2.tp2", "--target", target)
    assert done.returncode == 0, done.stderr
    assert "rewrite: 4 ranks written" in done.stdout
    source, manifest = (ArrowStorageReader(place).read_manifest() for place in (saved, target))
    assert manifest.layout == "fsdp2x2.tp2"
    assert manifest.fingerprints == source.fingerprints
    assert manifest.fingerprints
    assert manifest.values() == source.values()
    assert {name: entry.path for name, entry in manifest.tensors.items()} == {
        name: entry.path for name, entry in source.tensors.items()
    }
    assert all(chunk.checksums is not None for entry in manifest.tensors.values() for chunk in entry.chunks)
    parts = partition(source, Layout.parse("fsdp2x2.tp2"))
    for rank, boxes in parts.items():
        files = {
            chunk.file for name, box in boxes.items() for chunk in manifest.tensors[name].chunks if chunk.box == box
        }
        assert [file.split("_")[2] for file in files] == [str(rank)], "a rank's parts lie in one file of its own"
    assert len(manifest.files) == len(parts) == 4
    assert len(_differing(_blank())) > 30
    assert _differing(driver.load(_blank(), ArrowStorageReader(target))) == []
    found = _blank()
    dcp.load(found, storage_reader=dcp.FileSystemReader(target))
    assert _differing(found) == []


@pytest.mark.usefixtures("local_ray")
def test_overwrite_replaces_what_is_there(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    driver.save([{"other": torch.ones(3)}], [ArrowStorageWriter(target)])
    with pytest.raises(CheckpointExistsError):
        _reshard(saved, "tp2", target)
    manifest = _reshard(saved, "tp2", target, overwrite=True)
    assert _differing(driver.load(_blank(), ArrowStorageReader(target))) == []
    assert {path.name for path in target.glob("*.distcp")} == set(manifest.files)


@pytest.mark.usefixtures("local_ray")
def test_a_failing_task_is_named_and_nothing_is_left(saved: Path, tmp_path: Path) -> None:
    chunk = ArrowStorageReader(saved).read_manifest().tensors["model.layer113.weight"].chunks[0]
    _damage(saved / chunk.file, (chunk.data_start or 0) + math.prod(chunk.box.sizes) * 4 - 4)
    with pytest.raises(WorkerError, match=r"rank 2 on .*layer113\.weight.*damaged") as raised:
        _reshard(saved, "fsdp2x3", tmp_path / "target")
    assert raised.value.ranks == (2,)
    assert list((tmp_path / "target").glob("*")) == []


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_foreign_source_becomes_a_checkpoint_of_ours(tmp_path: Path) -> None:
    state = _state()
    torch.save({"model": state["model"], "lr": 0.25}, tmp_path / "model.pt")
    manifest = _reshard(tmp_path / "model.pt", "pp2.fsdp2x2", tmp_path / "target")
    found = driver.load({"model": _blank()["model"], "lr": None}, ArrowStorageReader(tmp_path / "target"))
    assert found["lr"] == 0.25
    assert all(torch.equal(found["model"][name], value) for name, value in state["model"].items())
    assert manifest.values() == {"lr": 0.25}
    assert len(manifest.files) == 4


@pytest.mark.usefixtures("local_ray")
def test_from_s3_to_s3() -> None:
    with run_s3() as s3:
        source, target = s3.uri("source"), s3.uri("target")
        driver.save([_state()], [ArrowStorageWriter(source)])
        manifest = _reshard(source, "fsdp2x3", target)
        assert len(manifest.files) == 3
        assert _differing(driver.load(_blank(), ArrowStorageReader(target))) == []


@pytest.mark.usefixtures("local_ray")
def test_a_target_that_tasks_do_not_share_is_refused(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One name, and another directory in every process: what each one's working directory is."""
    here = Path("/proc/self/cwd", tmp_path.name)
    there = Path(run_tasks(task_functions.working_directory, {0: ()}, timeout_s=60)[0], tmp_path.name)
    monkeypatch.chdir(tmp_path)
    try:
        with pytest.raises(UsageError, match=r"--target .* is not shared: the file that the task of rank 0 wrote"):
            _reshard(saved, "tp2", here)
        assert not here.exists()
        assert len(list(there.glob("*.distcp"))) == 2, "the tasks did write, but not here"
    finally:
        shutil.rmtree(there)


def test_the_source_may_be_a_store_of_steps(saved: Path, tmp_path: Path) -> None:
    saved.rename(tmp_path / "step-3")
    with contextlib.ExitStack() as holds:
        prepared = job.prepare(job.Options(str(tmp_path), "tp2", str(tmp_path / "target")), SCREEN, holds)
        assert prepared.source.address == str(tmp_path / "step-3")
        assert list(prepared.files) == [0, 1]


def test_wrong_use_is_one_line_and_touches_nothing(saved: Path, tmp_path: Path) -> None:
    driver.save([{"other": torch.ones(3)}], [ArrowStorageWriter(tmp_path / "taken")])
    before = (tmp_path / "taken" / MANIFEST_NAME).read_bytes()
    done = _run_script("--source", saved, "--to", "tp2", "--target", tmp_path / "taken")
    assert done.returncode == 2
    assert "already holds a committed checkpoint" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "taken" / MANIFEST_NAME).read_bytes() == before
    with contextlib.ExitStack() as holds, pytest.raises(UsageError, match="fsdp7"):
        job.prepare(job.Options(str(saved), "fsdp7", str(tmp_path / "t")), SCREEN, holds)


# ------------------------------------------------------------------------------------------------------ its tasks


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.usefixtures("local_ray")
class TestTasks:
    """run_tasks: values by number, every failure named, nothing left running."""

    def test_values_come_back_by_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tasks, "SUBMITTED_AT_ONCE", 2)
        done: dict[int, int] = {}
        values = run_tasks(
            "tests.support.task_functions:square", {n: (n,) for n in range(7)}, timeout_s=60, on_done=done.__setitem__
        )
        assert list(values.items()) == [(n, n * n) for n in range(7)]
        assert done == values
        assert run_tasks(task_functions.square, {}, timeout_s=60) == {}

    def test_failures_are_named_and_the_rest_is_not_begun(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tasks, "SUBMITTED_AT_ONCE", 2)
        begun: list[int] = []
        with pytest.raises(WorkerError) as raised:
            run_tasks(
                task_functions.fail_on,
                {n: (n, [3]) for n in range(100)},
                timeout_s=60,
                on_done=lambda number, value: begun.append(number),
            )
        assert raised.value.ranks == (3,)
        assert raised.value.failures[0].error_type == "ValueError"
        assert "the disk of 3 is on fire" in str(raised.value)
        assert "fail_on" in raised.value.tracebacks()
        assert len(begun) < 10

    def test_all_that_fail_at_once_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tasks, "CAUSE_GRACE_S", 60.0)  # how far apart they may be; some processes start late
        with pytest.raises(WorkerError) as raised:
            run_tasks(task_functions.fail_on, {n: (n, [0, 1, 2, 3]) for n in range(4)}, timeout_s=60)
        assert set(raised.value.ranks) == {0, 1, 2, 3}

    def test_a_task_whose_process_is_lost_runs_again_and_is_named_when_that_does_not_help(self, tmp_path: Path) -> None:
        assert run_tasks(task_functions.die_once, {5: (str(tmp_path),)}, timeout_s=60) == {5: "alive"}
        with pytest.raises(WorkerError) as raised:
            run_tasks(task_functions.die, {8: (8,)}, timeout_s=60)
        [failure] = raised.value.failures
        assert (failure.rank, failure.error_type) == (8, DIED)
        assert "lost 3 times" in failure.message

    def test_what_tasks_count_is_told_while_they_run(self, tmp_path: Path) -> None:
        told: list[int] = []

        def tell(done: int, total: int) -> None:
            told.append(done)
            (tmp_path / "go").touch()  # for which both wait

        meter = Meter(tell)
        args = (str(tmp_path / "go"),)
        run_tasks(task_functions.count_and_wait, {1: args, 2: args}, timeout_s=60, meter=meter)
        assert told[0] < meter.done == 6
        assert told == sorted(told)

    @pytest.mark.slow
    def test_what_hangs_is_named_and_ended(self, tmp_path: Path) -> None:
        start = time.monotonic()
        with pytest.raises(GroupTimeoutError, match=r"not done within 4 s: tasks 2$"):
            run_tasks(task_functions.hang, {2: (str(tmp_path),)}, timeout_s=4)
        assert time.monotonic() - start < 30
        for path in tmp_path.iterdir():
            wait_until(lambda pid=int(path.name): not _runs(pid), 30, lambda path=path: path.name)
