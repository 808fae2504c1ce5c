"""DCP's metadata and write results -> what `protocol.Coordinator` checks.

    metadata, results of all ranks ── global_plan ──> GlobalPlan     what was to be written, and who wrote it
               results of one rank ── rank_record ──> RankRecord     where it lies, and digests of what others wrote

Every result is an item of its rank's plan: its place in the list of results is its position.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.checkpoint.metadata import STORAGE_TYPES, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from ray_ckpt.format.dcp_metadata import names_in_order
from ray_ckpt.format.manifest import Chunk, ObjectEntry, Path, TensorColumns
from ray_ckpt.format.torch_container import dtype_name
from ray_ckpt.protocol.merging import GlobalPlan, Key, adopt
from ray_ckpt.protocol.messages import FileRecord, Item, RankRecord, TensorSpec


@dataclass(frozen=True)
class Written:
    """`WriteResult.storage_data` of an item that its rank wrote."""

    part: Chunk | ObjectEntry


@dataclass(frozen=True)
class Replica:
    """`WriteResult.storage_data` of an item that its rank holds too, but that another rank was to write."""

    spec: TensorSpec | None
    """Spec of the tensor; None for an object."""
    digest: bytes
    """Digest of its bytes, as in `RankRecord.replicas`."""


def global_plan(metadata: Metadata, results: Sequence[Sequence[WriteResult]]) -> GlobalPlan:
    """What was to be written, and which rank wrote it.

    Args:
        results: what `write_data` returned, by rank.

    Raises:
        CommitError: an item has no result or two, or nobody planned it; or a tensor is not covered exactly once.
    """
    paths: Mapping[str, Path] = metadata.planner_data or {}
    entries = metadata.state_dict_metadata
    names = {name: (paths.get(name), _whole(entries[name])) for name in names_in_order(metadata)}
    planned = {key for name, entry in entries.items() for key in _keys(name, entry)}
    items = [[_item(result, names) for result in of_rank] for of_rank in results]
    skipped = [
        [position for position, result in enumerate(of_rank) if isinstance(result.storage_data, Replica)]
        for of_rank in results
    ]
    return adopt(names, planned, items, skipped)


def rank_record(results: Sequence[WriteResult]) -> RankRecord:
    """What one rank wrote, and digests of what it would have written.

    Args:
        results: what its `write_data` returned.
    """
    chunks: dict[str, list[tuple[int, Chunk]]] = {}
    objects: dict[str, dict[int, ObjectEntry]] = {}
    replicas = []
    for position, result in enumerate(results):
        data = result.storage_data
        if isinstance(data, Replica):
            replicas.append(data.digest)
        elif isinstance(data.part, Chunk):
            chunks.setdefault(data.part.file, []).append((position, data.part))
        else:
            objects.setdefault(data.part.file, {})[position] = data.part
    files = dict.fromkeys([*chunks, *objects])
    return RankRecord(
        tuple(_file_record(file, chunks.get(file, ()), objects.get(file, {})) for file in files), b"".join(replicas)
    )


def files_of(results: Sequence[Sequence[WriteResult]]) -> set[str]:
    """Names of all files that ranks report to have written."""
    written = [result.storage_data for of_rank in results for result in of_rank]
    return {data.part.file for data in written if isinstance(data, Written)}


def _file_record(file: str, chunks: Sequence[tuple[int, Chunk]], objects: Mapping[int, ObjectEntry]) -> FileRecord:
    columns = TensorColumns(
        file,
        starts=array("q", [chunk.start for _, chunk in chunks]),
        lengths=array("q", [chunk.length for _, chunk in chunks]),
        data_starts=array("q", [chunk.data_start or 0 for _, chunk in chunks]),
        block_bytes=array("q", [chunk.checksums.block_bytes for _, chunk in chunks if chunk.checksums is not None]),
        sums=b"".join(chunk.checksums.sums for _, chunk in chunks if chunk.checksums is not None),
    )
    return FileRecord(columns, [position for position, _ in chunks], objects)


def _item(result: WriteResult, names: Mapping[str, tuple[Path | None, TensorSpec | None]]) -> Item:
    name, data = result.index.fqn, result.storage_data
    path, whole = names.get(name, (None, None))
    if isinstance(data, Replica):
        return Item(name, path, data.spec)
    box = data.part.box if isinstance(data.part, Chunk) else None
    if box is None or whole is None:
        # Nobody planned a tensor of this name: then its offsets alone say which part it is.
        spec = None if box is None else TensorSpec("", box.sizes, box.offsets, box.sizes)
    else:
        spec = whole._replace(offsets=box.offsets, sizes=box.sizes)
    return Item(name, path, spec)


def _whole(entry: STORAGE_TYPES) -> TensorSpec | None:
    if not isinstance(entry, TensorStorageMetadata):
        return None
    shape = tuple(entry.size)
    return TensorSpec(dtype_name(entry.properties.dtype), shape, (0,) * len(shape), shape)


def _keys(name: str, entry: STORAGE_TYPES) -> Iterator[Key]:
    if isinstance(entry, TensorStorageMetadata):
        yield from ((name, tuple(chunk.offsets)) for chunk in entry.chunks)
    else:
        yield name, None
