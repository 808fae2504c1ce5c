"""Functions that tests run as tasks. Importable by their processes, so that they travel by name."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.cluster.worker import WorkerContext
from ray_ckpt.progress import Meter


def square(number: int) -> int:
    return number * number


def working_directory() -> str:
    return os.getcwd()


def fail_on(number: int, culprits: list[int]) -> int:
    if number in culprits:
        raise ValueError(f"the disk of {number} is on fire")
    return number


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(directory: str) -> str:
    """Dies when it is first run, and leaves a mark for the second time."""
    mark = Path(directory, "mark")
    if not mark.exists():
        mark.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def count_and_wait(path: str, meter: Meter) -> None:
    """Counts two bytes, and one more once the file is there."""
    meter.add(2)
    deadline = time.monotonic() + 60
    while not Path(path).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    meter.add(1)


def hang(directory: str) -> None:
    Path(directory, str(os.getpid())).write_text("")
    threading.Event().wait()


def form_group(num_workers: int, start_timeout_s: float) -> list[object]:
    """The CPUs of each worker, and what the workers say."""
    with WorkerGroup(num_workers, process_group=False, start_timeout_s=start_timeout_s) as group:
        return [group.demand.cpus, group.run(name)]


class Former:
    """The same in an actor."""

    def form_group(self, num_workers: int, start_timeout_s: float) -> list[object]:
        return form_group(num_workers, start_timeout_s)


def name(ctx: WorkerContext) -> str:
    return f"rank {ctx.rank}"
