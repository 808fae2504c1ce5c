"""Stock DCP's `.metadata` <-> Manifest.

    .metadata bytes ── loads ──> Metadata ── to_manifest ──> Manifest          somebody else's checkpoint
    Manifest ── to_metadata ──> Metadata for a load planner                    any checkpoint
    Manifest ── dumps ──> .metadata bytes that stock DCP reads      our checkpoint

`.metadata` is a pickle, and a pickle runs what it names. `loads` lets none run (`dcp_pickle.py`), and `to_manifest`
trusts none of the values in it.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION

from ray_ckpt.errors import FormatError, RayCkptError
from ray_ckpt.format import limits
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.dcp_pickle import METADATA_NAME, read_metadata, unknown_class
from ray_ckpt.format.manifest import Chunk, Manifest, ObjectEntry, Path, TensorEntry
from ray_ckpt.format.stand_ins import Instance, Name
from ray_ckpt.format.torch_container import dtype_name, parse_dtype
from ray_ckpt.format.torch_internals import StorageInfo
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.text import quoted

__all__ = [
    "METADATA_NAME",
    "dumps",
    "dumps_as_stock",
    "is_ours",
    "loads",
    "names_in_order",
    "to_manifest",
    "to_metadata",
]

_SIGNATURE = "ray_ckpt"
"""Stands in `StorageMeta.modules` of the `.metadata` files that we write."""


def loads(data: bytes, *, trusted: bool = False) -> dcp.Metadata:
    """Unpickle a `.metadata` file.

    Args:
        trusted: Unpickle whatever it holds, running whatever code it names.

    Raises:
        UnsafeCheckpointError: it calls an unknown function, or has an unknown class where a description belongs.
        FormatError: it is truncated, damaged, something else, or exceeds a limit.
    """
    limits.RECORD_BYTES.check(len(data), METADATA_NAME)
    try:
        with collector_paused():
            metadata = pickle.loads(data) if trusted else read_metadata(data)
    except RayCkptError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise FormatError(f"{METADATA_NAME} cannot be read: {type(error).__name__}: {str(error)[:200]}") from error
    if not isinstance(metadata, dcp.Metadata):
        raise FormatError(f"{METADATA_NAME} holds a {type(metadata).__name__}, not DCP's Metadata")
    return metadata


def dumps(manifest: Manifest) -> bytes:
    """The `.metadata` that lets stock DCP read what the manifest describes."""
    with collector_paused():
        return pickle.dumps(_to_stock(manifest))


def dumps_as_stock(manifest: Manifest) -> bytes:
    """As `dumps`, for a directory that is stock DCP's alone: nobody looks for a manifest beside it."""
    with collector_paused():
        metadata = _to_stock(manifest)
        metadata.storage_meta = dcp.StorageMeta()
        return pickle.dumps(metadata)


def _to_stock(manifest: Manifest) -> dcp.Metadata:
    infos = {index: StorageInfo(part.file, part.start, part.length) for index, part in _index_parts(manifest)}
    return dcp.Metadata(
        _describe_entries(manifest),
        planner_data=_paths(manifest),
        storage_data=infos,
        storage_meta=dcp.StorageMeta(save_id=manifest.attempt, modules=[_SIGNATURE]),
        version=CURRENT_DCP_VERSION,
    )


def is_ours(metadata: dcp.Metadata) -> bool:
    """Whether ray_ckpt wrote this `.metadata`: then there is a manifest, or the save was never committed."""
    storage_meta = getattr(metadata, "storage_meta", None)
    return _SIGNATURE in (getattr(storage_meta, "modules", None) or ())


def to_manifest(metadata: dcp.Metadata) -> Manifest:
    """Describe a foreign checkpoint. Nothing in `metadata` is believed that `Manifest.check` has not checked.

    Raises:
        FormatError: the metadata does not hold together.
        UnsafeCheckpointError: a file name leaves the checkpoint's directory.
    """
    try:
        with collector_paused():
            manifest = _to_manifest(metadata)
            manifest.check()
    except RayCkptError:
        raise
    except Exception as error:  # nobody has checked the types of what it holds
        raise FormatError(
            f"{METADATA_NAME} does not hold together: {type(error).__name__}: {str(error)[:200]}"
        ) from error
    return manifest


def _to_manifest(metadata: dcp.Metadata) -> Manifest:
    storage: Mapping[dcp.MetadataIndex, StorageInfo] = metadata.storage_data
    paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
    tensors: dict[str, TensorEntry] = {}
    objects: dict[str, ObjectEntry] = {}
    files: dict[str, int] = {}
    for name in names_in_order(metadata):
        entry = metadata.state_dict_metadata[name]
        path = _checked_path(paths.get(name))
        if isinstance(entry, dcp.TensorStorageMetadata):
            chunks = tuple(_to_chunk(name, chunk, storage) for chunk in entry.chunks)
            tensors[name] = TensorEntry(dtype_name(entry.properties.dtype), _sizes(entry.size), chunks, path)
        else:
            info = _find(storage, dcp.MetadataIndex(name))
            start, length = _sizes((info.offset, info.length))
            objects[name] = ObjectEntry(info.relative_path, start, length, transforms=_transforms(info), path=path)
    parts: list[Chunk | ObjectEntry] = [chunk for tensor in tensors.values() for chunk in tensor.chunks]
    for part in (*parts, *objects.values()):
        files[part.file] = max(files.get(part.file, 0), part.start + part.length)
    return Manifest(tensors, objects, files)


def names_in_order(metadata: dcp.Metadata) -> list[str]:
    """As in the state dict, where that is known. DCP lists replicas by the rank that wrote them, which may be any."""
    entries = metadata.state_dict_metadata
    paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
    return list(dict.fromkeys([*(name for name in paths if name in entries), *entries]))


