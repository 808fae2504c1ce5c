"""save(state, target): the phases of `protocol/`, carried by collectives, and by messages beside training.

every rank     settle the save before, hold -> plan ── gather ──> coordinator: merge ── scatter ──>
               or, when no rank's plan has changed since that save: as then, which one small collective confirms
every rank     if training goes on meanwhile: copy (blocking=False), also while that collective is under way;
               from here on in a thread (background.py)
every rank     write files ── gather ──> coordinator: check ── broadcast ──> publish ── broadcast ──> SaveReport
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
import xxhash
from torch.distributed.checkpoint.stateful import Stateful

from ray_ckpt.checkpoint.background import saver
from ray_ckpt.checkpoint.exchange import Exchange, TrainersExchange
from ray_ckpt.checkpoint.meetings import Deadline
from ray_ckpt.errors import CheckpointError, CheckpointExistsError, RayCkptError, StorageError, UsageError
from ray_ckpt.events import Events, Telling
from ray_ckpt.format import dcp_metadata
from ray_ckpt.format.saved import Saved
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.progress import Meter, Progress
from ray_ckpt.protocol.coordinator import Coordinator
from ray_ckpt.protocol.messages import Assignment, LocalPlan, Outcome, RankRecord
from ray_ckpt.protocol.rank_save import RankSave
from ray_ckpt.protocol.save_handle import SaveHandle, check_on_error
from ray_ckpt.protocol.save_options import Cast, SaveOptions
from ray_ckpt.report import SaveReport
from ray_ckpt.state.train_state import TrainState
from ray_ckpt.storage.resolve import Location, Target, destination

State = Stateful | Mapping[str, Any]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Offer:
    """What a rank brings to a save."""

    plan: LocalPlan | None
    """None: it is busy with the save before, which is not to be waited for."""
    has_carrier: bool
    """Whether it can talk to the others beside training."""


@dataclass(frozen=True)
class _Order:
    """What a rank is to do."""

    assignment: Assignment
    new_carrier: bool
    """Whether some rank cannot talk to the others beside training yet, or no longer."""


@overload
def save(
    state: State,
    target: Target,
    step: int | None = ...,
    *,
    only: Sequence[str] | None = ...,
    cast: Cast | None = ...,
    key_map: Mapping[str, str | Saved] | None = ...,
    layout: str | None = ...,
    overwrite: bool = ...,
    fingerprints: bool = ...,
    blocking: Literal[True] = ...,
    if_busy: Literal["wait"] = ...,
    on_error: Literal["raise", "warn"] = ...,
    timeout_s: float | None = ...,
    progress: Progress | None = ...,
    events: Events | None = ...,
) -> SaveReport: ...
@overload
def save(
    state: State,
    target: Target,
    step: int | None = ...,
    *,
    only: Sequence[str] | None = ...,
    cast: Cast | None = ...,
    key_map: Mapping[str, str | Saved] | None = ...,
    layout: str | None = ...,
    overwrite: bool = ...,
    fingerprints: bool = ...,
    blocking: Literal[False],
    if_busy: Literal["wait"] = ...,
    on_error: Literal["raise", "warn"] = ...,
    timeout_s: float | None = ...,
    progress: Progress | None = ...,
    events: Events | None = ...,
) -> SaveHandle: ...
@overload
def save(
    state: State,
    target: Target,
    step: int | None = ...,
    *,
    only: Sequence[str] | None = ...,
    cast: Cast | None = ...,
    key_map: Mapping[str, str | Saved] | None = ...,
    layout: str | None = ...,
    overwrite: bool = ...,
    fingerprints: bool = ...,
    blocking: bool = ...,
    if_busy: Literal["wait", "skip"],
    on_error: Literal["raise", "warn"] = ...,
    timeout_s: float | None = ...,
    progress: Progress | None = ...,
    events: Events | None = ...,
) -> SaveReport | SaveHandle | None: ...
def save(
    state: State,
    target: Target,
    step: int | None = None,
    *,
    only: Sequence[str] | None = None,
    cast: Cast | None = None,
    key_map: Mapping[str, str | Saved] | None = None,
    layout: str | None = None,
    overwrite: bool = False,
    fingerprints: bool = False,
    blocking: bool = True,
    if_busy: Literal["wait", "skip"] = "wait",
    on_error: Literal["raise", "warn"] = "raise",
    timeout_s: float | None = None,
    progress: Progress | None = None,
    events: Events | None = None,
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
        >>> save(state, store, 100).num_files
        1
        >>> store.steps()
        (100,)

    Args:
        state: a `TrainState`, anything else with a `state_dict`, or a state dict: nested dicts and lists of tensors
            (plain, DTensor, ShardedTensor) and other objects. Ranks may hold different things; what several hold under
            one name is saved once.
        target: the checkpoint's directory: a local path, a URI as `Storage` takes it, or a `Storage`. With `step` the
            store to save into: the same, or a `CheckpointStore`.
        step: number of the step in the store, from 0.
        only: prefixes of the names to save, in whole components, such as `("model",)`; nothing else is. What is loaded
            from such a checkpoint has to be named likewise: a load of the whole state says what is missing.
        cast: save tensors of float64, float32, float16 and bfloat16 in this one of them, converted in windows of 8 MiB
            on the way into the file or the copy; checksums and fingerprints are of what is saved. Other dtypes, and
            tensors made of others, stay as they are. An element that would become infinite fails the save.
        key_map: name in the checkpoint -> name in the state, or `Saved` of such names, which joins, splits and slices:
            as for `load`, on the left what is made, on the right of what. What it uses is saved only so, and the rest
            of what it slices is not saved. Each rank that holds any of what is joined has to know all of it in its
            state. Both `cast` and `key_map` are for weights, and refuse an optimizer's state.
        layout: how the state lies across ranks, for the manifest; by default what the `TrainState` says.
        overwrite: replace a committed checkpoint; it stays valid until the new one is committed.
        fingerprints: also record the fingerprint of every tensor, by which `diff` compares checkpoints of any layouts
            without reading their tensors. They take several times as long as the writing: 2 s per GiB and rank on a
            CPU that has nothing else to do.
        if_busy: whether to wait while the previous save is still being written on some rank, or to skip this save: then
            there is a warning, and None instead of a report or a handle.
        on_error: with `blocking=False` whether a failure may end the run. "warn" lets this save begin although the one
            before failed, with a warning, and returns a handle that has failed where this one cannot begin: its
            `result` raises why. `SaveReport.num_failed_before` counts them. A last failure still makes the exit code 1.
        timeout_s: time limit, from the call to the commit, for waiting for other ranks and for the previous save; by
            default the process group's own. It does not limit this rank's own work, such as writing.
        progress: called about ten times a second with the bytes of tensors that this rank has written and all that it
            will, on the thread that writes; last after the commit. A file that is written again after a transient error
            counts from its beginning. When it raises, the save goes on, without it and with a warning.
        events: called with an `Event` for each phase of this rank once the save has ended, one for the end, or failure,
            and one for the time until this call returns; of a save in the background on its thread. When it raises, the
            save goes on, without it and with a warning.

    Raises:
        CheckpointExistsError: `target` holds a committed checkpoint already and `overwrite` was not given.
        CommitError: the ranks' parts do not fit together, or ranks hold different things under one name.
        StateMismatchError: shapes do not allow what `key_map` asks for, or it uses an element twice.
        CheckpointError: ranks failed, or did not arrive within `timeout_s`; every rank learns which. Nothing was
            committed. Or the previous save in the background failed and some rank has not seen that yet; then this one
            was not begun.
        SavePendingError: in a single process, the previous save has not ended within `timeout_s`.
    """
    if if_busy not in ("wait", "skip"):
        raise UsageError(f"if_busy={if_busy!r} is neither 'wait' nor 'skip'")
    check_on_error(on_error, blocking)
    options = SaveOptions.of(only, cast, key_map, fingerprints=fingerprints)
    ranks = TrainersExchange("save", timeout_s)
    location = destination(target, step)
    layout = state.layout if layout is None and isinstance(state, TrainState) else layout
    meter, beside = Meter(progress), not blocking
    telling = Telling(events, "save", location.storage.address, location.step, ranks.rank)
    this = _Save(
        location, options, overwrite=overwrite, layout=layout, beside_training=beside, meter=meter, telling=telling
    )
    this.is_patient = on_error == "warn"
    try:
        with telling.failing():
            return this.run(state, ranks, skip=if_busy == "skip")
    except (CheckpointError, StorageError) as error:  # which every rank has
        if on_error == "raise":
            raise
        return saver().pass_over(location.storage.address, error)


