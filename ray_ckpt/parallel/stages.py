"""Build a model without memory, and cut it into pipeline stages.

A model's *parts* run one after the other, each fed by the one before: its direct children, or the modules that its
`pipeline_parts()` names (`["model.embed_tokens", "model.layers.0", ..., "lm_head"]`). A stage is the same model without
the other stages' parts, so every parameter keeps its name: what stood in a `Sequential`, `ModuleList` or `ModuleDict`
is taken out, other parts are None, and `forward` must skip what is not there.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ray_ckpt.errors import UsageError
from ray_ckpt.format.initial_values import initializer
from ray_ckpt.parallel.materialize import owns_state

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def build_on_meta(factory: Callable[[], nn.Module]) -> nn.Module:
    """Build the model without memory.

    Raises:
        UsageError: the factory does not return a module, it has parameters or persistent buffers outside its parts, or
            a module that cannot be initialized after the fact.
    """
    with torch.device("meta"):
        model = factory()
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model factory must return a torch.nn.Module, not {type(model).__name__}")
    prefixes = tuple(f"{part}." for part in parts_of(model))
    if outside := [name for name in _saved_names(model) if not name.startswith(prefixes)]:
        raise UsageError(
            f"{type(model).__name__} owns parameters or buffers beside its layers ({', '.join(outside[:5])}): move "
            "them into a layer, as each belongs to a pipeline stage"
        )
    for name, module in model.named_modules():
        if owns_state(module) and initializer(model, module) is None:
            raise UsageError(
                f"module {name!r} ({type(module).__name__}) has parameters or buffers of its own but no "
                "reset_parameters(), and the model no _init_weights(module): it is built on the meta device and could "
                "not be initialized"
            )
    return model


def _saved_names(model: nn.Module) -> list[str]:
    """Names of all parameters and persistent buffers; of tied ones, all names."""
    buffers = [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, _ in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    ]
    return [name for name, _ in model.named_parameters(remove_duplicate=False)] + buffers


def parts_of(model: nn.Module) -> list[str]:
    """Names of the modules that run one after the other.

    Raises:
        UsageError: `pipeline_parts()` names a module that does not exist.
    """
    own: Callable[[], Sequence[str]] | None = getattr(model, "pipeline_parts", None)
    if own is None:
        return [name for name, _ in model.named_children()]
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if unknown := [name for name in own() if name not in known]:
        raise UsageError(f"pipeline_parts() of {type(model).__name__} names {', '.join(unknown)}, which do not exist")
    return list(own())


def cut_evenly(model: nn.Module, num_stages: int) -> list[list[str]]:
    """The names of the parts that each stage runs: contiguous, at least one each, the largest stage as small as can be.

    A part counts by its parameters; parts without any count nothing.

    Raises:
        UsageError: the model has fewer parts than stages.
    """
    parts = parts_of(model)
    if len(parts) < num_stages:
        raise UsageError(
            f"cannot cut {type(model).__name__} with {len(parts)} layers ({', '.join(parts)}) into {num_stages} "
            "stages: use fewer stages or more layers"
        )
    sizes = [sum(p.numel() for p in model.get_submodule(name).parameters()) for name in parts]
    bounds = _even_bounds(sizes, num_stages)
    return [parts[start:end] for start, end in itertools.pairwise(bounds)]


def cut_by_names(model: nn.Module, stages: Sequence[Sequence[str]]) -> list[list[str]]:
    """Check a cut that the user gives, and return it.

    Raises:
        UsageError: it does not name every part once, in the order they run.
    """
    named = [name for names in stages for name in names]
    if named != parts_of(model) or not all(stages):
        raise UsageError(
            f"the stages {[list(names) for names in stages]} must name the parts of {type(model).__name__} once each, "
            f"in order, and at least one per stage: {', '.join(parts_of(model))}"
        )
    return [list(names) for names in stages]


def take_stage(model: nn.Module, parts: Sequence[str]) -> nn.Module:
    """The model with only these of its parts. Shares their modules; `model` itself stays whole."""
    taken_out = [name for name in parts_of(model) if name not in parts]
    copies = {"": copy.copy(model)}
    copies[""]._modules = dict(model._modules)
    for name in taken_out:
        parent, _, child = name.rpartition(".")
        modules = _copied(copies, parent)._modules
        if isinstance(copies[parent], _CONTAINERS):
            del modules[child]
        else:
            modules[child] = None
    return copies[""]


def _copied(copies: dict[str, nn.Module], name: str) -> nn.Module:
    """The stage's own copy of a module on the way to a part, made when first asked for."""
    if name not in copies:
        parent, _, child = name.rpartition(".")
        holder = _copied(copies, parent)
        copies[name] = copy.copy(holder.get_submodule(child))
        copies[name]._modules = dict(copies[name]._modules)
        holder._modules[child] = copies[name]
    return copies[name]


def _even_bounds(sizes: Sequence[int], num_stages: int) -> list[int]:
    """Where to cut a row of sizes into runs of at least one, so that the largest sum is least; then: even in number.

    Dynamic programming over (stages left, position): a model has at most a few hundred parts.
    """
    totals = [0, *itertools.accumulate(sizes)]
    even = len(sizes) / num_stages

    def cost(start: int, end: int) -> tuple[int, float]:
        return totals[end] - totals[start], (end - start - even) ** 2

    best: dict[int, tuple[tuple[int, float], list[int]]] = {0: ((0, 0.0), [0])}
    for stage in range(1, num_stages + 1):
        reached: dict[int, tuple[tuple[int, float], list[int]]] = {}
        for end in range(stage, len(sizes) - (num_stages - stage) + 1):
            reached[end] = min(_joined(best[start], cost(start, end), end) for start in best if start < end)
        best = reached
    return best[len(sizes)][1]


def _joined(
    before: tuple[tuple[int, float], list[int]], cost: tuple[int, float], end: int
) -> tuple[tuple[int, float], list[int]]:
    (largest, unevenness), bounds = before
    return (max(largest, cost[0]), unevenness + cost[1]), [*bounds, end]


def stages_that_share(cut: Sequence[Sequence[str]], tied: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """Tied weights that are cut apart: further name -> (its stage, the stage of the first name)."""

    def stage_of(name: str) -> int:
        return next(stage for stage, parts in enumerate(cut) for part in parts if name.startswith(f"{part}."))

    found = {alias: (stage_of(alias), stage_of(canonical)) for alias, canonical in tied.items()}
    return {alias: stages for alias, stages in found.items() if stages[0] != stages[1]}
