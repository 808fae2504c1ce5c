"""Every command of the README, CONTRIBUTING and docs/ is run by a test; so is every Python block of the first two."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

RUN_BY = {
    "make demo": ".ci/run",
    "make test": ".ci/run",
    "make test-jobs": ".ci/run",
    "make test-oldest": ".ci/run",
    "make test-slow": "tests/test_makefile.py::test_arguments_reach_the_commands",
    "make test-matrix": "tests/test_makefile.py::test_arguments_reach_the_commands",
    "make test-cluster": "tests/test_makefile.py::test_arguments_reach_the_commands",
    "make test-faults": "tests/test_makefile.py::test_arguments_reach_the_commands",
    "make test-frameworks": "tests/test_makefile.py::test_arguments_reach_the_commands",
    "make soak": "tests/test_makefile.py::test_arguments_reach_the_commands",
    "make test-versions": "tests/test_makefile.py::test_arguments_reach_the_commands",
    "make lint": ".ci/run",
    "make docs": "tests/test_makefile.py::test_arguments_reach_the_commands",
    'make bench ARGS="--sizes 0.1"': "tests/test_makefile.py::test_arguments_reach_the_commands",
    "make bench-async": "tests/test_makefile.py::test_arguments_reach_the_commands",
    "make bench-planning": "tests/test_makefile.py::test_arguments_reach_the_commands",
    'make demo ARGS="--target fsdp1"': "tests/test_makefile.py::test_arguments_reach_the_commands",
    'make test ARGS="-k fingerprint -x"': "tests/test_makefile.py::test_arguments_reach_the_commands",
    "make format": "tests/test_makefile.py::test_arguments_reach_the_commands",
    "make constraints": "tests/test_makefile.py::test_arguments_reach_the_commands",
    "pip install .": "tests/test_public_face.py::installed",
    "python jobs/pipeline_to_fsdp.py": "tests/test_start_modes.py",
    "export RAY_AUTH_MODE=token": "tests/test_start_modes.py",
    "ray get-auth-token --generate": "tests/test_start_modes.py",
    "ray start --head": "tests/test_start_modes.py",
    "python jobs/pipeline_to_fsdp.py --storage /mnt/shared/run1": "tests/test_start_modes.py",
    "ray job submit --working-dir . -- python jobs/pipeline_to_fsdp.py --storage /mnt/shared/run2": (
        "tests/test_start_modes.py"
    ),
    "python jobs/reshard.py --source /mnt/shared/run1 --to fsdp2x2.tp2 --target /mnt/shared/run1-resharded": (
        "tests/test_reshard_job.py::test_a_rewritten_checkpoint_is_the_same_for_everybody"
    ),
    "python jobs/train_elastic.py --layouts pp4,fsdp2x3,fsdp2x2,single --storage /mnt/shared/run3": (
        "tests/test_train_elastic.py"
    ),
    "python jobs/ray_train.py --storage /mnt/shared/run4 --workers 4": "tests/test_ray_train.py",
    "python jobs/ray_train.py --storage /mnt/shared/run4 --workers 2": "tests/test_ray_train.py",
    "torchrun --nproc-per-node 2 stages.py": "tests/test_tutorials.py::test_the_commands_of_a_page_run_its_files",
    "torchrun --nproc-per-node 2 fsdp.py": "tests/test_tutorials.py::test_the_commands_of_a_page_run_its_files",
    "torchrun --nproc-per-node 2 train.py": "tests/test_tutorials.py::test_the_commands_of_a_page_run_its_files",
    "torchrun --nproc-per-node 3 train.py": "tests/test_tutorials.py::test_the_commands_of_a_page_run_its_files",
    # What Ray's launcher would do with the file is checked as far as that goes without an account.
    "ray up cluster.yaml": "tests/test_cluster_yaml.py::test_it_keeps_rays_schema",
    "ray submit cluster.yaml jobs/pipeline_to_fsdp.py --gpus-per-worker 1 --start-timeout 1200 "
    "--storage s3://bucket/run1": "tests/test_readme.py::test_options_in_the_readme_exist",
    "ray down cluster.yaml": "tests/test_cluster_yaml.py::test_it_keeps_rays_schema",
}
"""Command -> where it is run: a test, a test file, or CI itself."""


PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
DOCUMENTS = sorted((REPOSITORY / "docs").rglob("*.md"))
"""Their Python blocks are run by `tests/test_tutorials.py`."""


def blocks(language: str, pages: Sequence[Path] = PAGES) -> list[str]:
    texts = [page.read_text() for page in pages]
    return [block for text in texts for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


def commands() -> list[str]:
    lines = [line.partition("  #")[0] for block in blocks("bash", PAGES + DOCUMENTS) for line in block.splitlines()]
    lines = [line.strip() for line in lines]
    return [line for line in lines if line]


def test_every_command_is_run_somewhere() -> None:
    assert set(commands()) == RUN_BY.keys()


@pytest.mark.parametrize("where", sorted(set(RUN_BY.values())))
def test_that_place_exists(where: str) -> None:
    file, _, name = where.partition("::")
    text = (REPOSITORY / file).read_text()
    assert not name or f"def {name}(" in text


def test_ci_runs_what_it_is_said_to_run() -> None:
    script = (REPOSITORY / ".ci" / "run").read_text()
    assert {command for command, where in RUN_BY.items() if where == ".ci/run" and command in script} == {
        "make demo",
        "make test",
        "make test-jobs",
        "make test-oldest",
        "make lint",
    }


def test_options_in_the_readme_exist() -> None:
    shown = {job: _help_of(job) for job in ("jobs/pipeline_to_fsdp.py", "jobs/train_elastic.py")}
    for job, text in shown.items():
        in_commands = {word for line in commands() if job in line for word in re.findall(r" (--[a-z-]+)", line)}
        assert in_commands
        assert not {option for option in in_commands - {"--working-dir"} if option not in text}
    named = set(re.findall(r"`(--[a-z-]+)", (REPOSITORY / "README.md").read_text())) - {"--help"}
    assert named
    assert not {option for option in named if not any(option in text for text in shown.values())}


def _help_of(job: str) -> str:
    done = subprocess.run(
        [sys.executable, job, "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout


@pytest.mark.jobs
@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.split()[1])
def test_every_python_block_runs(block: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", block],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
