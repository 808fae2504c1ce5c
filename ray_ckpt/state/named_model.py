"""Parameters, buffers and extra state of modules, under the names of the unwrapped, whole model.

Tied weights are one tensor under one name, the canonical one; so is the copy that a pipeline stage holds of a weight
which it shares with another stage. A plain tensor on the meta device belongs to another rank, unless the whole module
is still there; of a DTensor on the meta device this rank has its shard, which `Claim.target` gives memory.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from ray_ckpt.errors import UsageError
from ray_ckpt.format.flat_mesh import with_device_mesh
from ray_ckpt.format.torch_internals import local_tensor, names_of
from ray_ckpt.format.wrappers import FilledInPlace, are_same, is_made_of_others
from ray_ckpt.state import sealing
from ray_ckpt.state.load_plan import Claim, Handover, LoadPlan, SavedState, Spec
from ray_ckpt.state.module_entries import (
    EXTRA_STATE,
    Entry,
    Shown,
    has_no_place,
    has_own_form,
    live_tensor,
    memory_of,
    owner_of,
    target_of,
)
from ray_ckpt.state.replicated_parts import claim_under, handed_over
from ray_ckpt.state.trainable import Trainable
from ray_ckpt.state.unsaved_buffers import Unsaved
from ray_ckpt.text import listed

TIES = "all_tied_weights_keys"
"""Attribute of a module: alias -> canonical name of a weight that it shares. transformers' models have it."""


