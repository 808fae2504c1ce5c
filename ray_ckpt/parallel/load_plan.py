"""What a rank wants of a checkpoint: DCP's default load plan, made faster for many DTensors of few shapes."""

from __future__ import annotations

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_load_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from ray_ckpt.collector import collector_paused


class ShardLoadPlanner(DefaultLoadPlanner):
    """Plans what `DefaultLoadPlanner` plans, item for item.

    Where the shard of a DTensor lies follows from its shape, mesh and placements, and takes torch 0.15 ms to compute; a
    model has thousands of DTensors of a few dozen shapes, so each combination is computed once.
    """

    def create_local_plan(self) -> LoadPlan:
        with collector_paused():
            return self._create_local_plan()

    def _create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None, "DCP sets the planner up before it asks for a plan"
        places: dict[object, list[ChunkStorageMetadata]] = {}
        items: list[ReadItem] = []
        others = {}
        for name, value in self.state_dict.items():
            saved = self.metadata.state_dict_metadata.get(name)
            if not (
                isinstance(saved, TensorStorageMetadata) and isinstance(value, DTensor) and saved.size == value.shape
            ):
                # Including what does not fit, for which DCP has the right error.
                others[name] = value
                continue
            key = (value.shape, value.device_mesh, value.placements)
            if key not in places:
                is_member = value.device_mesh.get_coordinate() is not None
                places[key] = value.__create_chunk_list__() if is_member else []
            items += create_read_items_for_chunk_list(name, saved, places[key])
        items += create_default_local_load_plan(others, self.metadata, not self.allow_partial_load).items
        return LoadPlan(items)
