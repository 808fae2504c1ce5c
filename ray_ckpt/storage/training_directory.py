"""Directories of a whole training run: accelerate's `save_state` and transformers' `Trainer`.

model       `model.safetensors` or its shards and index, `pytorch_model.bin` likewise, `pytorch_model_fsdp.bin`;
            `pytorch_model_fsdp_0/`, DCP inside; of adapters `adapter_model.safetensors` or `.bin`
optimizer   `optimizer.pt`, `optimizer.bin`: the optimizer's own state dict; `optimizer_0/`, DCP inside
"""

from __future__ import annotations

import re

from ray_ckpt.errors import FormatError, UnsafeCheckpointError
from ray_ckpt.format import limits, safetensors
from ray_ckpt.format.dcp_metadata import METADATA_NAME
from ray_ckpt.format.foreign_json import parse_object
from ray_ckpt.format.manifest import Inline, Manifest, ObjectEntry
from ray_ckpt.storage import safetensors_files, stock_dcp, torch_files
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.foreign_names import ACCELERATE_MODEL, ACCELERATE_OPTIMIZER, ADAPTERS, Listing
from ray_ckpt.storage.foreign_parts import Found, below, check_parts, join, prefixed

__all__ = ["open_directory", "open_fsdp"]

_OPTIMIZER = re.compile(r"optimizer\.(pt|bin)")
_FURTHER = re.compile(r"(model_[0-9]+\.safetensors|pytorch_model_[0-9]+\.bin|optimizer_[0-9]+\.(pt|bin))")
"""accelerate's names of a second model or optimizer."""

_SAFETENSORS = re.compile(r"model(-[0-9]+-of-[0-9]+)?\.safetensors")
_BINS = re.compile(r"pytorch_model(-[0-9]+-of-[0-9]+|_fsdp)?\.bin")
_BIN_INDEX = "pytorch_model.bin.index.json"
_SIDES = re.compile(
    r"(scheduler|sampler)(_[0-9]+)?\.(pt|bin)|scaler\.pt|dl_state_dict\.bin"
    r"|rng_state(_[0-9]+)?\.pth|random_states_[0-9]+\.pkl|custom_checkpoint_[0-9]+\.pkl"
)
"""Files that `torch.save` wrote beside model and optimizer. `training_args.bin` is none: it holds nothing but code."""

_DEEPSPEED = re.compile(r"global_step[0-9]+")
"""Directories of DeepSpeed's, in which its optimizer lies."""

_TRAINER_STATE = "trainer_state.json"


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
    sides, notes = _beside(storage, listing)
    return Found("accelerate's FSDP directory", storage, join([*parts, *sides], storage), notes)


def open_directory(storage: Storage, listing: Listing, *, trusted: bool) -> Found:
    """A directory by transformers' `Trainer`, or by accelerate's `save_state` without sharding.

    Raises:
        FormatError, UnsafeCheckpointError: a part is damaged, or not safe to read.
    """
    if several := listing.matching(_FURTHER):
        raise FormatError(
            f"{storage.address} holds several models or optimizers, among them {several[0]}: name the files of one"
        )
    parts = [prefixed("model", _model(storage, listing))]
    parts += [
        prefixed("optim", torch_files.open_file(storage, name, listing.files[name]))
        for name in listing.matching(_OPTIMIZER)
    ]
    sides, notes = _beside(storage, listing)
    return Found("a training directory", storage, join([*parts, *sides], storage), notes)


def _model(storage: Storage, listing: Listing) -> Manifest:
    """
    Raises:
        FormatError: a part is missing or damaged, or there are files of several models.
    """
    for index in (f"model{safetensors.INDEX_SUFFIX}", _BIN_INDEX):
        if index in listing.files:
            open_indexed = torch_files.open_indexed if index == _BIN_INDEX else safetensors_files.open_indexed
            return open_indexed(storage, index)
    files = listing.matching(_SAFETENSORS) or listing.matching(_BINS) or listing.matching(ADAPTERS)[-1:]
    check_parts(storage.address, files)
    if files[0].endswith(safetensors.SUFFIX):
        return safetensors_files.open_files(storage, files)
    return join((torch_files.open_file(storage, name, listing.files[name]) for name in files), storage)


def _beside(storage: Storage, listing: Listing) -> tuple[list[Manifest], tuple[str, ...]]:
    """What lies beside model and optimizer, and what of it is left out.

    Raises:
        FormatError: a file is damaged.
    """
    parts, notes = [], []
    for name in listing.matching(_SIDES):
        try:
            parts.append(prefixed(_label(name), torch_files.open_file(storage, name, listing.files[name])))
        except UnsafeCheckpointError as error:
            notes.append(f"{name} is left out: {error}")
    if _TRAINER_STATE in listing.files:
        parts.append(_counters(storage, listing.files[_TRAINER_STATE]))
    notes += [f"{name} is left out: DeepSpeed's" for name in sorted(listing.directories) if _DEEPSPEED.fullmatch(name)]
    return parts, tuple(notes)


def _label(file: str) -> str:
    """What a file's entries are called: its name, without what tells that it is one of several of one kind."""
    label = file.rpartition(".")[0]
    return re.sub(r"^(scheduler|sampler)_([0-9]+)$", r"\1s.\2", label).replace("scheduler.0", "schedulers.0")


def _counters(storage: Storage, num_bytes: int) -> Manifest:
    """The numbers in `trainer_state.json`; the history in it is the logger's."""
    limits.RECORD_BYTES.check(num_bytes, _TRAINER_STATE)
    state = parse_object(storage.read_bytes(_TRAINER_STATE), _TRAINER_STATE)
    numbers = {key: value for key, value in state.items() if type(value) in (int, float)}
    objects = {
        f"trainer_state.{key}": ObjectEntry(_TRAINER_STATE, 0, 0, inline=Inline(value), path=("trainer_state", key))
        for key, value in numbers.items()
    }
    return Manifest({}, objects, {_TRAINER_STATE: num_bytes})
