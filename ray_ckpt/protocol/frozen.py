"""Frozen parameters, of which a `trainable_only` state saves and loads nothing but their fingerprints. Needs no torch.

saving    LocalPlan.frozen   what each rank holds                     ── digests ──> Manifest.fingerprints
loading   LoadOffer.frozen   the same, beside what the manifest says  ── compare ──> LoadOffer.other_base, and a note

Sums over parts are the sum over the tensor, so the layouts of the save and the load need not be the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray_ckpt.errors import CommitError, FormatError
from ray_ckpt.format.fingerprint import Fingerprint, by_name, merge
from ray_ckpt.text import listed

__all__ = ["NOTE", "Frozen", "compare", "digests"]

NOTE = "base"
"""Key of the note that says what came of the comparison."""

Frozen = Mapping[str, tuple[Fingerprint | None, str | None]]
"""Name -> what a rank holds of a frozen tensor, and the digest of it that was saved; both None where none was."""


def digests(held: Sequence[Mapping[str, Fingerprint]]) -> dict[str, str]:
    """Name -> digest of each frozen tensor, from what all ranks hold.

    Raises:
        CommitError: ranks hold different bits for one part, or not all of a tensor.
    """
    found: dict[str, str] = {}
    for name, parts in by_name(held).items():
        try:
            found[name] = merge(parts).digest
        except FormatError as error:
            raise CommitError(
                f"refusing to save: the frozen {name!r} is not one tensor on all ranks: {error}"
            ) from error
    return found


def compare(held: Sequence[Frozen]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Names of the frozen tensors that are others than those of the save, and the note on all of them."""
    saved = {name: digest for frozen in held for name, (_, digest) in frozen.items()}
    parts = by_name([{name: part for name, (part, _) in frozen.items() if part is not None} for frozen in held])
    other = tuple(sorted(name for name in parts if _digest(parts[name]) != saved[name]))
    unknown = sorted(saved.keys() - parts.keys())
    told = [f"{len(parts) - len(other)} frozen tensors are those of the save"] if len(parts) > len(other) else []
    if other:
        told.append(f"{len(other)} are others than those of the save: {listed(other, at_most=8)}")
    if unknown:
        told.append(
            f"{len(unknown)} could not be compared, as the checkpoint has no fingerprint of them: "
            f"{listed(unknown, at_most=8)}"
        )
    return other, {NOTE: "; ".join(told)} if told else {}


def _digest(parts: Sequence[Fingerprint]) -> str | None:
    try:
        return merge(parts).digest
    except FormatError:  # replicas differ: they cannot all be what was saved
        return None