class _Save:
    """One save, as one rank goes through it: `hold`; `repeat_last`, else `agree`; `begin`; `finish`.

    Args:
        beside_training: whether the state may change once `begin` has returned.
        meter: counts the bytes that this rank writes.
        telling: tells how it goes, but not the failures of `run`.
    """

    def __init__(
        self,
        location: Location,
        options: SaveOptions,
        *,
        overwrite: bool,
        layout: str | None,
        beside_training: bool,
        meter: Meter,
        telling: Telling,
    ) -> None:
        self._meter = meter
        self._telling = telling
        self.is_patient = False
        """Whether this save begins although the one before has failed."""
        self._beside_training = beside_training
        self._mine = saver()
        self._mine.meet()
        self._address = location.storage.address
        self._writer = RankSave(location.storage, options=options)
        self._coordinator = Coordinator(
            location.storage,
            overwrite=overwrite,
            layout=layout,
            saved_by={"torch": torch.__version__},
            cache=self._mine.cache,
            attempt=_next_attempt(self._mine.agreed),
            step=location.step,
        )
        self._offer: Outcome[_Offer] = Outcome()
        self._staged: Outcome[None] = Outcome()
        self._assignment: Assignment | None = None

    def run(self, state: State, ranks: TrainersExchange, *, skip: bool) -> SaveReport | SaveHandle | None:
        """All of it, or all that the trainer waits for.

        Args:
            skip: whether not to wait for the save before: then there may be None.
        """
        order = self.start(state, ranks, skip=skip)
        if order is None:
            if ranks.rank == 0:
                _logger.info("skipped the save of %s: the one before is still being written", self._address)
                text = f"the save of {self._address} is skipped: the one before is still being written"
                warnings.warn(text, stacklevel=3)
            return None
        outcome = self.finish_beside_training(ranks, order) if self._beside_training else self.finish(ranks)
        self._telling.blocked()
        return outcome

    def start(self, state: State, ranks: TrainersExchange, *, skip: bool) -> _Order | None:
        """Everything before the writing. None where this save is to be skipped.

        Args:
            skip: whether not to wait for the save before.
        """
        self.hold(state, ranks.deadline, skip=skip)
        order = self.repeat_last(ranks)
        anyone_differs = ranks.ask_any(order is None)
        # While the ranks ask each other, each begins what it is to do if nothing but values has changed.
        if order is not None:
            self.begin(order)
        if anyone_differs():
            order = self.agree(ranks)
            if order is not None:
                self.begin(order)
        if order is not None:
            self._mine.remember(order.assignment)
        return order

    def hold(self, state: State, deadline: Deadline | None, *, skip: bool) -> None:
        """Look through the state, after the save before. A failure is told by `agree`."""

        def offer() -> _Offer:
            if skip and self._mine.busy:
                return _Offer(None, self._mine.has_carrier)
            self._mine.settle(deadline, is_patient=self.is_patient)
            plan = self._writer.plan(state, self._mine.memory, self._mine.known)
            return _Offer(plan, self._mine.has_carrier)

        self._offer = Outcome.of(offer)

    def repeat_last(self, ranks: TrainersExchange) -> _Order | None:
        """The order of the save before, if nothing but values has changed on this rank since then; else None.

        When no rank gives None, nothing more needs to be said. What speaks against it is said by `agree`.
        """
        offer, last = self._offer.value, self._mine.agreed
        if offer is None or offer.plan is None or offer.plan.items is not None or last is None:
            return None
        if offer.plan.frozen or (self._beside_training and not offer.has_carrier):
            return None  # fingerprints of a base are values too, which the plan before does not have
        if ranks.rank == 0 and Outcome.of(self._coordinator.merge_again).failure is not None:
            return None
        return _Order(replace(last, attempt=self._coordinator.attempt), new_carrier=False)

    def agree(self, ranks: Exchange) -> _Order | None:
        """Plan together. None where a rank is busy and this save is to be skipped.

        Raises:
            RayCkptError: a rank could not offer a plan, or the plans do not fit together.
        """
        with collector_paused():  # plans of many parts arrive
            offers = ranks.gather(self._offer.get)

        def give_orders() -> Sequence[_Order | None]:
            plans = [offer.plan for offer in offers if offer.plan is not None]
            if len(plans) < len(offers):
                return [None] * len(offers)
            new_carrier = not all(offer.has_carrier for offer in offers)
            return [_Order(assignment, new_carrier) for assignment in self._coordinator.merge(plans)]

        return ranks.scatter(give_orders)

    def begin(self, order: _Order) -> None:
        """Copy this rank's part if training goes on. A failure is told by `finish`. May be called once more."""
        self._assignment = assignment = order.assignment
        if self._beside_training:
            self._staged = Outcome.of(lambda: self._writer.stage(assignment, self._mine.host_copy))

    def finish(self, ranks: Exchange) -> SaveReport:
        """Write, check, and commit.

        Raises:
            RayCkptError: a rank failed; nothing was committed. Or the commit itself failed, and may have happened.
            LostContact: a rank cannot be reached any more.
        """
        try:
            records = ranks.gather(self._write)
            self._coordinator.num_failed_before = self._mine.num_failed
            ranks.broadcast(lambda: self._coordinator.check(records))
        except RayCkptError:
            # All ranks have agreed not to commit. After a lost connection that is not known, and the files stay.
            self._writer.discard()
            raise
        try:
            report = ranks.broadcast(lambda: self._coordinator.publish(dcp_metadata.dumps(self._coordinator.manifest)))
        except CheckpointExistsError:
            self._writer.discard()  # it is another writer's that is there
            raise
        self._mine.num_failed = 0
        self._meter.end()
        self._telling.saved(report)
        return report

    def finish_beside_training(self, trainers: TrainersExchange, order: _Order) -> SaveHandle:
        """Begin `finish` in a thread; the handle tells how it ends. All ranks call it."""
        handle = SaveHandle(self._address)
        ranks = Exchange("save", self._mine.carrier(trainers.deadline, anew=order.new_carrier))

        def finish() -> SaveReport:
            with self._telling.failing():
                return self.finish(ranks)

        self._mine.start(handle, finish)
        return handle

    def _write(self) -> RankRecord:
        self._staged.get()
        assert self._assignment is not None, "begin comes first"
        return self._writer.write(self._assignment, self._meter)


def _next_attempt(agreed: Assignment | None) -> str | None:
    """A name for an attempt that all ranks know without being told."""
    return None if agreed is None else xxhash.xxh3_64_hexdigest(agreed.attempt.encode())[:12]
