"""The example for Ray Train: killed in the middle, it goes on with another number of workers as if nothing was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import ray.train
import torch
from ray.train import Checkpoint, RunConfig
from ray.train.torch import TorchTrainer

import ray_ckpt
from ray_ckpt.errors import FormatError
from ray_ckpt.integrations.ray_train import resume
from ray_ckpt.state.train_state import TrainState
from ray_ckpt.storage.store import CheckpointStore
from tests.conftest import REPOSITORY
from tests.support.faulty import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    # Ray Train sets options of Ray Data itself that Ray Data calls deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data"),
]

SAVE_EVERY = 2


def metrics_of(job: subprocess.Popen[str]) -> dict[str, int]:
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    # Ray's own processes may print after it.
    [printed] = [line for line in output.splitlines() if line.startswith("{")]
    metrics: dict[str, int] = json.loads(printed)
    return metrics


def start(storage: Path, workers: int, steps: int) -> subprocess.Popen[str]:
    arguments = ["--storage", str(storage), "--workers", str(workers), "--steps", str(steps)]
    arguments += ["--events", f"{storage}.events"]
    address = ray.get_runtime_context().gcs_address
    return subprocess.Popen(
        [sys.executable, "jobs/ray_train.py", *arguments, "--save-every", str(SAVE_EVERY)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "RAY_ADDRESS": address},
    )


def new_state(seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    return TrainState(model, torch.optim.Adam(model.parameters()))


def trained_without_interruption(steps: int) -> TrainState:
    state = new_state()
    for step in range(steps):
        inputs = torch.randn(60, 8, generator=torch.Generator().manual_seed(step))
        state.optimizer.zero_grad()
        (state.model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
        state.optimizer.step()
    return state


def in_the_middle(store: CheckpointStore) -> bool:
    return (store.latest() or 0) >= 3 * SAVE_EVERY


def test_a_killed_run_goes_on_with_another_number_of_workers(tmp_path: Path) -> None:
    store, noted = CheckpointStore(tmp_path / "steps"), tmp_path / "ray_train" / "checkpoint_manager_snapshot.json"
    first = start(tmp_path, workers=3, steps=1_000_000)
    try:
        wait_until(lambda: first.poll() is not None or (noted.exists() and in_the_middle(store)), timeout_s=300)
    finally:
        first.send_signal(signal.SIGKILL)
        output, _ = first.communicate(timeout=60)
    assert first.returncode == -signal.SIGKILL, output
    latest = store.latest()
    assert latest is not None
    final = latest + 3 * SAVE_EVERY
    metrics = metrics_of(start(tmp_path, workers=2, steps=final))
    # It went on from a reported step. The store has those too that were saved and not noted any more.
    assert metrics["step"] == final
    assert 0 < metrics["first"] <= latest
    assert store.latest() == final
    [file, *others] = store.manifest(final).files
    assert len(others) == 1, "two ranks saved it"
    assert file.startswith("__")
    resumed, reference = new_state(seed=1), trained_without_interruption(final)
    differ = {n: p.detach().clone() for n, p in resumed.model.named_parameters()}
    ray_ckpt.load(resumed, store)
    for name, parameter in resumed.model.named_parameters():
        assert not torch.equal(parameter, differ[name])
        torch.testing.assert_close(parameter, reference.model.get_parameter(name), rtol=1e-4, atol=1e-4)


def test_without_a_note_the_latest_step_of_the_store_is_loaded(tmp_path: Path) -> None:
    ray_ckpt.save(trained_without_interruption(4), tmp_path / "steps", 4)
    assert metrics_of(start(tmp_path, workers=2, steps=6)) == {"step": 6, "first": 4}
    events = [json.loads(line) for line in Path(f"{tmp_path}.events").read_text().splitlines()]
    ends = {(event["operation"], event["step"], event["rank"]) for event in events if event["phase"] == "end"}
    assert ends == {("load", 4, 0), ("load", 4, 1), ("save", 6, 0), ("save", 6, 1)}


def test_a_checkpoint_of_ray_train_that_something_else_wrote_is_refused(tmp_path: Path) -> None:
    def loop() -> None:
        ray.train.report({}, checkpoint=Checkpoint.from_directory(tmp_path / "other"))
        with pytest.raises(FormatError, match=r"has no ray_ckpt\.json: ray_ckpt's report did not write it"):
            resume(new_state(), tmp_path / "steps")

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.pt").write_bytes(b"1")
    TorchTrainer(loop, run_config=RunConfig("other", str(tmp_path / "runs"))).fit()
