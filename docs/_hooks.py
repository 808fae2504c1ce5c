"""Pages that stand elsewhere in the repository, for MkDocs: each stays where its readers look for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import ray_ckpt
from ray_ckpt import errors

REPOSITORY = Path(__file__).parent.parent
ELSEWHERE = ("SECURITY.md", "CHANGELOG.md", "benchmarks/RESULTS.md", "benchmarks/load_over_ranks.png")


def on_files(files: Files, config: Any) -> Files:
    """Add them, under the paths that they have in the repository."""
    for path in ELSEWHERE:
        files.append(File.generated(config, path, abs_src_path=str(REPOSITORY / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The public names in the API reference; links between docs/ and the rest, which are one directory here."""
    for kind, names in public_names().items():
        markdown = markdown.replace(f"<!-- {kind} -->", "\n\n".join(f"::: ray_ckpt.{name}" for name in names))
    if page.file.src_uri in ELSEWHERE:
        return markdown.replace("](docs/", "](").replace("](../docs/", "](../")
    depth = page.file.src_uri.count("/")
    for path in ELSEWHERE:
        markdown = markdown.replace(f"]({'../' * (depth + 1)}{path}", f"]({'../' * depth}{path}")
    return markdown


def public_names() -> dict[str, list[str]]:
    """Kind -> names in `ray_ckpt.__all__`, so that a new one is documented by being there."""
    names = [name for name in ray_ckpt.__all__ if name not in ("__version__", "cluster")]
    exceptions = [name for name in errors.__all__ if name in names]
    others = [name for name in names if name not in exceptions]
    return {
        "functions": [name for name in others if name.islower()],
        "classes": [name for name in others if not name.islower()],
        "errors": exceptions,
    }
