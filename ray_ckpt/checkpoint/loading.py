"""load(state, target): the phases of `protocol/rank_load.py`, carried by collectives.

every rank     open        and where that may be somebody else's: names ── gather ──> join ── broadcast ──> adapt
every rank     offer ── gather ──> coordinator: agree ── broadcast ──> check -> read -> finish -> LoadReport

The manifest tells every rank where its bytes are: nobody has to be asked while they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ray_ckpt.checkpoint.carriers import carrier, on_any_rank
from ray_ckpt.checkpoint.together import Exchange, chosen_by_one, together
from ray_ckpt.errors import UsageError
from ray_ckpt.format.translate import join
from ray_ckpt.protocol.agreement import agree
from ray_ckpt.protocol.rank_load import LoadOptions, RankLoad, State
from ray_ckpt.report import LoadReport
from ray_ckpt.state.load_plan import KeyMap
from ray_ckpt.state.train_state import TrainState
from ray_ckpt.storage.resolve import Target, checkpoint_at


def load(
    state: State,
    target: Target,
    step: int | None = None,
    *,
    strict: bool = True,
    cast: bool = False,
    only: Sequence[str] | None = None,
    key_map: KeyMap | None = None,
    hyperparameters: Literal["from-checkpoint", "from-optimizer"] = "from-checkpoint",
    fallback: bool = False,
) -> LoadReport:
    """Load a checkpoint into a live state, whatever layout saved it. All ranks call it, with the same options.

    Everything is compared before anything is changed. The optimizers' parameter groups are split where the checkpoint
    has different hyper-parameters for their members, and a fresh optimizer gets the state that was saved. Bytes are
    read directly into the live tensors: after an error while they are read, the tensors hold parts of two states.

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
        state: a `TrainState`, anything else with `state_dict` and `load_state_dict`, or a state dict, which is loaded
            in place: its tensors are filled, its other values replaced.
        target: the checkpoint's directory, or a store: a local path, a URI, a `Storage` or a `CheckpointStore`. For a
            `TrainState` also what others wrote: stock DCP (also where the optimizer's state is keyed by index, or its
            groups are), accelerate's and Lightning's FSDP directories, a file by `torch.save` or safetensors, or a
            directory of the latter. Their names are translated.
        step: of the store; None for the checkpoint at `target` itself, or else the latest committed step.
        strict: refuse a checkpoint that lacks something wanted, or holds something that no rank wants. Otherwise both
            are named in the report, and what is missing stays as it is.
        cast: convert what was saved in another dtype. Otherwise that is refused.
        only: what to load, by the beginning of its name, in whole components: `("model",)`, `("model.layers.0",)`,
            `("model", "optim")`. Below `model`, `ema` and `extra` a part can be named, of other sections the whole.
        key_map: wanted name -> saved name, as a mapping or a function. A parameter is renamed under `model.`, and its
            optimizer state follows.
        hyperparameters: whether the optimizers take what was saved, or keep their own, as they must where several
            pipeline stages saved their groups under one name and only one survived; see `LoadReport.lost`.

        fallback: where no step is named and the latest of the store is damaged, as far as its record and the sizes of
            its files tell, load the highest step that is good, and log a WARNING. Otherwise that is refused.

    Raises:
        CheckpointNotFoundError: there is no committed checkpoint.
        FormatError: the latest step is damaged; names path, reason and the highest good step.
        StateMismatchError: names, shapes, dtypes or hyper-parameters do not fit; nothing was changed.
        CheckpointError: a rank failed; names each of them, on every rank.
    """
    if isinstance(only, str):
        raise UsageError(f"only={only!r} is one text: give a sequence of them, as in only=({only!r},)")
    options = LoadOptions(strict, cast, None if only is None else tuple(only), key_map, hyperparameters)
    rank = RankLoad(chosen_by_one("load", lambda: checkpoint_at(target, step, fallback=fallback)), options)
    with together("load"):
        rank.open()
    ranks = Exchange("load", carrier())
    if rank.may_be_foreign and on_any_rank(isinstance(state, TrainState)):
        of_ranks = ranks.gather(lambda: rank.names(state))
        common = ranks.broadcast(lambda: join(of_ranks))
        with together("load"):
            rank.adapt(common)
    offers = ranks.gather(lambda: rank.offer(state))
    verdict = ranks.broadcast(lambda: agree(offers))
    # The same on all ranks, which need not tell each other.
    rank.check(verdict)
    with together("load"):
        rank.read()
    with together("load"):
        return rank.finish(verdict)