class _ExtraState:
    """The extra state of one module, which the module may refuse although its tensors fit."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @classmethod
    def of(cls, entry: Entry) -> _ExtraState | None:
        module, name = owner_of(entry)
        overridden = type(module).set_extra_state is not nn.Module.set_extra_state
        return cls(module) if name == EXTRA_STATE and overridden else None

    def state_dict(self) -> dict[str, Any]:
        return self._module.get_extra_state()  # type: ignore[no-any-return]

    def load_state_dict(self, state: Any) -> None:
        self._module.set_extra_state(state)


class NamedModel:
    """Args:
    modules: the model, or the chunks of it that this rank holds.
    tied: alias -> canonical name, besides what the modules share by themselves or say in `all_tied_weights_keys`.
    section: first component of the names in a checkpoint.
    trainable: whose frozen parameters are left out, by name; `itself`, another model, or None.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        tied: Mapping[str, str] | None = None,
        section: str = "model",
        trainable: NamedModel | Literal["itself"] | None = None,
    ) -> None:
        self.section = section
        self._trainable = self if trainable == "itself" else trainable
        self.modules = tuple(modules)
        self._tied = {alias: name for module in modules for alias, name in _declared_ties(module).items()}
        self._tied |= tied or {}
        self._known_names: dict[tuple[nn.Module, str], list[str]] = {}

    def leaves(self) -> dict[str, Any]:
        """Live tensors, and sealed values of everything else, without tensors on the meta device.

        Raises:
            UsageError: weights that are said to be tied are different memory, with different values.
        """
        leaves: dict[str, Any] = {}
        self._check_apart()
        for name, entries in self._entries().items():
            first, *others = [entry.value for entry in entries]
            if isinstance(first, torch.Tensor):
                if not first.is_meta:
                    _check_tied(name, first, others)
                    leaves[name] = first
            else:
                leaves |= sealing.pack(name, first)
        return leaves

    def _check_apart(self) -> None:
        """Refuse modules that are two models rather than chunks of one."""
        owners: dict[str, nn.Parameter] = {}
        for module in self.modules if len(self.modules) > 1 else ():
            for key, parameter in module.named_parameters():
                for name in self._names(module, key):
                    if owners.setdefault(name, parameter) is not parameter:
                        raise UsageError(
                            f"two of the {len(self.modules)} modules have a parameter {name!r}: if they are two "
                            "models, give them one root, as in nn.ModuleDict({'policy': ..., 'target': ...})"
                        )

    def plan(self, saved: SavedState) -> LoadPlan:
        held_by_name = self._entries()
        present = {module: _presence(module, self._trainable is not None) for module in self.modules}
        own_forms = {module: has_own_form(module) for module in self.modules}
        entries: dict[str, list[Entry]] = {}
        claims: dict[str, Claim] = {}
        handovers: list[Handover] = []
        waiting = set()
        for name, held in held_by_name.items():
            wanted = f"{self.section}.{name}"
            if not saved.wants(wanted):
                continue
            first, source = held[0], saved.name_of(wanted)
            if not first.is_opaque:
                if not present[first.module].holds(first):
                    continue
                is_own = own_forms[first.module]
                spec = Spec.of(first.value, wanted) if is_own else Spec.of_target(first.value, wanted)
                claims[wanted] = Claim(source, spec, target_of(first, has_own_form=is_own))
                waiting |= {entry.module for entry in held if entry.value.is_meta}
            else:
                claims |= (below := claim_under(saved, source))
                if owner := _ExtraState.of(first):
                    handovers += handed_over(saved, source, owner, below)
            entries[name] = held
        unsaved = Unsaved(waiting)
        apply = partial(self._apply, saved, entries, unsaved)
        made = [name for name, held in entries.items() if any(has_no_place(entry) for entry in held)]
        problems = [*unsaved.problems, *self._without_base(saved, present)]
        if made:
            problems.append(
                f"{listed(made, at_most=4)} are on the meta device, and no parameter or buffer has that name, as a "
                "hook has made it: give the model memory by to_empty(device=...) before the load"
            )
        return LoadPlan(claims, apply, problems, handovers=handovers)

    def _without_base(self, saved: SavedState, present: Mapping[nn.Module, _Presence]) -> list[str]:
        """Why nothing can be loaded into a model whose frozen parameters this load would leave without memory."""
        entries = {name: held[0] for name, held in self._frozen_entries().items()}
        lacking = [
            name
            for name, entry in entries.items()
            if entry.value.is_meta and present[entry.module].holds(entry) and saved.wants(f"{self.section}.{name}")
        ]
        if not lacking:
            return []
        return [
            f"the frozen {listed(lacking, at_most=4)} are on the meta device, and a trainable_only state loads none of "
            "them: load the base first, as by load(TrainState(model), base, only=('model',), strict=False)"
        ]

    def frozen(self) -> dict[str, torch.Tensor]:
        """Name -> live tensor that is left out, as far as this rank holds it."""
        tensors = {name: held[0].value for name, held in self._frozen_entries().items()}
        return {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}

    def trainable(self) -> Trainable:
        """Which names are left out: none, unless the state is that of what is trained."""
        return Trainable.of(self._trainable.parameters()) if self._trainable else Trainable()

    def parameters(self) -> dict[nn.Parameter, tuple[str, ...]]:
        """Each parameter's canonical name; several names, if it is a flat one of FSDP1's."""
        canonical = self.aliases()
        found: dict[nn.Parameter, tuple[str, ...]] = {}
        for module in self.modules:
            for key, parameter in module.named_parameters():
                names = self._names(module, key)
                found.setdefault(parameter, tuple(canonical.get(name, name) for name in names))
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """Canonical name -> tensor in the modules' state dicts."""
        values = {name: held[0].value for name, held in self._entries().items()}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def names_of(self, module: nn.Module, keys: Iterable[str]) -> set[str]:
        """Canonical names of parameters or buffers of one of the modules."""
        canonical = self.aliases()
        return {canonical.get(name, name) for key in keys for name in self._names(module, key)}

    @property
    def flat(self) -> FullyShardedDataParallel | None:
        """The module that FSDP1 wraps, if it does: its parameters are pieces of flattened ones."""
        roots = [module for module in self.modules if FullyShardedDataParallel.fsdp_modules(module)]
        if roots and len(self.modules) > 1:
            raise UsageError("FSDP1 cannot hold several chunks of a pipeline on one rank: use fully_shard")
        return roots[0] if roots else None  # type: ignore[return-value]

    def _apply(
        self,
        saved: SavedState,
        entries: Mapping[str, Sequence[Entry]],
        unsaved: Unsaved,
        loaded: Mapping[str, torch.Tensor],
    ) -> None:
        unsaved.restore()
        of_module: dict[nn.Module, dict[str, Any]] = {module: {} for module in self.modules}
        for name, held in entries.items():
            wanted = f"{self.section}.{name}"
            source = saved.name_of(wanted)
            if held[0].is_opaque:
                below = saved.under(source)
                leaves = {flat: loaded[flat] if flat in loaded else saved.values[flat] for flat in below}
                if not leaves:
                    continue
                value = sealing.unpack(source, leaves)
            elif wanted in loaded:
                value = loaded[wanted]
                for entry in held[1:]:
                    memory_of(entry)
            else:
                continue
            for entry in held:
                of_module[entry.module][entry.key] = value
        for module, state in of_module.items():
            if not state:
                continue
            with sharded_state_dicts(module), _copying(state):
                # What is missing has been found by now. A module may do more on a load than to take its tensors.
                read = Shown(module, state)
                module.load_state_dict(state, strict=False)
                read.check()

    def _entries(self) -> dict[str, list[Entry]]:
        """Canonical name -> everything that the modules hold under it, but for what is left out."""
        entries = self._all_entries()
        left_out = self._left_out(entries) if self._trainable else ()
        return {name: held for name, held in entries.items() if name not in left_out}

    def _frozen_entries(self) -> dict[str, list[Entry]]:
        if not self._trainable:
            return {}
        entries = self._all_entries()
        return {name: entries[name] for name in self._left_out(entries)}

    def _left_out(self, entries: Mapping[str, Sequence[Entry]]) -> list[str]:
        trainable = self.trainable()
        buffers = {
            name
            for module in self.modules
            for name in self.names_of(module, (key for key, _ in module.named_buffers(remove_duplicate=False)))
        }
        return [
            name
            for name, held in entries.items()
            if name not in buffers and not held[0].is_opaque and trainable.is_frozen(name)
        ]

    def _all_entries(self) -> dict[str, list[Entry]]:
        canonical = self.aliases()
        found: dict[str, list[Entry]] = {}
        for module in self.modules:
            with sharded_state_dicts(module):
                state = module.state_dict()
            self._check_kept(module, state)
            for key, value in state.items():
                if is_lazy(value):
                    raise UsageError(f"{key!r} of a lazy module has no shape yet: call the model once before")
                [name] = self._names(module, key)
                found.setdefault(canonical.get(name, name), []).append(Entry(module, key, value))
        return found

    def _check_kept(self, module: nn.Module, state: Mapping[str, Any]) -> None:
        """Refuse parameters of which FSDP1 has kept other elements than those that their class holds."""
        if not FullyShardedDataParallel.fsdp_modules(module):
            return
        made = {
            name: type(local_tensor(parameter)).__name__
            for key, parameter in module.named_parameters()
            if is_made_of_others(parameter)
            for name in self._names(module, key)
        }
        for key, value in state.items() if made else ():
            [name] = self._names(module, key)
            if name in made and not is_made_of_others(value):
                raise UsageError(
                    f"{name!r} is a {made[name]}, of which FSDP1 has flattened the values that it stands for: what "
                    "the class holds is in no shard any more. Use fully_shard, or give it to FSDP1 as one of "
                    "ignored_states"
                )

    def _names(self, module: nn.Module, key: str) -> list[str]:
        """Names of an entry in the unwrapped module: one, or several if FSDP1 has flattened them into it."""
        known = self._known_names.get((module, key))
        if known is None:
            inner, inner_key = module, key
            if isinstance(module, AveragedModel) and key.startswith("module."):
                inner, inner_key = module.module, key.removeprefix("module.")
            known = self._known_names[module, key] = sorted(_names_of(inner, inner_key))
        return known

    def aliases(self) -> dict[str, str]:
        """Alias -> canonical name."""
        shared: dict[int, list[str]] = {}
        for module in self.modules:
            for key, tensor in (
                *module.named_parameters(remove_duplicate=False),
                *module.named_buffers(remove_duplicate=False),
            ):
                if len(names := self._names(module, key)) == 1:
                    shared.setdefault(id(tensor), []).extend(names)
        canonical = dict(self._tied)
        declared = set(self._tied.values())
        for names in shared.values():
            if len(set(names)) > 1:
                first = next((self._tied[name] for name in names if name in self._tied), None)
                first = first or next((name for name in names if name in declared), names[0])
                canonical |= {name: first for name in names if name != first}
        return canonical


