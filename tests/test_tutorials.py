"""Every Python block of the tutorials and how-to pages runs, as the page shows it."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.support.programs import DOCS, blocks, run
from tests.support.s3 import run_s3

PROGRAMS = {
    "index.md": "",
    "memory.md": "durable (4, 5)",
    "howto/damaged.md": "1",
    "howto/elastic.md": "5\n",
    "howto/publish.md": "6 True\n(7, 8, 9) True\n9 [('qk', (6, 8))]\n2 tensors are equal: [3000.0]",
    "howto/retention.md": "(300, 500, 900, 1000)",
    "howto/storage.md": "(1,)",
    "howto/watching.md": "write 0 4000",
    "tutorials/accelerate.md": "",
    "tutorials/hugging_face.md": "same logits: True",
    "tutorials/trainer.md": "",
}
"""Page whose blocks are one program -> a line that it prints."""

SCRIPTS = {
    "tutorials/pipeline_to_fsdp.md": "1 [0.001, 0.0001]",
    "tutorials/torchrun.md": "resumed at step 20",
}
"""Page whose blocks are files, and whose commands run them -> a line that the last one prints."""

EXCERPTS = {"ray_train.md": "jobs/ray_train.py"}
"""Page -> the program that its lines are taken from, which has a test of its own."""

BY_TEST_FRAMEWORKS = {"tutorials/lightning.md": "tests/test_frameworks.py::test_the_lightning_page_runs"}

NOT_RUN = {
    "tutorials/torchtitan.md": "torchtitan 0.2 wants a nightly torch and GPUs. Its checkpoints are those of stock DCP, "
    "which tests/test_foreign.py loads, in the run folder of tests/test_training_directory.py",
}


def test_every_page_with_a_block_is_run_or_says_why_not() -> None:
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    listed = [*PROGRAMS, *SCRIPTS, *EXCERPTS, *BY_TEST_FRAMEWORKS, *NOT_RUN]
    assert {page for page in pages if blocks(page)} == set(listed)
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("page", EXCERPTS)
def test_excerpts_are_lines_of_the_program(page: str) -> None:
    program = {line.strip() for line in (REPOSITORY / EXCERPTS[page]).read_text().splitlines()}
    shown = {line.strip() for _, text in blocks(page) for line in text.splitlines()}
    assert shown - program == set()


LONG = {"howto/publish.md"}
"""Of `make test-slow`: the program takes half a minute, and starts Ray twice, which once stood still for minutes."""


@pytest.mark.jobs
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page in LONG else []) for page in PROGRAMS]
)
def test_the_blocks_of_a_page_are_a_program(page: str, tmp_path: Path) -> None:
    program = "\n".join(text for _, text in blocks(page))
    file = tmp_path / "program.py"
    with run_s3() as s3:
        options = f"scheme=http&endpoint_override=127.0.0.1:{s3.port}&"
        file.write_text(program.replace("?region", f"?{options}region"))
        printed = run(
            [sys.executable, "-W", "ignore", str(file)],
            tmp_path,
            AWS_ACCESS_KEY_ID="key",
            AWS_SECRET_ACCESS_KEY="secret",
        )
    assert PROGRAMS[page] in printed


@pytest.mark.jobs
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", SCRIPTS)
def test_the_commands_of_a_page_run_its_files(page: str, tmp_path: Path) -> None:
    for name, text in blocks(page):
        (tmp_path / name).write_text(text)
    [commands] = re.findall(r"```bash\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    printed = [
        run([shutil.which("torchrun") or "torchrun", *line.split()[1:]], tmp_path) for line in commands.splitlines()
    ]
    assert SCRIPTS[page] in printed[-1]
    assert SCRIPTS[page] not in printed[0]
