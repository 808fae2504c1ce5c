"""How far a long operation is: what callables are told, and what a terminal and a log show of it."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console

from ray_ckpt import CheckpointStore, TrainState, load, resume, save, verify
from ray_ckpt.progress import Meter
from ray_ckpt.recipes import screen as screen_module
from ray_ckpt.recipes.screen import Screen
from tests.support.faulty import Fault, FaultyStorage

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

Told = list[tuple[int, int]]


def state(value: float = 1.0) -> dict[str, Any]:
    return {"large": torch.full((3 << 20,), value), "small": torch.full((10,), value), "step": 3}


NUM_BYTES = (3 << 22) + 40


def noted(told: Told) -> Any:
    return lambda done, total: told.append((done, total))


@pytest.mark.parametrize("blocking", [True, False])
def test_a_save_tells_the_bytes_of_its_tensors(tmp_path: Path, blocking: bool) -> None:
    told: Told = []
    saved = save(state(), tmp_path, blocking=blocking, progress=noted(told))
    if not blocking:
        saved.result(timeout_s=60)
    assert told[-1] == (NUM_BYTES, NUM_BYTES)
    assert told == sorted(told)
    assert {total for _, total in told} == {NUM_BYTES}


def test_a_load_tells_what_it_reads(tmp_path: Path) -> None:
    save(state(), tmp_path)
    told: Told = []
    target = state(0.0)
    load(target, tmp_path, progress=noted(told))
    assert torch.equal(target["large"], state()["large"])
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] >= NUM_BYTES


def test_a_resume_and_a_load_of_anothers_checkpoint_tell_it_too(tmp_path: Path) -> None:
    model = torch.nn.Linear(600, 600)
    store = CheckpointStore(tmp_path / "run")
    save(TrainState(model), store, 1)
    told: Told = []
    resume(TrainState(torch.nn.Linear(600, 600)), store, progress=noted(told))
    assert told[-1][0] == told[-1][1] >= 600 * 600 * 4
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "stock", no_dist=True)
    told.clear()
    load(TrainState(torch.nn.Linear(600, 600)), tmp_path / "stock", progress=noted(told))
    assert told[-1][0] == told[-1][1] >= 600 * 600 * 4


@pytest.mark.parametrize("kind", ["ours", "dcp", "pt"])
def test_a_check_tells_every_byte_it_reads(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c.pt" if kind == "pt" else tmp_path
    if kind == "ours":
        save(state(), path)
    elif kind == "dcp":
        dcp.save(state(), checkpoint_id=path, no_dist=True)
    else:
        torch.save(state(), path)
    told: Told = []
    report = verify(path, progress=noted(told))
    assert told[-1] == (report.total_bytes, report.total_bytes)
    assert len(told) >= 2
    assert told == sorted(told)


def test_a_file_that_is_written_again_counts_from_its_beginning(tmp_path: Path) -> None:
    told: Told = []
    fault = Fault("throttled", ("finish",), name=".distcp")
    save(state(), FaultyStorage(str(tmp_path), fault, rank=0), progress=noted(told))
    assert told[-1] == (NUM_BYTES, NUM_BYTES)
    assert all(done <= total for done, total in told)


def test_a_callable_that_raises_is_told_once_and_the_save_goes_on(tmp_path: Path) -> None:
    calls = []

    def broken(done: int, total: int) -> None:
        calls.append(done)
        raise ValueError("no such bar")

    for verb in (
        lambda: save(state(), tmp_path / "1", progress=broken),
        lambda: load(state(), tmp_path / "1", progress=broken),
        lambda: verify(tmp_path / "1", progress=broken),
    ):
        calls.clear()
        with pytest.warns(RuntimeWarning, match=r"progress= raised ValueError: no such bar"):
            verb()
        assert len(calls) == 1


def test_ctrl_c_in_a_callable_ends_the_save(tmp_path: Path) -> None:
    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(state(), tmp_path, progress=interrupted)
    assert not (tmp_path / "manifest.json").exists()


def test_a_slow_callable_holds_up_nobody_but_its_own_thread() -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow(done: int, total: int) -> None:
        entered.set()
        assert leave.wait(60)

    meter = Meter(slow)
    meter.expect(100)
    thread = threading.Thread(target=meter.add, args=(1,))
    thread.start()
    assert entered.wait(60)
    for _ in range(50):
        meter.add(1)  # returns, though `slow` has not
    leave.set()
    thread.join(60)


def test_threads_lose_no_count() -> None:
    told: Told = []
    meter = Meter(noted(told))
    meter.expect(8000)
    threads = [threading.Thread(target=lambda: [meter.add(1) for _ in range(1000)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    meter.end()
    assert told[-1] == (8000, 8000)
    assert len(told) < 200


AT_ONCE = "from ray_ckpt.cli import progress, main; progress.DELAY_S = 0; main.run()"
"""The command, whose bar does not wait half a second, as a small checkpoint does not take that long."""


def terminal_session(command: list[str]) -> tuple[int, str]:
    """Run a command with a terminal of its own; its exit code, and all that the terminal was sent."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    shown, deadline = b"", time.monotonic() + 100
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        while time.monotonic() < deadline:
            if not select.select([terminal], [], [], 0.1)[0]:
                continue
            try:
                data = terminal.read(65536)
            except OSError:  # what Linux says when nobody has the other end any more
                break
            if not data:
                break
            shown += data
    return process.wait(10), shown.decode()


@pytest.mark.parametrize("arguments", [[], pytest.param(["--scan-nan"], marks=pytest.mark.slow)])
def test_a_terminal_shows_a_bar_with_bytes_rate_and_time_left(tmp_path: Path, arguments: list[str]) -> None:
    save(state(), tmp_path)
    code, shown = terminal_session([sys.executable, "-c", AT_ONCE, "verify", str(tmp_path), *arguments])
    assert code == 0
    assert "\x1b[" in shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"verify \S+ [\d.]+/12\.\d MiB [\d.]+ [kMG]?B/s \d:\d\d:\d\d", plain), plain
    assert "verified: 2 tensors" in shown


@pytest.mark.parametrize(
    "arguments",
    [["verify"], *(pytest.param(["verify", more], marks=pytest.mark.slow) for more in ("--json", "--scan-nan"))],
)
def test_a_log_shows_none(tmp_path: Path, arguments: list[str]) -> None:
    save(state(), tmp_path)
    command = [sys.executable, "-c", AT_ONCE, *arguments, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=110)
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout
    assert done.stderr == ""


def test_json_on_a_terminal_has_no_bar_in_it(tmp_path: Path) -> None:
    save(state(), tmp_path)
    code, shown = terminal_session([sys.executable, "-c", AT_ONCE, "verify", str(tmp_path), "--json"])
    assert code == 0
    assert "\x1b" not in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_a_phase_shows_bytes_rate_and_time_left_once_it_is_long(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen_module, "LOG_INTERVAL_S", 0.0)
    file = io.StringIO()
    screen = Screen(Console(file=file, force_terminal=terminal, width=120))
    with screen.phase("save", "all of it") as line:
        line.progress(0, 4 << 20)
        line.progress(1 << 20, 4 << 20)
        monkeypatch.setattr(screen_module, "LONG_S", 0.0)
        line.progress(3 << 20, 4 << 20, "2 ranks")
        line.progress(1 << 10, 1 << 20)  # the next operation begins
        if terminal and line.status is not None:
            line.status.update(f"{line.status.status}")
    told = file.getvalue()
    assert "1 MiB of" not in told
    if not terminal:
        assert re.search(r"save: 2 ranks, 3 MiB of 4 MiB, .* [GMk]iB/s, \d+ s left", told), told
