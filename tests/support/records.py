"""Records with a part changed, and a digest that fits them again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.format.record import seal

VERSION_1 = Path(__file__).parent.parent / "data" / "version-1"
"""A checkpoint with a record of format version 1, as it was saved when that was the newest."""


def sealed(manifest: dict[str, Any], *, as_saved: bool = False) -> str:
    """The record's text, as if it had been saved so.

    Args:
        as_saved: without spaces, as we write it; such a record is read in another way.
    """
    members = {key: value for key, value in manifest.items() if key != "digest"}
    return seal(json.dumps(members, separators=(",", ":") if as_saved else None))


def edit_record(directory: Path, change: Callable[[dict[str, Any]], object], *, as_saved: bool = False) -> None:
    """Change a checkpoint's record as nobody does by accident: its digest fits."""
    path = directory / MANIFEST_NAME
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_text(sealed(manifest, as_saved=as_saved))
