"""save(state, target): the phases of `protocol/`, carried by collectives, and by messages beside training.

every rank     settle the save before, hold -> plan ── gather ──> coordinator: merge ── scatter ──>
               or, when no rank's plan has changed since that save: as then, which one small collective confirms
every rank     if training goes on meanwhile: copy (blocking=False), also while that collective is under way;
               from here on in a thread (background.py)
every rank     write files ── gather ──> coordinator: check ── broadcast ──> publish ── broadcast ──> SaveReport
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, overload

import torch
import xxhash
from torch.distributed.checkpoint.stateful import Stateful

from ray_ckpt.checkpoint.background import Saver, saver
from ray_ckpt.checkpoint.carriers import Carrier, ask_any_rank, carrier
from ray_ckpt.checkpoint.together import Exchange
from ray_ckpt.errors import RayCkptError, UsageError
from ray_ckpt.format import dcp_metadata
from ray_ckpt.protocol.coordinator import Coordinator
from ray_ckpt.protocol.messages import Assignment, LocalPlan, RankRecord
from ray_ckpt.protocol.rank_save import RankSave
from ray_ckpt.protocol.save_handle import SaveHandle
from ray_ckpt.report import SaveReport
from ray_ckpt.state.train_state import TrainState
from ray_ckpt.storage.resolve import Target, destination

State = Stateful | Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class _Offer:
    """What a rank brings to a save."""

    plan: LocalPlan | None
    """None: it is busy with the save before, which is not to be waited for."""
    has_carrier: bool


@dataclass(frozen=True)
class _Order:
    """What a rank is to do."""

    assignment: Assignment
    new_carrier: bool
    """Some rank cannot talk to the others beside training yet, or no longer."""


@dataclass(frozen=True)
class _Begun:
    """What a rank has begun to do. The state may change from here on if it goes on beside training."""

    order: _Order
    write: Callable[[], RankRecord]


@overload
def save(
    state: State,
    target: Target,
    *,
    step: int | None = ...,
    layout: str | None = ...,
    overwrite: bool = ...,
    blocking: Literal[True] = ...,
    if_busy: Literal["wait"] = ...,
) -> SaveReport: ...
@overload
def save(
    state: State,
    target: Target,
    *,
    step: int | None = ...,
    layout: str | None = ...,
    overwrite: bool = ...,
    blocking: Literal[False],
    if_busy: Literal["wait"] = ...,
) -> SaveHandle: ...
@overload
def save(
    state: State,
    target: Target,
    *,
    step: int | None = ...,
    layout: str | None = ...,
    overwrite: bool = ...,
    blocking: bool = ...,
    if_busy: Literal["wait", "skip"],
) -> SaveReport | SaveHandle | None: ...
def save(
    state: State,
    target: Target,
    *,
    step: int | None = None,
    layout: str | None = None,
    overwrite: bool = False,
    blocking: bool = True,
    if_busy: Literal["wait", "skip"] = "wait",
) -> SaveReport | SaveHandle | None:
    """Save what every rank holds as one checkpoint at `target`. All ranks call it, with the same options.

    One save is in flight at a time. With `blocking=False` the call returns once this rank's part is copied into host
    memory, which the next save uses again: what training changes afterwards is not in the checkpoint. A thread writes
    and commits; the handle, or else the next `save`, reports a failure.

    Example:
        >>> import torch
        >>> from ray_ckpt import CheckpointStore, TrainState, save
        >>> model = torch.nn.Linear(4, 4)
        >>> state = TrainState(model, torch.optim.Adam(model.parameters()))
        >>> store = CheckpointStore("checkpoints")
        >>> save(state, store, step=100).num_files
        1
        >>> store.steps()
        (100,)

    Args:
        state: a `TrainState`, anything else with a `state_dict`, or a state dict: nested dicts and lists of tensors
            (plain, DTensor, ShardedTensor) and other objects. Ranks may hold different things; what several hold under
            one name is saved once.
        target: the checkpoint's directory (a local path, a URI as `Storage` takes it, or a `Storage`), or with `step`
            the store that it is a step of (the same, or a `CheckpointStore`).
        layout: how the state lies across ranks, for the manifest; by default what the `TrainState` says.
        overwrite: replace a committed checkpoint; it stays valid until the new one is committed.
        if_busy: whether a save waits for one that is still being written on some rank, or is skipped: a warning, and
            None instead of a report or a handle.

    Raises:
        CheckpointExistsError: `target` holds a committed checkpoint already and `overwrite` was not given.
        CommitError: the ranks' parts do not fit together, or ranks hold different things under one name.
        CheckpointError: a rank failed; names each of them, on every rank. Nothing was committed. Or the save in the
            background before this one failed and some rank has not seen that yet; this one was not begun.
    """
    if if_busy not in ("wait", "skip"):
        raise UsageError(f"if_busy={if_busy!r} is neither 'wait' nor 'skip'")
    storage = destination(target, step)
    mine = saver()
    mine.meet()
    writer = RankSave(storage)
    coordinator = Coordinator(
        storage,
        overwrite=overwrite,
        layout=state.layout if layout is None and isinstance(state, TrainState) else layout,
        saved_by={"torch": torch.__version__},
        cache=mine.cache,
        attempt=_next_attempt(mine.agreed),
    )
    trainers = carrier()
    offer = _kept(functools.partial(_offer, mine, writer, state, skip=if_busy == "skip"))
    begin = functools.partial(_begin, writer, mine, beside_training=not blocking)
    expected = _expected(mine, offer, coordinator, trainers, beside_training=not blocking)
    others_differ = ask_any_rank(expected is None)
    # While the ranks hear of each other, each goes ahead with what they do if nothing but values has changed.
    begun = None if expected is None else begin(expected)
    if others_differ():
        order = _agree(trainers, coordinator, offer)
        begun = None if order is None else begin(order)
    if begun is None:
        if trainers.rank == 0:
            text = f"the save of {storage.address} is skipped: the one before is still being written"
            warnings.warn(text, stacklevel=2)
        return None
    mine.remember(begun.order.assignment)
    if blocking:
        return _finish(Exchange("save", trainers), coordinator, writer, begun.write)
    ranks = Exchange("save", mine.carrier(anew=begun.order.new_carrier))
    handle = SaveHandle(storage.address)
    mine.start(handle, functools.partial(_finish, ranks, coordinator, writer, begun.write))
    return handle


def _offer(mine: Saver, writer: RankSave, state: State, *, skip: bool) -> _Offer:
    if skip and mine.busy:
        return _Offer(None, mine.has_carrier)
    mine.settle()
    return _Offer(writer.plan(state, mine.memory, mine.known), mine.has_carrier)


def _expected(
    mine: Saver, offer: Callable[[], _Offer], coordinator: Coordinator, trainers: Carrier, *, beside_training: bool
) -> _Order | None:
    """To do as at the save before, if this rank can: its state has changed in nothing but its values.

    When all ranks can, nothing more needs to be said than that. What speaks against it is said afterwards.
    """
    try:
        offered = offer()
        unchanged = offered.plan is not None and offered.plan.items is None
        if mine.agreed is None or not unchanged or (beside_training and not offered.has_carrier):
            return None
        if trainers.rank == 0:
            coordinator.merge_again()
    except Exception:
        return None
    return _Order(replace(mine.agreed, attempt=coordinator.attempt), new_carrier=False)


def _agree(trainers: Carrier, coordinator: Coordinator, offer: Callable[[], _Offer]) -> _Order | None:
    """Plan together, unless a rank is busy, which is None, or a save in the background has failed."""

    def give_orders() -> Sequence[_Order | None]:
        plans = [offer.plan for offer in offers if offer.plan is not None]
        if len(plans) < len(offers):
            return [None] * len(offers)
        new_carrier = not all(offer.has_carrier for offer in offers)
        return [_Order(assignment, new_carrier) for assignment in coordinator.merge(plans)]

    ranks = Exchange("save", trainers)
    offers = ranks.gather(offer)
    return ranks.scatter(give_orders)


def _begin(writer: RankSave, mine: Saver, order: _Order, *, beside_training: bool) -> _Begun:
    """Copy this rank's part if training goes on. A failure is raised by `write`, where all ranks learn of it."""
    write = functools.partial(writer.write, order.assignment)
    if not beside_training:
        return _Begun(order, write)
    staged = _kept(functools.partial(writer.stage, order.assignment, mine.host_copy))

    def write_staged() -> RankRecord:
        staged()
        return write()

    return _Begun(order, write_staged)


def _next_attempt(agreed: Assignment | None) -> str | None:
    """A name for an attempt that all ranks know without being told."""
    return None if agreed is None else xxhash.xxh3_64_hexdigest(agreed.attempt.encode())[:12]


def _kept(function: Callable[[], T]) -> Callable[[], T]:
    """Calls it now; what it gave, value or failure, is given as often as one asks."""
    try:
        value = function()
    except Exception as error:
        failure = error

        def fail() -> T:
            raise failure

        return fail
    return lambda: value


def _finish(ranks: Exchange, coordinator: Coordinator, writer: RankSave, write: Callable[[], RankRecord]) -> SaveReport:
    try:
        records = ranks.gather(write)
        ranks.broadcast(lambda: coordinator.check(records))
    except RayCkptError:
        # All ranks have agreed not to commit. After a lost connection that is not known, and the files stay.
        writer.discard()
        raise
    return ranks.broadcast(lambda: coordinator.publish(dcp_metadata.dumps(coordinator.manifest)))
