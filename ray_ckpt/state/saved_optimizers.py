"""The optimizer state and hyper-parameters in a checkpoint, looked up by the names of the live model's parameters."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

from ray_ckpt.format.torch_container import parse_dtype
from ray_ckpt.format.wrappers import plain_like
from ray_ckpt.state import sealing
from ray_ckpt.state.hyperparameters import without_numpy
from ray_ckpt.state.load_plan import Claim, SavedState, Spec

STATE, PARAM_GROUPS, KINDS = "state", "param_groups", "kinds"


@dataclass(frozen=True)
class Owner:
    """The parameter that optimizer state belongs to."""

    tensor: torch.Tensor
    """The parameter; under FSDP1 the DTensor of it in the model's state dict. May be on the meta device."""
    on_device: bool
    """Whether `step` lies on the parameter's device; otherwise on the host."""


class SavedOptimizers:
    """Args:
    saved: the checkpoint. A key map renames parameters, and the optimizer's state with them.
    """

    def __init__(self, saved: SavedState) -> None:
        self._saved = saved
        self._broken: set[tuple[str, int]] = set()
        """Parameters (and their twins) of whose state a part is lost."""
        self._known_entries: dict[tuple[str, str], dict[str, str]] = {}

    def hyperparameters(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Parameter name -> hyper-parameter -> value, without parameters that have none in the checkpoint."""
        found = {name: self._entries(PARAM_GROUPS, name) for name in names}
        return {
            name: {key: sealing.unpack(flat, self._saved.values) for key, flat in entries.items() if ".$" not in key}
            for name, entries in found.items()
            if entries
        }

    def kind(self, name: str) -> tuple[str, ...] | None:
        """Class name of the parameter's optimizer, and the keys of its state; None if that is not recorded."""
        kind = self._saved.values.get(f"optim.{KINDS}.{self._saved_parameter(name)}")
        return tuple(kind) if isinstance(kind, (list, tuple)) and kind else None

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
        entries = self._entries(STATE, name)
        if not all(key in entries for key in expected):
            self._broken.add((name, twin))
            live = {}
        for key, flat in entries.items():
            wanted = _wanted(name, key, twin)
            spec, tensor = self._saved.tensors.get(flat), live.get(key)
            if spec is None:
                claims[wanted] = Claim(flat)
            elif isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                claims[wanted] = Claim(flat, Spec.of(tensor, wanted), partial(torch.Tensor.detach, tensor))
            else:
                new = self._spec_for(name, key, spec, owner.tensor)
                claims[wanted] = Claim(flat, new, partial(_create, key, new, owner))
        for key in (*expected, *live) if entries else expected:
            if key not in entries:
                lost = key_name(f"optim.{STATE}.{self._saved_parameter(name)}", key)
                claims[_wanted(name, key, twin)] = Claim(lost)
        return claims

    def state(self, name: str, loaded: Mapping[str, torch.Tensor], twin: int = 0) -> dict[str, Any] | None:
        """The state that a parameter is to have after the load; None: what it has."""
        if (name, twin) in self._broken or not self.knows(name):
            return None
        leaves: dict[str, Any] = {}
        for key, flat in self._entries(STATE, name).items():
            wanted = _wanted(name, key, twin)
            leaves[flat] = loaded[wanted] if wanted in loaded else self._saved.values[flat]
        return sealing.unpack(f"optim.{STATE}.{self._saved_parameter(name)}", leaves) if leaves else {}

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
    plain = {key: without_numpy(value) for key, value in state.items()}
    packed = sealing.pack(name, plain) if state else {}
    return {flat[len(name) + 1 :]: leaf for flat, leaf in packed.items()}


def key_name(name: str, key: str) -> str:
    return f"{name}.{key}" if key else name


def _create(key: str, spec: Spec, owner: Owner) -> torch.Tensor:
    """Allocate state that the optimizer does not have yet."""
    tensor, dtype = owner.tensor.detach(), parse_dtype(spec.dtype)
    device = tensor.device
    if key == "step":
        return torch.empty(spec.shape, dtype=dtype, device=device if owner.on_device else "cpu")
    if spec.shape == tuple(tensor.shape):
        return plain_like(tensor, dtype)
    memory = torch.empty(spec.shape, dtype=dtype, device=device)
    if isinstance(tensor, DTensor) and spec.shape:
        mesh = tensor.device_mesh
        return DTensor.from_local(memory, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return memory
