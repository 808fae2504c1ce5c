"""delete_steps(store, steps): several steps at once, looked at before the first is removed."""

from __future__ import annotations

from collections.abc import Sequence

from ray_ckpt.errors import CheckpointError, UsageError
from ray_ckpt.report import RemovalReport
from ray_ckpt.storage.steps import directory_of
from ray_ckpt.storage.store import CheckpointStore

__all__ = ["delete_steps"]


def delete_steps(store: CheckpointStore, steps: Sequence[int], *, dry_run: bool = False) -> RemovalReport:
    """Remove committed steps, or say what would go.

    Raises:
        CheckpointNotFoundError: one of them is not committed; nothing was removed.
        UsageError: one of them is pinned; nothing was removed.
    """
    wanted = sorted(set(steps))
    kept = tuple(step for step in store.steps() if step not in wanted)
    files: dict[str, int] = {}
    for step in wanted:
        store.damage(step)  # raises when it is not there
        try:
            found = store.manifest(step).files
        except CheckpointError:
            found = {}  # a damaged record goes, and its files are left to a clean-up
        files |= {f"{directory_of(step)}/{name}": size for name, size in found.items()}
    if pinned := sorted(set(wanted) & set(store.pins())):
        raise UsageError(f"step {pinned[0]} of {store.address} is pinned and stays; unpin it first")
    if not dry_run:
        done = [store.delete(step) for step in wanted]
        files = {name: files.get(name, 0) for report in done for name in report.files}
        total = sum(report.total_bytes for report in done)
    else:
        total = sum(files.values())
    return RemovalReport(store.address, tuple(wanted), kept, tuple(files), total, dry_run=dry_run)
