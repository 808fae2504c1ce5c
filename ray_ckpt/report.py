"""What the verbs return: numbers with units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


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


@dataclass(frozen=True, order=True)
class Damage:
    """Bytes of a committed checkpoint that are not what was saved."""

    file: str
    start: int
    """The damage lies in the bytes `[start, end)` of the file."""
    end: int
    name: str
    """Of the tensor or object; empty where it is the file as a whole, or bytes that belong to neither."""
    problem: str

    def __str__(self) -> str:
        return f"{self.file} [{self.start}, {self.end}) {self.name!r}: {self.problem}"


@dataclass(frozen=True)
class VerifyReport:
    """What became of reading every byte of a checkpoint."""

    uri: str
    num_files: int
    num_tensors: int
    num_objects: int
    total_bytes: int
    """That were read."""
    seconds: float
    damages: tuple[Damage, ...]
    """All of them, by file and position."""
    unchecked: tuple[str, ...]
    """Tensors and objects that were read, but have no checksum to compare with: those of a foreign checkpoint."""

    @property
    def verified(self) -> bool:
        """Whether all of it is what was saved. What has no checksum is not known to be."""
        return not self.damages and not self.unchecked

    @property
    def damaged(self) -> tuple[str, ...]:
        """Names of the tensors and objects that are not whole, sorted."""
        return tuple(sorted({damage.name for damage in self.damages if damage.name}))

    def __str__(self) -> str:
        asked = (
            f"{self.num_tensors} tensors and {self.num_objects} objects in {self.num_files} files of {self.uri}, "
            f"{self.total_bytes / 2**20:.1f} MiB in {self.seconds:.1f} s"
        )
        if self.damages:
            return f"DAMAGED: {len(self.damaged)} of {asked}: " + "; ".join(map(str, self.damages))
        if self.unchecked:
            return f"read, but not verified: {asked}; {len(self.unchecked)} of them have no checksum"
        return f"verified: {asked}"

    @staticmethod
    def merge(shares: Sequence[VerifyReport]) -> VerifyReport:
        """What several ranks found together."""
        return replace(
            shares[0],
            total_bytes=sum(share.total_bytes for share in shares),
            seconds=max(share.seconds for share in shares),
            damages=tuple(sorted({damage for share in shares for damage in share.damages})),
        )
