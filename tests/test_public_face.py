"""What the package shows of itself: its names, its version, and what a built wheel gives to a type checker."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ray_ckpt
from ray_ckpt import errors
from tests.conftest import REPOSITORY

USER_CODE = """
from pathlib import Path

import torch

import ray_ckpt
from ray_ckpt import (
    ArrowStorageReader, ArrowStorageWriter, CheckpointContents, CheckpointStore, CompareReport, ConversionReport,
    CopyReport, Damage, DiffReport, DoctorReport, Event, EventFile, Finding, Fingerprint, Layout, LoadReport, Manifest,
    NodeFacts, NonFinite, PageReport, Phase, Policy, RemovalReport, RetryPolicy, SaveHandle, SaveReport, Saved,
    SignatureReport, Storage, StoreListing, TensorDifference, TensorStatistics, TrainState, TransferReport,
    VerifyReport, Weight, WeightFollower, WeightPublisher, Weights, WorkerContext, WorkerError, WorkerGroup, cluster,
    compare, convert, diff, doctor, export, fingerprint, inspect, keep, keep_every, keep_last, list_steps, load,
    open_weights, resume, save, scan_nonfinite, sign, tensor_statistics, verify, verify_signature, write_report,
)


def state_of(ctx: WorkerContext) -> TrainState:
    return TrainState(torch.nn.Linear(4, 4).to(ctx.device))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = TrainState(model, optimizer, step=0, layout=Layout.parse("fsdp2x2"), rng=True)
    store = CheckpointStore(Storage("s3://bucket/run", retry=RetryPolicy(attempts=3)))
    report: SaveReport = save(state, store, 1)
    handle: SaveHandle = save(state, store, step=2, blocking=False)
    print(report.total_bytes, handle.done(), handle.result(timeout_s=60.0).uri)
    told: list[Event] = []
    with EventFile("events.jsonl") as events:
        save(state, store, 3, events=events)
        load(state, store, events=told.append)
    resumed: LoadReport | None = resume(state, store)
    print(0 if resumed is None else resumed.step)
    loaded: LoadReport = load(state, store, strict=False, only=("model",), fallback=True)
    load(TrainState(model, trainable_only=True), "adapters.pt", trusted=True)
    load(state, store, wait_for=store.wait_for(3, timeout_s=60) + 1, wait_s=60)
    checked: VerifyReport = verify(store, 1, trusted=True)
    damages: tuple[Damage, ...] = checked.damages
    compared: CompareReport = compare(state, store, 1, only=("model",))
    print(compared.equal, compared.differing)
    policy: Policy = keep_last(3) | keep_every(1000) | keep([0])
    removed: RemovalReport = store.prune(policy)
    copying: CopyReport = CheckpointStore("run", front="ram://run", durable_every=2).copying()
    print(copying.waiting, copying.problems, store.make_durable(timeout_s=60))
    manifest: Manifest = store.manifest(2)
    part: Fingerprint = fingerprint(torch.ones(2))
    ArrowStorageWriter(Path("run")), ArrowStorageReader("run")
    print(loaded.missing, damages, removed.kept, manifest.total_bytes, part.digest, ray_ckpt.__version__)


def look() -> None:
    listing: StoreListing = list_steps("run")
    contents: CheckpointContents = inspect("run", 1)
    numbers: TensorStatistics = tensor_statistics("run", "model.weight", 1)
    nonfinite: dict[str, NonFinite] = dict(scan_nonfinite("run", 1))
    published: SaveReport = WeightPublisher("run", whole_every=8).save({"w": torch.ones(2)}, 1, cast="bfloat16")
    followed: LoadReport = WeightFollower("run").fetch({"w": torch.ones(2)}, wait_for=1, wait_s=5)
    print(published.total_bytes, followed.num_bytes)
    weights: Weights = open_weights("run", wait_for=1, wait_s=5)
    infos: tuple[Weight, ...] = weights.metadata
    tensors: dict[str, torch.Tensor] = dict(weights)
    print(weights.step, infos[0].name, infos[0].shape, infos[0].dtype, tensors)
    report: DiffReport = diff("run", "other", left_step=1, right_step=1, values=True)
    differences: tuple[TensorDifference, ...] = report.tensors
    page: PageReport = write_report("run", "report.html", layout=Layout.parse("fsdp2x2"))
    phases: tuple[Phase, ...] = save({}, "run").phases
    print(page.reshard.flows, phases)
    health: DoctorReport = doctor("run", address="local")
    findings: tuple[Finding, ...] = health.findings
    nodes: tuple[NodeFacts, ...] = health.nodes
    print(health.healthy, findings, nodes)
    print(listing.latest, contents.kind, numbers.mean, nonfinite, differences)
    load({"gate": torch.ones(2)}, "run", 1, key_map={"gate": Saved("gate_up").narrow(0, 0, 2)})


def move() -> None:
    weights: ConversionReport = export("run", "weights", to="safetensors", dtype="bf16", rename=[("^a", "b")])
    print(weights.files, convert("weights", "run", target_step=3).left_out)


def prove() -> None:
    signed: SignatureReport = sign("run", "key.pem", 1)
    print(signed.files, verify_signature("run", "key.pub", 1).record_only)


