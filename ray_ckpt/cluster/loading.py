"""load(group, state_of, target): the phases of `protocol/rank_load.py`, carried by actor calls.

driver                                    every worker
    wait for the step, if told to; find it
    open    ── storage, options, record ─>  the manifest
    names   ── state_of ─────────────────>  only where somebody else may have written it   <── Names ──
    adapt   ── what all are called ──────>  the manifest under our names
    offer   ── state_of ─────────────────>  compare; refuse what is missing  <── LoadOffer ──
    agree
    prepare ── what they agreed on ──────>  refuse what is left over; hand over what may be refused
    want    ─────────────────────────────>  only where it is worth it: what is to be read  <── Wants ──
    share_out
    read    ── who reads what for whom ──>  bytes into the live tensors
    finish  ─────────────────────────────>  set everything else              <── LoadReport ──

A phase begins when all workers have come through the one before. The manifest tells each where its bytes are: nobody
waits for another, and no process group is needed. Where there is one, bytes that several workers want of an object
store are read by one of them and go through it to the others.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from ray_ckpt.cluster import worker_side
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.errors import RayCkptError
from ray_ckpt.events import Events, Telling
from ray_ckpt.format.saved import Saved
from ray_ckpt.format.wanted_names import chosen, join_names
from ray_ckpt.progress import Progress
from ray_ckpt.protocol.agreement import agree
from ray_ckpt.protocol.messages import LoadOffer
from ray_ckpt.protocol.share_plan import Share, is_shared, share_out
from ray_ckpt.report import LoadReport
from ray_ckpt.storage.record_files import read_for_all
from ray_ckpt.storage.resolve import Target, checkpoint_at, held, wait_before


def load(
    group: WorkerGroup,
    state_of: worker_side.StateOf | str,
    target: Target,
    step: int | None = None,
    *,
    strict: bool = True,
    cast: bool = False,
    only: Sequence[str] | None = None,
    key_map: Mapping[str, str | Saved] | Callable[[str], str] | None = None,
    hyperparameters: Literal["from-checkpoint", "from-optimizer"] = "from-checkpoint",
    fallback: bool = False,
    trusted: bool = False,
    share: Share = "auto",
    wait_for: int | None = None,
    wait_s: float = 600.0,
    timeout_s: float | None = None,
    progress: Progress | None = None,
    events: Events | None = None,
) -> list[LoadReport]:
    """Load a checkpoint into what the workers hold, whatever layout saved it. The group stays open, whatever happens.

    Everything is compared, on all workers, before anything is changed; objects that may refuse what was saved take it
    before the tensors are read, as in `ray_ckpt.load`. After an error while reading, the tensors hold parts of both
    states, and the error says which parts of the state are new. Where a worker's own state takes part in collectives
    (FSDP1's does), a worker that fails leaves the others in them until the group's collective timeout.

    Example:
        >>> import torch
        >>> from ray_ckpt import WorkerGroup, cluster
        >>> def state_of(ctx):
        ...     return ctx.objects.setdefault("stage", {f"stage{ctx.rank}": torch.ones(3)})
        >>> with WorkerGroup(2, process_group=False) as group:
        ...     report = cluster.save(group, state_of, "run/step-1")
        ...     reports = cluster.load(group, state_of, "run/step-1")
        >>> [report.num_bytes for report in reports]
        [12, 12]

    Args:
        state_of: as for `save`; a state dict is filled in place, so return the one that the worker uses.
        target: the checkpoint's directory as every worker's node and the driver know it, or a store; or what others
            wrote, as for `ray_ckpt.load`.
        step: number of the step in the store; None loads the checkpoint at `target` itself, or else the latest
            committed step of the store there.
        strict, cast, only, key_map, hyperparameters, fallback, trusted, share: as for `ray_ckpt.load`; a function as
            `key_map` must be one that pickles, and bytes are shared where the group has a process group.
        wait_for, wait_s: as for `ray_ckpt.load`; the driver waits.
        timeout_s: time limit of the whole load, from when the step is there; by default the group's `call_timeout_s`.
        progress: as for `save`, with the bytes that the workers have read and all that they will.
        events: as for `ray_ckpt.load`, with the phases of all workers.

    Returns:
        One `LoadReport` per worker, in rank order.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint, or not that step; or none from `wait_for` on has come
            within `wait_s`.
        WorkerError: workers failed or died, or the checkpoint does not fit what they hold; names each.
        GroupTimeoutError: workers did not answer in time; names each.
    """
    options: dict[str, Any] = {"strict": strict, "cast": cast, "only": chosen(only)}
    options |= {"key_map": key_map, "hyperparameters": hyperparameters, "trusted": trusted}
    telling = Telling(events, "load", step=step)
    with telling.failing():
        target, wait = wait_before(target, step, wait_for, wait_s, fallback=fallback)
        if wait is not None:
            wait.look()
        attempt = LoadAttempt(group, state_of, group.call_timeout_s if timeout_s is None else timeout_s)
        with held(lambda: checkpoint_at(target, step, fallback=fallback)) as found, attempt.giving_up():
            telling.at(found.storage.address, found.step)
            shared = is_shared(share, found.storage)
            record = read_for_all(found.storage)
            attempt.prepare(attempt.call(worker_side.open_load, found.storage, options, state_of, record))
            attempt.read(progress, is_shared=shared)
            reports = attempt.finish()
    reports = [replace(report, step=found.step, passed_over=found.passed_over) for report in reports]
    telling.loaded(reports)
    return reports


class LoadAttempt:
    """The driver's side of one load.

    Args:
        timeout_s: time limit of all of it, from now on.
    """

    def __init__(self, group: WorkerGroup, state_of: worker_side.StateOf | str, timeout_s: float) -> None:
        self._group = group
        self._state_of = state_of
        self._deadline = time.monotonic() + timeout_s
        self._verdict: LoadOffer | None = None
        self.id = uuid.uuid4().hex[:12]

    def prepare(self, may_be_foreign: Sequence[bool]) -> None:
        """Let the workers compare, and hand over what may be refused.

        Args:
            may_be_foreign: what `open_load` has returned on each.
        """
        if any(may_be_foreign):
            self.call(worker_side.adapt_load, join_names(self.call(worker_side.name_load, self._state_of)))
        self._verdict = agree(self.call(worker_side.offer_load, self._state_of))
        self.call(worker_side.prepare_load, self._verdict)

    def read(self, progress: Progress | None, *, is_shared: bool) -> None:
        """Let the workers read into their states."""
        plan = share_out(self.call(worker_side.want_load)) if is_shared else None
        self.call(worker_side.read_load, plan, self.left_s, progress=progress)

    def finish(self) -> list[LoadReport]:
        """Let the workers set everything else."""
        return self.call(worker_side.finish_load, self._verdict)

    @contextlib.contextmanager
    def giving_up(self) -> Iterator[None]:
        """If the block fails, undo on all workers what can be undone, and let the error say what is new on which."""
        try:
            yield
        except BaseException as error:
            told = worker_side.tell_all(self._group, worker_side.give_up_load, self.id)
            if isinstance(error, RayCkptError):
                for text in dict.fromkeys(filter(None, told.values())):
                    ranks = ", ".join(str(rank) for rank in told if told[rank] == text)
                    error.append(f"rank {ranks}: {text}")
            raise

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return max(0.0, self._deadline - time.monotonic())

    def call(self, fn: Callable[..., Any], *args: Any, progress: Progress | None = None) -> list[Any]:
        """Call a function of `worker_side` on all workers, as one of this load; the results by rank."""
        return self.call_plain(fn, self.id, *args, progress=progress)

    def call_plain(self, fn: Callable[..., Any], *args: Any, progress: Progress | None = None) -> list[Any]:
        """Call a function of `worker_side` on all workers; the results by rank."""
        args_of = dict.fromkeys(range(self._group.num_workers), args)
        return list(self._group.call(fn, args_of, timeout_s=self.left_s, progress=progress).values())

    def call_some(self, fn: Callable[..., Any], args_of: Mapping[int, tuple[Any, ...]]) -> None:
        """Call a function on some workers, as one of this load."""
        own = {rank: (self.id, *args) for rank, args in args_of.items()}
        self._group.call(fn, own, timeout_s=self.left_s)
