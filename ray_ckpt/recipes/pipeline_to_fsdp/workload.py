"""What is trained, as plain data: the driver sends it and needs no torch for that."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Every worker builds the same model and the same batches from it."""

    model: str | None
    """`pkg.module:factory`, or None for `PipelineModel`."""
    dim: int
    layers: int
    num_stages: int
    seed: int = 0

    @property
    def num_microbatches(self) -> int:
        """Two per stage, so that 1F1B reaches its steady state."""
        return 2 * self.num_stages

    @property
    def batch_size(self) -> int:
        """Four samples per micro-batch; also a multiple of the number of FSDP ranks."""
        return 4 * self.num_microbatches
