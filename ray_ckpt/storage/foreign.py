"""What lies at a target that is no checkpoint of ours: recognized, and described by a Manifest.

    recognize(storage) ─┬─ a directory  `.metadata`                   stock_dcp.py
                        │               what KINDS know by its names  the opener of that kind
                        └─ a file       a zip archive                 torch_files.py
                                        a safetensors file or index   safetensors_files.py

Headers are read here and nothing else: the reader then fetches the bytes that are wanted, as of any checkpoint. Nothing
runs from any of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from ray_ckpt.errors import CheckpointNotFoundError, FormatError, RayCkptError
from ray_ckpt.format import safetensors, zip_directory
from ray_ckpt.format.dcp_metadata import METADATA_NAME
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.storage import (
    deepspeed_directory,
    rank_directory,
    safetensors_files,
    stock_dcp,
    torch_files,
    training_directory,
    unread,
)
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.foreign_names import KINDS, Listing, kind_of, list_target, unread_models
from ray_ckpt.storage.foreign_parts import Found, read_range
from ray_ckpt.text import listed

__all__ = ["Found", "recognize"]


class Opener(Protocol):
    """Opens a directory of one kind: raises FormatError or UnsafeCheckpointError."""

    def __call__(self, storage: Storage, listing: Listing, *, trusted: bool) -> Found: ...


_OPENERS: dict[str, Opener] = {
    "files of ranks": rank_directory.open_directory,
    "accelerate's FSDP directory": training_directory.open_fsdp,
    "a training directory": training_directory.open_directory,
    "DeepSpeed's directory": deepspeed_directory.open_directory,
    "safetensors": safetensors_files.open_directory,
    "numbered files": rank_directory.open_numbered,
}

if missing := {kind.name for kind in KINDS} ^ _OPENERS.keys():
    raise AssertionError(f"kinds without an opener, or openers without a kind: {missing}")


def recognize(storage: Storage, *, trusted: bool = False) -> Found:
    """Recognize what lies at the target.

    Args:
        trusted: unpickle a `.metadata` without a guard. Torch files are read with one all the same.

    Raises:
        CheckpointNotFoundError: nothing that this reader knows.
        FormatError, UnsafeCheckpointError: something that it knows, but damaged or not safe to read.
    """
    try:
        return _recognize(storage, trusted=trusted)
    except RayCkptError:
        raise
    except Exception as error:  # whatever the bytes make of it
        raise FormatError(f"{storage.address} cannot be read: {type(error).__name__}: {str(error)[:200]}") from error


def _recognize(storage: Storage, *, trusted: bool) -> Found:
    if storage.exists(METADATA_NAME):
        return _with_unread(stock_dcp.open_directory(storage, trusted=trusted), list_target(storage))
    parent = storage.parent()
    if parent is not None:
        directory, name = parent
        num_bytes = directory.size(name)
        if num_bytes is not None:
            return _file(directory, name, num_bytes)
    listing = list_target(storage)
    if kind := kind_of(listing):
        return _with_unread(_OPENERS[kind.name](storage, listing, trusted=trusted), listing)
    raise _not_found(storage, listing)


def _with_unread(found: Found, listing: Listing) -> Found:
    """With a note on other models there: one is chosen, and it has to be told."""
    if not (names := unread_models(listing, found.manifest.files)):
        return found
    note = f"{listed(names, at_most=4)} left out, as {found.kind} is read there: to load one of them, name it"
    return replace(found, notes=(*found.notes, note))


def _not_found(storage: Storage, listing: Listing) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(
        f"no checkpoint in {storage.address}: it holds neither {MANIFEST_NAME} nor {METADATA_NAME}, nor other files "
        f"that are known, and is no file; {unread.in_directory(listing)}"
    )


def _file(directory: Storage, name: str, num_bytes: int) -> Found:
    """What the first bytes of a file, or its name, tell."""
    if name.endswith(safetensors.INDEX_SUFFIX):
        return Found("a sharded safetensors checkpoint", directory, safetensors_files.open_indexed(directory, name))
    with directory.open_input(name) as file:
        beginning = read_range(file, 0, min(num_bytes, unread.FILE_START_BYTES))
    start = beginning[: len(torch_files.LEGACY_MAGIC)]
    if start.startswith(zip_directory.MAGIC):
        return Found("a file that torch.save wrote", directory, torch_files.open_file(directory, name, num_bytes))
    torch_files.refuse_legacy(name, start)
    if name.endswith(safetensors.SUFFIX) or start[safetensors.LENGTH_BYTES :].lstrip().startswith(b"{"):
        return Found("a safetensors file", directory, safetensors_files.open_files(directory, [name]))
    raise FormatError(
        f"{directory.address}/{name} is neither a checkpoint's directory, nor a file by torch.save or safetensors: "
        f"{unread.of_file(name, beginning)}"
    )
