"""verify(target, step): every rank reads its share of all bytes ── gather ──> coordinator: merge ── broadcast ──>"""

from __future__ import annotations

import contextlib
from dataclasses import replace

from ray_ckpt.checkpoint.exchange import TrainersExchange
from ray_ckpt.events import Events, Telling
from ray_ckpt.progress import Meter, Progress
from ray_ckpt.report import VerifyReport
from ray_ckpt.storage.audit import verify_share
from ray_ckpt.storage.resolve import Target, committed_at, held


def verify(
    target: Target,
    step: int | None = None,
    *,
    scan_nan: bool = False,
    trusted: bool = False,
    timeout_s: float | None = None,
    progress: Progress | None = None,
    events: Events | None = None,
) -> VerifyReport:
    """Read every byte of a committed checkpoint and compare it with what was recorded when it was saved.

    Elements and objects have checksums; everything else in our files (the containers around the elements, `.metadata`)
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
        target: the checkpoint's directory, a file by `torch.save` or safetensors, or a store: a local path, a URI, a
            `Storage` or a `CheckpointStore`.
        step: number of the step in the store; None verifies the checkpoint at `target` itself, or else the latest
            committed step of the store there.
        scan_nan: also count NaN and Inf, in the same read: `VerifyReport.nonfinite`. They are no damage.
        trusted: as for `load`. Only a `.metadata` by stock DCP that names unknown classes asks for it: values are
            compared as bytes, and not made.
        timeout_s: time limit for waiting for other ranks; by default the process group's own. It does not limit this
            rank's own work, such as reading.
        progress: called about ten times a second with the bytes that this rank has read and all that it will, on a
            thread that reads. When it raises, the check goes on, without it and with a warning.
        events: called with an `Event` for the end, or failure; damage is told as a failure of kind `IntegrityError`.

    Returns:
        What was read, and everything that is damaged or missing, by name. What other programs wrote carries at most
        the CRC-32 of zip archives, which are compared, but nothing covers its names and shapes: its report may have no
        damages, but is not `verified`.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint.
        FormatError, UnsafeCheckpointError: its manifest or header is damaged, or not safe to read.
        StorageError: the storage does not answer.
        CheckpointError: ranks failed, or did not arrive within `timeout_s`; every rank learns which.
    """
    ranks = TrainersExchange("verify", timeout_s)
    telling = Telling(events, "verify", rank=ranks.rank)
    with telling.failing(), contextlib.ExitStack() as holds:
        found = ranks.broadcast(lambda: holds.enter_context(held(lambda: committed_at(target, step))))
        telling.at(found.storage.address, found.step)
        shares = ranks.gather(
            lambda: verify_share(
                found.storage,
                rank=ranks.rank,
                num_ranks=ranks.num_ranks,
                scan_nan=scan_nan,
                trusted=trusted,
                meter=Meter(progress),
            )
        )
        report = replace(ranks.broadcast(lambda: VerifyReport.merge(shares)), step=found.step)
    telling.verified(report)
    return report
