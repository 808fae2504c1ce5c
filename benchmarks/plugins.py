"""The contestants of the storage benchmark, and the raw limit beside them.

Each saves and loads the same state dict in its own directory. `raw` is what the hardware and the kernel allow: plain
`write` and `fsync` of the tensors' memory, `preadv` of the wanted bytes into the targets' memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

import ray_ckpt
from ray_ckpt.dcp.reader import ArrowStorageReader
from ray_ckpt.dcp.writer import ArrowStorageWriter
from ray_ckpt.rounding import ceil_div

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Plugin:
    """One way to save and load a state dict of tensors."""

    name: str
    save: Callable[[State, str], None]
    load: Callable[[State, str], None]


def _with_dcp(
    name: str,
    writer: Callable[[str], dcp.StorageWriter],
    reader: Callable[[str], dcp.StorageReader],
) -> Plugin:
    def save(state: State, directory: str) -> None:
        dcp.save(dict(state), storage_writer=writer(directory))

    def load(state: State, directory: str) -> None:
        dcp.load(state, storage_reader=reader(directory))

    return Plugin(name, save, load)


def _save_in_phases(state: State, directory: str) -> None:
    ray_ckpt.save(state, directory, overwrite=True)


def _load_in_phases(state: State, directory: str) -> None:
    ray_ckpt.load(state, directory)


def _raw_save(state: State, directory: str) -> None:
    os.makedirs(directory, exist_ok=True)
    descriptor = os.open(os.path.join(directory, f"{dist.get_rank()}.raw"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for tensor in state.values():
        data = memoryview(tensor.numpy()).cast("B")
        while len(data):
            # In pieces as large as ours; one write per tensor measured within a tenth of that.
            data = data[os.write(descriptor, data[: 1 << 20]) :]
    os.fsync(descriptor)
    os.close(descriptor)


def _raw_load(state: State, directory: str) -> None:
    """Stage k wrote its tensors in order, so the place of each is known; the targets are shards of rows."""
    for file, entries in stages(state).items():
        descriptor = os.open(os.path.join(directory, f"{file}.raw"), os.O_RDONLY)
        position = 0
        for target in entries:
            local, first_row = local_rows(target)
            data = memoryview(local.numpy()).cast("B")
            offset = position + first_row * (local.nbytes // max(1, len(local)))
            while len(data):
                num_read = os.preadv(descriptor, [data[: 8 << 20]], offset)
                data, offset = data[num_read:], offset + num_read
            position += target.numel() * target.element_size()
        os.close(descriptor)


def stages(state: State) -> dict[int, list[torch.Tensor]]:
    """Number of a stage -> its tensors, in the order in which they were saved."""
    found: dict[int, list[torch.Tensor]] = {}
    for name, tensor in state.items():
        found.setdefault(int(name.split(".")[0].removeprefix("stage")), []).append(tensor)
    return found


def local_rows(target: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's rows, and the number of the first of them."""
    if not isinstance(target, DTensor):
        return target, 0
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return target.to_local(), min(rank * ceil_div(len(target), world_size), len(target))


PLUGINS: Mapping[str, Plugin] = {
    plugin.name: plugin
    for plugin in (
        _with_dcp("ours", ArrowStorageWriter, ArrowStorageReader),
        Plugin("ours, our verbs", _save_in_phases, _load_in_phases),
        _with_dcp("ours, unchecked", ArrowStorageWriter, lambda path: ArrowStorageReader(path, verify_checksums=False)),
        _with_dcp("stock FileSystem", FileSystemWriter, FileSystemReader),
        _with_dcp("stock Fsspec", FsspecWriter, FsspecReader),
        _with_dcp(
            "stock HuggingFace",
            lambda path: HuggingFaceStorageWriter(path, save_distributed=True),
            HuggingFaceStorageReader,
        ),
        Plugin("raw", _raw_save, _raw_load),
    )
}
