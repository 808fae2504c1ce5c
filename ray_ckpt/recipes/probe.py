"""What runs on each rank before the phases: load their code, and see who can write and see what at the storage."""

from __future__ import annotations

from dataclasses import dataclass

from ray_ckpt.cluster.worker import WorkerContext, load_module
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.storage.cleaning import probe_name
from ray_ckpt.storage.files import Storage


@dataclass(frozen=True)
class StorageView:
    """The storage as a process sees it."""

    probes: tuple[int, ...]
    """Ranks whose probe file it sees."""
    has_checkpoint: bool


def load_code(ctx: WorkerContext, module: str) -> None:
    load_module(module)


def write_probe(ctx: WorkerContext, uri: str, token: str) -> None:
    Storage(uri).write_atomic(probe_name(token, ctx.rank), b"probe")


def view_storage(ctx: WorkerContext, uri: str, token: str) -> StorageView:
    return look(uri, token, ctx.world_size)


def look(uri: str, token: str, num_ranks: int) -> StorageView:
    """The storage as this process sees it, on a worker or on the driver."""
    storage = Storage(uri)
    seen = tuple(rank for rank in range(num_ranks) if storage.exists(probe_name(token, rank)))
    return StorageView(seen, storage.exists(MANIFEST_NAME))


def remove_probe(ctx: WorkerContext, uri: str, token: str) -> None:
    Storage(uri).delete(probe_name(token, ctx.rank))
