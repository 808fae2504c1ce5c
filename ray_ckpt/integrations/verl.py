"""A checkpoint engine of verl over a store: trainers publish, rollout workers fetch when they are ready.

The interface is `verl/checkpoint_engine/base.py` of verl (2026). verl itself is not needed here, and has not been run.

    every update   prepare, on all ── build_topology, on the driver ──> init_process_group, on all
                   send_weights on the trainers, receive_weights on the rollout workers ──> finalize, on all
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

import torch

from ray_ckpt.checkpoint.saving import save
from ray_ckpt.conversion.weights import open_weights
from ray_ckpt.storage.retention import keep_last
from ray_ckpt.storage.store import CheckpointStore

__all__ = ["StoreCheckpointEngine"]


class StoreCheckpointEngine:
    """A `CheckpointEngine` of verl over a store in the cluster's memory, or any other.

    The first trainer holds all weights on the CPU while it saves them. A trainer that saves its own shards with
    `ray_ckpt.save(..., only=("model",), cast="bfloat16")` needs no room for that, and no gathering.

    A rollout worker keeps nothing of a version but what its engine makes of it, so there is nothing that a delta could
    change: versions are published whole, and of a delta that somebody else has published all is read that it is built
    on.

    Args:
        bucket_size: verl passes it; bytes are moved in pieces of our own.
        store: path or URI, such as `ram://policy?lifetime=detached`.
        keep: number of versions that stay in the store.
        wait_s: how long a rollout worker waits for the trainers.
        is_master: verl passes it to trainers; the topology says who publishes.

    Raises:
        CheckpointError: in `send_weights` and `receive_weights`, as `ray_ckpt.save` and `ray_ckpt.open_weights` do.

    Example::

        CheckpointEngineRegistry.register("ray_ckpt")(StoreCheckpointEngine)
        # checkpoint_engine.backend: ray_ckpt, checkpoint_engine.engine_kwargs.ray_ckpt.store: "ram://policy"
    """

    def __init__(
        self, bucket_size: int = 0, *, store: str, keep: int = 2, wait_s: float = 600.0, is_master: bool = False
    ) -> None:
        self._store = CheckpointStore(store)
        self._keep = keep
        self._wait_s = wait_s
        self._rank = -1
        self._version = 0

    def prepare(self) -> dict[str, Any]:
        """What the driver needs: the number that comes after those in the store."""
        return {"version": max(self._store.steps(), default=-1) + 1}

    @classmethod
    def build_topology(
        cls, trainer_world_size: int, rollout_world_size: int, metadata: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Keyword arguments of `init_process_group`, a list with one for each worker: trainers', rollout workers'."""
        version = metadata[0]["version"]
        return (
            {"rank": list(range(trainer_world_size)), "version": [version] * trainer_world_size},
            {"rank": [-1] * rollout_world_size, "version": [version] * rollout_world_size},
        )

    def init_process_group(self, rank: int, version: int) -> None:
        """Learn which version this update is. No group is formed."""
        self._rank, self._version = rank, version

    def finalize(self) -> None:
        """There is nothing to free: versions that are superseded go when the next one is there."""

    async def send_weights(self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None) -> None:
        """Publish, on all trainers: each takes part in producing the weights, and the first one's are saved.

        Args:
            weights: name and whole tensor, one after the other.
            global_steps: the version's number, unless the store has a higher one.
        """
        held = {name: tensor.to("cpu", copy=True) for name, tensor in weights if self._rank == 0}
        save(held, self._store, max(self._version, global_steps or 0))
        if self._rank == 0:
            self._store.prune(keep_last(self._keep))

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Name and whole tensor of this update's version, or of a later one that is there by then.

        Args:
            global_steps: not needed, as the driver has told which version it is.
        """
        weights = await asyncio.to_thread(open_weights, self._store, wait_for=self._version, wait_s=self._wait_s)
        for name, tensor in weights:
            yield name, tensor
