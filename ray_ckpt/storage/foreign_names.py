"""Which program's checkpoint is at a target, as far as names tell. Needs no torch: a driver asks too.

list_target ──> Listing ── kind_of ──> the first of KINDS that knows these names; `foreign.py` opens it
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ray_ckpt.format import rank_names, safetensors
from ray_ckpt.storage.files import Storage

__all__ = [
    "ACCELERATE_MODEL",
    "ACCELERATE_OPTIMIZER",
    "ADAPTERS",
    "KINDS",
    "Kind",
    "Listing",
    "is_file",
    "is_foreign",
    "kind_of",
    "list_target",
    "unread_models",
]

ACCELERATE_MODEL, ACCELERATE_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
"""Directories that accelerate's `save_state` makes for FSDP: `FSDP_MODEL_NAME` and `OPTIMIZER_NAME` of its constants,
with the number of the model or optimizer."""

ADAPTERS = re.compile(r"adapter_model\.(safetensors|bin)")
"""peft's file of adapters, which `Trainer` writes in the place of the model that has them."""

_MODEL = re.compile(
    r"(model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+|_fsdp)?\.bin)(\.index\.json)?|" + ADAPTERS.pattern
)
"""Files of a model by transformers' `save_pretrained` or accelerate's `save_state`."""

_BESIDE_MODEL = re.compile(r"(optimizer|scheduler)\.(pt|bin)|trainer_state\.json|(rng_state|random_states)(_\d+)?\.\w+")
"""Files that transformers' `Trainer` and accelerate's `save_state` put beside the model."""


_DEEPSPEED = re.compile(
    r"(zero_pp_rank_\d+_)?mp_rank_\d+_model_states\.pt|(\w+_)?zero_pp_rank_\d+_\w+_optim_states\.pt"
)
"""Files of one step by DeepSpeed."""


_HOLD_MODELS = (
    re.compile(r"(model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+|_fsdp)?\.bin)"),
    ADAPTERS,
    re.compile(r"model_world_size_\d+_rank_\d+\.pt|pytorch_model_fsdp(_\d+)?_rank\d+\.bin"),
    re.compile(r"mp_rank_\d+_model_states\.pt|zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt"),
)
"""Files that hold a model, or a part of one, of each kind."""


@dataclass(frozen=True)
class Listing:
    """What lies directly in a directory."""

    files: Mapping[str, int]
    """Name -> bytes."""
    directories: frozenset[str]

    def ending(self, suffix: str) -> list[str]:
        """Names of the files with this suffix, sorted."""
        return sorted(name for name in self.files if name.endswith(suffix))

    def matching(self, pattern: re.Pattern[str]) -> list[str]:
        """Names of the files that match as a whole, sorted."""
        return sorted(name for name in self.files if pattern.fullmatch(name))


class Kind(NamedTuple):
    """A kind of checkpoint directory."""

    name: str
    """Names its opener in `foreign.py`."""
    recognize: Callable[[Listing], bool]
    """Whether a directory that holds this is one."""


def _is_fsdp_directory(listing: Listing) -> bool:
    return not {ACCELERATE_MODEL, ACCELERATE_OPTIMIZER}.isdisjoint(listing.directories)


def _is_training_directory(listing: Listing) -> bool:
    """A model and at least one file of its training, or the shards of a model that only torch.save can hold."""
    models = listing.matching(_MODEL)
    return bool(models and listing.matching(_BESIDE_MODEL)) or any(".bin" in name for name in models)


def _is_deepspeed_directory(listing: Listing) -> bool:
    """One step's, or the one above, which names the newest step."""
    above = {"latest", "zero_to_fp32.py"} <= listing.files.keys()
    return above or any(_DEEPSPEED.fullmatch(name) for name in listing.files)


def _is_safetensors_directory(listing: Listing) -> bool:
    return bool(listing.ending(safetensors.SUFFIX) or listing.ending(safetensors.INDEX_SUFFIX))


def _are_rank_files(listing: Listing) -> bool:
    return rank_names.are_rank_files(listing.files)


def _are_numbered_files(listing: Listing) -> bool:
    return rank_names.are_numbered_files(listing.files)


KINDS = (
    Kind("files of ranks", _are_rank_files),
    Kind("accelerate's FSDP directory", _is_fsdp_directory),
    Kind("a training directory", _is_training_directory),
    Kind("DeepSpeed's directory", _is_deepspeed_directory),
    Kind("safetensors", _is_safetensors_directory),
    Kind("numbered files", _are_numbered_files),
)
"""Asked in this order: one whose names are a part of another's comes after it."""


def list_target(storage: Storage) -> Listing:
    return Listing(storage.list_files(), frozenset(storage.list_directories()))


def kind_of(listing: Listing) -> Kind | None:
    return next((kind for kind in KINDS if kind.recognize(listing)), None)


def unread_models(listing: Listing, read: Collection[str]) -> list[str]:
    """Files and directories that hold a model, too, but not the one that is read: several programs wrote here.

    Args:
        read: the files that are read, with the directories that they are in.
    """
    used = {name.partition("/")[0] for name in read}
    names = [*listing.files, *({ACCELERATE_MODEL} & listing.directories)]
    holding = (name for name in names if name == ACCELERATE_MODEL or any(p.fullmatch(name) for p in _HOLD_MODELS))
    return sorted(name for name in holding if name not in used)


def is_file(storage: Storage) -> bool:
    """Whether the target is a file rather than a directory."""
    parent = storage.parent()
    return parent is not None and parent[0].exists(parent[1])


def is_foreign(storage: Storage) -> bool:
    """Whether a directory without a manifest or `.metadata` holds what `foreign.recognize` may know."""
    return kind_of(list_target(storage)) is not None
