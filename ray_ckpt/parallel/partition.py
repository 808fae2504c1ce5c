"""Which rank of a layout holds which part of a checkpoint, as far as that can be told without the model.

    partition(manifest, layout)        -> parts of each rank that writes
    parts_of_tensors(manifest, layout) -> the same, by tensor
    replicas(layout)                   -> which ranks hold the same as each of these

Names go to pipeline stages in contiguous runs of about equal bytes, a parameter with its optimizer state. Within a
stage, data parallelism shards rows, as `torch.chunk` cuts them. Tensor and expert parallelism shard rows too, unless
the checkpoint's own chunks are cut along another dim, which is then the one that a plan had chosen. Replicas write
nothing: they read what the first of them wrote. Everything that is not a tensor goes to rank 0.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from ray_ckpt.format.boxes import Box
from ray_ckpt.format.manifest import Manifest, TensorEntry
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.rounding import ceil_div

__all__ = ["partition", "parts_of_tensors", "replicas"]

_STATE = re.compile(r".*?\.state\.(.+)\.[^.]+")
"""Name of a parameter's optimizer state."""


def partition(manifest: Manifest, layout: Layout) -> dict[int, dict[str, Box]]:
    """Rank -> name -> the rank's part of that tensor. Ranks without any are left out, except for rank 0."""
    parts: dict[int, dict[str, Box]] = {0: {}}
    for name, shards in parts_of_tensors(manifest, layout).items():
        for rank, box in shards:
            parts.setdefault(rank, {})[name] = box
    return dict(sorted(parts.items()))


def parts_of_tensors(manifest: Manifest, layout: Layout) -> dict[str, tuple[tuple[int, Box], ...]]:
    """The same by name: the ranks that write, and their parts. Tensors that are cut alike have the same tuple."""
    stages = _stages(manifest.tensors, layout.num_stages)
    return {
        name: _shards(tensor.shape, _dim_across(tensor), layout, stages[name] % layout.pp)
        for name, tensor in manifest.tensors.items()
    }


def replicas(layout: Layout) -> dict[int, tuple[int, ...]]:
    """Every rank that `partition` may name -> the ranks that hold the same, itself first."""
    found: dict[int, list[int]] = {}
    for rank in range(layout.world_size):
        first = layout.rank(layout.coordinate(rank) | {"dp_replicate": 0, "cp": 0})
        found.setdefault(first, []).append(rank)
    return {first: tuple(ranks) for first, ranks in found.items()}


def _stages(tensors: Mapping[str, TensorEntry], num_stages: int) -> dict[str, int]:
    """The stage of every tensor."""
    groups = _group(tensors)
    total = sum(tensor.num_bytes for tensor in tensors.values())
    stages: dict[str, int] = {}
    passed = 0
    for names in groups:
        num_bytes = sum(tensors[name].num_bytes for name in names)
        # By its middle, so that a large group does not push what follows it into the stage after.
        stage = min(num_stages - 1, (2 * passed + num_bytes) * num_stages // (2 * total)) if total else 0
        stages |= dict.fromkeys(names, stage)
        passed += num_bytes
    return stages


def _group(tensors: Mapping[str, TensorEntry]) -> list[list[str]]:
    """Names in their order, each parameter followed by its optimizer state."""
    groups: dict[str, list[str]] = {}
    aliases: dict[str, str] = {}
    for name in tensors:
        if not _STATE.fullmatch(name):
            groups[name] = [name]
            for start in (at for at, letter in enumerate(name) if letter == "."):
                aliases.setdefault(name[start + 1 :], name)
            aliases[name] = name
    for name in tensors:
        if match := _STATE.fullmatch(name):
            groups.setdefault(aliases.get(match[1], name), []).append(name)
    return list(groups.values())


@functools.lru_cache(maxsize=4096)
def _shards(shape: tuple[int, ...], across: int, layout: Layout, pipeline_rank: int) -> tuple[tuple[int, Box], ...]:
    """Ranks and the parts that lie there. Empty parts are left out. A model has many tensors and few shapes."""
    return tuple(_cut(shape, across, layout, pipeline_rank))


def _cut(shape: tuple[int, ...], across: int, layout: Layout, pipeline_rank: int) -> Iterator[tuple[int, Box]]:
    for tp, ep in itertools.product(range(layout.tp), range(layout.ep)):
        number, count = tp * layout.ep + ep, layout.tp * layout.ep
        outer = _chunk(Box.whole(shape), across, number, count)
        for shard in range(layout.dp_shard):
            box = _chunk(outer, 0, shard, layout.dp_shard) if outer is not None else None
            if box is not None:
                yield layout.rank({"pp": pipeline_rank, "tp": tp, "ep": ep, "dp_shard": shard}), box


def _dim_across(tensor: TensorEntry) -> int:
    """The dim that tensor parallelism shards: the last one in which the checkpoint's chunks differ, else rows."""
    for dim in reversed(range(1, len(tensor.shape))):
        if len({chunk.box.offsets[dim] for chunk in tensor.chunks}) > 1:
            return dim
    return 0


def _chunk(box: Box, dim: int, number: int, count: int) -> Box | None:
    """Part `number` of `count` along a dim, as `torch.chunk` cuts; None when it is empty.

    What has no elements, or no dims, is not cut: the first part is all of it.
    """
    if count == 1 or not box.num_elements or not box.sizes:
        return box if number == 0 else None
    size = ceil_div(box.sizes[dim], count)
    start = min(number * size, box.sizes[dim])
    length = min(size, box.sizes[dim] - start)
    if not length:
        return None
    return Box(_with(box.offsets, dim, box.offsets[dim] + start), _with(box.sizes, dim, length))


def _with(numbers: Sequence[int], dim: int, number: int) -> tuple[int, ...]:
    return (*numbers[:dim], number, *numbers[dim + 1 :])
