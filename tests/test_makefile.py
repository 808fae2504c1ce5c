"""`make` installs once, installs again when what is to be installed changes, and passes options on."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def would_run(directory: Path, *arguments: str) -> str:
    """The commands that make would run."""
    done = subprocess.run(
        ["make", "--dry-run", *arguments], cwd=directory, capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A clone whose .venv is up to date."""
    (tmp_path / ".venv").mkdir()
    for age_s, name in ((300, "Makefile"), (300, "pyproject.toml"), (300, "constraints.txt")):
        shutil.copy(REPOSITORY / name, tmp_path / name)
        set_age(tmp_path / name, age_s)
    for age_s, name in ((200, ".venv/.installed"), (100, ".venv/.installed-dev"), (50, ".venv/.installed-docs")):
        (tmp_path / name).touch()
        set_age(tmp_path / name, age_s)
    return tmp_path


def set_age(path: Path, age_s: float) -> None:
    now = path.parent.stat().st_mtime
    os.utime(path, (now - age_s, now - age_s))


@pytest.mark.parametrize("target", ["demo", "test", "lint", "docs"])
def test_the_second_call_installs_nothing(installed: Path, target: str) -> None:
    assert "pip install" not in would_run(installed, target)


@pytest.mark.parametrize("target", ["demo", "test", "lint", "docs"])
@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_a_change_of_what_is_needed_installs_again(installed: Path, target: str, changed: str) -> None:
    set_age(installed / changed, 0)
    expected = "pip install --disable-pip-version-check -q --no-compile -c constraints.txt -e"
    assert expected in would_run(installed, target)


def test_what_is_run_keeps_its_compiled_code() -> None:
    shown = subprocess.run(
        ["make", "--eval", "show:; @env", "show"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    ).stdout
    assert "PATH=" in shown
    assert "PYTHONDONTWRITEBYTECODE" not in shown


def test_the_demo_needs_no_test_dependencies(installed: Path) -> None:
    shutil.rmtree(installed / ".venv")
    assert "[dev]" not in would_run(installed, "demo")
    assert "[dev]" in would_run(installed, "test")


@pytest.mark.parametrize(
    ("target", "arguments", "expected"),
    [
        (
            "test",
            "-k fingerprint -x",
            '-m "not jobs and not slow and not matrix and not cluster and not faults and not frameworks and not soak '
            'and not oldest" -k fingerprint -x',
        ),
        ("test-jobs", "-x", '--no-loadscope-reorder -m "jobs and not slow and not faults" -x'),
        ("test-slow", "-k s3", ".venv/bin/python -m pytest -m slow -k s3"),
        ("test-matrix", "-k llama", ".venv/bin/python -m pytest -m matrix -k llama"),
        ("test-cluster", "-x", ".venv/bin/python -m pytest -m cluster -x"),
        ("test-faults", "-x", ".venv/bin/python -m pytest -m faults -x"),
        ("test-frameworks", "-x", ".venv-frameworks/bin/python -m pytest -m frameworks tests/test_frameworks.py -x"),
        ("soak", "-x", ".venv/bin/python -m pytest -m soak tests/test_soak.py -x"),
        ("test-versions", "ray2.54", "python3 tests/versions.py ray2.54"),
        ("test-oldest", "-x", "tests/test_ray_internals.py tests/test_cluster_saving.py -x"),
        ("bench", "--sizes 0.1", ".venv/bin/python benchmarks/storage.py --sizes 0.1"),
        ("bench", "", ".venv/bin/python benchmarks/planning.py"),
        ("bench-async", "--repeats 3", ".venv/bin/python benchmarks/async_save.py --repeats 3"),
        ("bench-planning", "--max-parts 9", ".venv/bin/python benchmarks/planning.py --max-parts 9"),
        ("demo", "--target fsdp1", ".venv/bin/python jobs/pipeline_to_fsdp.py --target fsdp1"),
        ("docs", "--site-dir out", ".venv/bin/python -m mkdocs build --quiet --strict --site-dir out"),
        ("lint", "", ".venv/bin/python -m mkdocs build --quiet --strict"),
        ("format", "", ".venv/bin/ruff format ."),
        ("constraints", "", "uv pip compile"),
    ],
)
def test_arguments_reach_the_commands(target: str, arguments: str, expected: str) -> None:
    assert expected in would_run(REPOSITORY, target, f"ARGS={arguments}")


def test_tests_of_a_group_are_kept_together(request: pytest.FixtureRequest) -> None:
    """pytest-xdist tells them by the ends of their names, which not every pytest lets it change."""
    if not hasattr(request.config, "workerinput"):
        pytest.skip("not one of several processes")
    grouped = [item.nodeid for item in request.session.items if item.get_closest_marker("xdist_group")]
    assert [nodeid for nodeid in grouped if "@" not in nodeid.rpartition("]")[2]] == []
