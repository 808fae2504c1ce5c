"""Shards that DCP's planners misplace: they take every DTensor's shard for one box."""

from __future__ import annotations

from collections.abc import Mapping

from torch.distributed.tensor import DTensor

from ray_ckpt.errors import UsageError
from ray_ckpt.format.shards import local_boxes
from ray_ckpt.format.torch_internals import StridedShard, locate_shard


def refuse_scattered(planner: object) -> None:
    """Refuse what the planner would save from, or load into, the wrong rows.

    Raises:
        UsageError: a shard is not one box, or not the one that torch takes it for; names the tensor.
    """
    state = getattr(planner, "state_dict", None)
    for name, tensor in state.items() if isinstance(state, Mapping) else ():
        if not isinstance(tensor, DTensor) or not any(isinstance(p, StridedShard) for p in tensor.placements):
            continue
        sizes, offsets = locate_shard(tensor)
        boxes = [(part.box.sizes, part.box.offsets) for part in local_boxes(tensor)]
        if boxes and boxes != [(sizes, offsets)]:
            raise UsageError(
                f"{name!r} is placed by {tensor.placements}: this rank's part of it is {len(boxes)} boxes, which DCP's "
                "planner takes for one at other places. ray_ckpt.save and ray_ckpt.load know where they lie"
            )
