"""Where a DTensor's local elements lie: compared with torch's own splitting, saved, and read back elsewhere."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

import ray_ckpt
from ray_ckpt import ArrowStorageReader, ArrowStorageWriter
from ray_ckpt.errors import UsageError
from ray_ckpt.format.fingerprint import Fingerprint
from ray_ckpt.format.fingerprinting import fingerprint
from ray_ckpt.format.shards import local_boxes
from ray_ckpt.format.torch_internals import StridedShard
from tests.support.ranks import run_ranks

SHAPES = ((8,), (7,), (1,), (0,), (5, 3), (4, 6), (13, 2))
PLACEMENTS: tuple[Placement, ...] = (
    Replicate(),
    Shard(0),
    Shard(1),
    StridedShard(0, split_factor=2),
    StridedShard(0, split_factor=3),
    StridedShard(1, split_factor=2),
)


def laid_out(whole: torch.Tensor, mesh: Any, placements: tuple[Placement, ...]) -> DTensor:
    """Split by each placement's own means, one mesh axis after the other, as torch does."""
    local = whole
    for axis, placement in enumerate(placements):
        if not isinstance(placement, Replicate):
            parts, _ = placement._split_tensor(local, mesh.size(axis), with_padding=False, contiguous=True)
            local = parts[mesh.get_local_rank(axis)]
    return DTensor.from_local(
        local.clone(), mesh, placements, shape=whole.shape, stride=whole.stride(), run_check=False
    )


def cases() -> list[tuple[tuple[int, ...], tuple[Placement, ...]]]:
    pairs = itertools.product(PLACEMENTS, repeat=2)
    return [
        (shape, placements)
        for placements in pairs
        for shape in SHAPES
        if all(getattr(placement, "dim", 0) < len(shape) for placement in placements)
    ]


def compare_boxes(rank: int, directory: Path) -> int:
    mesh = init_device_mesh("cpu", (2, 2))
    state, wholes = {}, {}
    for number, (shape, placements) in enumerate(cases()):
        whole = torch.arange(torch.Size(shape).numel()).reshape(shape) + 1
        tensor = laid_out(whole, mesh, placements)
        local = tensor._local_tensor
        seen = torch.zeros_like(local)
        for part in local_boxes(tensor):
            ends = (slice(o, o + s) for o, s in zip(part.box.offsets, part.box.sizes, strict=True))
            assert torch.equal(part.of(local), whole[tuple(ends)]), (shape, placements)
            part.of(seen).add_(1)
        assert bool((seen == 1).all()), (shape, placements)
        state[str(number)], wholes[str(number)] = tensor, whole
    ray_ckpt.save(state, directory / "strided")
    read = {name: torch.zeros_like(whole) for name, whole in wholes.items()}
    ray_ckpt.load(read, directory / "strided")
    assert all(torch.equal(read[name], whole) for name, whole in wholes.items())
    locals_before = {name: tensor._local_tensor.clone() for name, tensor in state.items()}
    for tensor in state.values():
        tensor._local_tensor.zero_()
    ray_ckpt.load(state, directory / "strided")
    assert all(torch.equal(tensor._local_tensor, locals_before[name]) for name, tensor in state.items())
    return len(state)


def test_a_local_shard_is_a_list_of_boxes(tmp_path: Path) -> None:
    """All pairs of placements on a mesh of two axes, uneven and empty shapes too: saved, loaded whole, loaded back."""
    assert min(run_ranks(compare_boxes, 4, tmp_path, tmp_path)) > 100


def strided_fingerprint(rank: int) -> Fingerprint:
    mesh = init_device_mesh("cpu", (2,))
    return fingerprint(laid_out(torch.arange(8), mesh, (StridedShard(0, split_factor=2),)))


def test_a_strided_shard_has_the_fingerprint_of_what_it_holds(tmp_path: Path) -> None:
    parts = run_ranks(strided_fingerprint, 2, tmp_path)
    assert [sorted(box.offsets[0] for box in part.parts) for part in parts] == [[0, 4], [2, 6]]
    assert sum(sum(part.parts.values()) for part in parts) % 2**64 == sum(fingerprint(torch.arange(8)).parts.values())


def refused(rank: int, directory: Path) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    messages = []
    wrong: dict[str, Any] = {
        "partial": DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False),
        "short": DTensor.from_local(torch.ones(1), mesh, [Shard(0)], run_check=False, shape=(8,), stride=(1,)),
    }
    for name, tensor in wrong.items():
        with pytest.raises(UsageError) as e:
            ray_ckpt.save({name: tensor}, directory / name)
        messages.append(str(e.value))
    return messages


def test_what_is_no_shard_is_refused_by_name(tmp_path: Path) -> None:
    partial, short = run_ranks(refused, 2, tmp_path, tmp_path)[0]
    assert "'partial' is a pending sum" in partial
    assert "'short': a DTensor of shape [8]" in short
    assert "local shard of shape [1] where the placements imply [4]" in short


def through_dcp(rank: int, directory: Path) -> tuple[int, list[str]]:
    """Number of tensors that dcp.load brought to the right rows, and what it said of the others."""
    mesh = init_device_mesh("cpu", (2, 2))
    right, said = 0, []
    for number, (shape, placements) in enumerate(cases()):
        if not any(isinstance(placement, StridedShard) for placement in placements) or 0 in shape:
            continue
        whole = torch.arange(torch.Size(shape).numel()).reshape(shape) + 1
        place = directory / str(number)
        if rank == 0:
            dcp.save({"w": whole}, storage_writer=ArrowStorageWriter(place), no_dist=True)
        dist.barrier()
        target = laid_out(torch.zeros_like(whole), mesh, placements)
        expected = laid_out(whole, mesh, placements)._local_tensor
        try:
            dcp.load({"w": target}, storage_reader=ArrowStorageReader(place))
        except CheckpointException as error:
            said += [str(failure[0]) for failure in error.failures.values()]
        else:
            right += 1
            assert torch.equal(target._local_tensor, expected), (shape, placements)
    return right, said


def test_dcp_loads_strided_shards_where_they_lie_or_not_at_all(tmp_path: Path) -> None:
    for right, said in run_ranks(through_dcp, 4, tmp_path, tmp_path):
        assert right > 20
        assert len(said) > 20
        assert all("'w' is placed by" in text for text in said)


def save_through_dcp(rank: int, directory: Path) -> int:
    """Every strided tensor that dcp.save took is read back whole, and right."""
    mesh = init_device_mesh("cpu", (2, 2))
    saved = 0
    for number, (shape, placements) in enumerate(cases()):
        if not any(isinstance(placement, StridedShard) for placement in placements) or 0 in shape:
            continue
        whole = torch.arange(torch.Size(shape).numel()).reshape(shape) + 1
        place = directory / str(number)
        with contextlib.suppress(CheckpointException):
            dcp.save({"w": laid_out(whole, mesh, placements)}, storage_writer=ArrowStorageWriter(place))
            found = {"w": torch.zeros_like(whole)}
            dcp.load(found, storage_reader=ArrowStorageReader(place), no_dist=True)
            assert torch.equal(found["w"], whole), (shape, placements)
            saved += 1
    return saved


def test_dcp_saves_strided_shards_where_they_lie_or_not_at_all(tmp_path: Path) -> None:
    assert min(run_ranks(save_through_dcp, 4, tmp_path, tmp_path)) > 10
