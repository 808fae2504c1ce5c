"""Sharded tensors in the pickles that `torch.save` writes: a rank's part, and where it lies in the whole tensor.

    _rebuild_from_type_v2(_rebuild_wrapper_subclass, DTensor, sizes, {_local_tensor, _spec})   ──> Sharded
    _rebuild_from_type_v2(_rebuild_wrapper_subclass, ShardedTensor, sizes, (_local_shards, metadata, ...))

Stand-ins are read, nothing is rebuilt: no process group, no mesh, no class that the pickle names. What is placed
otherwise than by `Shard`, `_StridedShard` and `Replicate` stays a stand-in, which is refused by its name when wanted.

Source of the format: PyTorch's `torch/_tensor.py` (`_rebuild_from_type_v2`), and of `torch/distributed/`
`tensor/_dtensor_spec.py`, `device_mesh.py`, `_mesh_layout.py` and `_shard/sharded_tensor/`; older names are known too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ray_ckpt.errors import FormatError
from ray_ckpt.format import limits
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.placements import Split, placed_boxes
from ray_ckpt.format.stand_ins import Instance, Name
from ray_ckpt.text import quoted

__all__ = ["Sharded", "Tensor", "rebuild_from_type"]


class Tensor(NamedTuple):
    """A tensor as the pickle describes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Strides in elements."""
    key: str
    """Name of its storage."""
    offset: int
    """Position of its first element in the storage, in elements."""
    is_converted: bool
    """Whether it is a conjugate or negated view: then its elements are not what its bytes say."""

    def narrowed(self, start: Sequence[int], sizes: tuple[int, ...]) -> Tensor:
        """A box of it."""
        first = sum(place * stride for place, stride in zip(start, self.strides, strict=True))
        return self._replace(shape=sizes, offset=self.offset + first)


class Sharded(NamedTuple):
    """One rank's part of a sharded tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    layout: str
    """How it is sharded, in words; the same on all ranks."""
    ranks: tuple[int, ...]
    """The ranks that it is sharded across, as far as the pickle says so."""
    local: Sequence[tuple[Box, Tensor]]
    """Boxes of the whole tensor that this rank holds."""


def rebuild_from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """What stands for a tensor of a class of its own, other than torch.Tensor and Parameter."""
    if isinstance(kind, Name) and isinstance(function, Name) and function.text == _WRAPPER:
        if kind.text in _DTENSORS:
            return _dtensor(_fields(state))
        if kind.text in _SHARDED_TENSORS:
            return _sharded_tensor(state)
    return Instance(kind.text if isinstance(kind, Name) else "torch._tensor._rebuild_from_type_v2", (args, state))


_WRAPPER = "torch._utils._rebuild_wrapper_subclass"

_DTENSORS = {
    f"torch.distributed.{module}.DTensor"
    for module in ("tensor", "tensor._api", "tensor.api", "_tensor", "_tensor.api")
}

_SHARDED = "torch.distributed._shard"
_SHARDED_TENSORS = {f"{_SHARDED}.sharded_tensor.api.ShardedTensor", f"{_SHARDED}.sharded_tensor.ShardedTensor"}

_PLACEMENT_MODULES = ("torch.distributed.tensor.placement_types.", "torch.distributed._tensor.placement_types.")

_MAX_AXES = 16
"""Largest number of axes of a mesh."""


# ----------------------------------------------------------------------------------------------------------- DTensor


