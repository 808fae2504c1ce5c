"""The documents say what is there: links and paths lead somewhere, and the format's fields are those of a manifest."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from ray_ckpt import save
from ray_ckpt.format.manifest import VERSION
from tests.conftest import REPOSITORY

DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("benchmarks/*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_what_a_document_names_is_there(document: Path) -> None:
    text = document.read_text()
    links = {link.partition("#")[0] for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)}
    assert not {link for link in links if not (document.parent / link).exists()}
    files = set(re.findall(r"`((?:[\w-]+/)*[\w.-]+\.(?:py|md|yaml|toml|txt))(?:::\w+)?`", text))
    rooms = (REPOSITORY, REPOSITORY / "ray_ckpt", document.parent)
    assert not {file for file in files if not any((room / file).exists() for room in rooms)}


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    """`make docs` refuses others; this tells it in a second."""
    listed = set(re.findall(r": ([\w/.-]+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {str(path.relative_to(REPOSITORY / "docs")) for path in REPOSITORY.glob("docs/**/*.md")}
    elsewhere = {"SECURITY.md", "CHANGELOG.md", "benchmarks/RESULTS.md"}
    assert listed - elsewhere == pages
    assert elsewhere <= listed


def test_the_format_document_has_every_field_of_a_manifest(tmp_path: Path) -> None:
    state = {"model": {"weight": torch.ones(2)}, "lr": 0.1, "shape": torch.Size([1]), "betas": (0.9, float("inf"))}
    save(state, tmp_path, layout="single", fingerprints=True)
    text = (REPOSITORY / "docs" / "format.md").read_text()
    documented = {
        name for row in re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    tensors, objects = manifest["tensors"].values(), manifest["objects"].values()
    chunks = [chunk for tensor in tensors for chunk in tensor["chunks"]]
    written = {key for entry in (manifest, *tensors, *chunks, *objects) for key in entry}
    assert {"checksums", "value", "blob"} <= written
    assert written <= documented
    # Not written by a save of our own, or only when it replaces another checkpoint.
    assert documented - written == {"transforms", "strides", "replaced_metadata"}


def test_the_format_document_is_of_this_version() -> None:
    text = (REPOSITORY / "docs" / "format.md").read_text()
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)] == list(range(1, VERSION + 1))


def test_the_readme_names_the_floor_of_ray() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text()
    floors = set(re.findall(r"\"ray\[\w+\]>=([\d.]+)\"", project))
    assert set(re.findall(r"needs Ray ([\d.]+)\s+or", (REPOSITORY / "README.md").read_text())) == floors
    [floor] = floors
    assert tuple(map(int, floor.split("."))) >= (2, 54), "CVE-2026-27482 is in all before it"
