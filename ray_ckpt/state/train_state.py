"""TrainState: everything that a training run must not lose, as one flat, name-keyed state.

    model.<parameter or buffer>                          named_model.py
    optim.state.<parameter>.<key>                        named_optimizers.py
    optim.param_groups.<parameter>.<hyper-parameter>     hyperparameters.py
    optim.shards.<parameter>.<box>.<key>                 shard_state.py
    optim.others.<n>. ...                                own_optimizers.py
    schedulers.<scheduler>. ...                          named_schedulers.py
    scaler.state. ...  counters. ...                     replicated_parts.py
    extra. ...                                           extra_part.py
    ema.<parameter or buffer>                            named_model.py, extra_part.py
    rng.rank<n>. ...  dataloader.rank<n>. ...            rank_parts.py

Names depend on the model alone, never on the layout: that is what lets any layout load what any other saved.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

from ray_ckpt.errors import StateMismatchError, UsageError
from ray_ckpt.format.fingerprint import CURRENT, Fingerprint, formula_of
from ray_ckpt.format.fingerprinting import fingerprint
from ray_ckpt.format.snapshot import Snapshot
from ray_ckpt.format.translate import HYPERPARAMETERS
from ray_ckpt.state import handing_over, subclasses
from ray_ckpt.state.extra_part import ExtraPart
from ray_ckpt.state.known_fingerprints import KnownFingerprints
from ray_ckpt.state.load_plan import Claim, LoadPlan, SavedState, Spec, StatePart
from ray_ckpt.state.named_model import NamedModel
from ray_ckpt.state.named_optimizers import NamedOptimizers
from ray_ckpt.state.named_schedulers import NamedSchedulers, Schedulers
from ray_ckpt.state.random_generators import Rng
from ray_ckpt.state.rank_parts import RankPart
from ray_ckpt.state.replicated_parts import CounterPart, StatefulPart
from ray_ckpt.state.wrappers import optimizer_in

T = TypeVar("T")

OPTIONAL = {
    "schedulers": "TrainState(schedulers=...)",
    "scaler": "TrainState(scaler=...)",
    "counters": "TrainState(step=..., counters=...)",
    "ema": "TrainState(ema=...)",
    "extra": "TrainState(extra=...)",
    "dataloader": "TrainState(dataloader=...)",
    "rng": "TrainState(rng=True)",
}
"""Section -> what a state has it by, where it may be without."""

PER_RANK = ("rng", "dataloader")
"""Sections that every rank has of its own, so that their names depend on the layout."""


class TrainState:
    """Everything that a training run must not lose, as far as this rank holds it.

    `ray_ckpt.save` and `ray_ckpt.load` take it. DCP's own `save` and `load` take it too, with one difference: DCP only
    fills tensors that exist, so only `ray_ckpt.load` can give a fresh optimizer the state that the checkpoint has.
    Saving changes nothing: it takes no optimizer step, and state that an optimizer does not have yet is not saved.

    Example:
        >>> import torch
        >>> from ray_ckpt import TrainState
        >>> model = torch.nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> state = TrainState(model, optimizer, step=0, counters={"tokens": 0})
        >>> sorted(state.state_dict()["model"])
        ['bias', 'weight']
        >>> state.state_dict()["optim"]["param_groups.weight.lr"]
        0.1

    Args:
        model: the wrapped model, or the chunks of it that this rank holds (interleaved pipeline stages). A plain tensor
            on the meta device belongs to another rank. A DTensor on the meta device, or a module that is there as a
            whole, gets memory when it is loaded: on the CPU, or on its mesh's device. So do its buffers; those that are
            not persistent are computed by the module's own `reset_parameters()` or the model's `_init_weights(module)`,
            and refused by name where neither sets them.
        optimizers: one, several, or several by name. Each parameter has at most one of them.
        schedulers: LR schedulers of these optimizers: one, several, or several by name.
        scaler: a `torch.amp.GradScaler`, or anything else with `state_dict` and `load_state_dict`.
        step: number of steps trained; set `state.step` as training goes on. A load sets it.
        counters: other numbers, such as tokens seen; a load replaces the values in this mapping.
        rng: whether to save and restore the random generators of each rank.
        dataloader: this rank's data loader: anything with `state_dict` and `load_state_dict`. A torchdata
            `StatefulDataLoader` over a `StatefulDistributedSampler` goes on in any layout, each sample once.
        ema: a second set of parameters: a module (also torch's `AveragedModel`), or name -> tensor.
        extra: name -> tensor, plain value, or anything with `state_dict` and `load_state_dict`; a load fills tensors
            in place and replaces plain values in this mapping. An object that was registered with accelerate is loaded
            from its `custom_checkpoint_<n>.pkl` by that name: `extra={"custom_checkpoint_0": ...}`.
        tied: alias -> canonical name of tied weights, for a pipeline stage that holds a copy of another stage's weight
            (`{"lm_head.weight": "model.embed_tokens.weight"}`). Not needed for weights that modules of one stage share,
            or that are listed in an attribute `all_tied_weights_keys`, as transformers' models have it. A tied weight
            is saved once and loaded into all.
        trainable_only: save and load only what training changes: parameters with `requires_grad`, the optimizers' state
            of them, all buffers and extra state. For adapters (LoRA): the frozen parameters are loaded before, by
            other means. Their fingerprints are saved, and a load beside another base is refused by name. That reads
            all frozen elements once per save and load, but none from or to the storage; the same object computes the
            fingerprint of one again only where its bytes have changed. (DCP's own verbs do not.)
        layout: name of the layout in which this rank runs, for the manifest. The states that each rank has of its own
            (`rng`, `dataloader`) are restored only in a layout of the same name and number of ranks; see `dataloader`.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | Mapping[str, torch.optim.Optimizer] = (),
        *,
        schedulers: Schedulers = (),
        scaler: Stateful | None = None,
        step: int | None = None,
        counters: MutableMapping[str, Any] | None = None,
        rng: bool = False,
        dataloader: Stateful | None = None,
        ema: nn.Module | MutableMapping[str, torch.Tensor] | None = None,
        extra: MutableMapping[str, Any] | None = None,
        tied: Mapping[str, str] | None = None,
        trainable_only: bool = False,
        layout: object | None = None,
    ) -> None:
        self.models = [model] if isinstance(model, nn.Module) else list(model)
        self.given_optimizers = _listed(optimizers)
        """As they were given: they may be wrappers that are no optimizers of torch's."""
        self.optimizers = [optimizer_in(given) for given in self.given_optimizers]
        self.step = step
        self.layout = None if layout is None else str(layout)
        self.trainable_only = trainable_only
        self._known_fingerprints = KnownFingerprints()
        named = self._model = NamedModel(self.models, tied, trainable="itself" if trainable_only else None)
        self._optim = NamedOptimizers(self.optimizers, named)
        # In the order in which they are loaded: an optimizer's state takes after the parameters, schedulers follow its
        # groups, and nothing may draw random numbers after the generators.
        self._parts: list[StatePart] = [named]
        schedules = NamedSchedulers(schedulers, self._optim)
        if self.optimizers:
            self._parts += [self._optim, schedules]
        if isinstance(ema, nn.Module):
            self._parts.append(NamedModel([ema], tied, "ema", named if trainable_only else None))
        elif ema is not None:
            self._parts.append(ExtraPart(ema, "ema"))
        if scaler is not None:
            self._parts.append(StatefulPart("scaler", scaler))
        self._parts.append(CounterPart(self, {} if counters is None else counters))
        if extra is not None:
            self._parts.append(ExtraPart(extra))
        if dataloader is not None:
            self._parts.append(RankPart("dataloader", dataloader, self.layout))
        if rng:
            self._parts.append(RankPart("rng", Rng(), self.layout))

    @property
    def model(self) -> nn.Module:
        """The model, when it is one module.

        Raises:
            UsageError: this rank holds several chunks: see `models`.
        """
        return _only(self.models, "model chunks", "models")

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, when there is one.

        Raises:
            UsageError: there is none, or there are several: see `optimizers`.
        """
        return _only(self.optimizers, "optimizers", "optimizers")

    @property
    def named_models(self) -> list[NamedModel]:
        """The model, and its average if that is a module."""
        return [part for part in self._parts if isinstance(part, NamedModel)]

    @property
    def sections(self) -> frozenset[str]:
        """First components of the names that this state saves and loads."""
        return frozenset(part.section for part in self._parts)

    @property
    def groups(self) -> list[list[str]]:
        """Names of the parameters in each group of the optimizers, on this rank."""
        names = self._optim.names()
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return [[name for parameter in group["params"] for name in names[parameter]] for group in groups]

    @property
    def aliases(self) -> dict[str, str]:
        """Other names of the model's tied weights -> the names that they are saved under."""
        return self._model.aliases()

    def state_dict(self) -> dict[str, Any]:
        """Section -> name -> live tensor (a DTensor where the layout shards it) or plain value. Nothing is copied.

        Raises:
            UsageError: something has no place in a checkpoint; the message names it.
        """
        sections = {part.section: subclasses.apart(part.leaves(), part.section) for part in self._parts}
        return {section: leaves for section, leaves in sections.items() if leaves}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, of this state or of another one in the same layout.

        Raises:
            StateMismatchError: it does not fit: other hyper-parameters in one group, another recipe of a subclass.
        """
        flat = {f"{section}.{name}": value for section, leaves in state_dict.items() for name, value in leaves.items()}
        tensors = {name: value for name, value in flat.items() if isinstance(value, torch.Tensor)}
        values = {name: value for name, value in flat.items() if not isinstance(value, torch.Tensor)}
        values |= {name: value for name, value in tensors.items() if is_hyperparameter(name)}
        saved = SavedState({name: Spec.of(value) for name, value in tensors.items()}, values, layout=self.layout)
        if self.optimizers and not any(name.startswith("optim.state.") for name in flat):
            warnings.warn(
                "no optimizer state arrived. If the checkpoint has some, load it by ray_ckpt.load: DCP fills only what "
                "an optimizer remembers already, and this one has not stepped",
                stacklevel=2,
            )
        loaded: dict[str, torch.Tensor] = {}

        def fill(claims: Mapping[str, Claim]) -> dict[str, torch.Tensor]:
            for name, claim in claims.items():
                if claim.target is None or claim.saved not in tensors or name in loaded:
                    continue
                if (target := claim.target()) is not None:
                    loaded[name] = target
                    with torch.no_grad():
                        target.copy_(tensors[claim.saved])
            return loaded

        plans = self.plans(saved)
        if problems := [problem for plan in plans for problem in plan.problems]:
            raise StateMismatchError("; ".join(problems[:8]))
        early = handing_over.early(plans)
        handing_over.Taken().take(early, lambda: fill({k: c for handover in early for k, c in handover.claims.items()}))
        for plan in plans:
            handing_over.finish(plan, fill(plan.claims))

    def plans(self, saved: SavedState) -> list[LoadPlan]:
        """Each part's plan to load a checkpoint, to be applied in this order. Nothing is changed or allocated yet."""
        seen = subclasses.whole(saved)
        plans = [replace(part.plan(seen), section=part.section) for part in self._parts]
        return [subclasses.expand(plan, seen, saved) for plan in plans]

    def frozen(self) -> dict[str, torch.Tensor]:
        """Flat name -> live tensor that `trainable_only` leaves out, as far as this rank holds it.

        Under FSDP1 all ranks have to call it together.
        """
        section = self._model.section
        leaves = subclasses.apart(self._model.frozen(), section)
        return {f"{section}.{name}": value for name, value in leaves.items() if isinstance(value, torch.Tensor)}

    def frozen_fingerprints(
        self, tensors: Mapping[str, torch.Tensor], recorded: Mapping[str, str | None] | None = None
    ) -> dict[str, Fingerprint]:
        """Flat name -> fingerprint of what this rank holds of a tensor of `frozen`, by the formula of the digest that
        it is to be compared with."""
        formulas = {name: formula_of(digest) for name, digest in (recorded or {}).items() if digest}
        return {
            name: self._known_fingerprints.of(name, tensor, formulas.get(name, CURRENT))
            for name, tensor in tensors.items()
        }

    def snapshot(self, rank: int) -> Snapshot:
        """Fingerprints of all tensors that this rank holds, and the values of everything else, by flat name.

        Without what belongs to one rank alone: it is no other rank's in any other layout.
        """
        fingerprints, values = {}, {}
        for section, leaves in self.state_dict().items():
            if section in PER_RANK:
                continue
            for name, value in leaves.items():
                if isinstance(value, torch.Tensor):
                    fingerprints[f"{section}.{name}"] = fingerprint(value)
                else:
                    values[f"{section}.{name}"] = value
        return Snapshot(rank, fingerprints, values)


def is_hyperparameter(name: str) -> bool:
    """Whether a tensor of this name is a hyper-parameter, whose value is needed before anything is loaded."""
    return name.startswith(HYPERPARAMETERS)


def _listed(optimizers: Any) -> list[Any]:
    several = optimizers.values() if isinstance(optimizers, Mapping) else optimizers
    return list(several) if isinstance(several, Iterable) else [several]


def _only(several: list[T], what: str, attribute: str) -> T:
    if len(several) != 1:
        raise UsageError(f"this state has {len(several)} {what}: see its attribute {attribute!r}")
    return several[0]
