"""load(state, target), resume(state, store): the phases of `protocol/rank_load.py`, carried by collectives.

coordinator    has the step come that is waited for? ── broadcast, once a second ──>
coordinator    where the checkpoint is, and its record unless files are local ── broadcast ──>
every rank     open        and where that may be somebody else's: names ── gather ──> join ── broadcast ──> adapt
every rank     offer ── gather ──> coordinator: agree ── broadcast ──> prepare
every rank     want  ── gather ──> coordinator: share_out ── broadcast ──>         where it is worth it
every rank     read -> finish -> LoadReport

The manifest tells every rank where its bytes are, so ranks need not talk while they read, unless what several want is
read once (`protocol/shared_reading.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from ray_ckpt.checkpoint.exchange import TrainersExchange
from ray_ckpt.errors import CheckpointNotFoundError, RayCkptError
from ray_ckpt.events import Events, Telling
from ray_ckpt.format.saved import Saved
from ray_ckpt.format.wanted_names import chosen, join_names
from ray_ckpt.progress import Meter, Progress
from ray_ckpt.protocol.agreement import agree
from ray_ckpt.protocol.load_options import LoadOptions
from ray_ckpt.protocol.rank_load import RankLoad, State
from ray_ckpt.protocol.share_plan import Share, SharePlan, is_shared, share_out
from ray_ckpt.report import LoadReport
from ray_ckpt.state.train_state import TrainState
from ray_ckpt.storage.record_files import read_for_all
from ray_ckpt.storage.resolve import Location, Target, checkpoint_at, held, wait_before
from ray_ckpt.storage.waiting import Wait

LONGEST_ROUND_S = 1.0
"""How long one rank waits for a step before it tells the others, who sit in a collective meanwhile."""


def load(
    state: State,
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
) -> LoadReport:
    """Load a checkpoint into a live state, whatever layout saved it. All ranks call it, with the same options.

    Everything is compared before anything is changed. Objects that may refuse what was saved (gradient scalers, data
    loaders, all with a `load_state_dict` of their own but modules and optimizers) are given it before other tensors are
    read; if one refuses, on any rank, all get back what they had. An optimizer's parameter groups are split where the
    checkpoint has different hyper-parameters for their members. Bytes are read directly into the live tensors: after an
    error while they are read, the tensors hold parts of two states, and the error says which parts are new.

    Example:
        >>> import torch
        >>> from ray_ckpt import CheckpointStore, TrainState, load, save
        >>> model, fresh = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        >>> store = CheckpointStore("checkpoints")
        >>> report = save(TrainState(model, step=100), store, step=100)
        >>> state = TrainState(fresh, step=0)
        >>> load(state, store).missing  # the latest committed step
        ()
        >>> state.step, bool((fresh.weight == model.weight).all())
        (100, True)

    Args:
        state: a `TrainState`, anything else with `state_dict` and `load_state_dict`, or a state dict, which is filled.
        target: the checkpoint's directory, or a store: a local path, a URI, a `Storage` or a `CheckpointStore`. For a
            `TrainState` also what others wrote: stock DCP (also where the optimizer's state is keyed by index, or its
            groups are), directories of torchtitan, accelerate, transformers, Lightning, verl and more, a file
            by `torch.save` or safetensors, or a directory of the latter. Names are translated, and in a run folder
            without a checkpoint of ours the highest finished `step-<N>` is taken, there or in its `checkpoint/`.
        step: number of the step in the store; None loads the checkpoint at `target` itself, or else the latest
            committed step of the store there.
        strict: refuse a checkpoint that lacks something wanted, or holds what no rank wants. Else the report has both.
        cast: convert what was saved in another dtype. Otherwise it is refused.
        only: prefixes of the names to load, in whole components, such as `("model.layers.0", "optim")`. Below `model`,
            `ema` and `extra` a part can be named, other sections only as a whole.
        key_map: wanted name -> saved name, as a mapping or a function. A parameter is renamed under `model.`, and its
            optimizer state follows. A mapping may join and split tensors by `Saved`: the same one on all ranks, in
            which every saved element has one place. A key that no rank wants is refused if `strict`, else named in
            `LoadReport.lost`.
        hyperparameters: whether the optimizers take the saved hyper-parameters or keep their own, as they must where of
            those of several pipeline stages one survived; see `LoadReport.lost`.
        fallback: when no step is named and the latest is damaged, by its record and its files' sizes, load the highest
            good step and log a WARNING. Otherwise it is refused.
        trusted: let the checkpoint's pickles run whatever code they name, if you trust its author. Otherwise what needs
            that is refused by name. What lies in files by `torch.save` is never run.
        share: whether bytes that several ranks want are read once and sent to the others, in 128 MiB of memory a rank:
            "auto" does so for object stores, as local files are faster to read.
        wait_for: wait until this step of the store or a higher one is committed; load the latest, as the report tells.
        wait_s: how long to wait for that step, by one rank for all; 0 looks once.
        timeout_s: limit of waiting for other ranks, not of own work or of `wait_for`; by default the group's own.
        progress: as for `save`, with the bytes that this rank has read and will, on a thread that reads.
        events: as for `save`; there is none for the time until the call returns.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint, or not the step, or not in time; names the newest.
        FormatError: the latest step is damaged; names path, reason and the highest good step.
        UnsafeCheckpointError: something that is wanted could run code.
        StateMismatchError: names, shapes, dtypes or hyper-parameters do not fit, or an object refuses; nothing changed.
        CheckpointError: ranks failed, or did not arrive within `timeout_s`; every rank learns which.
    """
    options = LoadOptions(strict, cast, chosen(only), key_map, hyperparameters, trusted)
    target, wait = wait_before(target, step, wait_for, wait_s, fallback=fallback)
    ranks = TrainersExchange("load", timeout_s) if wait is None else wait_together(wait, "load", timeout_s)
    telling = Telling(events, "load", step=step, rank=ranks.rank)
    with telling.failing(), contextlib.ExitStack() as holds:
        found = ranks.broadcast(lambda: find_and_hold(target, step, fallback, holds))
        return load_found(ranks, state, found, options, progress, telling, share)


def resume(
    state: State,
    store: Target,
    *,
    fallback: bool = False,
    trusted: bool = False,
    timeout_s: float | None = None,
    progress: Progress | None = None,
    events: Events | None = None,
) -> LoadReport | None:
    """Load the latest committed step of a store, or return None where there is none yet. All ranks call it.

    One rank looks for all, so that all load the same step, or all start from the beginning.

    Example:
        >>> import torch
        >>> from ray_ckpt import TrainState, resume, save
        >>> model = torch.nn.Linear(4, 4)
        >>> state = TrainState(model, torch.optim.Adam(model.parameters()))
        >>> def start() -> int:
        ...     report = resume(state, "checkpoints")
        ...     return 0 if report is None else report.step + 1
        >>> start()
        0
        >>> report = save(state, "checkpoints", 70)
        >>> start()
        71

    Args:
        state: as for `load`.
        store: a `CheckpointStore`, or its directory: a local path, a URI or a `Storage`.
        fallback, trusted, timeout_s, progress, events: as for `load`.

    Raises:
        FormatError: the latest step is damaged; names path, reason and the highest good step.
        StateMismatchError: names, shapes, dtypes or hyper-parameters do not fit; nothing was changed.
        CheckpointError: ranks failed, or did not arrive within `timeout_s`; every rank learns which.
    """
    ranks = TrainersExchange("resume", timeout_s)

    def latest() -> Found | None:
        try:
            return find_and_hold(store, None, fallback, holds)
        except CheckpointNotFoundError:
            return None

    telling = Telling(events, "load", rank=ranks.rank)
    with telling.failing(), contextlib.ExitStack() as holds:
        found = ranks.broadcast(latest)
        if found is None:
            return None
        return load_found(ranks, state, found, LoadOptions(trusted=trusted), progress, telling)


def wait_together(wait: Wait, operation: str, timeout_s: float | None) -> TrainersExchange:
    """Let one rank wait, and tell the others now and then that it does: a collective is given up after a while.

    Returns:
        The exchange in which the step was there.
    """
    round_s = LONGEST_ROUND_S if timeout_s is None else min(LONGEST_ROUND_S, timeout_s / 2)
    while True:
        ranks = TrainersExchange(operation, timeout_s)  # which has its own time limit, from now on
        if ranks.broadcast(lambda: wait.look(round_s)) is not None:
            return ranks


class Found(NamedTuple):
    location: Location
    record: bytes | None
    """As `read_for_all` gives it."""


def find_and_hold(target: Target, step: int | None, fallback: bool, holds: contextlib.ExitStack) -> Found:
    """
    Args:
        holds: what is found is held until it is closed.
    """
    location = holds.enter_context(held(lambda: checkpoint_at(target, step, fallback=fallback)))
    return Found(location, read_for_all(location.storage))


def load_found(
    ranks: TrainersExchange,
    state: State,
    found: Found,
    options: LoadOptions,
    progress: Progress | None,
    telling: Telling,
    share: Share = "auto",
) -> LoadReport:
    location, record = found
    telling.at(location.storage.address, location.step)
    meter = Meter(progress)
    rank = RankLoad(location.storage, options)
    ranks.on_all(lambda: rank.open(record))
    if rank.may_be_foreign and ranks.ask_any(isinstance(state, TrainState))():
        names = ranks.gather(lambda: rank.names(state))
        common = ranks.broadcast(lambda: join_names(names))
        ranks.on_all(lambda: rank.adapt(common))
    offers = ranks.gather(lambda: rank.offer(state))
    verdict = ranks.broadcast(lambda: agree(offers))
    try:
        ranks.on_all(lambda: rank.prepare(verdict))
        plan = _share_out(ranks, rank) if ranks.peers and is_shared(share, location.storage) else None
        ranks.on_all(lambda: rank.read(meter, plan, ranks.peers))
        report = ranks.on_all(lambda: rank.finish(verdict))
    except BaseException as error:
        if (told := rank.give_up()) and isinstance(error, RayCkptError):
            error.append(told)
        raise
    meter.end()
    report = replace(report, step=location.step, passed_over=location.passed_over)
    telling.loaded([report])
    return report


def _share_out(ranks: TrainersExchange, rank: RankLoad) -> SharePlan | None:
    wants = ranks.gather(rank.want)
    return ranks.broadcast(lambda: share_out(wants))