def _dtensor(fields: Mapping[str, Any]) -> Sharded | Instance:
    local, spec = fields["_local_tensor"], _fields(fields["_spec"])
    if not isinstance(local, Tensor):
        # Such as a quantized tensor, whose own class is the reason.
        return local if isinstance(local, Instance) else Instance("torch.distributed.tensor.DTensor", ())
    shape, dtype = _tensor_meta(spec["tensor_meta"])
    if local.dtype != dtype:
        raise ValueError(f"a shard of {local.dtype} of a tensor of {dtype}")
    mesh = _fields(spec["mesh"])
    sizes = _mesh_sizes(mesh)
    placements = [_placement(placement) for placement in spec["placements"]]
    for placement in placements:
        if isinstance(placement, Instance):
            return placement
    if len(placements) != len(sizes):
        raise ValueError(f"{len(placements)} placements on a mesh of {len(sizes)} axes")
    layout = f"{_in_words(placements)} on a mesh of {list(sizes)}"
    coordinate = mesh.get("_coordinate_on_dim")
    ranks = _ranks(mesh)
    if coordinate is None:
        return Sharded(dtype, shape, layout, ranks, ())
    if len(coordinate) != len(sizes) or not all(
        type(place) is int and 0 <= place < size for place, size in zip(coordinate, sizes, strict=True)
    ):
        raise ValueError(f"place {quoted(coordinate)} on a mesh of {list(sizes)}")
    splits = [
        Split(placement.dim % len(shape), sizes[axis], coordinate[axis], placement.pieces)
        for axis, placement in _in_order(placements, spec.get("shard_order"), len(shape))
    ]
    boxes = placed_boxes(shape, splits)
    _check_local(local, shape, boxes, layout)
    pieces = [(box, local.narrowed(start, box.sizes)) for box, start in boxes]
    return Sharded(dtype, shape, layout, ranks, pieces)


class _Placed(NamedTuple):
    dim: int | None
    """None for a replica."""
    pieces: int = 1


class _Shard(NamedTuple):
    dim: int
    pieces: int


def _placement(value: Any) -> _Placed | Instance:
    """A placement; a stand-in of one that is not known is returned as it is."""
    if not isinstance(value, Instance):
        raise ValueError(f"{quoted(value)} is no placement")
    module, _, kind = value.name.rpartition(".")
    if f"{module}." not in _PLACEMENT_MODULES or kind not in ("Shard", "_StridedShard", "Replicate"):
        return value
    if kind == "Replicate":
        return _Placed(None)
    fields = _fields(value.state) if value.state is not None else {}
    dim = fields.get("dim", value.args[0] if value.args else None)
    pieces = fields.get("split_factor", 1)
    if type(dim) is not int or type(pieces) is not int or pieces < 1:
        raise ValueError(f"{kind} of dim {quoted(dim)} with factor {quoted(pieces)}")
    return _Placed(dim, pieces)


def _in_words(placements: Sequence[Any]) -> str:
    words = [
        "Replicate"
        if placed.dim is None
        else f"Shard({placed.dim})"
        if placed.pieces == 1
        else f"_StridedShard({placed.dim}, {placed.pieces})"
        for placed in placements
    ]
    return f"({', '.join(words)})"


def _in_order(placements: Sequence[Any], order: Any, num_dims: int) -> Iterator[tuple[int, _Shard]]:
    """Axis and shard, in the order in which they split their dims: from the first axis on, or as the spec says."""
    axes = [axis for axis, placed in enumerate(placements) if placed.dim is not None]
    if bad := [placements[axis].dim for axis in axes if not -num_dims <= placements[axis].dim < num_dims]:
        raise ValueError(f"Shard({bad[0]}) of a tensor of {num_dims} dims")
    if order:
        named = [axis for entry in order for axis in (entry.args if isinstance(entry, Instance) else entry)[1]]
        if sorted(named) != axes:
            raise ValueError(f"shard_order {quoted(named)} names other axes than {axes}")
        axes = named
    for axis in axes:
        yield axis, _Shard(placements[axis].dim, placements[axis].pieces)


def _check_local(
    local: Tensor, shape: tuple[int, ...], boxes: Sequence[tuple[Box, tuple[int, ...]]], layout: str
) -> None:
    """Whether the local tensor has as many elements, in the shape that the placements imply."""
    implied = tuple(max((start[dim] + box.sizes[dim] for box, start in boxes), default=0) for dim in range(len(shape)))
    if boxes and local.shape != implied and 0 not in shape:
        raise FormatError(
            f"a shard of a tensor of shape {list(shape)}, placed by {layout}, has the shape {list(local.shape)} where "
            f"the placements imply {list(implied)}"
        )
    if not boxes and 0 not in local.shape:
        raise FormatError(
            f"a shard of a tensor of shape {list(shape)}, placed by {layout}, has the shape {list(local.shape)} where "
            "the placements imply an empty one"
        )


