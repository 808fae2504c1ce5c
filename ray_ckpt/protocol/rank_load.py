"""One rank's side of a load.

every rank     open     the manifest
only where that may be somebody else's:
every rank     names    the names of this rank's part of the state
coordinator    translate.join_names: the names of all ranks together
every rank     adapt    the manifest under our names
every rank     offer    plan; refuse what this rank misses                     (changes nothing)
coordinator    agree    agreement.py: what no rank wants
every rank     prepare  refuse what is left over; objects that may refuse what was saved take it
only where it is shared what several ranks want:
every rank     want     allocate; what is to be read
coordinator    share_plan.share_out: who reads what, and for whom
every rank     read     allocate; bytes go straight into the live tensors
every rank     finish   hyper-parameters, schedulers, counters, generators
after an error
every rank     give_up  before `read`: objects get back what they had; after it: tell which parts are new

Between the phases, whoever carries the messages tells the ranks whether the others have succeeded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.stateful import Stateful

from ray_ckpt.errors import CheckpointError, FormatError, StateMismatchError
from ray_ckpt.format.manifest import Manifest, itemsize
from ray_ckpt.format.torch_internals import local_tensor
from ray_ckpt.format.translate import HYPERPARAMETERS
from ray_ckpt.format.wanted_names import Names
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.phase_clock import PhaseClock
from ray_ckpt.progress import NOBODY, Meter
from ray_ckpt.protocol import frozen
from ray_ckpt.protocol.agreement import mark, marked
from ray_ckpt.protocol.fitting import compare, lacking, saved_and_wanted, unknown_names, unused_keys
from ray_ckpt.protocol.frozen import Frozen
from ray_ckpt.protocol.load_options import LoadOptions
from ray_ckpt.protocol.load_source import LoadSource
from ray_ckpt.protocol.messages import LoadOffer
from ray_ckpt.protocol.peers import Peers
from ray_ckpt.protocol.share_plan import SharePlan, Wants
from ray_ckpt.protocol.shared_reading import read_shared, wants_of
from ray_ckpt.report import LoadReport
from ray_ckpt.state import handing_over, plain_state
from ray_ckpt.state.load_plan import Claim, KeyMap, LoadPlan, SavedState
from ray_ckpt.state.subclasses import expand, whole
from ray_ckpt.state.train_state import TrainState
from ray_ckpt.storage.checkpoint_reader import TensorReads
from ray_ckpt.storage.files import Storage
from ray_ckpt.text import listed

State = TrainState | Stateful | Mapping[str, Any]

_listed = partial(listed, at_most=8, separator="; ")


class _Wanted(NamedTuple):
    """What is to be read into allocated tensors."""

    reads: TensorReads
    copies: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """(target, filled) where several targets want the same."""
    num_bytes: int

    def copy(self) -> None:
        """After the reading."""
        with torch.no_grad():
            for target, filled in self.copies:
                target.copy_(filled)


class RankLoad:
    """Loads one checkpoint into what a rank holds.

    Args:
        storage: the checkpoint's directory or file.
    """

    def __init__(self, storage: Storage, options: LoadOptions) -> None:
        self._start = time.monotonic()
        self._source = LoadSource(storage, trusted=options.trusted)
        self._options = options
        self._names: list[str] = []
        self._saved = SavedState({}, {})
        self._plans: Sequence[LoadPlan] = ()
        self._taken = handing_over.Taken()
        self._loaded: dict[str, torch.Tensor] = {}
        self._num_bytes = 0
        self._preparing = threading.Lock()
        self._given_up = False
        self._reading = False
        self._wanted: _Wanted | None = None
        self._cut_short = False
        self._num_applied = 0
        self._clock = PhaseClock()
        self._storage = storage
        self._retries_before = storage.num_retries
        self._rereads_before = len(storage.rereads)

    def open(self, record: bytes | Manifest | None = None) -> None:
        """Read what the checkpoint says of itself.

        Args:
            record: the bytes of its `manifest.json`, where the coordinator has read them for all, or what they say.

        Raises:
        CheckpointNotFoundError, FormatError, UnsafeCheckpointError: there is nothing that can be read.
        """
        with self._clock.phase("open"):
            self._source.open(record)
            self._list_names()

    @property
    def may_be_foreign(self) -> bool:
        """Whether `names` and `adapt` are to be called; the same on all ranks."""
        return self._source.may_be_foreign

    def names(self, state: State) -> Names | None:
        """The names of this rank's part of the state. Under FSDP1 all ranks have to call it together.

        Returns:
            None for a state that is no `TrainState`: it has the names of whoever saved it.
        """
        if not isinstance(state, TrainState):
            return None
        claims = {name: claim for plan in state.plans(SavedState({}, {})) for name, claim in plan.claims.items()}
        model = {name.removeprefix("model."): claim for name, claim in claims.items() if name.startswith("model.")}
        shapes = {name: claim.spec.shape for name, claim in model.items() if claim.spec is not None}
        others = [name for name in claims if not name.startswith(("model.", "optim."))]
        return Names(list(model), state.groups, shapes=shapes, aliases=state.aliases, others=others)

    def adapt(self, names: Names | None) -> None:
        """Translate the names of the checkpoint.

        Args:
            names: the names of all ranks together.

        Raises:
            StateMismatchError: the optimizer's state cannot be matched to parameters, or its hyper-parameters are lost
                and `hyperparameters` is not "from-optimizer".
        """
        if names is None:
            return
        names = _saved_names(names, self._options)
        if not SavedState({}, {}, only=self._options.only).wants("optim"):
            names = replace(names, groups=())
        self._source.adapt(names)
        if self._source.lost and not self._options.keep_hyperparameters:
            raise StateMismatchError(
                f"{self._source.lost}. hyperparameters='from-optimizer' keeps those of the optimizers that it is "
                "loaded into, and takes everything else"
            )
        self._list_names()

    def _list_names(self) -> None:
        self._names = sorted({*self._source.manifest.tensors, *self._source.manifest.objects})

    def offer(self, state: State) -> LoadOffer:
        """Compare. Under FSDP1 all ranks have to call it together.

        Raises:
            StateMismatchError: something that this rank wants is missing (`strict`), has another shape or kind, or
                another dtype (unless `cast`).
            FormatError: what `TrainState` records of itself is damaged.
        """
        with collector_paused(), self._clock.phase("plan"):
            return self._offer(state)

    def _offer(self, state: State) -> LoadOffer:
        options = self._options
        needed = _needed_by(state, options.names)
        kept: Mapping[str, Any] = {}
        if options.keep_hyperparameters and isinstance(state, TrainState):
            self._source.drop(HYPERPARAMETERS)
            self._list_names()
            kept = _own_hyperparameters(state, options.names)
        if options.made:
            wants_optimizer = SavedState({}, {}, only=options.only).wants("optim") and needed("optim")
            self._source.rearrange(options.made, with_optimizer=wants_optimizer)
            self._list_names()
        saved = self._saved = self._source.saved(needed, options.only, options.names, kept)
        try:
            self._plans = _plans(state, saved)
        except FormatError as error:
            raise FormatError(f"{self._source.address}: {error}") from error
        claims = {wanted: claim for plan in self._plans for wanted, claim in plan.claims.items()}
        missing = sorted(wanted for wanted, claim in claims.items() if claim.saved not in saved.names)
        differing, cast = compare(claims, saved)
        problems = [problem for plan in self._plans for problem in plan.problems]
        if options.strict:
            problems += [
                f"{doubt} (strict=False loads it all the same)" for plan in self._plans for doubt in plan.doubts
            ]
        problems += unknown_names(options.only, saved, claims)
        lacks = [] if not isinstance(state, TrainState) else lacking(missing, saved)
        self._refuse(missing, differing, cast, problems, claims, lacks)
        taken = {claim.saved for claim in claims.values()}
        taken |= {name for plan in self._plans for name in plan.taken}
        unwanted = {name for name in self._names if name not in taken and saved.wants(name)}
        unwanted = {name for name in unwanted if not name.startswith(plain_state.KEYS)}
        notes = {section: note for plan in self._plans for section, note in plan.notes.items()}
        unused = unused_keys(options.key_map, saved, {*claims, *_further_names(state)})
        return LoadOffer(
            tuple(missing), tuple(cast), mark(self._names, unwanted), notes, self._frozen(state), unused_keys=unused
        )

    def _frozen(self, state: State) -> Frozen:
        """What the state has instead of loading it, beside the fingerprints that were saved."""
        if not isinstance(state, TrainState) or not state.trainable_only:
            return {}
        saved = self._source.manifest.fingerprints
        held = {name: tensor for name, tensor in state.frozen().items() if self._saved.wants(name)}
        known = {name: saved.get(self._saved.name_of(name)) for name in held}
        found = state.frozen_fingerprints({name: held[name] for name, digest in known.items() if digest}, known)
        return {name: (found.get(name), digest) for name, digest in known.items()}

    def prepare(self, verdict: LoadOffer) -> None:
        """Give the objects that may refuse what was saved their state; no other tensor is read yet.

        Args:
            verdict: what all ranks have agreed on.

        Raises:
            StateMismatchError: no rank wants some of what was saved, and the load is `strict`; or an object refuses its
                state. Nothing was changed.
            StorageError, FormatError, IntegrityError: it cannot be read, or is damaged.
        """
        self._refuse_leftovers(verdict)
        with self._preparing:
            self._refuse_after_giving_up()
            if handovers := handing_over.early(self._plans):
                claims = {wanted: claim for handover in handovers for wanted, claim in handover.claims.items()}
                with self._clock.phase("prepare"):
                    self._taken.take(handovers, lambda: self._read_early(claims))

    def want(self) -> Wants:
        """Allocate what has no memory yet, and tell what is to be read for it. `read` follows on all ranks."""
        with self._clock.phase("share"):
            self._wanted = self._want(self._claims())
            return wants_of(self._wanted.reads)

    def read(self, meter: Meter = NOBODY, share: SharePlan | None = None, peers: Peers | None = None) -> None:
        """Allocate what has no memory yet, and read. After an error while reading the tensors hold parts of two states.

        Args:
            meter: counts the bytes that are read.
            share: what of it other ranks read, as came of what all ranks `want`. All ranks have to call it together.
                If one of them fails, the others return without having read all, and wait to hear of it.
            peers: these ranks.

        Raises:
            StorageError, FormatError, IntegrityError: it cannot be read, or is damaged.
        """
        with self._clock.phase("read") as phase:
            wanted = self._wanted or self._want(self._claims())
            with self._preparing:
                self._refuse_after_giving_up()
                self._reading = True
            if share is None or peers is None:
                wanted.reads.run(meter)
            else:
                self._cut_short = not read_shared(wanted.reads, share, peers, meter)
            wanted.copy()
            phase.num_bytes = wanted.num_bytes

    def _claims(self) -> dict[str, Claim]:
        return {wanted: claim for plan in self._plans for wanted, claim in plan.claims.items()}

    def give_up(self) -> str:
        """After an error, on any rank: undo what can be undone. May be called from another thread than the rest.

        Returns:
            Which parts of this rank's state are new; empty when none is.
        """
        early = handing_over.early(self._plans)
        taken = {wanted for handover in early for wanted in handover.claims}
        rest = [(plan.section, plan.claims.keys() - taken) for plan in self._plans]
        with self._preparing:
            if not self._reading:
                self._given_up = True
                told = [undone] if (undone := self._taken.undo()) else []
                if unfilled := _sections([(section, wanted & self._loaded.keys()) for section, wanted in rest]):
                    told.append(
                        f"nothing was read; of {', '.join(unfilled)}, what had no memory has some of any content now"
                    )
                return "; ".join(told)
        applied, others = rest[: self._num_applied], rest[self._num_applied :]
        begun = [(section, wanted) for section, wanted in others if wanted & self._loaded.keys()]
        parts = {
            "new": [*(handover.name for handover in early), *_sections(applied)],
            "part old, part new": _sections(begun),
            "as it was": _sections([part for part in others if part not in begun]),
        }
        told = [f"{state}: {', '.join(names)}" for state, names in parts.items() if names]
        return f"what the failed load has left: {'; '.join(told)}"

    def _refuse_leftovers(self, verdict: LoadOffer) -> None:
        if verdict.other_base and self._options.strict:
            raise StateMismatchError(
                f"{self._source.label} was saved beside another base: the frozen {_listed(list(verdict.other_base))} "
                "have other elements, or another dtype or shape, than they had then. Load the base of that run first; "
                "strict=False loads it all the same"
            )
        if verdict.unused_keys and self._options.strict:
            raise StateMismatchError(
                f"{_unused(verdict)}. Its keys are names of what is loaded into; strict=False ignores others"
            )
        left = marked(self._names, verdict.unwanted)
        if verdict.missing and len(left) == sum(map(self._saved.wants, self._names)):
            raise StateMismatchError(
                f"nothing would be loaded: {self._source.label} has nothing that is wanted. It holds {listed(left)}; "
                f"wanted are {listed(list(verdict.missing))}"
            )
        if left and self._options.strict:
            texts = [f"{name}: saved {self._source.describe(name)}, not wanted" for name in left]
            raise StateMismatchError(
                f"{self._source.label} does not fit what it is loaded into: {_listed(texts)}. Load a part of it by "
                "only=('model', ...), or all that fits by strict=False"
            )

    def _refuse_after_giving_up(self) -> None:
        if self._given_up:
            raise CheckpointError("another rank has given up")

    def _read_early(self, claims: Mapping[str, Claim]) -> Mapping[str, torch.Tensor]:
        wanted = self._want(claims)
        wanted.reads.run()
        wanted.copy()
        return self._loaded

    def _want(self, claims: Mapping[str, Claim]) -> _Wanted:
        """What is claimed and has not been read yet."""
        with collector_paused():
            tensors, copies = self._allocate(claims)
        num_bytes = sum(
            _local_elements(tensor) * itemsize(self._saved.tensors[name].dtype) for name, tensor in tensors.items()
        )
        self._num_bytes += num_bytes
        return _Wanted(self._source.plan(dict(tensors)), copies, num_bytes)

    def _allocate(
        self, claims: Mapping[str, Claim]
    ) -> tuple[dict[str, torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Targets by saved name, and (target, filled) where several want the same."""
        tensors: dict[str, torch.Tensor] = {}
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for wanted, claim in claims.items():
            if claim.target is None or claim.saved not in self._saved.tensors or wanted in self._loaded:
                continue
            target = claim.target()
            if target is None:
                continue
            self._loaded[wanted] = target
            if claim.saved in tensors:
                copies.append((target, tensors[claim.saved]))
            else:
                tensors[claim.saved] = target
        return tensors, copies

    def finish(self, verdict: LoadOffer) -> LoadReport:
        """Set what is not read in place. Under FSDP1 all ranks have to call it together.

        Raises:
            CheckpointError: an object refuses what was saved; the tensors have been read.
        """
        if self._cut_short:
            raise CheckpointError("another rank has failed to read")
        with self._clock.phase("set"):
            for plan in self._plans:
                handing_over.finish(plan, self._loaded)
                self._num_applied += 1
        again = self._storage.rereads[self._rereads_before :]
        return LoadReport(
            uri=self._source.address,
            num_bytes=self._num_bytes,
            seconds=time.monotonic() - self._start,
            missing=verdict.missing,
            unexpected=tuple(marked(self._names, verdict.unwanted)),
            cast=verdict.cast,
            rng=verdict.notes.get("rng"),
            dataloader=verdict.notes.get("dataloader"),
            lost="; ".join(filter(None, (self._source.left_out, _unused(verdict)))),
            phases=self._clock.phases,
            num_retries=self._storage.num_retries - self._retries_before,
            bytes_by_file=self._source.bytes_by_file,
            tier=self._storage.tier,
            durable_bytes=self._num_bytes
            if self._storage.tier == "durable"
            else sum(r.num_bytes for r in again if r.is_durable),
            damaged_copies=tuple(dict.fromkeys(map(str, again))),
            base=verdict.notes.get(frozen.NOTE),
        )

    def _refuse(
        self,
        missing: Sequence[str],
        differing: Sequence[str],
        cast: Sequence[str],
        problems: Sequence[str],
        claims: Mapping[str, Claim],
        lacks: Sequence[str],
    ) -> None:
        texts = list(differing)
        if cast and not self._options.cast:
            texts += [f"{name}: {saved_and_wanted(claims[name], self._saved)}" for name in cast]
        if self._options.strict:
            texts += [f"{name}: not saved, wanted {claims[name].spec or 'a value'}" for name in missing]
        advice = ""
        if cast and not self._options.cast:
            advice = ". cast=True converts dtypes"
        if lacks and self._options.strict:
            advice += f". It has nothing for {listed(lacks)}: without that the rest is loaded"
        if texts:
            texts = [f"{self._source.label} does not fit what it is loaded into: {_listed(sorted(texts))}{advice}"]
        if texts or problems:
            raise StateMismatchError("; ".join([*texts, *problems]))


