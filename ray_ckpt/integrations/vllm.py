"""Weights of a store for vLLM, which takes them from a `WeightSource`.

The interface is `vllm/distributed/weight_transfer/base.py` of vLLM (2026): `metadata()` gives name, dtype and shape of
each parameter, and each pass yields name and whole tensor. vLLM itself is not needed here, and has not been run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ray_ckpt.conversion.weights import Weight, Weights, open_weights
from ray_ckpt.storage.resolve import Target

__all__ = ["PublishedWeights"]


class PublishedWeights:
    """A `WeightSource` of vLLM over what a trainer has published; every pass takes the latest version.

    No gathering among trainers is needed: they save what each holds, and who reads gets whole tensors.

    It keeps none of them, so a pass over a version that is a delta (`WeightPublisher`) reads the last whole one and all
    changes since. Who has the memory for a copy of the model on the CPU reads the changes alone: let a `WeightFollower`
    fetch into a state dict of whole tensors, and give its items to `load_weights`.

    Args:
        target: a `CheckpointStore`, or its path or URI, such as `ram://policy`.
        wait_for: wait for this version or a higher one before the first pass.
        wait_s: how long.

    Raises:
        CheckpointError: in `metadata` and in a pass, as `ray_ckpt.open_weights` does.

    Example::

        engine = WeightTransferTrainerFactory.trainer_init(..., source=PublishedWeights("ram://policy"))
        model.load_weights(PublishedWeights("ram://policy", wait_for=5))  # in a worker of vLLM
    """

    def __init__(self, target: Target, *, wait_for: int | None = None, wait_s: float = 600.0) -> None:
        self._target = target
        self._wait_for = wait_for
        self._wait_s = wait_s
        self.version: int | None = None
        """Number of the step that the last pass, or `metadata`, has read."""

    def metadata(self) -> list[Weight]:
        """Name, dtype and global shape of every parameter of the latest version, by its record alone."""
        return list(self._open().metadata)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._open())

    def _open(self) -> Weights:
        weights = open_weights(self._target, wait_for=self._wait_for, wait_s=self._wait_s)
        self.version = weights.step
        return weights
