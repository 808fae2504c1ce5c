"""Non-tensors between DCP's planners and storage.

    saving    planner ── read_object ──> SavedObject
    loading   manifest entry ── read_objects ──> value ──> planner

A planner that insists on bytes gets those of a fresh `torch.save` of the value, because stock DCP's unpickles them
without the guard of `weights_only=True`.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem, SavePlanner, WriteItem

from ray_ckpt.errors import UsageError
from ray_ckpt.format.manifest import ObjectEntry
from ray_ckpt.format.torch_internals import set_element
from ray_ckpt.storage.checkpoint_reader import CheckpointReader
from ray_ckpt.storage.objects import SavedObject, saved_object, torch_save


def read_object(planner: SavePlanner, item: WriteItem) -> SavedObject:
    """A non-tensor as bytes, and as a plain value where it is one."""
    if _gives_values(planner):
        return saved_object(planner.lookup_object(item.index))  # type: ignore[attr-defined]
    data = planner.resolve_data(item)
    if not isinstance(data, io.BytesIO):
        raise UsageError(f"the save planner resolves {item.index.fqn!r} to {type(data).__name__}, not to BytesIO")
    return SavedObject(data.getvalue(), None)


def _gives_values(planner: SavePlanner) -> bool:
    """Whether `resolve_data` is `torch.save` of what `lookup_object` finds, as in stock DCP's planner."""
    return (
        isinstance(planner, DefaultSavePlanner)
        and type(planner).resolve_data is DefaultSavePlanner.resolve_data
        and type(planner).transform_object is DefaultSavePlanner.transform_object
    )


def read_objects(reader: CheckpointReader, items: Sequence[tuple[ReadItem, ObjectEntry]], planner: LoadPlanner) -> None:
    """Hand the planner its non-tensors. Those that the manifest holds itself cost no read."""
    entries = {item.storage_index.fqn: entry for item, entry in items}
    containers = reader.read_containers(entries)
    for item, entry in items:
        name = item.storage_index.fqn
        if entry.inline is not None:
            _hand_over(planner, item, copy.deepcopy(entry.inline.value))
        elif reader.trusted:
            planner.load_bytes(item, io.BytesIO(containers[name]))
        else:
            _hand_over(planner, item, reader.decoder.load(containers[name], name))


def _hand_over(planner: LoadPlanner, item: ReadItem, value: object) -> None:
    """Put a value where the planner wants it; stock DCP's planner is spared a `torch.save` and `torch.load` of it."""
    if isinstance(planner, DefaultLoadPlanner) and type(planner).load_bytes is DefaultLoadPlanner.load_bytes:
        name = item.dest_index.fqn
        if planner.flatten_state_dict:
            set_element(planner.original_state_dict, planner.mappings[name], value)
        else:
            planner.state_dict[name] = value
    else:
        planner.load_bytes(item, io.BytesIO(torch_save(value)))