@contextlib.contextmanager
def sharded_state_dicts(module: nn.Module) -> Iterator[None]:
    """Under FSDP1 a state dict holds DTensors within this block, also if the module was not given a device mesh."""
    if not FullyShardedDataParallel.fsdp_modules(module):
        yield
        return
    with warnings.catch_warnings(), with_device_mesh(module):
        warnings.filterwarnings("ignore", category=FutureWarning)
        with FullyShardedDataParallel.state_dict_type(
            module,
            StateDictType.SHARDED_STATE_DICT,
            ShardedStateDictConfig(offload_to_cpu=False),
            ShardedOptimStateDictConfig(offload_to_cpu=False),
        ):
            yield


def _names_of(module: nn.Module, key: str) -> set[str]:
    """The names of an entry; one that a hook has made, and that is no attribute, is below the nearest that is."""
    try:
        return names_of(module, key)
    except AttributeError:
        parent, _, last = key.rpartition(".")
        return {f"{name}.{last}" for name in _names_of(module, parent)} if parent else {last}


def _copying(state: Mapping[str, Any]) -> contextlib.AbstractContextManager[object]:
    """In which a module takes what lies in its own memory already."""
    made = any(isinstance(value, torch.Tensor) and is_made_of_others(value) for value in state.values())
    return FilledInPlace() if made else contextlib.nullcontext()