def _tensor_meta(value: Any) -> tuple[tuple[int, ...], torch.dtype]:
    if isinstance(value, Instance) and value.args:
        shape, _strides, dtype = value.args
    else:
        fields = _fields(value)
        shape, dtype = fields["shape"], fields["dtype"]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{quoted(dtype)} is no dtype")
    return _sizes(shape), dtype


def _mesh_sizes(mesh: Mapping[str, Any]) -> tuple[int, ...]:
    """Sizes of the axes of a mesh: of its layout in a newer torch, of the tensor of its ranks in an older one."""
    layout = mesh.get("_layout")
    if layout is None:
        ranks = mesh["mesh"]
        if not isinstance(ranks, Tensor):
            raise ValueError(f"{quoted(ranks)} is no mesh")
        sizes = ranks.shape
    else:
        fields = _fields(layout)
        axes = [_fields(axis)["shape"] for axis in fields["axes"]] if "axes" in fields else _tuple(fields["shape"])
        sizes = tuple(_product(axis) for axis in axes)
    if len(sizes) > _MAX_AXES or not all(0 < size < 1 << 31 for size in sizes):
        raise ValueError(f"no mesh has the sizes {quoted(sizes)}")
    return tuple(sizes)


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _product(sizes: Any) -> int:
    """Of a size, or of sizes that are nested in each other where axes were flattened."""
    waiting, product = [sizes], 1
    for _ in range(_MAX_AXES * _MAX_AXES):
        if not waiting:
            return product
        size = waiting.pop()
        if isinstance(size, (list, tuple)):
            waiting.extend(size[:_MAX_AXES])
        elif type(size) is int and 0 < size < 1 << 31:
            product *= size
        else:
            raise ValueError(f"{quoted(size)} is no size of a mesh")
    raise ValueError("a mesh of too many axes")


def _ranks(mesh: Mapping[str, Any]) -> tuple[int, ...]:
    ranks = mesh.get("_flatten_rank_map")
    return tuple(ranks) if isinstance(ranks, tuple) and all(type(rank) is int for rank in ranks) else ()


# ----------------------------------------------------------------------------------------------------- ShardedTensor


def _sharded_tensor(state: Any) -> Sharded:
    """FSDP1's, whose shards say themselves where they lie."""
    shards, metadata = state[:2]
    fields = _fields(metadata)
    properties = fields["tensor_properties"]
    properties = properties.state if isinstance(properties, Instance) else properties
    dtype = properties[0] if isinstance(properties, tuple) else properties["dtype"]
    shape = _sizes(fields["size"])
    if not isinstance(dtype, torch.dtype) or not isinstance(shards, list):
        raise ValueError(f"a ShardedTensor of {quoted(dtype)}")
    local = []
    for shard in shards:
        parts = _fields(shard)
        place, tensor = _fields(parts["metadata"]), parts["tensor"]
        box = Box(_sizes(place["shard_offsets"]), _sizes(place["shard_sizes"]))
        if not isinstance(tensor, Tensor) or (tensor.dtype, tensor.shape) != (dtype, box.sizes):
            raise ValueError(f"a shard of {quoted(tensor)} that is said to have the size {list(box.sizes)}")
        if box.num_elements or 0 in shape:
            local.append((box, tensor))
    num_shards = len(fields["shards_metadata"])
    return Sharded(dtype, shape, f"a ShardedTensor of {num_shards} shards", (), local)


# --------------------------------------------------------------------------------------------------------- stand-ins


def _fields(value: Any) -> Mapping[str, Any]:
    """The attributes of a stand-in: its state is a dict, or that and a dict of its slots."""
    state = value.state if isinstance(value, Instance) else value
    dicts = [part for part in (state if isinstance(state, tuple) else (state,)) if part is not None]
    if not dicts or not all(type(part) is dict for part in dicts):
        raise ValueError(f"{quoted(value)} has no attributes")
    return {key: item for part in dicts for key, item in part.items()}


def _sizes(value: Any) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, (list, tuple)) else None
    if sizes is None or not all(type(size) is int and 0 <= size < 1 << 63 for size in sizes):
        raise ValueError(f"{quoted(value)} is no shape")
    limits.check_shape(sizes, "a sharded tensor")
    return sizes
