"""Memory for what a load finds on the meta device: where it goes, and the buffers that no checkpoint holds."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ray_ckpt.format.initial_values import buffers_without_memory, computed_buffers

__all__ = ["Unsaved", "device_of"]


class Unsaved:
    """Non-persistent buffers on meta, which no checkpoint holds, of modules that this load gives memory.

    Those that the modules compute by their own means get these values; for others there is no way but the caller's.
    """

    def __init__(self, modules: set[nn.Module]) -> None:
        self._values: list[tuple[nn.Module, str, torch.Tensor, torch.device]] = []
        self.problems: list[str] = []
        for module in modules:
            owners = buffers_without_memory(module)
            values = computed_buffers(module, owners)
            for key, value in values.items():
                self._values.append((owners[key], key.rpartition(".")[2], value, device_of(module)))
            if lost := [key for key in owners if key not in values]:
                self.problems.append(
                    f"{', '.join(lost)} have neither memory nor a place in the checkpoint, as they are not persistent, "
                    "nor does their module compute them in reset_parameters() or _init_weights(): give them both "
                    "before the load"
                )

    def restore(self) -> None:
        for owner, name, value, device in self._values:
            setattr(owner, name, value.to(device))


def device_of(module: nn.Module) -> torch.device:
    """The device for a module on meta: that of its shards, or else the CPU."""
    kinds = {p.device_mesh.device_type for p in module.parameters() if isinstance(p, DTensor)} - {"cpu"}
    kind = kinds.pop() if kinds else "cpu"
    return torch.device(kind, torch.get_device_module(kind).current_device()) if kind != "cpu" else torch.device(kind)