def drive() -> None:
    with WorkerGroup(4) as group:
        try:
            saved: SaveReport = cluster.save(group, state_of, "run", step=1)
        except WorkerError as error:
            print(error.ranks)
        reports: list[LoadReport] = cluster.load(group, state_of, "run")
        checked: VerifyReport = cluster.verify(group, "run")
        print(saved, reports, checked)
        moved: TransferReport = cluster.transfer(group, state_of, group, state_of, cast="bfloat16", atomic=True)
        handle: cluster.TransferHandle = cluster.transfer(group, state_of, group, state_of, blocking=False)
        cluster.WeightPublisher(group, state_of, "run", whole_every=8).save(7, cast="bfloat16")
        print(moved.num_compared, handle.done(), handle.result(timeout_s=60.0).num_bytes)
"""

WRONG_CODE = """
import ray_ckpt

ray_ckpt.load({}, "run", step="last")
ray_ckpt.CheckpointStore("run").prune(3)
ray_ckpt.save({}, "run", blocking=False).total_bytes
ray_ckpt.no_such_name
"""


def test_what_type_checkers_see_is_what_there_is() -> None:
    """The names stand three times, as type checkers read no others: here they are held together."""
    tree = ast.parse(Path(ray_ckpt.__file__).read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in checked.body if isinstance(node, ast.ImportFrom)]
    imported = {alias.name: node.module for node in imports for alias in node.names}
    assert imported == ray_ckpt._HOMES
    exceptions = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)}
    assert set(ray_ckpt.__all__) == {"__version__"} | exceptions | imported.keys()


def test_the_version_stands_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", ray_ckpt.__version__)
    assert not re.search(r'^version = "', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the built wheel, and everything else from the environment of the tests."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "ray_ckpt", source / "ray_ckpt", ignore=shutil.ignore_patterns("__pycache__"))
    environment = directory / "environment"
    _run([sys.executable, "-m", "venv", "--without-pip", str(environment)], directory)
    python = environment / "bin" / "python"
    packages = next(environment.glob("lib/python*/site-packages"))
    # What stands in a .pth of these directories is not followed: an editable install there is not seen.
    of_the_tests = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "of_the_tests.pth").write_text("\n".join(of_the_tests))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install"]
    _run([*pip, "--no-index", "--no-deps", "--no-build-isolation", "."], source)
    return python


def _run(command: list[str], directory: Path, *, fails: bool = False) -> str:
    surroundings = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(command, cwd=directory, env=surroundings, capture_output=True, text=True, timeout=250)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout


def _type_check(python: Path, code: str, directory: Path, *, fails: bool = False) -> str:
    (directory / "program.py").write_text(code)
    options = ["--strict", "--python-executable", str(python), "--cache-dir", str(python.parent / "mypy-cache")]
    return _run([sys.executable, "-m", "mypy", *options, "program.py"], directory, fails=fails)


def test_the_wheel_is_what_is_imported_and_has_its_version(installed: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.metadata, ray_ckpt; "
        "print(ray_ckpt.__file__, ray_ckpt.__version__, importlib.metadata.version('ray-ckpt'))"
    )
    where, *versions = _run([str(installed), "-c", code], tmp_path).split()
    assert Path(where).is_relative_to(installed.parent.parent)
    assert versions == [ray_ckpt.__version__] * 2


@pytest.mark.jobs
@pytest.mark.timeout(600)
def test_the_wheel_alone_has_the_command(installed: Path, tmp_path: Path) -> None:
    """In an empty directory: neither `jobs/` nor the sources are there."""
    command = str(installed.parent / "ray-ckpt")
    assert "inspect" in _run([command, "--help"], tmp_path)
    assert _run([str(installed), "-m", "ray_ckpt", "--help"], tmp_path).startswith("Usage: ")
    saving = "import torch, ray_ckpt; ray_ckpt.save({'weight': torch.ones(3)}, 'run', 1)"
    _run([str(installed), "-W", "ignore", "-c", saving], tmp_path)
    assert "weight" in _run([command, "inspect", "run", "--tree"], tmp_path)
    assert "verified: 32 tensors" in _run([command, "demo", "--dim", "8"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    [package] = installed.parent.parent.glob("lib/python*/site-packages/ray_ckpt")
    assert (package / "py.typed").exists()


@pytest.mark.jobs
@pytest.mark.timeout(270)
def test_user_code_type_checks_against_the_wheel(installed: Path, tmp_path: Path) -> None:
    assert {name for name in ray_ckpt.__all__ if name not in errors.__all__ and name not in USER_CODE} == set()
    _type_check(installed, USER_CODE, tmp_path)


@pytest.mark.jobs
@pytest.mark.timeout(270)
def test_wrong_user_code_does_not(installed: Path, tmp_path: Path) -> None:
    told = _type_check(installed, WRONG_CODE, tmp_path, fails=True)
    assert re.findall(r"program\.py:(\d+): error:.*\[(.*)\]", told) == [
        ("4", "arg-type"),
        ("5", "arg-type"),
        ("6", "attr-defined"),
        ("7", "attr-defined"),
    ]
