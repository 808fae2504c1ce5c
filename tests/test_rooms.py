"""The house keeps its floors: a module imports only from lower ones, and some libraries have one home."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ray_ckpt

PACKAGE = Path(ray_ckpt.__file__).parent

FLOORS = {
    "errors": 0,
    "events": 1,
    "gc_pause": 0,
    "phase_clock": 1,
    "plain_data": 0,
    "progress": 0,
    "report": 0,
    "rounding": 0,
    "text": 0,
    "text_units": 0,
    "format": 1,
    "storage": 2,
    "parallel": 2,
    "state": 2,
    "inspection": 3,
    "protocol": 3,
    "checkpoint": 4,
    "cluster": 4,
    "dcp": 4,
    "signing": 4,
    "conversion": 5,
    "pictures": 5,
    "recipes": 6,
    "__init__": 7,
    "cli": 7,
    "__main__": 8,
    "integrations": 8,
}
"""Rooms and single modules. Those on one floor know nothing of each other."""

ONLY_HOMES = {
    "ray": {"cluster", "integrations.ray_train"},
    "pyarrow": {
        "storage.files",
        "storage.filesystems",
        "storage.file_objects",
        "storage.registered",
        "storage.delta_codec",
        "cluster.ram.sending",
    },
    "boto3": {"storage.unfinished_uploads"},
    "click": {"cli", "recipes"},
    "rich": {"cli", "recipes"},
    "jinja2": {"pictures"},
    "vl_convert": {"pictures"},
    "model_signing": {"signing"},
}
"""Who may import a library: a room, or one module of it."""

LONGEST_FILE, LONGEST_FUNCTION = 500, 70
"""Lines of a file; lines of a function without its docstring, as every argument of a public one is described."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__") or "__init__"


def imports(path: Path) -> set[str]:
    """Every module named by an import statement, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_a_module_imports_only_from_lower_floors(path: Path) -> None:
    room = module_name(path).split(".")[0]
    for name in imports(path):
        if name.startswith("ray_ckpt."):
            other = name.split(".")[1]
            assert other == room or FLOORS[other] < FLOORS[room], f"{room} must not import {name}"


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_a_library_is_imported_only_in_its_home(path: Path) -> None:
    module = module_name(path)
    for name in imports(path):
        homes = ONLY_HOMES.get(name.split(".")[0])
        assert homes is None or any(module == home or module.startswith(home + ".") for home in homes), (
            f"{module} must not import {name}: its home is {homes}"
        )


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_files_and_functions_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            assert lines <= LONGEST_FUNCTION, f"{path}: {node.name}"


def test_importing_the_package_imports_neither_ray_nor_torch() -> None:
    code = "import sys, ray_ckpt; print(sorted({'ray', 'torch', 'pyarrow'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_had() -> None:
    assert sorted(ray_ckpt.__all__) == ray_ckpt.__all__
    for name in ray_ckpt.__all__:
        assert getattr(ray_ckpt, name) is not None
    assert set(ray_ckpt.__all__) <= set(dir(ray_ckpt))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ray_ckpt.no_such_name
