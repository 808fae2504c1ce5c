"""SIGTERM and SIGINT of a job at moments spread over its whole run, imports and joins included: none is lost.

It ends with the signal's exit code and one line, without a traceback, and leaves no process and no directory.
"""

from __future__ import annotations

import signal
import subprocess
import time

import pytest

from tests.support.clusters import Sandbox, Started, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TINY = ("--from", "single", "--to", "single", "--steps", "1", "--dim", "8", "--layers", "1")
NUM_MOMENTS = 30
RAY_ENDS_S = 90
"""Ray's own agents end by themselves, seen up to 50 s after their raylet."""
PYTHON_STARTS_S = 0.3
"""Until then the signal may find Python before the first line of the job: it ends as any Python program does."""


def duration(sandbox: Sandbox) -> float:
    start = time.monotonic()
    done = sandbox.run_job(*TINY)
    assert done.wait(0) == 0, done.stderr
    return time.monotonic() - start


def strike(sandbox: Sandbox, number: signal.Signals, after_s: float) -> Started:
    job = sandbox.start_job(*TINY)
    try:
        job.process.wait(timeout=after_s)
    except subprocess.TimeoutExpired:
        job.process.send_signal(number)
    job.wait(60)
    return job


@pytest.mark.parametrize(
    ("number", "line"), [(signal.SIGTERM, "error: terminated"), (signal.SIGINT, "error: interrupted")]
)
def test_a_signal_ends_the_job_at_any_moment(number: signal.Signals, line: str) -> None:
    with Sandbox() as sandbox:
        whole_s = duration(sandbox)
        first_second = [0.03 * moment for moment in range(1, NUM_MOMENTS // 3)]
        later = [1 + (whole_s - 1) * moment / NUM_MOMENTS for moment in range(NUM_MOMENTS)]
        codes = []
        for after_s in first_second + later:
            job = strike(sandbox, number, after_s)
            codes.append(job.process.returncode)
            if after_s < PYTHON_STARTS_S and codes[-1] != 128 + number:
                continue
            if codes[-1] == 0:
                assert "verified: " in job.stdout  # it was done when the signal came
                continue
            assert codes[-1] == 128 + number, (after_s, job.stdout, job.stderr)
            assert job.stderr.strip() == line, (after_s, job.stdout)
            wait_until(lambda: not sandbox.processes(), RAY_ENDS_S, sandbox.processes)
            assert list(sandbox.tmp.glob("ray-ckpt-*")) == [], after_s
        assert codes.count(128 + number) > NUM_MOMENTS / 2, codes
