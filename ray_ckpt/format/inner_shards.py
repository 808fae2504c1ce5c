"""Where the inner tensors of a DTensor's shard lie, when the shard is a tensor subclass: as DTensors of their own.

    codes [rows, columns]    sharded as the outer tensor is
    scale [rows, 1]          by rows where the outer tensor is; likewise a scale per block of rows or columns
    scale [blocks]           one after the other, blocks being counted in row-major order
    table [256]              the same on every rank

Which of these an inner tensor is, the class says when a part of it is taken (`narrow`, or `split` where it has only
that): what gets shorter follows, and what stays as it is is the same everywhere. A class that cannot be cut is judged
by shapes: what has a part for each row (or block of rows) of the shard follows, anything else is refused. Neither can
be wrong in silence: the global shape that follows must be the same in every layout, and ranks that hold "the same" are
compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ray_ckpt.errors import UsageError
from ray_ckpt.format.shards import local_boxes
from ray_ckpt.format.torch_internals import StridedShard, local_tensor, placed
from ray_ckpt.format.wrappers import Nodes, flatten, nodes_of

Shape = tuple[int, ...]


class Spread(NamedTuple):
    """How inner tensors lie across ranks, by name below the outer one's."""

    mesh: DeviceMesh
    placements: Mapping[str, tuple[Placement, ...]]
    shapes: Mapping[str, Shape]
    """Global shapes; none where this rank's shard is empty."""
    local_shapes: Mapping[str, Shape]

    def place(self, name: str, local: torch.Tensor) -> DTensor:
        """The inner tensor as a DTensor."""
        local = local.detach() if local.requires_grad else local
        return placed(local, self.mesh, self.placements[name], self.shapes[name])


_known: dict[object, Spread] = {}
_MOST_KNOWN = 1024


def spread(tensor: DTensor, nodes: Nodes) -> Spread:
    """Where the inner tensors lie.

    Args:
        tensor: says how the outer one is sharded; what its local tensor is made of does not matter.
        nodes: what the outer one is made of, on this rank or as a whole (on the meta device).

    Raises:
        UsageError: an inner tensor does not follow the sharding.
    """
    root = nodes[""]
    shapes = tuple((name, tuple(node.shape)) for name, node in nodes.items())
    placing = tensor.device_mesh, tensor.placements, tuple(tensor.shape), tuple(local_tensor(tensor).shape)
    key = type(root), repr(flatten(root)[1]), shapes, placing
    found = _known.get(key)
    if found is None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        found = _known[key] = _spread(tensor, nodes)
    return found


def _spread(tensor: DTensor, nodes: Nodes) -> Spread:
    boxes = local_boxes(tensor)
    shape, local, root = tuple(tensor.shape), tuple(local_tensor(tensor).shape), tuple(nodes[""].shape)
    if not boxes:
        return Spread(tensor.device_mesh, {}, {}, {})
    cut = [dim for dim in range(len(shape)) if shape[dim] != local[dim]]
    follows = {dim: _follow(nodes, dim) for dim in cut}
    placements: dict[str, tuple[Placement, ...]] = {"": tuple(tensor.placements)}
    shapes, local_shapes = {"": shape}, {"": local}
    for name, node in nodes.items():
        dims = {dim: follows[dim][name] for dim in cut}
        inner_dims = [dim for dim in dims.values() if dim is not None]
        if len(set(inner_dims)) < len(inner_dims):
            raise UsageError(f"its {name} {list(node.shape)} is cut by two dims at once")
        whole, part = list(node.shape), list(node.shape)
        for dim, inner in dims.items():
            if inner is not None:
                whole[inner] = _scaled(name, node.shape[inner], shape[dim], root[dim])
                part[inner] = _scaled(name, node.shape[inner], local[dim], root[dim])
        shapes[name], local_shapes[name] = tuple(whole), tuple(part)
        placements[name] = tuple(_placement(placement, dims) for placement in tensor.placements)
    found = Spread(tensor.device_mesh, placements, shapes, local_shapes)
    for name in nodes:
        _check(name, found, {dim: follows[dim][name] for dim in cut}, tensor)
    return found


