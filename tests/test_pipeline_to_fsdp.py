"""The main job: what it proves, and that it says so when something is wrong.

The job runs as a person runs it, as a process of its own, on one local Ray that this module's tests share; tampering
between save and load calls its phases one by one.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from rich.console import Console

from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.errors import UsageError, WorkerError
from ray_ckpt.format import record
from ray_ckpt.format.manifest import MANIFEST_NAME, Manifest
from ray_ckpt.format.snapshot import compare
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.recipes.pipeline_to_fsdp import job
from ray_ckpt.recipes.pipeline_to_fsdp.command import pipeline_to_fsdp
from ray_ckpt.recipes.pipeline_to_fsdp.report import JobReport
from ray_ckpt.recipes.screen import Screen
from ray_ckpt.recipes.setting import check_storage
from tests.conftest import MARKERS, REPOSITORY
from tests.support import rank_functions
from tests.support.commands import assert_one_line, assert_refused
from tests.support.models import DOOMED_RANK
from tests.support.s3 import run_s3

pytestmark = pytest.mark.usefixtures("local_ray")

SCRIPT = REPOSITORY / "jobs" / "pipeline_to_fsdp.py"


def run_job(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The job as its own process, on this module's Ray."""
    address = ray.get_runtime_context().gcs_address
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--address", address, *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=REPOSITORY,
        check=False,
    )


@pytest.mark.parametrize(
    ("target", "workers"),
    [
        ("fsdp2", 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("fsdp2", 4), ("fsdp1", 2), ("fsdp1", 4))),
    ],
)
def test_every_tensor_and_every_hyperparameter_arrives(tmp_path: Path, target: str, workers: int) -> None:
    report_path, storage = tmp_path / "out.json", tmp_path / "run"
    done = run_job(
        *("--target", target, "--workers", str(workers), "--steps", "5"),
        *("--storage", str(storage), "--json", str(report_path), "--events", str(tmp_path / "events.jsonl")),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(report_path.read_text())
    assert report["verified"] is True
    assert (report["bits_verified"], report["continuation_verified"]) == (True, True)
    assert report["mismatches"] == []
    assert report["continuation"]["note"] == ""
    for closeness in (report["continuation"]["step"], report["continuation"]["losses"]):
        assert 0 <= closeness["difference"] <= closeness["allowed"]
    assert (report["target"], report["workers"], report["backend"]) == (target, workers, "gloo")
    assert (report["from"], report["to"]) == (f"pp{workers}", f"{target}x{workers}")
    assert report["storage"] == str(storage)
    # Four layers with weight and bias, each with exp_avg and exp_avg_sq: 24. Adam's step per parameter: 8 more.
    assert report["tensors_compared"] == 24 + 8
    # Hyper-parameters of eight parameters, and the number of steps.
    assert report["objects_compared"] % 8 == 1
    assert report["objects_compared"] >= 8 * 10
    # Weights and both moments in float32.
    assert report["checkpoint_bytes"] >= 3 * 4 * 4 * (500 * 500 + 500)
    losses = report["losses"]
    assert [len(losses[name]) for name in ("pipeline", "resumed", "reference")] == [5, 5, 10]
    assert losses["pipeline"] + losses["resumed"] == pytest.approx(losses["reference"], rel=1e-4)
    assert losses["resumed"][-1] < losses["pipeline"][0]
    assert " ".join(report["phases"]) == "ray group train save regroup load verify resume reference"
    assert "verified: 32 tensors" in done.stdout
    assert "verified: continuation: the next step differs by " in done.stdout
    assert f"loss {losses['pipeline'][0]:.4f} -> " in done.stdout
    assert done.stderr == ""
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["phase"] for event in events if event["operation"] == "job"] == list(report["phases"])
    for operation, phase in (("save", "write"), ("load", "read")):
        ranks = [event["rank"] for event in events if (event["operation"], event["phase"]) == (operation, phase)]
        assert ranks == list(range(workers))
    assert [event["failure"] for event in events if event["failure"]] == []


