"""The Dockerfile keeps hadolint's rules and has what the package is built of; its page shows our versions."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

import ray_ckpt
from tests.conftest import REPOSITORY

DOCKERFILE = REPOSITORY / "Dockerfile"
PAGE = REPOSITORY / "docs" / "howto" / "image.md"


def complaints(text: str, directory: Path) -> str:
    (directory / "Dockerfile").write_text(text)
    environments = [Path(path).parents[2] for path in sys.path if Path(path).name == "site-packages"]
    hadolint = shutil.which("hadolint", path=os.pathsep.join(str(each / "bin") for each in environments))
    assert hadolint, "pip install -e '.[dev]' brings it"
    done = subprocess.run(
        [hadolint, "--no-color", "Dockerfile"], cwd=directory, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr


def test_hadolint_has_nothing_to_say(tmp_path: Path) -> None:
    text = DOCKERFILE.read_text()
    assert complaints(text, tmp_path) == ""
    assert "DL3006" in complaints(re.sub(r"^FROM (\S+):\S+", r"FROM \1", text, flags=re.MULTILINE), tmp_path)


def test_it_copies_what_the_package_is_built_of() -> None:
    copied = {
        name for line in re.findall(r"^COPY --chown=\S+ (.*)$", DOCKERFILE.read_text(), re.M) for name in line.split()
    }
    project = (REPOSITORY / "pyproject.toml").read_text()
    named = re.findall(r'^(?:readme = |license-files = \[)"(.*?)"', project, re.M)
    assert len(named) == 2
    assert {"pyproject.toml", "constraints.txt", "ray_ckpt", *named} <= copied
    allowed = re.findall(r"^!(.*)$", (REPOSITORY / ".dockerignore").read_text(), re.M)
    for name in copied - {"./"}:
        assert (REPOSITORY / name).exists()
        assert any(fnmatch.fnmatch(name, pattern) for pattern in allowed)


def test_the_page_shows_these_versions() -> None:
    text = PAGE.read_text()
    assert set(re.findall(r"ray-ckpt:([\d.]+)", text)) == {ray_ckpt.__version__}
    [launcher] = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert launcher["docker"].keys() == {"image", "container_name"}
