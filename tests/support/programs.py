"""The Python that pages of docs/ show, and how it is run: as a person would, in an empty directory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"

_BLOCK = re.compile(r'```python(?: title="([\w.]+)")?\n(.*?)```', re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """File and text of each block of a page."""
    return _BLOCK.findall((DOCS / page).read_text())


def run(command: list[str], directory: Path, **more: str) -> str:
    """What it prints; with more in the environment."""
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=directory, env={**surroundings, **more}, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
