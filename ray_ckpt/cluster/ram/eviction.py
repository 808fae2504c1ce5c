"""Which step goes when memory is full. By names alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.storage.pins import pin_name
from ray_ckpt.storage.step_names import directory_of, parse_steps


def superseded(paths: Collection[str], wanted_by: str, spared: Collection[str] = ()) -> str | None:
    """The directory of the lowest committed step that has a higher one beside it and is not pinned.

    Args:
        paths: of all files.
        wanted_by: path of the file that needs room: its own step stays, and its own store's steps go first.
        spared: directories that stay.
    """
    stores: dict[str, list[int]] = defaultdict(list)
    for path in paths:
        directory, _, name = path.rpartition("/")
        store, _, step = directory.rpartition("/")
        if name == MANIFEST_NAME:
            stores[store] += parse_steps([step])
    candidates = [
        (not wanted_by.startswith(f"{store}/" if store else "step-"), step, directory)
        for store, steps in stores.items()
        for step in sorted(steps)[:-1]
        if not wanted_by.startswith(f"{(directory := in_store(store, directory_of(step)))}/")
        and in_store(store, pin_name(step)) not in paths
        and directory not in spared
    ]
    return min(candidates)[2] if candidates else None


def in_store(store: str, name: str) -> str:
    """The path of what a store at a path holds; the path of the store of all is empty."""
    return f"{store}/{name}" if store else name
