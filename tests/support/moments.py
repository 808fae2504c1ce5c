"""Moments of a job's life at which a signal strikes it, spread over what it does."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

from tests.support.clusters import Started

MOMENTS_EACH = 10
"""Moments that are struck in each part of a job's life."""
PARTS = {"imports": "", "joining": "ray: looking", "working": "group: starting"}
"""Part of a job's life -> what the job prints as it begins."""
IMPORTS_S = 1.0
JOB_ENDS_S = 120
"""After a signal, or without one. On an idle machine it is 1 s, or 8."""


def moments(part_s: float) -> list[float]:
    """Seconds after the beginning of a part that takes so long."""
    return [part_s * (moment + 1) / (MOMENTS_EACH + 1) for moment in range(MOMENTS_EACH)]


def durations(job: Started) -> dict[str, float]:
    """Let a job come to its end. Part of its life -> seconds that it took."""
    began = {}
    for part, text in PARTS.items():
        job.wait_for(text, JOB_ENDS_S)
        began[part] = time.monotonic()
    assert job.wait(JOB_ENDS_S) == 0, job.stderr
    ends = [*list(began.values())[1:], time.monotonic()]
    return {part: end - began[part] for part, end in zip(began, ends, strict=True)}


def strike(job: Started, number: signal.Signals, part: str, after_s: float) -> bool | None:
    """Send the signal at that moment.

    Returns:
        Whether the job listened to signals by then; until it does, Python ends as it always does. None: it had ended.
    """
    job.wait_for(PARTS[part], JOB_ENDS_S)
    try:
        job.process.wait(timeout=after_s)
    except subprocess.TimeoutExpired:
        [caught] = re.findall(r"SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{job.pid}/status").read_text())
        job.process.send_signal(number)
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)
    return None
