"""Jobs in poor surroundings: each ends right, or in one line that says what to do, and leaves nothing."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from rich.console import Console

from ray_ckpt.cluster.deferral import signals_deferred
from ray_ckpt.errors import UsageError
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.recipes.command import main
from ray_ckpt.recipes.json_output import json_alone, write_json
from ray_ckpt.recipes.pipeline_to_fsdp.command import pipeline_to_fsdp
from ray_ckpt.recipes.screen import Screen
from ray_ckpt.recipes.setting import check_layouts, storage_of
from ray_ckpt.recipes.workload import Workload
from tests.conftest import REPOSITORY
from tests.support.commands import assert_refused

SWALLOWED = """
import os, signal, sys
import click
import ray_ckpt.recipes.command

number = int(sys.argv.pop())

class Deaf:
    def __del__(self):
        os.kill(os.getpid(), number)  # Python cannot raise here

@click.command()
def endless():
    Deaf()
    while True:
        signal.pause()

ray_ckpt.recipes.command.main("__main__:endless")
"""


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGINT, 130, "error: interrupted"), (signal.SIGTERM, 143, "error: terminated")],
)
def test_a_signal_is_not_lost_where_python_cannot_raise(number: signal.Signals, code: int, line: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWED, str(int(number))], cwd=REPOSITORY, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == code
    assert done.stderr.strip() == line


def test_signals_wait_while_ray_connects() -> None:
    handled: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: handled.append(number))
    ours = signal.getsignal(signal.SIGTERM)
    try:
        with signals_deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert handled == []
        assert handled == [signal.SIGTERM]
        with signals_deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert len(handled) == 2  # who insists is heard at once
        assert len(handled) == 3
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("raising", "the model factory 'tests.support.models:raising' raised KeyError: 'no such setting' ("),
        ("tests/support/models.py:raising", "must look like pkg.module:factory"),
    ],
)
def test_a_factory_that_fails_is_named(
    factory: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = factory if ":" in factory else f"tests.support.models:{factory}"
    assert_refused(pipeline_to_fsdp, ["--model", spec], message, monkeypatch, capsys)


@pytest.fixture
def handlers() -> Iterator[None]:
    """A command leaves signals ignored, as its process is to end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def make():\n    raise SystemExit(1)", "raised SystemExit: 1 ("),
        (
            "class Mute(Exception):\n    __str__ = None\ndef make():\n    raise Mute",
            "raised Mute: its message cannot be",
        ),
        ("def make():\n    raise ValueError('long' * 2**18)", "factory_here.py:2)"),
        ("class Own(BaseException): pass\ndef make():\n    raise Own('way')", "raised Own: way ("),
        ("make = 7", "is a int, not a callable"),
        ("make = lambda: 7", "must return a torch.nn.Module, not int"),
        ("import argparse\nargparse.ArgumentParser().parse_args()", "cannot import the model factory"),
        ("import no_such_module", "No module named 'no_such_module'; it is looked for in this directory and where"),
    ],
)
def test_a_factory_in_a_file_here_that_fails_in_any_way_is_told_in_one_line(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "größer und mit Platz"
    directory.mkdir()
    (directory / "factory_here.py").write_text(body)
    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "factory_here", raising=False)
    monkeypatch.setattr(sys, "argv", ["job.py", "--model", "factory_here:make"])
    with pytest.raises(SystemExit) as ended:
        main("ray_ckpt.recipes.pipeline_to_fsdp.command:pipeline_to_fsdp")
    monkeypatch.delitem(sys.modules, "factory_here", raising=False)
    last = capfd.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2
    assert last.startswith("error: ")
    assert message in last
    assert len(last) < 2100


