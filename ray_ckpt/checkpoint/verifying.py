"""verify(target, step): every rank reads its share of all bytes ── gather ──> coordinator: merge ── broadcast ──>"""

from __future__ import annotations

from ray_ckpt.checkpoint.carriers import carrier
from ray_ckpt.checkpoint.together import Exchange, chosen_by_one
from ray_ckpt.report import VerifyReport
from ray_ckpt.storage.audit import audit
from ray_ckpt.storage.checkpoint_reader import CheckpointReader
from ray_ckpt.storage.resolve import Target, committed_at


def verify(target: Target, step: int | None = None) -> VerifyReport:
    """Read every byte of a committed checkpoint and compare it with what was recorded when it was saved.

    Elements and objects have checksums; what else our files hold (the containers around the elements, `.metadata`)
    follows from the manifest and is compared as well. Needs a few MiB of memory, whatever the checkpoint's size. On a
    process group all ranks call it and share the files; each gets the whole report.

    Example:
        >>> import torch
        >>> from ray_ckpt import save, verify
        >>> report = save({"weight": torch.ones(3)}, "run/step-1")
        >>> checked = verify("run/step-1")
        >>> checked.verified
        True
        >>> print(checked)
        verified: 1 tensors and 0 objects in 1 files of ...

    Args:
        target: the checkpoint's directory, or a store: a local path, a URI, a `Storage` or a `CheckpointStore`.
        step: of the store; None for the checkpoint at `target` itself, or else the latest committed step.

    Returns:
        What was read, and all that is damaged or missing, by name. A checkpoint that stock DCP wrote has no checksums:
        its report has no damages then, but is not `verified` either.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint.
        FormatError, UnsafeCheckpointError: its manifest is damaged, or not safe to read.
        StorageError: the storage does not answer.
        CheckpointError: some ranks failed, others not; names each, on every rank.
    """
    storage = chosen_by_one("verify", lambda: committed_at(target, step))
    mine = carrier()
    ranks = Exchange("verify", mine)

    def check() -> VerifyReport:
        manifest = CheckpointReader(storage).read_manifest()
        return audit(storage, manifest, rank=mine.rank, num_ranks=mine.num_ranks)

    shares = ranks.gather(check)
    return ranks.broadcast(lambda: VerifyReport.merge(shares))