def _unwrapped(module: nn.Module) -> nn.Module:
    for attribute in ("_fsdp_wrapped_module", "_orig_mod", "module"):
        children = dict(module.named_children())  # those of a scripted module are in no `_modules` that one can ask
        if list(children) == [attribute]:
            return _unwrapped(children[attribute])
    return module


def _declared_ties(module: nn.Module) -> dict[str, str]:
    ties = getattr(_unwrapped(module), TIES, None)
    return dict(ties) if isinstance(ties, Mapping) else {}


@dataclass(frozen=True)
class _Presence:
    """Which entries of a module on the meta device belong to this rank."""

    untouched: bool
    """No entry has memory yet: the whole module is this rank's."""
    sharded: bool
    """Some parameters are shards without memory: the buffers are this rank's too."""

    def holds(self, entry: Entry) -> bool:
        value = entry.value
        if not value.is_meta or isinstance(value, DTensor) or self.untouched:
            return True
        return self.sharded and not isinstance(live_tensor(entry), nn.Parameter)


def _presence(module: nn.Module, trainable_only: bool) -> _Presence:
    parameters = list(module.parameters())
    persistent = [
        buffer
        for child in module.modules()
        for name, buffer in child.named_buffers(recurse=False)
        if name not in child._non_persistent_buffers_set
    ]
    if trainable_only and not any(parameter.is_meta for parameter in parameters if not parameter.requires_grad):
        # The base is all there: adapters without memory are this rank's, too.
        parameters, persistent = [parameter for parameter in parameters if parameter.requires_grad], []
    return _Presence(
        untouched=all(tensor.is_meta for tensor in (*parameters, *persistent)),
        sharded=any(tensor.is_meta and isinstance(tensor, DTensor) for tensor in parameters),
    )


def _check_tied(name: str, first: torch.Tensor, others: Sequence[torch.Tensor]) -> None:
    for other in others:
        if not are_same(first, other):
            raise UsageError(
                f"the weights tied under {name!r} are different memory and hold different values: they were untied, "
                "for instance by wrapping each layer for itself, and one name cannot save both"
            )
