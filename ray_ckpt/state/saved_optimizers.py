"""The optimizer state and hyper-parameters in a checkpoint, looked up by the names of the live model's parameters."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Set
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

from ray_ckpt.format.torch_container import parse_dtype
from ray_ckpt.format.wrappers import plain_like
from ray_ckpt.state import dim_order, nesting, sealing
from ray_ckpt.state.dim_order import Order, special_order
from ray_ckpt.state.hyperparameters import without_numpy
from ray_ckpt.state.load_plan import Claim, SavedState, Spec
from ray_ckpt.state.shard_state import (
    AS_DTENSOR,
    DIGESTS,
    OF_SHARD,
    SAME,
    SHARDS,
    Note,
    Owner,
    fitting_box,
    place_name,
    split_note,
)
from ray_ckpt.text import listed

STATE, PARAM_GROUPS, KINDS = "state", "param_groups", "kinds"


class SavedOptimizers:
    """Args:
    saved: the checkpoint. A key map renames parameters, and the optimizer's state with them.
    """

    def __init__(self, saved: SavedState) -> None:
        self._saved = saved
        self._broken: set[tuple[str, int]] = set()
        """Parameters (and their twins) of whose state a part is lost."""
        self._known_entries: dict[tuple[str, str], dict[str, str]] = {}
        self._other_shapes: dict[str, bool] = {}
        self._shared: dict[tuple[str, int], torch.Tensor] = {}
        """Place of the first of several that are one tensor, and which copy of the parameter it is of -> the tensor."""
        self._boxes: dict[str, str | None] = {}
        """Parameter -> the box whose state this rank takes, of those that have state of each shard."""

    def hyperparameters(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Parameter name -> hyper-parameter -> value, without parameters that have none in the checkpoint."""
        found = {name: self._entries(PARAM_GROUPS, name) for name in names}
        return {
            name: {key: sealing.unpack(flat, self._saved.values) for key, flat in entries.items() if ".$" not in key}
            for name, entries in found.items()
            if entries
        }

    def kind(self, name: str) -> str | None:
        """Class name of the parameter's optimizer; None if that is not recorded."""
        recorded = self._recorded(name)
        return recorded[0] if recorded else None

    def recorded_keys(self, name: str) -> dict[str, Note]:
        """Key of the parameter's state, as far as they are recorded -> what is noted of it."""
        return dict(map(split_note, self._recorded(name)[1:]))

    def _recorded(self, name: str) -> tuple[str, ...]:
        kind = self._saved.values.get(f"optim.{KINDS}.{self._saved_parameter(name)}")
        return tuple(kind) if isinstance(kind, (list, tuple)) else ()

    @functools.cached_property
    def has_kinds(self) -> bool:
        """Whether the checkpoint records kinds at all: those of other programs, and of older versions, do not."""
        return bool(self._saved.under(f"optim.{KINDS}"))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape that the parameter was saved in."""
        spec = self._saved.tensors.get(f"model.{self._saved_parameter(name)}")
        return None if spec is None else spec.shape

    def keys(self, name: str) -> frozenset[str]:
        """Keys of the parameter's state that are there."""
        return frozenset(self._entries(STATE, name))

    def knows(self, name: str) -> bool:
        """Whether an optimizer had this parameter when it was saved."""
        return bool(self._entries(PARAM_GROUPS, name))

    def hyperparameter_names(self, names: Iterable[str]) -> set[str]:
        """The hyper-parameters that some of these parameters have in the checkpoint."""
        return {key for name in names for key in self._entries(PARAM_GROUPS, name)}

    def claim_values(self, name: str, expected: Set[str] = frozenset()) -> dict[str, Claim]:
        """Claim a parameter's saved hyper-parameters.

        Args:
            expected: those that the checkpoint should have, if it has any.
        """
        wanted = f"optim.{PARAM_GROUPS}.{name}"
        entries = self._entries(PARAM_GROUPS, name)
        if not entries:
            return {wanted: Claim(f"optim.{PARAM_GROUPS}.{self._saved_parameter(name)}")}
        claims = {f"{wanted}.{key}": Claim(flat) for key, flat in entries.items()}
        for key in expected - entries.keys():
            claims[f"{wanted}.{key}"] = Claim(f"optim.{PARAM_GROUPS}.{self._saved_parameter(name)}.{key}")
        if self.has_kinds:
            claims[f"optim.{KINDS}.{name}"] = Claim(f"optim.{KINDS}.{self._saved_parameter(name)}")
        return claims

    def claim_state(
        self, name: str, owner: Owner, live: Mapping[str, Any], expected: Iterable[str] = (), twin: int = 0
    ) -> dict[str, Claim]:
        """Claim a parameter's saved state: into the live tensors where there are any, else into new ones.

        Args:
            live: the optimizer's state of the parameter. If the checkpoint has none of it, it is not claimed.
            expected: keys that the checkpoint should have. If one is lost, the live state is left as it is, since no
                optimizer can step with a part of it.
            twin: number of parameters of this name before this one; tied weights may be several in memory.
        """
        claims: dict[str, Claim] = {}
        entries = {**self._entries(STATE, name), **self._of_shard(name, owner)}
        if self._boxes.get(name, "") is None and self.shards(name):
            return {}  # a problem already
        notes = self.recorded_keys(name)
        if not all(key in entries for key in expected):
            self._broken.add((name, twin))
            live = {}
        for key, flat in entries.items():
            wanted = _wanted(name, key, twin)
            spec, tensor = self._saved.tensors.get(flat), live.get(key)
            if spec is None:
                claims[wanted] = Claim(flat)
                continue
            new = self._spec_for(name, key, spec, owner.tensor)
            known = notes.get(key)
            note = known or Note()
            is_dtensor = isinstance(owner.tensor, DTensor) and self._is_dtensor(key, new, owner, note.kind)
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and _may_stay(tensor, is_dtensor, owner, known):
                claims[wanted] = Claim(flat, Spec.of_target(tensor, wanted), partial(torch.Tensor.detach, tensor))
            else:
                spec = spec if note.kind == OF_SHARD else new
                claims[wanted] = Claim(flat, spec, partial(_create, key, spec, owner, is_dtensor, note.order))
        for key in (*expected, *live) if entries else expected:
            if key not in entries:
                lost = key_name(f"optim.{STATE}.{self._saved_parameter(name)}", key)
                claims[_wanted(name, key, twin)] = Claim(lost)
        return claims

    def _is_dtensor(self, key: str, spec: Spec, owner: Owner, note: str) -> bool:
        """Whether state of a DTensor is one."""
        if note:
            return note == AS_DTENSOR
        is_number = owner.tensor.numel() == 1 and not owner.is_torchs
        return owner.is_dtensor_by_default(key, spec.shape) and not (is_number and self._is_of_other_shapes(key))

    def _is_of_other_shapes(self, key: str) -> bool:
        """Whether state of this key has another shape than its parameter anywhere."""
        if key in self._other_shapes:
            return self._other_shapes[key]
        start, end = f"optim.{STATE}.", f".{key}"
        self._other_shapes[key] = any(
            spec.shape != parameter.shape
            for flat in self._saved.under(start[:-1])
            if flat.endswith(end)
            and (spec := self._saved.tensors.get(flat))
            and (parameter := self._saved.tensors.get(f"model.{flat[len(start) : -len(end)]}"))
        )
        return self._other_shapes[key]

    def shards(self, name: str) -> list[str]:
        """All names of what was saved of the parameter's shards."""
        return self._saved.under(f"optim.{SHARDS}.{self._saved_parameter(name)}")

    def misfit(self, name: str, owner: Owner) -> list[str]:
        """Why the state of the parameter's shards does not fit this rank; an empty list if it does."""
        digests = self._digests(name)
        self._boxes[name] = fitting_box(owner, digests) if digests else None
        if not digests or self._boxes[name] is not None:
            return []
        held = owner.box if owner.is_sharded else "all of it"
        return [
            f"the optimizer keeps plain tensors of each shard of {name}, which fit no other layout: saved were those "
            f"of {listed(sorted(digests), at_most=4)}, this rank holds {held}. Load them in the layout that saved them"
        ]

    def _digests(self, name: str) -> dict[str, Any]:
        """Box -> digests of what was saved of it."""
        start = len(f"optim.{SHARDS}.{self._saved_parameter(name)}.")
        boxes = dict.fromkeys(flat[start:].partition(".")[0] for flat in self.shards(name))
        return {box: self._saved.values.get(f"{self.shards(name)[0][:start]}{box}.{DIGESTS}") for box in boxes}

    def _of_shard(self, name: str, owner: Owner) -> dict[str, str]:
        """Key -> name in the checkpoint, of the state of the shard that this rank takes."""
        if not self.has_shards:
            return {}
        if name not in self._boxes:
            self.misfit(name, owner)
        if self._boxes[name] is None:
            return {}
        prefix = f"optim.{SHARDS}.{self._saved_parameter(name)}.{self._boxes[name]}."
        return {flat[len(prefix) :]: flat for flat in self.shards(name) if flat.startswith(prefix)}

    @functools.cached_property
    def has_shards(self) -> bool:
        """Whether it holds state of shards at all."""
        return bool(self._saved.under(f"optim.{SHARDS}"))

    @functools.cached_property
    def _has_shared(self) -> bool:
        """Whether any tensors of the state are one."""
        kinds = (self._saved.values.get(flat) for flat in self._saved.under(f"optim.{KINDS}"))
        return any(
            type(key) is str and SAME in key for kind in kinds if isinstance(kind, (tuple, list)) for key in kind
        )

    def state(
        self, name: str, owner: Owner, loaded: Mapping[str, torch.Tensor], twin: int = 0
    ) -> dict[str, Any] | None:
        """The state that a parameter is to have after the load; None: what it has."""
        if (name, twin) in self._broken or not self.knows(name):
            return None
        leaves: dict[str, Any] = {}
        parameter = self._saved_parameter(name)
        below = f"optim.{STATE}.{parameter}"
        notes = self.recorded_keys(name) if self._has_shared else {}
        for key, flat in {**self._entries(STATE, name), **self._of_shard(name, owner)}.items():
            wanted = _wanted(name, key, twin)
            if key == DIGESTS:
                continue
            leaf = loaded[wanted] if wanted in loaded else self._saved.values[flat]
            if self._has_shared and isinstance(leaf, torch.Tensor):
                note = notes.get(key)
                first = (note.same if note else "") or place_name(parameter, key)
                leaf = self._shared.setdefault((first, twin), leaf)
            leaves[key_name(below, key)] = leaf
        return sealing.unpack(below, leaves) if leaves else {}

    def _entries(self, kind: str, name: str) -> dict[str, str]:
        """Key -> name in the checkpoint. The key is empty for state that is sealed as a whole."""
        entries = self._known_entries.get((kind, name))
        if entries is None:
            prefix = f"optim.{kind}.{self._saved_parameter(name)}"
            found = self._saved.under(prefix)
            entries = {flat[len(prefix) + 1 :]: flat for flat in found if flat != prefix or kind == STATE}
            self._known_entries[kind, name] = entries
        return entries

    def _saved_parameter(self, name: str) -> str:
        return self._saved.name_of(f"model.{name}").removeprefix("model.")

    def _spec_for(self, name: str, key: str, saved: Spec, live: torch.Tensor) -> Spec:
        """State of its parameter's shape and dtype is wanted in the live parameter's; other state as saved."""
        parameter = self._saved.tensors.get(f"model.{self._saved_parameter(name)}")
        if key == "step" or parameter is None or saved.shape != parameter.shape:
            return saved
        own = Spec.of(live)
        if saved.recipe is not None and saved.shape == own.shape:
            return saved
        return Spec(own.dtype if saved.dtype == parameter.dtype else saved.dtype, own.shape)


