"""Plain tensors that an optimizer keeps of a sharded parameter: each rank's own, as nothing says that they are alike.

    shards.<parameter>.<box>.<key>      the tensor, of the ranks that hold this box of the parameter
    shards.<parameter>.<box>.$digests   key -> digest of a tensor that may be the same on all ranks

Such as 8-bit moments with their scales, or preconditioners, that are computed from the local shard. They come back to
ranks that hold the same box. Where they are alike in all boxes, and not shaped by the shard, they fit any layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ray_ckpt.format.fingerprinting import fingerprint
from ray_ckpt.format.shards import local_boxes
from ray_ckpt.format.torch_internals import local_tensor
from ray_ckpt.format.wrappers import is_made_of_others
from ray_ckpt.state.dim_order import Order, special_order

SHARDS, DIGESTS = "shards", "$digests"

OF_SHARD, AS_DTENSOR, AS_PLAIN = "|shard", "|dtensor", "|plain"
"""What may follow a recorded key of state, if it is not as `is_dtensor_by_default` says."""

_DIMS = "|dims="
"""What follows a recorded key with its notes, if the dims lie in another order than by default."""


SAME = "|same="
"""What follows a recorded key with all that, if it is one tensor with another: where the first of them is."""


@dataclass(frozen=True)
class Owner:
    """The parameter that optimizer state belongs to."""

    tensor: torch.Tensor
    """The parameter; under FSDP1 the DTensor of it in the model's state dict. May be on the meta device."""
    on_device: bool = False
    """Whether `step` lies on the parameter's device; otherwise on the host."""
    is_torchs: bool = False
    """Whether its optimizer is one of torch's, whose state of a sharded parameter is DTensors, but for numbers."""

    @property
    def is_sharded(self) -> bool:
        tensor = self.tensor
        return isinstance(tensor, DTensor) and any(
            not placement.is_replicate() and tensor.device_mesh.size(axis) > 1
            for axis, placement in enumerate(tensor.placements)
        )

    @property
    def is_elsewhere(self) -> bool:
        """Whether all elements are other ranks'."""
        return isinstance(self.tensor, DTensor) and not local_tensor(self.tensor).numel() and self.tensor.numel() > 0

    @property
    def box(self) -> str:
        """The part of the parameter that this rank holds, such as `0:4,0:8`."""
        if not isinstance(self.tensor, DTensor):
            return ""
        boxes = [part.box for part in local_boxes(self.tensor)]
        return (
            ";".join(
                ",".join(f"{start}:{start + size}" for start, size in zip(box.offsets, box.sizes, strict=True))
                for box in boxes
            )
            or "none"
        )

    def is_dtensor_by_default(self, key: str, shape: tuple[int, ...]) -> bool:
        """Whether state of this shape is a DTensor where the parameter is one, unless a record says otherwise."""
        if key == "step" or shape == tuple(self.tensor.shape):
            return key != "step"
        return bool(shape) and (self.is_torchs or shape.count(1) < len(shape))

    def is_of_shard(self, key: str, leaf: Any) -> bool:
        """Whether a leaf of its state is this rank's own. A number in a tensor is one for all in torch's optimizers."""
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, DTensor) or not self.is_sharded:
            return False
        return leaf.dim() > 0 or not (self.is_torchs or key == "step")

    def note(self, key: str, leaf: Any) -> str:
        """A key as it is recorded."""
        order = None if self.is_of_shard(key, leaf) else special_order(leaf, self.tensor)
        dims = "" if order is None else _DIMS + ",".join(map(str, order))
        return self._note(key, leaf) + dims

    def _note(self, key: str, leaf: Any) -> str:
        if not isinstance(leaf, torch.Tensor) or not isinstance(self.tensor, DTensor):
            return key
        is_dtensor = isinstance(leaf, DTensor)
        if self.is_of_shard(key, leaf):
            return key + OF_SHARD
        is_clear = self.is_torchs or self.tensor.numel() != 1
        if is_clear and is_dtensor == self.is_dtensor_by_default(key, tuple(leaf.shape)):
            return key
        return key + (AS_DTENSOR if is_dtensor else AS_PLAIN)


@dataclass(frozen=True)
class Note:
    """What is recorded of a key of state."""

    kind: str = ""
    """One of `OF_SHARD`, `AS_DTENSOR`, `AS_PLAIN`; empty for the default."""
    order: Order | None = None
    """How its dims lie in memory; None for the default."""
    same: str = ""
    """Parameter and key of the tensor that it is; empty if it is its own."""


class Places:
    """Which tensors of an optimizer's state are one, as nothing else would tell after a load: it steps in place.

    They are told by identity, so all have to be kept meanwhile.
    """

    def __init__(self) -> None:
        self._first: dict[int, tuple[str, str]] = {}

    def note(self, parameter: str, key: str, leaf: Any) -> str:
        """What is recorded of a leaf that is the same tensor as one before; empty for any other."""
        if not isinstance(leaf, torch.Tensor):
            return ""
        place = parameter, key
        first = self._first.setdefault(id(leaf), place)
        return "" if first is place else SAME + place_name(*first)


def place_name(parameter: str, key: str) -> str:
    """What a note calls the tensor that several are."""
    return f"{parameter}.{key}"


def split_note(recorded: str) -> tuple[str, Note]:
    """A recorded key, and what follows it."""
    recorded, _, same = recorded.partition(SAME)
    recorded, found, dims = recorded.partition(_DIMS)
    order = tuple(int(dim) for dim in dims.split(",") if dim.isdecimal()) if found else None
    for kind in (OF_SHARD, AS_DTENSOR, AS_PLAIN):
        if recorded.endswith(kind):
            return recorded.removesuffix(kind), Note(kind, order, same)
    return recorded, Note(order=order, same=same)


def pack_shard(parameter: str, owner: Owner, leaves: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Name in the optimizer's section -> tensor of this rank's shard, with their digests."""
    if not leaves:
        return {}
    below = f"{SHARDS}.{parameter}.{owner.box}"
    digests = tuple((key, _digest(leaf, owner.tensor)) for key, leaf in sorted(leaves.items()))
    return {f"{below}.{key}": leaf for key, leaf in leaves.items()} | {f"{below}.{DIGESTS}": digests}


def _digest(leaf: torch.Tensor, parameter: torch.Tensor) -> str:
    """Empty for a tensor that is shaped by the shard, so that it fits no other one."""
    of_shard = leaf.dim() > 0 and leaf.numel() == local_tensor(parameter).numel() != parameter.numel()
    if is_made_of_others(leaf) or leaf.is_meta or of_shard:
        return ""
    found = fingerprint(leaf)
    return f"{found.dtype}{list(found.shape)}:{sum(found.parts.values()):016x}"


def fitting_box(owner: Owner, digests: Mapping[str, Any]) -> str | None:
    """The box whose state a rank takes; None if none fits.

    Args:
        digests: box -> digests that were saved with it.
    """
    own = owner.box if owner.is_sharded else ""
    if own in digests:
        return own
    first, *others = digests.values()
    alike = all(other == first for other in others) and all(digest for _, digest in first or (("", ""),))
    return next(iter(digests)) if alike else None
