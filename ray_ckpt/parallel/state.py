"""TrainState: a model and its optimizer as one flat, name-keyed state dict.

Optimizer state is keyed by parameter name (`optim.state.layer1.weight.exp_avg`,
`optim.param_groups.layer1.weight.lr`), so every pipeline stage's hyper-parameters survive the save. The load needs
more: torch fills a parameter group of the target from the *first* name in it, so one group over four stages would
silently take stage 0's learning rate. `match_hyperparameters` splits the target's groups first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from ray_ckpt.errors import StateMismatchError
from ray_ckpt.format.digest import fingerprint
from ray_ckpt.format.snapshot import Snapshot

PARAM_GROUPS = "param_groups."
"""Prefix of the optimizer's hyper-parameters in the flat state dict: `param_groups.<parameter>.<hyper-parameter>`."""

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)

Hyperparameters = Mapping[str, Mapping[str, Any]]
"""Parameter name -> hyper-parameter name -> value."""


class TrainState:
    """What a training run must not lose, as seen by one rank: its part of the model and of the optimizer.

    A `Stateful` for DCP: `state_dict` holds `{"model": {...}, "optim": {...}}`. Under FSDP the tensors are DTensors,
    on a pipeline stage plain ones; only what this rank really holds is in it.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """The live tensors, not copies, under the names of the unwrapped model.

        An optimizer that has not stepped yet gets its state first, by a step with learning rate 0.
        """
        model, optim = get_state_dict(self.model, self.optimizer, options=_FLAT)
        return {"model": _without_meta(model), "optim": _without_meta(optim)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=dict(state_dict["model"]),
            optim_state_dict=dict(state_dict["optim"]),
            options=_FLAT,
        )

    def match_hyperparameters(self, saved: Hyperparameters) -> None:
        """Split the optimizer's parameter groups so that each holds one distinct set of saved hyper-parameters.

        Raises:
            StateMismatchError: parameters of one group were saved with different hyper-parameters and the optimizer
                has stepped already, so that its groups may mean something to somebody; or a parameter was not saved.
        """
        names = {parameter: name for name, parameter in _named_parameters(self.model)}
        groups: list[dict[str, Any]] = []
        for group in self.optimizer.param_groups:
            members = [names[parameter] for parameter in group["params"]]
            if missing := [name for name in members if name not in saved]:
                raise StateMismatchError(f"the checkpoint has no hyper-parameters for {', '.join(missing)}")
            parts = _group_by_values({name: saved[name] for name in members})
            if len(parts) > 1 and self.optimizer.state:
                raise StateMismatchError(_describe_conflict(parts))
            parameters = dict(zip(members, group["params"], strict=True))
            groups += [{**group, **values, "params": [parameters[name] for name in part]} for part, values in parts]
        self.optimizer.param_groups[:] = groups

    def snapshot(self, rank: int) -> Snapshot:
        """Fingerprints of all tensors that this rank holds, and the values of everything else, by flat name."""
        fingerprints, values = {}, {}
        for part, state in self.state_dict().items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    fingerprints[f"{part}.{name}"] = fingerprint(value)
                else:
                    values[f"{part}.{name}"] = value
        return Snapshot(rank, fingerprints, values)


def _without_meta(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not (isinstance(value, torch.Tensor) and value.is_meta)}


def _named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters under the names of the unwrapped model, which FSDP1 prefixes."""
    return [(name.replace("_fsdp_wrapped_module.", ""), parameter) for name, parameter in model.named_parameters()]


def _group_by_values(saved: Hyperparameters) -> list[tuple[list[str], Mapping[str, Any]]]:
    """Names that share all their values, in order of first appearance."""
    parts: list[tuple[list[str], Mapping[str, Any]]] = []
    for name, values in saved.items():
        for members, common in parts:
            if common == values:
                members.append(name)
                break
        else:
            parts.append(([name], values))
    return parts


def _describe_conflict(parts: list[tuple[list[str], Mapping[str, Any]]]) -> str:
    differing = sorted({key for _, values in parts for key in values if values[key] != parts[0][1].get(key)})
    found = "; ".join(
        f"{', '.join(names)}: " + ", ".join(f"{key}={values.get(key)}" for key in differing) for names, values in parts
    )
    return (
        "one parameter group of the optimizer holds parameters that were saved with different hyper-parameters "
        f"({found}). Load into a fresh optimizer, whose groups are split to match, or give each set its own group"
    )
