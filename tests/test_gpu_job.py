"""What only a CUDA device can show: fingerprints on it, and the main job on one shared GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ray_ckpt.format.fingerprinting import fingerprint
from tests.conftest import REPOSITORY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.complex64], ids=str)
def test_a_fingerprint_is_the_same_on_gpu_and_cpu(dtype: torch.dtype) -> None:
    tensor = torch.arange(1_000_003).to(dtype)
    assert fingerprint(tensor.cuda()) == fingerprint(tensor)
    assert fingerprint(tensor.cuda() + 1) != fingerprint(tensor)


@pytest.mark.parametrize(
    ("workers", "gpus_per_worker", "backend"),
    [
        (1, 1.0, "cpu:gloo,cuda:nccl"),
        # NCCL refuses two ranks on one GPU: the job takes gloo over CUDA tensors, and says so.
        (2, 0.5, "gloo"),
    ],
)
def test_the_main_job_on_one_gpu(tmp_path: Path, workers: int, gpus_per_worker: float, backend: str) -> None:
    report_path = tmp_path / "out.json"
    arguments = ["--workers", str(workers), "--gpus-per-worker", str(gpus_per_worker), "--address", "local"]
    done = subprocess.run(
        [sys.executable, "jobs/pipeline_to_fsdp.py", *arguments, "--json", str(report_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert ("share GPUs (0.5 each)" in done.stdout) == (workers == 2)
    report = json.loads(report_path.read_text())
    assert (report["verified"], report["backend"]) == (True, backend)
