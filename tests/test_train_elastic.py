"""The elastic job under real kills: of worker processes and of whole nodes, from outside, at seeded steps.

All tests share one `ray start` head with two CPUs; those that kill a node add one first.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ckpt import verify
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.parallel.materialize import materialize
from ray_ckpt.parallel.stages import parts_of
from ray_ckpt.recipes.model import batch, build, learning_rates, loss_function
from ray_ckpt.recipes.train_elastic.command import train_elastic
from ray_ckpt.recipes.workload import Workload
from ray_ckpt.storage.store import CheckpointStore
from tests.support.clusters import Head, Started, add_node, wait_until, wait_until_free, workers
from tests.support.commands import assert_refused

pytestmark = pytest.mark.timeout(300)

JOB = "jobs/train_elastic.py"
MODEL = "tests.support.models:Perceptron"
STEPS = 40
SAVE_EVERY = 2
NEVER_ALIKE = itertools.count(2)
"""Last parts of the addresses that nodes get: Ray knows a dead node by its address for a while."""


@dataclass(frozen=True)
class Kill:
    """What is killed once the job has saved this step."""

    step: int
    node: bool
    """The whole node that was added, or else one worker process."""


def start_job(head: Head, layouts: str, storage: Path, *options: str) -> Started:
    return head.sandbox.start(
        *(sys.executable, JOB, "--address", head.address, "--model", MODEL, "--layouts", layouts),
        *("--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--storage", str(storage)),
        *("--json", str(storage) + ".json", "--events", str(storage) + ".events", *options),
    )


def report_of(storage: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(Path(str(storage) + ".json").read_text())
    return report


def events_of(storage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(str(storage) + ".events").read_text().splitlines()]


def reference(layouts: str, steps: int = STEPS) -> list[float]:
    """The losses of the same training in this process, on whole batches."""
    workload = Workload.of(MODEL, 500, 4, [Layout.parse(text) for text in layouts.split(",")])
    model = build(workload)
    materialize(model, torch.device("cpu"), workload.seed)
    optimizer = torch.optim.Adam(
        {"params": list(model.get_submodule(part).parameters()), "lr": rate}
        for part, rate in learning_rates(parts_of(model)).items()
        if any(True for _ in model.get_submodule(part).parameters())
    )
    losses = []
    for step in range(steps):
        inputs, targets = batch(workload, model, step)
        optimizer.zero_grad()
        loss = loss_function(model)(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    return losses


def strike(head: Head, job: Started, kill: Kill, chance: random.Random, node: Started | None) -> None:
    """Wait until the job has saved the step, then kill."""
    saved = re.compile(rf"step {kill.step} of {STEPS}, .* saving")
    wait_until(lambda: bool(saved.search(job.stdout)) or job.ended, 90, lambda: (kill, job.stdout, job.stderr))
    assert not job.ended, (kill, job.stdout, job.stderr)
    if kill.node:
        assert node is not None
        head.sandbox.kill(node)
        return
    victims = workers(head.sandbox)
    assert victims, "the job has workers while it trains"
    chance.choice(victims).kill()


def run_under_kills(
    head: Head, storage: Path, layouts: str, kills: Sequence[Kill], seed: int, node: Started | None = None
) -> dict[str, Any]:
    """Run the job to its end, and check what holds whatever was killed."""
    chance = random.Random(seed)
    job = start_job(head, layouts, storage, "--max-failures", str(len(kills) + 1), "--start-timeout", "60")
    for kill in kills:
        strike(head, job, kill, chance, node)
    assert job.wait(120) == 0, job.stdout + job.stderr
    report = report_of(storage)
    assert report["final_step"] == STEPS
    assert report["losses"] == pytest.approx(reference(layouts), rel=1e-4)
    assert CheckpointStore(storage).latest() == STEPS
    assert report["stopped"] is False
    assert len(report["layouts_used"]) == len(report["restarts"]) + 1
    for restart in report["restarts"]:
        assert restart["step"] >= kills[0].step
        assert restart["seconds_lost"] > 0
    # Nobody notices a kill that the training outran; any other has its rank.
    assert len(report["restarts"]) == len(kills)
    assert all(type(restart["rank"]) is int for restart in report["restarts"])
    wait_until_free(60)
    return report


@pytest.mark.jobs
def test_a_killed_worker_is_replaced_and_the_losses_are_those_of_an_uninterrupted_run(
    head: Head, tmp_path: Path
) -> None:
    report = run_under_kills(head, tmp_path / "run", "pp2,single", [Kill(6, node=False)], seed=1)
    assert report["layouts_used"] == ["pp2", "pp2"]
    [restart] = report["restarts"]
    assert "died: process" in restart["cause"]
    events = events_of(tmp_path / "run")
    [failed, again] = [
        event for event in events if event["phase"] in ("end", "restart") and event["operation"] == "train"
    ]
    assert (failed["failure"], failed["rank"], failed["message"]) == ("died", restart["rank"], restart["cause"])
    assert (again["step"], again["seconds"]) == (restart["step"], restart["seconds_lost"])
    steps = [event["step"] for event in events if event["phase"] == "step"]
    assert set(steps) == set(range(1, STEPS + 1))
    assert {event["step"] for event in events if (event["operation"], event["phase"]) == ("save", "end")} <= set(steps)
    [load] = [event for event in events if (event["operation"], event["phase"], event["rank"]) == ("load", "end", 0)]
    assert load["step"] <= failed["step"]


@pytest.mark.jobs
def test_after_the_loss_of_a_node_training_goes_on_in_another_layout(head: Head, tmp_path: Path) -> None:
    node = add_node(head, f"127.0.0.{next(NEVER_ALIKE)}")
    report = run_under_kills(head, tmp_path / "run", "fsdp2x3,pp2", [Kill(4, node=True)], seed=2, node=node)
    assert report["layouts_used"] == ["fsdp2x3", "pp2"]


@pytest.mark.jobs
def test_the_last_step_is_saved_without_a_replica_that_dies_meanwhile(head: Head, tmp_path: Path) -> None:
    storage = tmp_path / "run"
    options = ("--model", "tests.support.models:StruckWhileSaving", "--steps", "6", "--save-every", "100")
    job = start_job(head, "ddp2,single", storage, *options)
    assert job.wait(120) == 0, job.stdout + job.stderr
    report = report_of(storage)
    assert (report["final_step"], report["restarts"], report["layouts_used"]) == (6, [], ["ddp2"])
    assert report["saved_without"] == {"6": [1]}
    assert report["failed_saves"] == []
    store = CheckpointStore(storage)
    assert store.manifest(6).layout == "ddp2 without rank 1"
    assert verify(store).verified
    assert "step 6 is saved without what died: rank 1" in job.stdout
    # Another job goes on from it.
    second = start_job(head, "single", storage, *options[:2], "--steps", "8")
    assert second.wait(120) == 0, second.stdout + second.stderr
    assert [resume["step"] for resume in report_of(storage)["resumes"]] == [6]
    wait_until_free(60)


@pytest.mark.jobs
def test_a_signal_saves_and_a_second_job_goes_on_from_there(head: Head, tmp_path: Path) -> None:
    storage = tmp_path / "run"
    job = start_job(head, "pp2", storage, "--grace", "60", "--steps", "100000")
    job.wait_for("step 4 of 100000", 100)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(100) == 128 + signal.SIGTERM, job.stdout + job.stderr
    stopped = report_of(storage)
    assert stopped["stopped"] is True
    assert stopped["final_step"] >= 4
    assert CheckpointStore(storage).latest() == stopped["final_step"] == len(stopped["losses"])
    wait_until_free(60)
    last = stopped["final_step"] + 20
    second = start_job(head, "single", storage, "--steps", str(last))
    assert second.wait(90) == 0, second.stdout + second.stderr
    assert f"start: single from step {stopped['final_step']}" in second.stdout
    assert report_of(storage)["losses"] == pytest.approx(reference("pp2", last), rel=1e-3, abs=1e-5)


@pytest.mark.jobs
def test_it_goes_on_from_the_newest_good_step_and_replaces_the_damaged_one(head: Head, tmp_path: Path) -> None:
    storage = tmp_path / "run"
    first = start_job(head, "single", storage, "--keep-last", "2")
    assert first.wait(90) == 0, first.stdout + first.stderr
    wait_until_free(60)
    record = storage / f"step-{STEPS}" / MANIFEST_NAME
    record.write_bytes(record.read_bytes()[:-9])
    second = start_job(head, "single", storage)
    assert second.wait(90) == 0, second.stdout + second.stderr
    assert f"step {STEPS} is damaged: " in second.stdout
    assert f"start: single from step {STEPS - SAVE_EVERY}" in second.stdout
    report = report_of(storage)
    assert list(report["damaged"]) == [str(STEPS)]
    assert str(record) in report["damaged"][str(STEPS)]
    assert report["losses"] == pytest.approx(reference("single"), rel=1e-4)
    assert CheckpointStore(storage).damage(STEPS) == ""


@pytest.mark.slow
def test_no_more_failures_than_are_allowed(head: Head, tmp_path: Path) -> None:
    job = start_job(head, "pp2", tmp_path / "run", "--max-failures", "0")
    strike(head, job, Kill(SAVE_EVERY, node=False), random.Random(0), None)
    assert job.wait(60) == 1, job.stdout + job.stderr
    assert re.match(r"error: rank [01] on .* died: process \d+", job.stderr.splitlines()[-1])
    assert (CheckpointStore(tmp_path / "run").latest() or 0) < STEPS
    wait_until_free(60)


@pytest.mark.slow
def test_when_the_grace_is_over_the_job_ends_without_the_save(head: Head, tmp_path: Path) -> None:
    """The workers stand still, so that neither the step nor a save can end."""
    job = start_job(head, "pp2", tmp_path / "run", "--grace", "5")
    job.wait_for(f"step {2 * SAVE_EVERY} of {STEPS}", 60)
    stopped = workers(head.sandbox)
    for worker in stopped:
        worker.suspend()
    began = time.monotonic()
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(30) == 128 + signal.SIGTERM, job.stdout + job.stderr
    # The process of a job takes a moment to end after its grace.
    assert 4 < time.monotonic() - began < 10
    assert "the grace is over: what was trained since the last save is lost" in job.stdout
    report = report_of(tmp_path / "run")
    assert report["stopped"] is True
    assert report["final_step"] == CheckpointStore(tmp_path / "run").latest() >= SAVE_EVERY
    wait_until_free(60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([JOB, "--layouts", "pp4"], "waiting for 4 x {CPU: 1}"),
        (["jobs/pipeline_to_fsdp.py", "--workers", "2", "--steps", "1000000"], "train: 1000000 steps"),
    ],
    ids=["train_elastic", "pipeline_to_fsdp"],
)
def test_a_signal_where_nothing_is_to_be_saved_ends_the_job_at_once(
    head: Head, tmp_path: Path, arguments: list[str], text: str
) -> None:
    job = head.sandbox.start(sys.executable, *arguments, "--address", head.address, "--storage", str(tmp_path))
    job.wait_for(text, 60)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(10) == 128 + signal.SIGTERM, job.stdout + job.stderr
    assert "error: terminated" in job.stderr.splitlines()
    wait_until_free(60)


@pytest.mark.slow
def test_a_failure_that_repeats_itself_is_not_tried_again(head: Head, tmp_path: Path) -> None:
    arguments = [
        "--address",
        head.address,
        "--model",
        "tests.support.models:Failing",
        "--layouts",
        "pp2",
        "--steps",
        "4",
    ]
    job = head.sandbox.start(sys.executable, JOB, *arguments, "--max-failures", "9", "--storage", str(tmp_path))
    assert job.wait(90) == 1
    assert job.stdout.count("group: 2 workers") == 2
    last = job.stderr.splitlines()[-1]
    assert last.startswith("error: rank 1 on ")
    assert "cannot learn this" in last
    wait_until_free(60)


@pytest.mark.slow
def test_it_grows_when_room_comes_back(head: Head, tmp_path: Path) -> None:
    storage = tmp_path / "run"
    job = start_job(head, "fsdp2x3,single", storage, "--grow")
    job.wait_for(f"step 2 of {STEPS}", 60)
    os.kill(job.pid, signal.SIGSTOP)  # so that it does not end before the node is there
    node = add_node(head, f"127.0.0.{next(NEVER_ALIKE)}")
    os.kill(job.pid, signal.SIGCONT)
    assert job.wait(120) == 0, job.stdout + job.stderr
    report = report_of(storage)
    assert report["layouts_used"] == ["single", "fsdp2x3"]
    assert report["restarts"] == []
    assert report["losses"] == pytest.approx(reference("fsdp2x3,single"), rel=1e-4)
    head.sandbox.kill(node)


@pytest.mark.slow
def test_it_waits_for_room_before_it_takes_less(head: Head, tmp_path: Path) -> None:
    """Two CPUs are there and three wanted: the third comes while the job waits for it."""
    job = start_job(head, "fsdp2x3,single", tmp_path / "run", "--wait-for-capacity", "60")
    job.wait_for("waiting for 3 x {CPU: 1}", 60)
    node = add_node(head, f"127.0.0.{next(NEVER_ALIKE)}")
    assert job.wait(120) == 0, job.stdout + job.stderr
    assert report_of(tmp_path / "run")["layouts_used"] == ["fsdp2x3"]
    head.sandbox.kill(node)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layouts", "pp2,"], "layout '' has the token ''"),
        (["--layouts", "fsdp1x2.tp2"], "FSDP1 does not combine"),
        (["--layouts", "pp7", "--layers", "4"], "with 4 layers"),
        (["--cpus-per-worker", "0"], "must ask for some CPU or GPU"),
        (["--json", "/no/such/directory/out.json"], "no such directory"),
    ],
)
def test_wrong_use_gets_one_line_and_exit_code_2(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, as none of it gets as far as Ray."""
    assert_refused(train_elastic, options, message, monkeypatch, capsys)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(20))
def test_kills_at_random_steps(head: Head, tmp_path: Path, seed: int) -> None:
    """One to three kills; in every fourth run the first is a node's."""
    chance = random.Random(seed)
    # Not one save after the other: a kill is noticed some steps later, and the same rank twice at the same step is what
    # the job takes for a failure that repeats itself.
    steps = sorted(chance.sample(range(SAVE_EVERY, STEPS // 2, 2 * SAVE_EVERY), chance.randint(1, 3)))
    with_node = seed % 4 == 3
    node = add_node(head, f"127.0.0.{next(NEVER_ALIKE)}") if with_node else None
    kills = [Kill(step, node=with_node and number == 0) for number, step in enumerate(steps)]
    layouts = "fsdp2x3,pp2,single" if with_node else chance.choice(["pp2,single", "fsdp2x2", "hsdp2x1,single"])
    run_under_kills(head, tmp_path / "run", layouts, kills, seed, node)
