"""A state of odd sizes, and rank functions that load it. Imports little, as every rank imports it."""

from __future__ import annotations

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ray_ckpt.dcp.reader import ArrowStorageReader

SIZES = (37, 61, 113)
"""They divide by no number of ranks."""


def weights():
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for rows, columns in zip(SIZES, SIZES[1:] + SIZES[:1], strict=True):
        weights[f"layer{rows}.weight"] = torch.randn(rows, columns, generator=generator)
        weights[f"layer{rows}.bias"] = torch.randn(rows, generator=generator).to(torch.bfloat16)
    weights["scale"] = torch.tensor(3.5, dtype=torch.float64)
    weights["flags"] = torch.arange(61) % 3 == 0
    return weights


def blank():
    return {name: torch.full_like(value, 1) for name, value in weights().items()}


def differing(found):
    return {name for name, value in weights().items() if not torch.equal(value, found[name])}


PLACEMENTS = {
    "fsdp2x4": ((4,), [Shard(0)]),
    "tp4": ((4,), [Shard(1)]),
    "fsdp2x2.tp2": ((2, 2), [Shard(0), Shard(1)]),
    "hsdp2x2": ((2, 2), [Replicate(), Shard(0)]),
    "fsdp2x3": ((3,), [Shard(0)]),
}


def blank_shards(layout):
    """DTensors of ones, and what belongs into this rank's part of them."""
    shape, placements = PLACEMENTS[layout]
    mesh = init_device_mesh("cpu", shape)
    target, expected = {}, {}
    for name, value in weights().items():
        fitting = [
            Shard(min(p.dim, value.ndim - 1)) if p.is_shard() and value.ndim else Replicate() for p in placements
        ]
        sizes, offsets = compute_local_shape_and_global_offset(value.shape, mesh, fitting)
        expected[name] = value[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]
        part = torch.ones(sizes, dtype=value.dtype)
        target[name] = DTensor.from_local(
            part, mesh, fitting, run_check=False, shape=value.shape, stride=value.stride()
        )
    return target, expected


def bad_parts(target, expected):
    return sum(not torch.equal(target[name].to_local(), part) for name, part in expected.items())


def load_shards(rank, paths, layouts):
    """Number of bad parts before the loads and after them, by file and layout."""
    outcomes = {}
    for layout in layouts:
        for path in paths:
            target, expected = blank_shards(layout)

            before = bad_parts(target, expected)
            dcp.load(target, storage_reader=ArrowStorageReader(path), no_dist=True)
            outcomes[layout, path] = before, bad_parts(target, expected)
    stage = dict(list(blank().items())[rank::2])
    dcp.load(stage, storage_reader=ArrowStorageReader(paths[0]))
    outcomes["stage", paths[0]] = len(stage), len(differing({**weights(), **stage}))
    return outcomes
