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
