"""The optimizer state and hyper-parameters in a checkpoint, looked up by the names of the live model's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

from ray_ckpt.format.torch_container import parse_dtype
from ray_ckpt.state import sealing
from ray_ckpt.state.load_plan import Claim, SavedState, Spec

STATE, PARAM_GROUPS = "state", "param_groups"


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

    def hyperparameters(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Parameter name -> hyper-parameter -> value, without parameters that have none in the checkpoint."""
        found = {name: self._entries(PARAM_GROUPS, name) for name in names}
        return {
            name: {key: sealing.unseal(flat, self._saved.values[flat]) for key, flat in entries.items()}
            for name, entries in found.items()
            if entries
        }

    def knows(self, name: str) -> bool:
        """Whether an optimizer had this parameter when it was saved."""
        return bool(self._entries(PARAM_GROUPS, name))

    def claim_values(self, name: str) -> dict[str, Claim]:
        wanted = f"optim.{PARAM_GROUPS}.{name}"
        entries = self._entries(PARAM_GROUPS, name)
        if not entries:
            return {wanted: Claim(f"optim.{PARAM_GROUPS}.{self._saved_parameter(name)}")}
        return {f"{wanted}.{key}": Claim(flat) for key, flat in entries.items()}

    def claim_state(self, name: str, owner: Owner, live: Mapping[str, Any], twin: int = 0) -> dict[str, Claim]:
        """Claim a parameter's saved state: into the live tensors where there are any, else into new ones.

        Args:
            live: the optimizer's state of the parameter. If the checkpoint has none of it, nothing is claimed.
            twin: number of parameters of this name before this one; tied weights may be several in memory.
        """
        claims: dict[str, Claim] = {}
        entries = self._entries(STATE, name)
        for key, flat in entries.items():
            wanted = _wanted(name, key, twin)
            spec, tensor = self._saved.tensors.get(flat), live.get(key)
            if spec is None:
                claims[wanted] = Claim(flat)
            elif isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                claims[wanted] = Claim(flat, Spec.of(tensor), partial(torch.Tensor.detach, tensor))
            else:
                new = self._spec_for(name, key, spec, owner.tensor)
                claims[wanted] = Claim(flat, new, partial(_create, key, new, owner))
        if entries:
            parameter = self._saved_parameter(name)
            for key in live.keys() - entries.keys():
                claims[_wanted(name, key, twin)] = Claim(f"optim.{STATE}.{parameter}.{key}")
        return claims

    def state(self, name: str, loaded: Mapping[str, torch.Tensor], twin: int = 0) -> dict[str, Any]:
        """The state that a parameter is to have after the load."""
        state: dict[str, Any] = {}
        for key, flat in self._entries(STATE, name).items():
            wanted = _wanted(name, key, twin)
            *path, last = key.split(".")
            place = state
            for component in path:
                place = place.setdefault(component, {})
            if wanted in loaded:
                place[last] = loaded[wanted]
            elif flat in self._saved.values:
                place[last] = sealing.unseal(flat, self._saved.values[flat])
        return state

    def _entries(self, kind: str, name: str) -> dict[str, str]:
        """Key -> name in the checkpoint."""
        prefix = f"optim.{kind}.{self._saved_parameter(name)}"
        return {flat[len(prefix) + 1 :]: flat for flat in self._saved.under(prefix) if flat != prefix}

    def _saved_parameter(self, name: str) -> str:
        return self._saved.name_of(f"model.{name}").removeprefix("model.")

    def _spec_for(self, name: str, key: str, saved: Spec, live: torch.Tensor) -> Spec:
        """State of its parameter's shape and dtype is wanted in the live parameter's; other state as saved."""
        parameter = self._saved.tensors.get(f"model.{self._saved_parameter(name)}")
        if key == "step" or parameter is None or saved.shape != parameter.shape:
            return saved
        own = Spec.of(live)
        return Spec(own.dtype if saved.dtype == parameter.dtype else saved.dtype, own.shape)


def _wanted(name: str, key: str, twin: int) -> str:
    return f"optim.{STATE}.{name}.{key}" + (f" (of copy {twin})" if twin else "")


def flatten(state: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{below}": item for below, item in flatten(value).items()}
        else:
            flat[str(key)] = value
    return flat


def _create(key: str, spec: Spec, owner: Owner) -> torch.Tensor:
    """Allocate state that the optimizer does not have yet."""
    tensor, dtype = owner.tensor.detach(), parse_dtype(spec.dtype)
    device = tensor.device
    if key == "step":
        return torch.empty(spec.shape, dtype=dtype, device=device if owner.on_device else "cpu")
    if spec.shape == tuple(tensor.shape):
        return torch.empty_like(tensor, dtype=dtype)
    memory = torch.empty(spec.shape, dtype=dtype, device=device)
    if isinstance(tensor, DTensor) and spec.shape:
        mesh = tensor.device_mesh
        return DTensor.from_local(memory, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return memory
