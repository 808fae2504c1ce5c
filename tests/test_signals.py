"""SIGTERM and SIGINT at moments spread over a job's whole life, the first second of imports and the join included.

None is lost: the job ends with the signal's exit code and one line, without a traceback, and leaves no process and no
directory.
"""

from __future__ import annotations

import signal

import pytest

from tests.support.clusters import Sandbox, Started, wait_until
from tests.support.moments import IMPORTS_S, JOB_ENDS_S, PARTS, durations, moments, strike

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TINY = ("--from", "single", "--to", "single", "--steps", "1", "--dim", "8", "--layers", "1")
LINES = {signal.SIGTERM: "error: terminated", signal.SIGINT: "error: interrupted"}
RAY_ENDS_S = 120
"""Ray's own agents end by themselves, seen up to 50 s after their raylet."""


def check_end(job: Started, number: signal.Signals, listened: bool | None) -> int:
    """What is promised of a job that was struck. Its exit code."""
    code = job.wait(JOB_ENDS_S)
    told = (listened, job.stdout, job.stderr)
    if code == 0:
        assert "verified: continuation: " in job.stdout, told  # it was done when the signal came
    elif listened is False and code != 128 + number:
        assert code in (1, -number), told
    else:
        assert code == 128 + number, told
        assert job.stderr.strip() == LINES[number], told
    return code


@pytest.fixture(scope="module")
def local_s() -> dict[str, float]:
    """Part of the life of a job with a local Ray -> seconds."""
    with Sandbox() as sandbox:
        return durations(sandbox.start_job(*TINY))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("number", LINES, ids=lambda number: number.name)
def test_a_signal_ends_the_job_at_any_moment(request: pytest.FixtureRequest, number: signal.Signals, part: str) -> None:
    """Each on a local Ray of its own, so that its start and its end are struck too."""
    part_s = IMPORTS_S if part == "imports" else request.getfixturevalue("local_s")[part]
    with Sandbox() as sandbox:
        codes = []
        for after_s in moments(part_s):
            job = sandbox.start_job(*TINY)
            codes.append(check_end(job, number, strike(job, number, part, after_s)))
        print(f"{number.name} while {part} ({part_s:.1f} s): exit codes {codes}")
        assert 128 + number in codes
        assert list(sandbox.tmp.glob("ray-ckpt-*")) == []
        wait_until(lambda: not sandbox.processes(), RAY_ENDS_S, sandbox.processes)
