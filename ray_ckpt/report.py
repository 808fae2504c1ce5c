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