def _scaled(name: str, size: int, to: int, of: int) -> int:
    if size * to % of:
        raise UsageError(f"its {name} has {size} for {of} rows or columns, which cannot be {to} of them")
    return size * to // of


def _placement(placement: Placement, dims: Mapping[int, int | None]) -> Placement:
    inner = dims.get(placement.dim) if isinstance(placement, Shard | StridedShard) else None
    if inner is None:
        return Replicate()
    if isinstance(placement, StridedShard):
        return StridedShard(inner, split_factor=placement.split_factor)
    return Shard(inner)


def _check(name: str, found: Spread, dims: Mapping[int, int | None], tensor: DTensor) -> None:
    """Compare where the elements lie: uneven shards may leave an inner tensor elsewhere than its outer one."""
    inner = found.place(name, torch.empty(found.local_shapes[name], device="meta"))
    try:
        inner_boxes = [part.box for part in local_boxes(inner)]
    except UsageError as error:
        raise UsageError(f"its {name} does not follow its sharding: {error}") from None
    for dim, inner_dim in dims.items():
        if inner_dim is None:
            continue
        scale = Fraction(inner.shape[inner_dim], tensor.shape[dim])
        expected = {(part.box.offsets[dim] * scale, part.box.sizes[dim] * scale) for part in local_boxes(tensor)}
        found_at = {(Fraction(box.offsets[inner_dim]), Fraction(box.sizes[inner_dim])) for box in inner_boxes}
        if expected != found_at:
            raise UsageError(f"its {name} {list(inner.shape)} does not follow its sharding {tensor.placements}")


def _follow(nodes: Nodes, dim: int) -> dict[str, int | None]:
    """Name -> dim in which an inner tensor is cut when the outer one is cut in this dim; None: in none."""
    for take in (torch.Tensor.narrow, _first_of_split):
        for length in _lengths(nodes, dim):
            if (found := _cut(nodes, dim, length, take)) is not None:
                return found
    return {name: dim if not name else _by_shape(name, nodes, dim) for name in nodes}


def _lengths(nodes: Nodes, dim: int) -> Iterator[int]:
    """Where to cut: a class may only take whole blocks."""
    size = nodes[""].shape[dim]
    blocks = {size // rows for node in nodes.values() for rows in node.shape if rows and size % rows == 0}
    yield from sorted({length for length in (size // 2, *blocks) if 0 < length < size}, reverse=True)
    yield 0


def _first_of_split(tensor: torch.Tensor, dim: int, start: int, length: int) -> torch.Tensor:
    """As FSDP takes the parts of a parameter."""
    return torch.split(tensor, length, dim)[0] if length else tensor


_Take = Callable[[torch.Tensor, int, int, int], torch.Tensor]


def _cut(nodes: Nodes, dim: int, length: int, take: _Take) -> dict[str, int | None] | None:
    """What the class itself makes of its inner tensors when it is cut; None if it cannot be, or not there."""
    root = nodes[""]
    try:
        with torch.no_grad():
            part = take(root, dim, 0, length)
        if type(part) is not type(root):
            return None
        parts = nodes_of(part)
    except Exception:  # the class is somebody else's
        return None
    if parts.keys() != nodes.keys():
        return None
    found: dict[str, int | None] = {}
    for name, node in nodes.items():
        before, after = tuple(node.shape), tuple(parts[name].shape)
        changed = [at for at, sizes in enumerate(zip(before, after, strict=False)) if sizes[0] != sizes[1]]
        if len(before) != len(after) or len(changed) > 1:
            return None
        if changed and after[changed[0]] * root.shape[dim] != before[changed[0]] * length:
            return None
        found[name] = changed[0] if changed else None
    return found if found[""] == dim else None


def _by_shape(name: str, nodes: Nodes, dim: int) -> int:
    root, inner = nodes[""].shape, nodes[name].shape
    in_order = len(inner) == 1 and dim == 0
    if len(inner) == len(root) or in_order:
        size, parts = root[dim], inner[dim]
        if parts and (size % parts == 0 or parts % size == 0) and (not in_order or root.numel() % parts == 0):
            return dim
    raise UsageError(
        f"its {name} {list(inner)} has no part for each part of dim {dim}, in which {list(root)} is sharded, and the "
        "class does not say how it is cut"
    )