def test_a_factory_that_goes_elsewhere_takes_no_relative_path_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandering.py").write_text(
        "import os\nfrom ray_ckpt.recipes.model import PipelineModel\n"
        "def make():\n    os.chdir('/')\n    return PipelineModel(8, 2)"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    layouts = [Layout.parse("pp2")]
    check_layouts(Workload.of("wandering:make", 8, 2, layouts), layouts, Screen(Console(file=io.StringIO())))
    assert Path.cwd() == tmp_path


DEAD = """
import click
import ray_ckpt.recipes.command
from ray_ckpt.errors import DIED, RankFailure, WorkerError

@click.command()
def doomed():
    raise WorkerError((RankFailure(1, "host (10.0.0.1)", DIED, "process 7 is gone"),))

ray_ckpt.recipes.command.main("__main__:doomed")
"""


def test_a_worker_that_died_is_told_in_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", DEAD], cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr == "error: rank 1 on host (10.0.0.1): died: process 7 is gone\n"


REFUSED = """
import click
import ray_ckpt.recipes.command
from ray_ckpt.errors import RankFailure, WorkerError

@click.command()
def full():
    raise WorkerError((
        RankFailure(1, "host (10.0.0.1)", "ray_ckpt.errors.StorageError", "cannot write /x: full", "Traceback: ours"),
        *(RankFailure(2, "host (10.0.0.1)", "ValueError", "the user's", "Traceback: theirs") for _ in range(OTHERS)),
    ))

ray_ckpt.recipes.command.main("__main__:full")
"""


@pytest.mark.parametrize("others", [0, 1])
def test_an_error_of_ours_on_a_worker_is_told_in_one_line_and_others_with_their_traceback(others: int) -> None:
    code = REFUSED.replace("OTHERS", str(others))
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ours" not in done.stderr
    assert done.stderr.count("Traceback: theirs") == others
    *_, last = lines = done.stderr.splitlines()
    assert last.startswith("error: rank 1 on host (10.0.0.1): ray_ckpt.errors.StorageError: cannot write /x: full")
    assert len(lines) == (3 if others else 1)


def test_what_a_model_prints_past_python_does_not_mix_with_the_json(capfd: pytest.CaptureFixture[str]) -> None:
    with json_alone("-"):
        os.write(1, b"raw\n")
        subprocess.run(["echo", "of a child"], check=True)
    write_json({"verified": True}, "-")
    shown = capfd.readouterr()
    assert shown.err == "raw\nof a child\n"
    assert json.loads(shown.out) == {"verified": True}


def test_what_others_print_does_not_mix_with_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    with json_alone("-"):
        print("a factory's own words")
        click.echo("and others")
    write_json({"verified": True}, "-")
    with json_alone("out.json"):
        print("to the screen")
    shown = capsys.readouterr()
    assert shown.err == "a factory's own words\nand others\n"
    assert json.loads(shown.out.removesuffix("to the screen\n")) == {"verified": True}


def test_the_temporary_directory_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with storage_of(None) as directory:
        assert os.stat(directory).st_mode & 0o777 == 0o700
        assert Path(directory).parent == tmp_path
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from ray_ckpt.recipes.setting import storage_of

with storage_of(None) as directory:
    open(os.path.join(directory, "manifest.json"), "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_temporary_directory_of_a_killed_job_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = [sys.executable, "-c", KILLED]
    subprocess.run(killed, cwd=REPOSITORY, env={**os.environ, "TMPDIR": str(tmp_path)}, timeout=30, check=False)
    [left] = tmp_path.iterdir()
    somebody_elses = tmp_path / "ray-ckpt-mine"
    somebody_elses.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with storage_of(None) as first, storage_of(None) as second:
        assert {*tmp_path.iterdir()} == {Path(first), Path(second), somebody_elses}
        assert left not in {Path(first), Path(second)}
    assert list(tmp_path.iterdir()) == [somebody_elses]


def test_no_temporary_directory_is_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/self/nothing")
    with pytest.raises(UsageError, match=r"cannot make a temporary directory: .*; give --storage, or set TMPDIR"):
        storage_of(None).__enter__()