def _further_names(state: State) -> list[str]:
    """What a key map may name that is not read under that name: tied weights by their others, and a frozen base."""
    if not isinstance(state, TrainState):
        return []
    frozen = state.frozen() if state.trainable_only else ()
    return [*(f"model.{alias}" for alias in state.aliases), *frozen]


def _unused(verdict: LoadOffer) -> str:
    return f"key_map has {_listed(list(verdict.unused_keys))}, which nothing wants" if verdict.unused_keys else ""


def _sections(parts: Sequence[tuple[str, Set[str]]]) -> list[str]:
    return [section for section, wanted in parts if section and wanted]


def _own_hyperparameters(state: TrainState, key_map: KeyMap | None) -> dict[str, Any]:
    """The optimizers' own values, as if they had been saved, under the names that the parameters were saved by."""
    view = SavedState({}, {}, key_map=key_map)
    own: dict[str, Any] = {}
    for name, value in state.state_dict().get("optim", {}).items():
        if name.startswith("param_groups."):
            whole, dot, tensor = name.removeprefix("param_groups.").partition(".$")
            parameter, _, key = whole.rpartition(".")
            saved = view.name_of(f"model.{parameter}").removeprefix("model.")
            own[f"{HYPERPARAMETERS}{saved}.{key}{dot}{tensor}"] = value
    return own


