"""Which rank wrote which file, as far as names tell; a missing one is missed here. Needs no torch.

    verl                  `model_world_size_4_rank_0.pt`, `optim_...`, `extra_state_...`
    accelerate            `pytorch_model_fsdp_0_rank0.bin`, `optimizer_0_rank0.bin`, by `use_dcp=False`
    torch_checkpointing   `model_0.pt`, `optimizer_0.pt`, ...; beside `metadata.pkl` unless it was told to write none,
                          and declares that nothing can be resharded then

Source of the names: verl's `utils/checkpoint/fsdp_checkpoint_manager.py`, accelerate's `utils/fsdp_utils.py`,
torch_checkpointing 0.1.1.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ray_ckpt.errors import FormatError
from ray_ckpt.format.pickle_reader import Unpickler
from ray_ckpt.text import listed, quoted

__all__ = ["METADATA_NAME", "RankFile", "RankFiles", "are_numbered_files", "are_rank_files", "find", "read_world_size"]

METADATA_NAME = "metadata.pkl"
"""What torch_checkpointing writes beside the files of the ranks."""

_VERL = re.compile(r"(model|optim|extra_state)_world_size_([0-9]{1,7})_rank_([0-9]{1,7})\.pt")
_ACCELERATE = re.compile(r"(pytorch_model_fsdp|optimizer)(_[0-9]{1,4})?_rank([0-9]{1,7})\.bin")
_TORCH_CHECKPOINTING = re.compile(r"(.+)_([0-9]{1,7})\.pt")

_ITEMS = {"pytorch_model_fsdp": "model", "optimizer": "optim"}
"""Accelerate's names of what its files hold -> ours, which verl's are too."""


class RankFile(NamedTuple):
    """A file of one rank."""

    item: str
    """What it holds, such as `model`: the first component of the names in it."""
    rank: int
    name: str


@dataclass(frozen=True)
class RankFiles:
    """The files of all ranks."""

    kind: str
    """Who wrote them, for messages."""
    files: Sequence[RankFile]


def are_rank_files(names: Collection[str]) -> bool:
    """Whether `find` may find any."""
    own = METADATA_NAME in names and any(_TORCH_CHECKPOINTING.fullmatch(name) for name in names)
    return own or any(_VERL.fullmatch(name) or _ACCELERATE.fullmatch(name) for name in names)


def are_numbered_files(names: Collection[str]) -> bool:
    """Whether files may be torch_checkpointing's without its `metadata.pkl`, as far as names tell: those of epochs may
    have such names, too."""
    matches = [match for name in names if (match := _TORCH_CHECKPOINTING.fullmatch(name))]
    numbers = {int(match[2]) for match in matches}
    return bool(numbers) and numbers == set(range(len(numbers))) and "0" in {match[2] for match in matches}


def find(names: Collection[str], world_size: int | None = None) -> RankFiles | None:
    """The files of ranks in a directory; None when there are none.

    Args:
        names: of the files there.
        world_size: number of ranks that wrote them, where torch_checkpointing's `metadata.pkl` tells.

    Raises:
        FormatError: a rank's file is missing, or they are those of several saves.
    """
    if world_size is not None:
        matches = [match for name in names if (match := _TORCH_CHECKPOINTING.fullmatch(name))]
        found = [RankFile(match[1], int(match[2]), match[0]) for match in matches]
        return _complete("a checkpoint of torch_checkpointing", found, world_size)
    if verl := [match for name in names if (match := _VERL.fullmatch(name))]:
        sizes = sorted({int(match[2]) for match in verl})
        if len(sizes) > 1:
            raise FormatError(
                f"files of saves by {listed(sizes)} ranks lie in one directory: move those of all but one elsewhere"
            )
        found = [RankFile(match[1], int(match[3]), match[0]) for match in verl]
        return _complete("verl's checkpoint of one file per rank", found, sizes[0])
    if accelerate := [match for name in names if (match := _ACCELERATE.fullmatch(name))]:
        numbers = sorted({(match[2] or "").removeprefix("_") for match in accelerate})
        if len(numbers) > 1:
            raise FormatError(
                f"files of several models or optimizers, numbers {listed(numbers)}, lie in one directory, and nothing "
                "says which belong together: move those of all but one elsewhere"
            )
        found = [RankFile(_ITEMS[match[1]], int(match[3]), match[0]) for match in accelerate]
        return _complete("accelerate's checkpoint of one file per rank", found, 1 + max(file.rank for file in found))
    if are_numbered_files(names):
        ranks = [int(match[2]) for name in names if (match := _TORCH_CHECKPOINTING.fullmatch(name))]
        return find(names, 1 + max(ranks))
    return None


def read_world_size(metadata: bytes) -> int | None:
    """The number of ranks that torch_checkpointing's `metadata.pkl` tells; None when it is another program's."""
    root = Unpickler(metadata, METADATA_NAME, constant=lambda name: None, makers={}).load()
    if type(root) is not dict or not {"metadata", "world_size"} <= root.keys():
        return None
    world_size = root["world_size"]
    if type(world_size) is not int or not 0 < world_size < 10_000_000:
        raise FormatError(f"{METADATA_NAME} says that {quoted(world_size)} ranks wrote the checkpoint")
    return world_size


def _complete(kind: str, files: Sequence[RankFile], world_size: int) -> RankFiles:
    by_item: dict[str, dict[int, str]] = defaultdict(dict)
    for file in files:
        if file.rank in by_item[file.item]:
            raise FormatError(f"{file.name} and {by_item[file.item][file.rank]} are two files of one rank")
        by_item[file.item][file.rank] = file.name
    for item, of_item in by_item.items():
        if beyond := sorted(of_item.keys() - set(range(world_size))):
            raise FormatError(
                f"{of_item[beyond[0]]} is the file of a rank that a save by {world_size} ranks does not have: files of "
                "several saves lie in one directory"
            )
        if len(of_item) < world_size:
            missing = [rank for rank in range(min(world_size, 1 + len(of_item) + 8)) if rank not in of_item]
            raise FormatError(
                f"{kind} by {world_size} ranks lacks the {item} of rank {listed(missing)}, which "
                f"{next(iter(of_item.values()))} has a sibling for: the save was interrupted, or not all files were "
                "copied here"
            )
    if not by_item:
        raise FormatError(f"{kind} holds no file of any rank")
    return RankFiles(kind, sorted(files))
