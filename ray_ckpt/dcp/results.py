"""What the coordinator checks before it commits: the plan against what the ranks say they wrote.

results of all ranks ── build_manifest ──> Manifest, or CommitError naming tensors and ranks
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from ray_ckpt.errors import CommitError
from ray_ckpt.format.boxes import check_cover
from ray_ckpt.format.dcp_metadata import names_in_order
from ray_ckpt.format.manifest import Chunk, Manifest, ObjectEntry, Path, TensorEntry
from ray_ckpt.format.torch_container import dtype_name
from ray_ckpt.text import listed


@dataclass(frozen=True)
class Written:
    """`WriteResult.storage_data` of an item that its rank wrote."""

    part: Chunk | ObjectEntry
    digest: str
    """Of dtype, shape and bytes: equal things have equal digests."""


@dataclass(frozen=True)
class Replica:
    """`WriteResult.storage_data` of an item that its rank holds too, but that another rank was to write."""

    digest: str


def build_manifest(
    metadata: Metadata,
    results: Sequence[Sequence[WriteResult]],
    *,
    attempt: str,
    layout: str | None,
    fingerprints: Mapping[str, str],
) -> Manifest:
    """The manifest of what was written, once it is what was planned.

    Args:
        results: What `write_data` returned, by rank.
        fingerprints: Digests of tensors, kept in the manifest for whoever loads it.

    Raises:
        CommitError: an item has no result or two, a tensor is not covered exactly once, or two ranks hold different
            things under one name.
    """
    written = _collect(results)
    _check_complete(metadata, written)
    _check_replicas(written, results)
    paths: Mapping[str, Path] = metadata.planner_data or {}
    tensors: dict[str, TensorEntry] = {}
    objects: dict[str, ObjectEntry] = {}
    files: dict[str, int] = {}
    for name in names_in_order(metadata):
        entry = metadata.state_dict_metadata[name]
        path = paths.get(name)
        parts = [written[index][1].part for index in _planned(name, entry)]
        for part in parts:
            files[part.file] = max(files.get(part.file, 0), part.start + part.length)
        if isinstance(entry, TensorStorageMetadata):
            chunks = tuple(part for part in parts if isinstance(part, Chunk))
            if problem := check_cover(entry.size, [chunk.box for chunk in chunks]):
                raise CommitError(f"refusing to commit: tensor {name!r} is not covered exactly once: {problem}")
            tensors[name] = TensorEntry(dtype_name(entry.properties.dtype), tuple(entry.size), chunks, path)
        else:
            for part in parts:
                if isinstance(part, ObjectEntry):
                    objects[name] = replace(part, path=path)
    if strangers := sorted(fingerprints.keys() - tensors.keys()):
        raise CommitError(f"refusing to commit: fingerprints of tensors that were not saved: {listed(strangers)}")
    return Manifest(tensors, objects, files, attempt, layout, {"torch": torch.__version__}, fingerprints)


def _planned(name: str, entry: STORAGE_TYPES) -> list[MetadataIndex]:
    if isinstance(entry, TensorStorageMetadata):
        return [MetadataIndex(name, chunk.offsets) for chunk in entry.chunks]
    return [MetadataIndex(name)]


def _collect(results: Sequence[Sequence[WriteResult]]) -> dict[MetadataIndex, tuple[int, Written]]:
    """Every written item and the rank that wrote it."""
    written: dict[MetadataIndex, tuple[int, Written]] = {}
    for rank, of_rank in enumerate(results):
        for result in of_rank:
            if not isinstance(result.storage_data, Written):
                continue
            if result.index in written:
                first = written[result.index][0]
                raise CommitError(f"refusing to commit: {_name(result.index)} was written by ranks {first} and {rank}")
            written[result.index] = (rank, result.storage_data)
    return written


def _check_complete(metadata: Metadata, written: Mapping[MetadataIndex, object]) -> None:
    planned = {index for name, entry in metadata.state_dict_metadata.items() for index in _planned(name, entry)}
    if missing := sorted(map(_name, planned - written.keys())):
        raise CommitError(f"refusing to commit: no rank reported to have written {listed(missing)}")
    if unplanned := sorted(map(_name, written.keys() - planned)):
        raise CommitError(f"refusing to commit: ranks wrote what nobody planned: {listed(unplanned)}")


def _check_replicas(
    written: Mapping[MetadataIndex, tuple[int, Written]], results: Sequence[Sequence[WriteResult]]
) -> None:
    """Replicas are saved once; here each of the others proves that nothing else was lost with it."""
    conflicts = []
    for rank, of_rank in enumerate(results):
        for result in of_rank:
            if isinstance(result.storage_data, Replica) and result.index in written:
                writer, saved = written[result.index]
                if saved.digest != result.storage_data.digest:
                    conflicts.append(f"{_name(result.index)} on ranks {writer} and {rank}")
    if conflicts:
        raise CommitError(
            "refusing to commit: ranks hold different things under one name, of which only one would survive: "
            f"{listed(conflicts)}; give them different names, or make the ranks agree"
        )


def _name(index: MetadataIndex) -> str:
    return (
        repr(index.fqn) if index.offset is None or not any(index.offset) else f"{index.fqn!r} at {tuple(index.offset)}"
    )