def _wanted(name: str, key: str, twin: int) -> str:
    return key_name(f"optim.{STATE}.{name}", key) + (f" (of copy {twin})" if twin else "")


def flatten(name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> tensor or sealed value, of all that an optimizer keeps of a parameter.

    Args:
        name: of the state, for the message.

    Raises:
        UsageError: something in it is neither a tensor nor a plain value.
    """
    with nesting.named(name, state):
        plain = {key: without_numpy(value) for key, value in state.items()}
        packed = sealing.pack(name, plain) if state else {}
    return {flat[len(name) + 1 :]: leaf for flat, leaf in packed.items()}


def key_name(name: str, key: str) -> str:
    return f"{name}.{key}" if key else name


def _may_stay(live: torch.Tensor, is_dtensor: bool, owner: Owner, note: Note | None) -> bool:
    """Whether a live tensor is, and lies, as the saved one did, or nothing is known of that."""
    if note is None:
        return True
    is_kind = not note.kind or isinstance(live, DTensor) == is_dtensor
    return is_kind and note.order == special_order(live, owner.tensor)


def _create(key: str, spec: Spec, owner: Owner, is_dtensor: bool, order: Order | None) -> torch.Tensor:
    """Allocate state that the optimizer does not have yet."""
    tensor, dtype = owner.tensor.detach(), parse_dtype(spec.dtype)
    device = tensor.device
    if key == "step":
        return torch.empty(spec.shape, dtype=dtype, device=device if owner.on_device else "cpu")
    is_like_it = spec.shape == tuple(tensor.shape) and isinstance(tensor, DTensor) == is_dtensor
    if is_like_it and (order is None or owner.is_sharded):
        return plain_like(tensor, dtype)
    memory = dim_order.empty(spec.shape, order or (), dtype, device)
    if is_dtensor and isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        return DTensor.from_local(memory, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return memory
