"""Cut a model into pipeline stages, and give a model that was built on the meta device its memory.

A model qualifies when its direct children run one after the other, each fed by the one before, and when its `forward`
still works while some of them are missing: `torch.nn.Sequential` does by itself, another module skips children that
are None. A stage is then the same model with the other stages' children taken out, so every parameter keeps its name.
"""

from __future__ import annotations

import copy
import itertools
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ray_ckpt.errors import UsageError


def build_on_meta(factory: Callable[[], nn.Module]) -> nn.Module:
    """Build the model without memory.

    Raises:
        UsageError: the factory does not return a module, parameters lie outside its layers, a module cannot be
            initialised after the fact, or weights are tied, which giving them memory would silently untie.
    """
    with torch.device("meta"):
        model = factory()
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model factory must return a torch.nn.Module, not {type(model).__name__}")
    if _owns_state(model):
        raise UsageError(
            f"{type(model).__name__} owns parameters or buffers beside its layers: move them into a layer, as each "
            "belongs to exactly one pipeline stage"
        )
    for name, module in model.named_modules():
        if _owns_state(module) and _initialiser(module) is None:
            raise UsageError(
                f"module {name!r} ({type(module).__name__}) has parameters or buffers of its own but no "
                "reset_parameters(): it is built on the meta device and could not be initialised"
            )
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if tied := sorted(set(names) - {name for name, _ in model.named_parameters()}):
        raise UsageError(f"tied weights are not supported here: {', '.join(tied)} share memory with another parameter")
    return model


def cut_evenly(model: nn.Module, num_stages: int) -> list[list[str]]:
    """The names of the direct children that each stage runs: contiguous, counts differ by one at most.

    Raises:
        UsageError: the model has fewer children than stages.
    """
    children = [name for name, _ in model.named_children()]
    if len(children) < num_stages:
        raise UsageError(
            f"cannot cut {type(model).__name__} with {len(children)} layers ({', '.join(children)}) into {num_stages} "
            "stages, one per worker: use fewer workers or more layers"
        )
    bounds = [len(children) * stage // num_stages for stage in range(num_stages + 1)]
    return [children[start:end] for start, end in itertools.pairwise(bounds)]


def take_stage(model: nn.Module, children: Sequence[str]) -> nn.Module:
    """The model with only these children. Shares their modules; `model` itself stays whole."""
    stage = copy.copy(model)
    stage._modules = {
        name: child if name in children else None
        for name, child in model.named_children()
        if name in children or not isinstance(model, nn.Sequential)
    }
    return stage


def materialise(model: nn.Module, device: torch.device, seed: int, prefix: str = "") -> None:
    """Give a meta model memory on `device`, and initial values that depend on the seed and each module's name only.

    So a stage gets the values that the whole model would give it, on whichever rank it is.

    Args:
        prefix: the name of `model` in the whole model, when it is a part of it.
    """
    model.to_empty(device=device)
    for name, module in model.named_modules(prefix=prefix):
        initialise(module, name, seed)


def initialise(module: nn.Module, name: str, seed: int) -> None:
    """Set the parameters and buffers that this module, of this name, owns itself."""
    if _owns_state(module) and (reset := _initialiser(module)):
        torch.manual_seed(seed + zlib.crc32(name.encode()))
        with torch.no_grad():
            reset()


def _owns_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))


def _initialiser(module: nn.Module) -> Callable[[], object] | None:
    """torch's own modules are re-initialised by `reset_parameters`, a few (MultiheadAttention) by the private name."""
    for name in ("reset_parameters", "_reset_parameters"):
        initialise: Callable[[], object] | None = getattr(module, name, None)
        if callable(initialise):
            return initialise
    return None
