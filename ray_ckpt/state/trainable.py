"""What of a model training changes: for `TrainState(..., trainable_only=True)`, as adapters (LoRA) want it.

parameters with `requires_grad`     saved and loaded
buffers, extra state                saved and loaded: training changes those of frozen modules too (BatchNorm)
parameters without                  compared by their fingerprints
what hooks make of parameters       as the parameter, or those of the module, that it lies below
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

__all__ = ["Trainable", "starts"]


def starts(name: str) -> Iterator[str]:
    """The first component of a name, the first two, and so on."""
    return itertools.accumulate(name.split("."), "{}.{}".format)


@dataclass(frozen=True)
class Trainable:
    """Which names of a model are trained."""

    frozen: frozenset[str] = frozenset()
    """Names of the parameters without `requires_grad`."""
    trained_places: frozenset[str] = frozenset()
    """Names of the other parameters, and of all modules that they are in."""
    frozen_places: frozenset[str] = frozenset()

    @classmethod
    def of(cls, parameters: Mapping[nn.Parameter, Sequence[str]]) -> Trainable:
        """
        Args:
            parameters: each parameter's names.
        """
        trained = {name for parameter, names in parameters.items() if parameter.requires_grad for name in names}
        frozen = {name for names in parameters.values() for name in names} - trained
        return cls(
            frozenset(frozen),
            frozenset(start for name in trained for start in starts(name)),
            frozenset(start for name in frozen for start in starts(name)),
        )

    def is_frozen(self, name: str) -> bool:
        """Whether an entry of a state dict that is neither a buffer nor extra state is left out."""
        if name in self.frozen:
            return True
        for start in reversed(list(starts(name))):
            if start in self.trained_places:
                return False
            if start in self.frozen_places:
                return True
        return False
