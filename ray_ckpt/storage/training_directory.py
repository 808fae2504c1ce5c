"""Directories of a whole training run: accelerate's `save_state` and transformers' `Trainer`.

model       `model.safetensors` or its shards and index, `pytorch_model.bin` likewise, `pytorch_model_fsdp.bin`;
            `pytorch_model_fsdp_0/`, DCP inside
optimizer   `optimizer.pt`, `optimizer.bin`: the optimizer's own state dict; `optimizer_0/`, DCP inside
"""

from __future__ import annotations

from ray_ckpt.errors import FormatError
from ray_ckpt.format import safetensors
from ray_ckpt.format.dcp_metadata import METADATA_NAME
from ray_ckpt.format.manifest import Manifest
from ray_ckpt.storage import safetensors_files, stock_dcp, torch_files
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.foreign_names import ACCELERATE_MODEL, ACCELERATE_OPTIMIZER, Listing
from ray_ckpt.storage.foreign_parts import Found, below, join, prefixed

__all__ = ["open_directory", "open_fsdp"]


def open_fsdp(storage: Storage, listing: Listing, *, trusted: bool) -> Found:
    """accelerate's directory with DCP inside.

    Raises:
        FormatError: it is damaged, or holds several models.
    """
    more = [name for name in listing.directories if name.startswith(("pytorch_model_fsdp_", "optimizer_"))]
    if other := sorted(set(more) - {ACCELERATE_MODEL, ACCELERATE_OPTIMIZER}):
        raise FormatError(
            f"{storage.address} is accelerate's directory of several models or optimizers: name one of its "
            f"directories, such as {ACCELERATE_MODEL} or {other[0]}"
        )
    parts = []
    for name in (ACCELERATE_MODEL, ACCELERATE_OPTIMIZER):
        if name in listing.directories:
            inside = storage.child(name)
            if not inside.exists(METADATA_NAME):
                raise FormatError(
                    f"{inside.address} looks like accelerate's, but holds no {METADATA_NAME}: its save was interrupted"
                )
            with storage.open_input(f"{name}/{METADATA_NAME}"):
                pass  # the directory may be a link that leaves this one
            parts.append(below(name, stock_dcp.open_directory(inside, trusted=trusted).manifest))
    return Found("accelerate's FSDP directory", storage, join(parts, storage))


def open_directory(storage: Storage, listing: Listing, *, trusted: bool) -> Found:
    """A directory by transformers' `Trainer`, or by accelerate's `save_state` without sharding.

    Raises:
        FormatError, UnsafeCheckpointError: a part is damaged, or not safe to read.
    """
    parts = [prefixed("model", _model(storage, listing))]
    for name in ("optimizer.pt", "optimizer.bin"):
        if name in listing.files:
            parts.append(prefixed("optim", torch_files.open_file(storage, name, listing.files[name])))
    return Found("a training directory", storage, join(parts, storage))


def _model(storage: Storage, listing: Listing) -> Manifest:
    if f"model{safetensors.INDEX_SUFFIX}" in listing.files:
        return safetensors_files.open_indexed(storage, f"model{safetensors.INDEX_SUFFIX}")
    if files := [name for name in listing.ending(safetensors.SUFFIX) if name.startswith("model")]:
        return safetensors_files.open_files(storage, files)
    files = [name for name in listing.ending(".bin") if name.startswith("pytorch_model")]
    return join((torch_files.open_file(storage, name, listing.files[name]) for name in files), storage)
