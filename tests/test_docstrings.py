"""What the public names say of themselves: a summary line, and an example that runs."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ray_ckpt
from ray_ckpt.errors import RayCkptError
from tests.conftest import REPOSITORY

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def names_in_cluster() -> list[str]:
    """The verbs that need Ray, found without loading it."""
    tree = ast.parse((REPOSITORY / "ray_ckpt" / "cluster" / "__init__.py").read_text())
    [listed] = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    return [f"cluster.{name}" for name in ast.literal_eval(listed)]


ON_RAY = ["TransferReport", "WorkerContext", "WorkerGroup", *names_in_cluster()]
OFF_RAY = [name for name in ray_ckpt.__all__ if name != "__version__" and name not in ON_RAY]


def public(name: str) -> Any:
    room, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"ray_ckpt.{room}") if room else ray_ckpt, attribute)


def needs_example(item: Any) -> bool:
    return not (isinstance(item, type) and issubclass(item, RayCkptError)) and not inspect.ismodule(item)


@pytest.mark.parametrize("name", OFF_RAY + ON_RAY)
def test_it_has_a_summary_and_an_example(name: str) -> None:
    item = public(name)
    summary = (inspect.getdoc(item) or "").splitlines()[0]
    assert summary.endswith((".", "?")), summary
    assert not summary.startswith("Of "), summary
    if needs_example(item):
        assert doctest.DocTestParser().get_examples(item.__doc__), f"{name} has no example"


@pytest.mark.parametrize("name", [name for name in OFF_RAY + ON_RAY if name[0].isupper()])
def test_its_methods_have_a_summary(name: str) -> None:
    item = public(name)
    methods = [key for key, value in vars(item).items() if key[0] != "_" and (callable(value) or is_descriptor(value))]
    assert not [key for key in methods if not inspect.getdoc(getattr(item, key))]


def is_descriptor(value: object) -> bool:
    return isinstance(value, (property, classmethod, staticmethod))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("name", OFF_RAY)
def test_its_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_examples(name, tmp_path, monkeypatch)


@pytest.mark.jobs
@pytest.mark.parametrize("name", ON_RAY)
def test_its_examples_run_on_ray(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None) -> None:
    run_examples(name, tmp_path, monkeypatch)


def run_examples(name: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the object and of its methods, each as a program of its own in an empty directory."""
    item = public(name)
    if not needs_example(item):
        return
    failures: list[str] = []
    for number, test in enumerate(doctest.DocTestFinder().find(item, name, globs={"__name__": "__main__"})):
        here = directory / str(number)
        here.mkdir()
        monkeypatch.chdir(here)
        doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=failures.append)
    assert not failures, "".join(failures)
    assert os.listdir(directory)


def test_fields_say_what_they_are() -> None:
    """ "Byte offset of the container in `file`" rather than "Of the container, in the file"."""
    told = [(path.name, *field) for path in (REPOSITORY / "ray_ckpt").rglob("*.py") for field in described_fields(path)]
    assert len(told) > 300
    assert not [field for field in told if field[-1].startswith(("Of ", "In ", "By ", "For ", "To ", "At "))]


def described_fields(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of the docstrings below fields and constants."""
    for node in ast.walk(ast.parse(path.read_text())):
        body = getattr(node, "body", None)
        for before, after in itertools.pairwise(body if isinstance(body, list) else []):
            text = after.value if isinstance(after, ast.Expr) else None
            if isinstance(before, ast.Assign | ast.AnnAssign) and isinstance(text, ast.Constant):
                yield after.lineno, str(text.value)
