"""What the driver still tells the workers when a verb has ended, well or not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.errors import GroupError

PATIENCE_S = 3.0
"""How long the workers may take to let go of what they hold, and to remove what they have written."""


def tell_all(group: WorkerGroup, fn: Callable[..., None], attempt: str) -> None:
    """Call `fn(ctx, attempt)` on every worker that answers soon, beside whatever it does. Others cannot be helped."""
    with contextlib.suppress(GroupError):
        args_of = dict.fromkeys(range(group.num_workers), (attempt,))
        group.call(fn, args_of, timeout_s=PATIENCE_S, beside=True)
