"""Lay a model across the ranks of a layout.

    parallelize(whole, layout, device)
      cut                            pipeline stages: this rank's chunks of the model          stages.py
      split_experts                  experts over `ep`                                         experts.py
      parallelize_module             tensor parallel over `tp`, by the model's plan
      fully_shard, ...               data parallel over `dp_replicate` and `dp_shard`
      allocate, set_initial_values   memory for what this rank holds, and what it holds first  materialize.py

All of it happens on the meta device first, so that no rank ever holds more than its own part and one module.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ray_ckpt.errors import UsageError
from ray_ckpt.parallel.experts import layers_of_experts, split_experts
from ray_ckpt.parallel.layout import AXES, Layout
from ray_ckpt.parallel.materialize import allocate, set_initial_values, tie, tied_names, values_of
from ray_ckpt.parallel.stages import cut_by_names, cut_evenly, take_stage

TensorParallelPlan = Mapping[str, ParallelStyle]
"""Module name, with `*` for any part of it -> how it is split, as `parallelize_module` takes it."""


@dataclass(frozen=True)
class Parallelized:
    """What one rank holds of a model."""

    layout: Layout
    mesh: DeviceMesh
    """Has an axis for each degree of the layout above 1, and `dp_shard` under FSDP."""
    chunks: tuple[nn.Module, ...]
    """One per pipeline stage of this rank, as `layout.stages_of` numbers them; the whole model where there is one."""
    cut: tuple[tuple[str, ...], ...]
    """The parts of every stage."""
    tied: Mapping[str, str]
    """Tied weights of the whole model: every further name -> the first one."""


def parallelize(
    whole: nn.Module,
    layout: Layout,
    device: torch.device,
    *,
    seed: int | None,
    stages: Sequence[Sequence[str]] | None = None,
    tp_plan: TensorParallelPlan | None = None,
) -> Parallelized:
    """Lay a model across the ranks of the default process group, or on this one alone.

    Args:
        whole: on the meta device, as `build_on_meta` makes it; used up by this.
        device: where this rank's tensors belong.
        seed: for the initial values, which do not depend on the layout. None: parameters are left undefined, for a load
            to fill them.
        stages: the parts of every pipeline stage; by default even in parameters.
        tp_plan: how `tp` splits modules; by default the model's own `tp_plan()`.

    Raises:
        UsageError: the layout is not supported, does not fit the number of ranks, or the model cannot be laid out so.
    """
    layout.check_supported()
    mesh = make_mesh(layout, device.type)
    skeleton, tied = copy.deepcopy(whole), tied_names(whole)
    cut = cut_evenly(whole, layout.num_stages) if stages is None else cut_by_names(whole, stages)
    if layout.ep > 1:
        layers_of_experts(whole, layout.ep)
    if len(cut) != layout.num_stages:
        raise UsageError(f"layout {layout} has {layout.num_stages} pipeline stages, but the cut has {len(cut)}")
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    plan = tp_plan if tp_plan is not None else _own_plan(whole, layout)
    wrapping = _Wrapping(layout, mesh, device, seed, plan, skeleton, tied)
    chunks = []
    for stage in layout.stages_of(rank):
        chunk = take_stage(whole, cut[stage]) if layout.num_stages > 1 else whole
        chunks.append(wrapping.wrap(chunk, _units(chunk, cut[stage], tied)))
    return Parallelized(layout, mesh, tuple(chunks), tuple(map(tuple, cut)), tied)


def check_fits(whole: nn.Module, layout: Layout) -> None:
    """Whether `parallelize` can lay the model out so, as far as one process can tell.

    Raises:
        UsageError: it cannot.
    """
    layout.check_supported()
    cut_evenly(whole, layout.num_stages)
    _own_plan(whole, layout)
    if layout.ep > 1:
        layers_of_experts(whole, layout.ep)


def make_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """A mesh over all ranks of the default process group, with an axis for each degree that is split.

    Raises:
        UsageError: the layout needs another number of ranks.
    """
    initialized = torch.distributed.is_initialized()
    layout.check_world(torch.distributed.get_world_size() if initialized else 1)
    kept = [axis for axis in AXES if layout.degrees[axis] > 1 or (axis == "dp_shard" and layout.dp.startswith("fsdp"))]
    if not initialized:
        raise UsageError("there is no process group: join one first, also of one rank")
    axes = kept or ["dp_shard"]
    return init_device_mesh(device_type, tuple(layout.degrees[axis] for axis in axes), mesh_dim_names=tuple(axes))


def _own_plan(whole: nn.Module, layout: Layout) -> TensorParallelPlan:
    if layout.tp == 1:
        return {}
    own = getattr(whole, "tp_plan", None)
    if own is None:
        raise UsageError(
            f"layout {layout} splits modules over tp, but {type(whole).__name__} has no tp_plan() that says how: give "
            "one, or pass tp_plan={'layers.*.up': ColwiseParallel(), ...}"
        )
    plan: TensorParallelPlan = own()
    return plan


@dataclass(frozen=True)
class _Wrapping:
    """Splits the chunks of one model over the mesh, and gives them memory."""

    layout: Layout
    mesh: DeviceMesh
    device: torch.device
    seed: int | None
    """None: parameters keep undefined values."""
    tp_plan: TensorParallelPlan
    skeleton: nn.Module
    """The whole model on the meta device, before anything was split."""
    tied: Mapping[str, str]

    def wrap(self, chunk: nn.Module, units: Sequence[nn.Module]) -> nn.Module:
        """Args:
        units: submodules of the chunk that data parallelism gathers one at a time.
        """
        if self.layout.dp == "fsdp1":
            return self._wrap_by_fsdp1(chunk, units)
        if self.layout.ep > 1:
            for experts in layers_of_experts(chunk, self.layout.ep, required=False):  # a pipeline stage may have none
                split_experts(experts, self.mesh["ep"])
        if self.layout.tp > 1:
            _split_by_plan(chunk, self.mesh["tp"], self.tp_plan)
            tie(chunk, self.tied)
        if self.layout.dp == "fsdp2":
            # A mesh of two axes means replicas of shards.
            axes = ("dp_replicate", "dp_shard") if self.layout.dp_replicate > 1 else ("dp_shard",)
            for module in (*units, chunk):
                fully_shard(module, mesh=self.mesh[axes])
        allocate(chunk, self.device, self.tied)
        set_initial_values(chunk, self.skeleton, self.tied, self.seed or 0, parameters=self.seed is not None)
        if self.layout.dp == "ddp":
            return DistributedDataParallel(chunk, process_group=self.mesh.get_group("dp_replicate"))
        return chunk

    def _wrap_by_fsdp1(self, chunk: nn.Module, units: Sequence[nn.Module]) -> nn.Module:
        """Wrap a model on meta in FullyShardedDataParallel, unit by unit. Its state dict holds DTensors."""
        # It takes memory and values in one step, so there are values also where a load would not need them.
        seed = self.seed or 0
        options: dict[str, Any] = {}
        if self.tied:
            # It knows which weights are tied only while they are, and that ends when it gives modules memory one by
            # one.
            allocate(chunk, self.device, self.tied)
            set_initial_values(chunk, self.skeleton, self.tied, seed)
        else:
            names = {module: name for name, module in chunk.named_modules()}
            options["param_init_fn"] = partial(_materialize_alone, names, self.skeleton, self.device, seed)
        return FullyShardedDataParallel(
            chunk,
            # Without a mesh its state dict holds the deprecated ShardedTensor.
            device_mesh=self.mesh["dp_shard"],
            # On the CPU it has to be told, as it expects an accelerator.
            device_id=self.device,
            use_orig_params=True,
            auto_wrap_policy=partial(lambda_auto_wrap_policy, lambda_fn=set(units).__contains__),
            **options,
        )


def _split_by_plan(model: nn.Module, mesh: DeviceMesh, plan: TensorParallelPlan) -> None:
    """Split modules over a one-axis mesh. Entries of the plan that match nothing here belong to other stages.

    Each rank cuts its shard out of the same values, so nothing is sent.
    """
    matching = {pattern: style for pattern, style in plan.items() if _matches_some(model, pattern)}
    if matching:
        parallelize_module(model, mesh, matching, src_data_rank=None)


def _matches_some(model: nn.Module, pattern: str) -> bool:
    wanted = pattern.split(".")
    return any(
        len(parts) == len(wanted) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=True))
        for parts in (name.split(".") for name, _ in model.named_modules())
    )


def _units(model: nn.Module, parts: Sequence[str], tied: Mapping[str, str]) -> list[nn.Module]:
    """Parts that are gathered one at a time. Those that share weights stay with the model, or these would be untied."""
    shared = [*tied, *tied.values()]
    return [
        model.get_submodule(part)
        for part in parts
        if any(True for _ in model.get_submodule(part).parameters())
        and not any(name.startswith(f"{part}.") for name in shared)
    ]


@torch.no_grad()
def _materialize_alone(
    names: Mapping[nn.Module, str], skeleton: nn.Module, device: torch.device, seed: int, module: nn.Module
) -> None:
    """Memory and values for what a module owns itself."""
    owned = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if not owned:
        return
    module.to_empty(device=device, recurse=False)
    values = values_of(skeleton, names[module], seed, device)
    for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        tensor.copy_(values[key])
