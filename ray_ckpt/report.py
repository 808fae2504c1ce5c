"""What the verbs return: numbers with units."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SaveReport:
    """One committed checkpoint."""

    uri: str
    total_bytes: int
    """Of all data files."""
    num_files: int
    seconds: float
    """From the first plan to the commit, on this rank."""


@dataclass(frozen=True)
class LoadReport:
    """One load, as a rank saw it. Names are the same on all ranks, sorted."""

    uri: str
    num_bytes: int
    """Of tensors that this rank has read."""
    seconds: float
    """From the manifest to the last value set, on this rank."""
    missing: tuple[str, ...]
    """Wanted by some rank and not in the checkpoint; left as they were."""
    unexpected: tuple[str, ...]
    """In the checkpoint, within what was to be loaded, and wanted by no rank."""
    cast: tuple[str, ...]
    """Saved in another dtype than the one they were loaded into."""
    rng: str | None
    """Random generators: `restored`, `reseeded` because another layout saved them, None: not a part of the load."""
    dataloader: str | None
    """Data loader: `restored`, `left as it was` because another layout saved it, None: not a part of the load."""
    lost: str = ""
    """What of somebody else's checkpoint was lost when it was saved, and why."""


@dataclass(frozen=True)
class RemovalReport:
    """What was removed from a store of checkpoints, or would be."""

    uri: str
    removed: tuple[int, ...]
    """Steps that are no longer there, ascending."""
    kept: tuple[int, ...]
    """Committed steps that stay, as the listing at the start showed them, ascending."""
    files: tuple[str, ...]
    """Names of the removed files, relative to the store."""
    total_bytes: int
    """Of the removed files."""
    dry_run: bool
    """Whether nothing was removed in truth."""