def _to_chunk(name: str, chunk: dcp.ChunkStorageMetadata, storage: Mapping[dcp.MetadataIndex, StorageInfo]) -> Chunk:
    info = _find(storage, dcp.MetadataIndex(name, chunk.offsets))
    start, length = _sizes((info.offset, info.length))
    box = Box(_sizes(chunk.offsets), _sizes(chunk.sizes))
    return Chunk(box, info.relative_path, start, length, data_start=None, transforms=_transforms(info))


def _find(storage: Mapping[dcp.MetadataIndex, StorageInfo], index: dcp.MetadataIndex) -> StorageInfo:
    info = storage.get(index)
    if info is None:
        raise FormatError(
            f"{METADATA_NAME} says nothing of where {quoted(index.fqn)} at {quoted(index.offset)} lies: it is "
            "incomplete; stock DCP's threaded writer loses items like this when a thread fails"
        )
    if isinstance(info, Instance):
        raise unknown_class(info)
    if not isinstance(info, StorageInfo) or type(info.relative_path) is not str:
        raise FormatError(f"{METADATA_NAME} locates {quoted(index.fqn)} by {quoted(info)}")
    return info


def _transforms(info: StorageInfo) -> tuple[str, ...]:
    found = getattr(info, "transform_descriptors", None) or ()
    limits.NESTING.check(len(found), f"the place of a container in {METADATA_NAME}")
    if any(type(item) is not str for item in found):
        raise FormatError(f"{METADATA_NAME} has {quoted(found)} where names of stream extensions belong")
    return tuple(found)


def _sizes(numbers: Any) -> tuple[int, ...]:
    """The numbers, when each is a size or an offset."""
    sizes = tuple(numbers)
    if any(type(size) is not int or not 0 <= size < 1 << 63 for size in sizes):
        raise FormatError(f"{METADATA_NAME} has {quoted(sizes)} where sizes belong")
    return sizes


def _checked_path(path: Any) -> Path | None:
    if path is None:
        return None
    if isinstance(path, (Instance, Name)):
        raise unknown_class(path)
    parts = tuple(path)
    limits.NESTING.check(len(parts), f"a path in {METADATA_NAME}")
    if any(type(part) not in (str, int) for part in parts):
        raise FormatError(f"{METADATA_NAME} has {quoted(parts)} where a path in a state dict belongs")
    return parts


def to_metadata(manifest: Manifest) -> dcp.Metadata:
    """What a load planner needs to know. `storage_data` maps each index to the manifest's own entry.

    Raises:
        FormatError: this torch lacks a dtype of the checkpoint.
    """
    return dcp.Metadata(
        _describe_entries(manifest),
        planner_data=_paths(manifest),
        storage_data=dict(_index_parts(manifest)),
        storage_meta=dcp.StorageMeta(),
    )


def _describe_entries(manifest: Manifest) -> dict[str, dcp.TensorStorageMetadata | dcp.BytesStorageMetadata]:
    """Tensors that differ in nothing but their bytes share one description: pickle then writes it once."""
    shared: dict[object, dcp.TensorStorageMetadata] = {}
    entries: dict[str, dcp.TensorStorageMetadata | dcp.BytesStorageMetadata] = {}
    for name, tensor in manifest.tensors.items():
        key = tensor.dtype, tensor.shape, *[(chunk.box.offsets, chunk.box.sizes) for chunk in tensor.chunks]
        if key not in shared:
            shared[key] = _describe(tensor)
        entries[name] = shared[key]
    entries |= dict.fromkeys(manifest.objects, dcp.BytesStorageMetadata())
    return entries


def _describe(tensor: TensorEntry) -> dcp.TensorStorageMetadata:
    chunks = [
        dcp.ChunkStorageMetadata(torch.Size(chunk.box.offsets), torch.Size(chunk.box.sizes)) for chunk in tensor.chunks
    ]
    properties = dcp.TensorProperties(dtype=parse_dtype(tensor.dtype))
    return dcp.TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)


def _index_parts(manifest: Manifest) -> Iterator[tuple[dcp.MetadataIndex, Chunk | ObjectEntry]]:
    for name, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            yield dcp.MetadataIndex(name, chunk.box.offsets), chunk
    for name, entry in manifest.objects.items():
        yield dcp.MetadataIndex(name), entry


def _paths(manifest: Manifest) -> dict[str, Path] | None:
    paths = {name: tensor.path for name, tensor in manifest.tensors.items() if tensor.path}
    paths |= {name: entry.path for name, entry in manifest.objects.items() if entry.path}
    return paths or None


def difference(metadata: dcp.Metadata, manifest: Manifest) -> str:
    """What a `.metadata` says otherwise than the one that this torch would write for the manifest; empty for nothing.

    Raises:
        FormatError: this torch lacks a dtype of the checkpoint.
    """
    wanted = _to_stock(manifest)
    return (
        _first_difference("entry", metadata.state_dict_metadata, wanted.state_dict_metadata)
        or _first_difference("place", metadata.storage_data or {}, wanted.storage_data or {})
        or _first_difference("path", metadata.planner_data or {}, wanted.planner_data or {})
        or ("" if metadata.storage_meta == wanted.storage_meta else "its StorageMeta is another one")
    )


def _first_difference(what: str, found: Mapping[Any, Any], wanted: Mapping[Any, Any]) -> str:
    for key in (*wanted, *(key for key in found if key not in wanted)):
        if key not in found:
            return f"it has no {what} of {str(key)[:200]}"
        if key not in wanted:
            return f"it has a {what} of {str(key)[:200]}, of which the manifest knows nothing"
        if type(found[key]) is not type(wanted[key]) or found[key] != wanted[key]:
            return f"its {what} of {str(key)[:200]} is another one"
    return ""