def _saved_names(names: Names, options: LoadOptions) -> Names:
    """The names under which the checkpoint has what is wanted, as far as a key map says so."""
    made, view = options.made, SavedState({}, {}, key_map=options.names)

    def of(name: str) -> list[str]:
        saved = made.get(f"model.{name}")
        found = [view.name_of(f"model.{name}")] if saved is None else dict.fromkeys(saved.names())
        return [each.removeprefix("model.") for each in found]

    if options.key_map is None:
        return names
    model = dict.fromkeys(saved for name in names.model for saved in of(name))
    groups = [list(dict.fromkeys(saved for name in group for saved in of(name))) for group in names.groups]
    return replace(names, model=tuple(model), groups=groups)


def _needed_by(state: State, key_map: KeyMap | None) -> Callable[[str], bool]:
    """Whether a value of this saved name may be wanted."""
    if not isinstance(state, TrainState):
        view = SavedState({}, {}, key_map=key_map)
        roots = plain_state.roots(state)
        places = SavedState({}, {}, only=[place for root in roots for place in plain_state.places(view.name_of(root))])
        return places.wants
    if callable(key_map):
        return _everything
    mapped = set((key_map or {}).values())
    return lambda name: name.partition(".")[0] in state.sections or name in mapped


def _everything(name: str) -> bool:
    return True


def _plans(state: State, saved: SavedState) -> list[LoadPlan]:
    if isinstance(state, TrainState):
        return state.plans(saved)
    seen = whole(saved)
    return [expand(plan, seen, saved) for plan in plain_state.plans(state, seen)]


def _local_elements(tensor: torch.Tensor) -> int:
    return local_tensor(tensor).numel()
