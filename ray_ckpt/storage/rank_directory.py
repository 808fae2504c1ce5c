"""Directories in which each rank wrote its own files: verl's, accelerate's `use_dcp=False`, torch_checkpointing's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from ray_ckpt.errors import CheckpointNotFoundError, FormatError
from ray_ckpt.format import limits, rank_names, torch_file
from ray_ckpt.format.rank_files import Part, join
from ray_ckpt.format.torch_pickle import Sharded
from ray_ckpt.storage import torch_files
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.foreign_names import Listing
from ray_ckpt.storage.foreign_parts import Found
from ray_ckpt.text import listed

__all__ = ["open_directory", "open_numbered"]

_THREADS = 8
"""Files that are opened at the same time: little is read of each."""


def open_directory(storage: Storage, listing: Listing, *, trusted: bool) -> Found:
    """
    Raises:
        FormatError: a rank's file is missing or damaged, or they contradict each other.
        UnsafeCheckpointError: one is not safe to read.
    """
    world_size = _world_size(storage, listing)
    found = rank_names.find(listing.files, world_size)
    if found is None or (rank_names.METADATA_NAME in listing.files and world_size is None):
        raise FormatError(f"{storage.address}/{rank_names.METADATA_NAME} is none of torch_checkpointing's")
    joined = join(_parts(storage, listing, found))
    return Found(found.kind, storage, joined.manifest, joined.notes)


def open_numbered(storage: Storage, listing: Listing, *, trusted: bool) -> Found:
    """What torch_checkpointing writes when it is told to write no `metadata.pkl`.

    Raises:
        CheckpointNotFoundError: none of the files holds sharded tensors: the numbers may be those of epochs.
        FormatError, UnsafeCheckpointError: as `open_directory`.
    """
    found = rank_names.find(listing.files)
    parts = _parts(storage, listing, found) if found else []
    if not found or not any(isinstance(tensor, Sharded) for part in parts for tensor in part.content.tensors.values()):
        raise CheckpointNotFoundError(
            f"no checkpoint in {storage.address}: it holds numbered files of whole tensors; to load one of them, name "
            f"the file: {listed(sorted(part.file.name for part in parts), at_most=3)}"
        )
    joined = join(parts)
    return Found(found.kind, storage, joined.manifest, joined.notes)


def _parts(storage: Storage, listing: Listing, found: rank_names.RankFiles) -> list[Part]:
    def open_part(file: rank_names.RankFile) -> Part:
        num_bytes = listing.files[file.name]
        content, places = torch_files.read_file(storage, file.name, num_bytes, file.item)
        return Part(file, content, torch_file.describe(content, places, file.name, num_bytes))

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="ray_ckpt-open") as pool:
        return list(pool.map(open_part, found.files))


def _world_size(storage: Storage, listing: Listing) -> int | None:
    name = rank_names.METADATA_NAME
    if name not in listing.files:
        return None
    limits.RECORD_BYTES.check(listing.files[name], name)
    return rank_names.read_world_size(storage.read_bytes(name))