@pytest.mark.jobs
@pytest.mark.parametrize(
    ("source", "target"),
    [("fsdp2x3", "pp2"), pytest.param("tp2", "single", marks=pytest.mark.slow)],
)
def test_any_layout_to_any_other_each_with_its_own_number_of_workers(tmp_path: Path, source: str, target: str) -> None:
    done = run_job(
        "--from", source, "--to", target, "--steps", "3", "--dim", "37", "--json", str(tmp_path / "out.json")
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["from"], report["to"], report["workers"]) == (source, target, Layout.parse(source).world_size)
    assert report["verified"] is True
    assert report["tensors_compared"] == 32
    assert f"train: 3 steps as {source}\n" in done.stdout


@pytest.mark.slow
def test_weights_that_two_stages_share_are_trained_and_arrive_as_one() -> None:
    done = run_job(
        "--model", "tests.support.models:tied", "--from", "pp2", "--to", "fsdp2x2", "--steps", "4", "--json", "-"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verified"] is True
    # One weight and two biases, each with two moments and a step.
    assert report["tensors_compared"] == 3 * 4


@pytest.mark.slow
def test_a_users_model_with_buffers_and_uneven_stages_through_s3() -> None:
    with run_s3() as s3:
        arguments = ["--model", "tests.support.models:Perceptron", "--workers", "3", "--steps", "4"]
        done = run_job(*arguments, "--storage", s3.uri("run"), "--json", "-")
        assert done.returncode == 0, done.stderr
        # A data file per stage, the two records of what is in them, and a probe per worker.
        assert s3.requests["PUT"] >= 3 + 2 + 3
    report = json.loads(done.stdout)
    assert report["verified"] is True
    # Three linear layers: 6 parameters, each with two moments and a step; and the persistent buffer.
    assert report["tensors_compared"] == 6 * 4 + 1
    assert report["storage"] == "s3://bucket/run"
    # What a person reads does not mix with the JSON, and no credentials are shown.
    assert "verified: 25 tensors" in done.stderr
    assert "secret" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def options() -> job.Options:
    return job.Options(Layout.parse("pp2"), Layout.parse("fsdp2x2"), steps=2, dim=32, layers=2)


@pytest.fixture(scope="module")
def saved(options: job.Options, local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> job.Saved:
    uri = str(tmp_path_factory.mktemp("saved") / "run")
    return job.train_and_save(options, quiet_screen(), uri)


@pytest.fixture
def copy_of_saved(saved: job.Saved, tmp_path: Path) -> job.Saved:
    """The saved checkpoint, to be tampered with."""
    shutil.copytree(saved.uri, tmp_path / "run")
    return replace(saved, uri=str(tmp_path / "run"))


@pytest.fixture(scope="module")
def group(options: job.Options, local_ray: None) -> Iterator[WorkerGroup]:
    """Workers that saved nothing; every load makes its model anew."""
    with job.form_group(options, quiet_screen(), "regroup", options.target) as group:
        yield group


def quiet_screen() -> Screen:
    return Screen(Console(file=io.StringIO()))


def text_of(report: JobReport) -> str:
    text = io.StringIO()
    report.show(Console(file=text, width=160))
    return text.getvalue()


def test_what_was_saved_is_what_is_loaded(options: job.Options, copy_of_saved: job.Saved, group: WorkerGroup) -> None:
    comparison = job.load_and_verify(options, quiet_screen(), group, copy_of_saved).comparison
    assert comparison.mismatches == ()
    assert comparison.tensors_compared == 2 * 2 * 4
    report = job.make_report(options, quiet_screen(), copy_of_saved, comparison, None)
    assert report.bits_verified
    assert not report.verified, "training has not gone on"
    resumed = job.resume(options, quiet_screen(), group, copy_of_saved)
    report = job.make_report(options, quiet_screen(), copy_of_saved, comparison, resumed)
    assert report.verified


def test_what_the_proof_of_bits_misses_shows_when_training_goes_on(
    options: job.Options, copy_of_saved: job.Saved, group: WorkerGroup
) -> None:
    comparison = job.load_and_verify(options, quiet_screen(), group, copy_of_saved).comparison
    group.run(rank_functions.zero_one_average)
    resumed = job.resume(options, quiet_screen(), group, copy_of_saved)
    report = job.make_report(options, quiet_screen(), copy_of_saved, comparison, resumed)
    assert (report.bits_verified, report.continuation_verified, report.verified) == (True, False, False)
    assert {"optim.state.layer1.weight.exp_avg after step 2"} <= {mismatch.name for mismatch in report.mismatches}
    shown = text_of(report)
    assert "verified: 16 tensors and " in shown
    assert "NOT VERIFIED: continuation: the next step differs by " in shown


def test_a_flipped_byte_of_a_tensor_is_found(
    options: job.Options, copy_of_saved: job.Saved, group: WorkerGroup
) -> None:
    data_file, offset = middle_of_a_weight(copy_of_saved.uri)
    data = bytearray(data_file.read_bytes())
    data[offset] ^= 1
    data_file.write_bytes(data)
    with pytest.raises(WorkerError, match="IntegrityError") as caught:
        job.load_and_verify(options, quiet_screen(), group, copy_of_saved)
    assert data_file.name in str(caught.value)
    assert "model.layer2.weight" in str(caught.value)


def test_a_changed_learning_rate_is_found(options: job.Options, copy_of_saved: job.Saved, group: WorkerGroup) -> None:
    manifest = Path(copy_of_saved.uri) / MANIFEST_NAME
    text, _, _ = manifest.read_text().rpartition(',"digest":')
    assert text.count("0.002") == 2, "weight and bias of the second stage"
    manifest.write_text(record.seal(text.replace("0.002", "0.001") + "}"))
    comparison = job.load_and_verify(options, quiet_screen(), group, copy_of_saved).comparison
    assert [(m.name, m.expected, m.found, m.ranks) for m in comparison.mismatches] == [
        ("optim.param_groups.layer2.bias.lr", "0.002", "0.001", (0, 1)),
        ("optim.param_groups.layer2.weight.lr", "0.002", "0.001", (0, 1)),
    ]
    report = job.make_report(options, quiet_screen(), copy_of_saved, comparison, None)
    assert not report.verified
    shown = text_of(report)
    assert "optim.param_groups.layer2.bias.lr" in shown
    assert "NOT VERIFIED: 16 tensors and " in shown
    assert "NOT VERIFIED: continuation: not tried, as other bits arrived than were saved" in shown


def test_a_dropped_stage_is_found(options: job.Options, copy_of_saved: job.Saved, group: WorkerGroup) -> None:
    [_, dropped, *_] = sorted(Path(copy_of_saved.uri).glob("*.distcp"))
    dropped.unlink()
    with pytest.raises(WorkerError) as caught:
        job.load_and_verify(options, quiet_screen(), group, copy_of_saved)
    assert dropped.name in str(caught.value)


def test_nothing_compared_is_not_verified(options: job.Options, saved: job.Saved) -> None:
    assert not job.make_report(options, quiet_screen(), saved, compare([], []), None).bits_verified


def test_storage_that_nodes_do_not_share_is_found_before_a_byte_is_saved(group: WorkerGroup, tmp_path: Path) -> None:
    group.run(rank_functions.move_into_own_directory, str(tmp_path))
    with pytest.raises(UsageError, match=r"not shared: rank 0 on .* does not see the file that rank 1 on ") as caught:
        check_storage(group, "/proc/self/cwd/run", overwrite=False)
    assert "mounted on every node, or an object store" in str(caught.value)
    (tmp_path / "theirs").mkdir()
    group.run(rank_functions.move_into, str(tmp_path / "theirs"))
    with pytest.raises(UsageError, match=r"not shared: this driver, which commits, does not see the file that rank 0"):
        check_storage(group, "/proc/self/cwd/run", overwrite=False)
    # The same group finds nothing wrong with a place that is shared, and leaves nothing there.
    check_storage(group, str(tmp_path / "shared"), overwrite=False)
    assert list((tmp_path / "shared").iterdir()) == []


@pytest.mark.jobs
def test_a_mismatch_ends_with_exit_code_1_and_a_table(tmp_path: Path) -> None:
    report_path = tmp_path / "out.json"
    for mark in MARKERS.glob("built-by-*"):
        mark.unlink()
    done = run_job(
        "--model", "tests.support.models:Noisy", "--workers", "2", "--steps", "2", "--json", str(report_path)
    )
    assert done.returncode == 1
    report = json.loads(report_path.read_text())
    assert report["verified"] is False
    assert {"name", "expected", "found", "ranks"} == report["mismatches"][0].keys()
    assert all(mismatch["name"].startswith("loss of step ") for mismatch in report["mismatches"])
    assert "loss of step " in done.stdout
    assert "\nverified: 16 tensors and " in done.stdout
    assert "NOT VERIFIED: continuation: nothing was compared, as the model gave two losses for one batch" in done.stdout
    # What a factory does may take minutes.
    assert done.stdout.startswith("model: calling tests.support.models:Noisy, as every worker will\nmodel: done (")
    built = sorted(len(mark.read_text()) for mark in MARKERS.glob("built-by-*"))
    assert built == [1, 3, 3, 4, 4], "by the driver, and by each worker and the first of either group"


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["train", "save", "load"])
def test_a_killed_worker_is_named_within_ten_seconds_and_a_second_run_succeeds(tmp_path: Path, moment: str) -> None:
    arguments = ["--model", f"tests.support.models:dies_in_{moment}", "--workers", "2", "--steps", "2"]
    arguments += ["--storage", str(tmp_path / "run")]
    done = run_job(*arguments)
    took_s = time.time() - float((MARKERS / moment).read_text())
    assert done.returncode == 1
    assert f"rank {DOOMED_RANK} on " in done.stderr.splitlines()[-1]
    assert "died: process" in done.stderr.splitlines()[-1]
    # Ray's own paragraph about a dead worker stays away.
    assert "raylet" not in done.stdout + done.stderr
    assert took_s < 10
    # A kill after the commit leaves a checkpoint, which is replaced only on request.
    second = run_job(*arguments, *(["--overwrite"] if moment == "load" else []))
    assert second.returncode == 0, second.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "ddp"], "ddp"),
        (["--json", "/no/such/directory/out.json"], "no such directory"),
        (["--workers", "4", "--layers", "3"], "cannot cut PipelineModel with 3 layers"),
        (["--model", "tests.support.models"], "pkg.module:factory"),
        (["--model", "no.such.module:factory"], "No module named 'no'"),
        (["--model", "tests.support.models:no_such_factory"], "no_such_factory"),
        (["--model", "tests.support.models:DOOMED_RANK"], "not a callable"),
        (["--model", "tests.support.models:not_a_model"], "must return a torch.nn.Module, not str"),
        (["--from", "pp2.tp"], "layout 'pp2.tp' has the token 'tp'"),
        (["--to", "fsdp1x2.tp2"], "FSDP1 does not combine with other axes"),
        (["--to", "fsdp2x3", "--target", "fsdp1"], "--target fsdp1 is short for --to fsdp1x4"),
        (["--model", "tests.support.models:Perceptron", "--to", "tp2"], "Perceptron has no tp_plan()"),
        (["--to", "ep2"], "PipelineModel has no layer of experts to split over 2 ranks"),
        (["--model", "tests.support.models:Headed", "--workers", "2"], "beside its layers"),
        (["--model", "tests.support.models:without_data", "--workers", "2"], "has no sample_batch"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, as none of it gets as far as Ray."""
    assert_refused(pipeline_to_fsdp, arguments, message, monkeypatch, capsys)


@pytest.mark.jobs
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "2", "--storage", "/dev/null/run"], "cannot write to --storage /dev/null/run"),
        (["--workers", "2", "--backend", "nccl"], "needs GPUs"),
    ],
)
def test_what_only_the_cluster_can_tell_gets_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    assert_wrong_use(run_job(*arguments), message)


@pytest.mark.jobs
def test_a_committed_checkpoint_is_not_replaced_unless_asked(saved: job.Saved) -> None:
    before = tree(saved.uri)
    arguments = ["--workers", "2", "--steps", "2", "--dim", "32", "--layers", "2", "--storage", saved.uri]
    assert_wrong_use(run_job(*arguments), "already holds a committed checkpoint")
    assert tree(saved.uri) == before


def assert_wrong_use(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert_one_line(done.stderr, message)


def tree(root: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(root).iterdir()}


def middle_of_a_weight(uri: str) -> tuple[Path, int]:
    """A byte in the middle of a tensor's raw bytes, by the checkpoint's own record: its file and offset."""
    manifest = Manifest.from_json((Path(uri) / MANIFEST_NAME).read_bytes())
    [chunk] = manifest.tensors["model.layer2.weight"].chunks
    assert chunk.data_start is not None
    return Path(uri) / chunk.file, chunk.data_start + 32 * 32 * 2
