"""A `.metadata` pickle -> DCP's own `Metadata`, made of stand-ins by code of ours: nothing that the pickle names runs.

    bytes ── Unpickler ──> stand-ins ── read_metadata ──> Metadata, whose numbers and names nobody has checked yet

What no reader needs (a planner's data of its own, enumerations, the path that the checkpoint was saved to) stays a
stand-in. A class in a place that matters is refused by its name.

Source of the format: PyTorch's `torch/distributed/checkpoint/metadata.py` and `filesystem.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp

from ray_ckpt.errors import FormatError, UnsafeCheckpointError
from ray_ckpt.format import limits
from ray_ckpt.format.pickle_reader import Unpickler
from ray_ckpt.format.stand_ins import Instance, Name
from ray_ckpt.format.torch_internals import StorageInfo
from ray_ckpt.format.torch_pickle import constant, make_size
from ray_ckpt.text import quoted

__all__ = ["METADATA_NAME", "TRUST_ADVICE", "read_metadata", "unknown_class"]

METADATA_NAME = ".metadata"
"""Where stock DCP keeps its record of a checkpoint."""

_MAX_WITHOUT_PLACE = 50_000
"""Chunks that may lack a place: as many as are quickly looked at, until one of them is named."""

_MAX_SAME_HASH = 16
"""Chunks that may share their hash with others. No two of a million do by chance."""

TRUST_ADVICE = "if you trust its author, say trusted=True, which all take that load, look, check or copy"
"""Ends the message of a refusal that an option lifts."""


def read_metadata(data: bytes) -> dcp.Metadata:
    """Read a `.metadata` file.

    Raises:
        UnsafeCheckpointError: it calls an unknown function, or has an unknown class where a description belongs.
        FormatError: it is damaged, something else, or exceeds a limit.
    """
    makers = {"torch.Size": make_size}
    root = Unpickler(data, METADATA_NAME, constant=constant, makers=makers, trust_advice=TRUST_ADVICE).load()
    if not isinstance(root, Instance) or root.name != _name_of(dcp.Metadata):
        raise FormatError(f"{METADATA_NAME} holds {quoted(root)}, not DCP's Metadata")
    fields = _fields(root)
    entries, storage = fields["state_dict_metadata"], fields.get("storage_data")
    places = _storage_data(storage) if isinstance(storage, Mapping) else {}
    _check_sharing(entries, len(places))
    planner_data, version = fields.get("planner_data"), fields.get("version")
    return dcp.Metadata(
        {_text(name): _entry(entry) for name, entry in entries.items()},
        planner_data=planner_data if isinstance(planner_data, Mapping) else None,
        storage_data=places,
        storage_meta=_storage_meta(fields.get("storage_meta")),
        version=version if type(version) is str else None,
    )


def _check_sharing(entries: Mapping[Any, Any], num_places: int) -> None:
    """A pickle may have one list of chunks as that of any number of tensors, but every chunk has a place of its own."""
    states = (entry.state for entry in entries.values() if isinstance(entry, Instance) and type(entry.state) is dict)
    num_chunks = sum(len(state.get("chunks") or ()) for state in states)
    if num_chunks > 2 * num_places + _MAX_WITHOUT_PLACE:
        raise FormatError(f"{METADATA_NAME} has {num_chunks} chunks and tells where {num_places} of them lie")


def unknown_class(value: Instance | Name) -> UnsafeCheckpointError:
    """The refusal of a stand-in in a place that matters."""
    name = value.text if isinstance(value, Name) else value.name
    return UnsafeCheckpointError(
        f"{METADATA_NAME} asks for {name[:200]}, which is no part of DCP's metadata and could run code; {TRUST_ADVICE}"
    )


def _name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__name__}"


_TENSOR, _BYTES, _CHUNK, _INFO, _INDEX, _PROPERTIES, _STORAGE_META = map(
    _name_of,
    (
        *(dcp.TensorStorageMetadata, dcp.BytesStorageMetadata, dcp.ChunkStorageMetadata, StorageInfo),
        *(dcp.MetadataIndex, dcp.TensorProperties, dcp.StorageMeta),
    ),
)


def _fields(value: Any, wanted: str = "") -> dict[str, Any]:
    """The attributes of an instance of that class."""
    if not isinstance(value, Instance):
        raise FormatError(f"{METADATA_NAME} has {quoted(value)} where {wanted.rpartition('.')[2]} belongs")
    if wanted and value.name != wanted:
        raise unknown_class(value)
    state = value.state
    if type(state) is not dict:
        raise FormatError(f"{METADATA_NAME} has {quoted(value)} with the state {quoted(state)}")
    return state


def _entry(value: Any) -> dcp.TensorStorageMetadata | dcp.BytesStorageMetadata:
    if isinstance(value, Instance) and value.name == _BYTES:
        return dcp.BytesStorageMetadata()
    fields = _fields(value, _TENSOR)
    chunks = [_chunk(chunk) for chunk in fields["chunks"]]
    return dcp.TensorStorageMetadata(_properties(fields["properties"]), _sized(fields["size"]), chunks)


def _chunk(value: Any) -> dcp.ChunkStorageMetadata:
    fields = _fields(value, _CHUNK)
    return dcp.ChunkStorageMetadata(_sized(fields["offsets"]), _sized(fields["sizes"]))


def _sized(numbers: Any) -> Any:
    """Sizes or offsets, one for each dim, which may be shared by any number of tensors."""
    if not isinstance(numbers, (tuple, list)) or len(numbers) > limits.MAX_DIMS:
        raise FormatError(f"{METADATA_NAME} has {quoted(numbers)} where the sizes of a tensor's dims belong")
    return numbers


def _properties(value: Any) -> dcp.TensorProperties:
    """Of these only the dtype counts."""
    if not isinstance(value, Instance) or value.name != _PROPERTIES:
        raise unknown_class(value) if isinstance(value, Instance) else FormatError(f"{quoted(value)} has no dtype")
    state = value.state
    dtype = state[0] if type(state) is tuple else state["dtype"]
    if not isinstance(dtype, torch.dtype):
        raise FormatError(f"{METADATA_NAME} has {quoted(dtype)} where a dtype of torch {torch.__version__} belongs")
    return dcp.TensorProperties(dtype=dtype)


def _storage_data(storage: Mapping[Any, Any]) -> dict[dcp.MetadataIndex, Any]:
    """Where everything lies. What is no part of DCP's is left as it is, for `to_manifest` to refuse where it is
    wanted."""
    indexes = [_index(key) for key in storage]
    if (num_same := len(indexes) - len(set(map(hash, indexes)))) > _MAX_SAME_HASH:
        raise FormatError(f"{METADATA_NAME} has {len(indexes)} chunks, {num_same} of which have the hash of another")
    return {index: _info(value) for index, value in zip(indexes, storage.values(), strict=True)}


def _index(value: Any) -> dcp.MetadataIndex:
    fields = _fields(value, _INDEX)
    offset = fields.get("offset")
    if offset is not None and (not isinstance(offset, tuple) or len(offset) > limits.MAX_DIMS):
        raise FormatError(f"{METADATA_NAME} has a chunk at {quoted(offset)}, which is no place in a tensor")
    return dcp.MetadataIndex(_text(fields["fqn"]), offset)


def _info(value: Any) -> Any:
    if not isinstance(value, Instance) or value.name != _INFO:
        return value
    fields = _fields(value)
    return StorageInfo(fields["relative_path"], fields["offset"], fields["length"], fields.get("transform_descriptors"))


def _storage_meta(value: Any) -> dcp.StorageMeta | None:
    if not isinstance(value, Instance) or value.name != _STORAGE_META or type(value.state) is not dict:
        return None
    save_id, modules = value.state.get("save_id"), value.state.get("modules")
    return dcp.StorageMeta(
        save_id=save_id if type(save_id) is str else None,
        modules=[module for module in modules if type(module) is str] if type(modules) is list else [],
    )


def _text(value: Any) -> str:
    if isinstance(value, (Instance, Name)):
        raise unknown_class(value)
    if type(value) is not str:
        raise FormatError(f"{METADATA_NAME} has {quoted(value)} where a name belongs")
    return value
