"""A module's own means to set its initial values: what a checkpoint does not hold comes from there."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import nn

from ray_ckpt.format.torch_internals import with_own_tensors


def initializer(model: nn.Module, module: nn.Module) -> Callable[[], object] | None:
    """The function that sets a module's initial values; None if there is none.

    By the model's own `_init_weights(module)`, which transformers' models have; else by the module's
    `reset_parameters()`, as torch's have, a few of them (MultiheadAttention) under the private name.
    """
    own: Callable[[nn.Module], object] | None = getattr(model, "_init_weights", None)
    if own is not None:
        return lambda: own(module)
    for name in ("reset_parameters", "_reset_parameters"):
        reset: Callable[[], object] | None = getattr(module, name, None)
        if callable(reset):
            return reset
    return None


def buffers_without_memory(root: nn.Module) -> dict[str, nn.Module]:
    """Name -> owner of the buffers on the meta device that no state dict has, as they are not persistent."""
    return {
        f"{prefix}.{name}".lstrip("."): child
        for prefix, child in root.named_modules()
        for name, buffer in child.named_buffers(recurse=False, remove_duplicate=False)
        if name in child._non_persistent_buffers_set and buffer.is_meta
    }


def computed_buffers(root: nn.Module, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Those of the buffers of these names that their modules compute, such as the frequencies of rotary embeddings.

    Each module's initializer runs on two copies of the module, which begin with other values: what it sets, and sets to
    the same both times, does not depend on what was there before, nor on chance. The module itself is left alone.

    Returns:
        Name -> value on the CPU.
    """
    found = {}
    values: dict[nn.Module, dict[str, torch.Tensor]] = {}
    for name in names:
        path, _, key = name.rpartition(".")
        module = root.get_submodule(path)
        if module not in values:
            values[module] = _computed(_initializing(root, path), module)
        if key in values[module]:
            found[name] = values[module][key]
    return found


def _initializing(root: nn.Module, path: str) -> nn.Module:
    """The nearest module around another that initializes what is within it; else the root."""
    parts = path.split(".") if path else []
    around = [root.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1)]
    return next((module for module in around if hasattr(module, "_init_weights")), root)


@torch.no_grad()
def _computed(model: nn.Module, module: nn.Module) -> dict[str, torch.Tensor]:
    results = []
    for fill in (0, 1):

        def filled(tensor: torch.Tensor, fill: int = fill) -> torch.Tensor:
            return torch.full(tensor.shape, fill, dtype=tensor.dtype)

        copied = with_own_tensors(module, filled)
        reset = initializer(model, copied)
        if reset is None:
            return {}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(fill)
            try:
                reset()
            except Exception:  # somebody else's code, on a module that has neither parameters nor children of its own
                return {}
        results.append(dict(copied.named_buffers(recurse=False)))
    one, other = results
    return {name: value for name, value in one.items() if not value.is_meta and torch.equal(value, other[name])}
