"""What is trained, as plain data: the driver sends it and needs no torch for that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ray_ckpt.parallel.layout import Layout
from ray_ckpt.rounding import round_up

_LEAST_SAMPLES = 32


@dataclass(frozen=True)
class Workload:
    """Every worker builds the same model and the same batches from it."""

    model: str | None
    """`pkg.module:factory`, or None for `PipelineModel`."""
    dim: int
    layers: int
    batch_size: int
    """Samples of a whole batch: every layout of the run cuts it into equal parts."""
    seed: int = 0

    @classmethod
    def of(cls, model: str | None, dim: int, layers: int, layouts: Sequence[Layout]) -> Workload:
        """With batches that each of these layouts can cut into equal parts."""
        unit = math.lcm(*map(num_parts, layouts))
        return cls(model, dim, layers, round_up(_LEAST_SAMPLES, unit))


def num_microbatches(layout: Layout) -> int:
    """Micro-batches that each rank cuts its part of a batch into: two per pipeline stage, for 1F1B's steady state."""
    return 2 * layout.num_stages if layout.num_stages > 1 else 1


def num_parts(layout: Layout) -> int:
    """Parts of a batch that run by themselves."""
    return layout.num_batch_parts * num_microbatches(layout)
