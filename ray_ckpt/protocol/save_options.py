"""What of a state is saved, under which names and in which dtype. Plain data: the driver makes it without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Union

from ray_ckpt.errors import UsageError
from ray_ckpt.format.saved import Saved
from ray_ckpt.format.wanted_names import chosen, is_below

if TYPE_CHECKING:
    import torch

Cast = Union["torch.dtype", Literal["float64", "float32", "float16", "bfloat16"]]
"""A dtype, or its name."""

CASTABLE = ("float64", "float32", "float16", "bfloat16")
"""Dtypes from and to which a save converts. An element of fewer bits is one of several parts that make up a value."""


@dataclass(frozen=True)
class SaveOptions:
    """See `ray_ckpt.save`."""

    only: tuple[str, ...] | None = None
    cast: str = ""
    """A name in `CASTABLE`; empty to leave dtypes as they are."""
    key_map: Mapping[str, Saved] = field(default_factory=dict)
    """Name in the checkpoint -> what of the state it is made of."""
    fingerprints: bool = False

    @classmethod
    def of(
        cls,
        only: Sequence[str] | None,
        cast: Cast | None,
        key_map: Mapping[str, str | Saved] | None,
        *,
        fingerprints: bool,
    ) -> SaveOptions:
        """As a user gives them.

        Raises:
            UsageError: one of them cannot be.
        """
        dtype = "" if cast is None else str(cast).removeprefix("torch.")
        if dtype and dtype not in CASTABLE:
            raise UsageError(f"cast={cast!r} is none of the dtypes that a save converts to: {', '.join(CASTABLE)}")
        if not isinstance(key_map or {}, Mapping):
            raise UsageError(
                "key_map of a save is a mapping: name in the checkpoint -> name in the state, or a Saved of such names"
            )
        made = {name: Saved(of) if isinstance(of, str) else of for name, of in (key_map or {}).items()}
        return cls(chosen(only), dtype, made, fingerprints)

    def takes(self, name: str) -> bool:
        """Whether something of the state is saved."""
        return self.only is None or any(is_below(name, prefix) for prefix in self.only)

    def saved_names(self, names: frozenset[str]) -> frozenset[str]:
        """These names of the state, and what a key map makes of something of these names."""
        return names | {made for made, saved in self.key_map.items() if not names.isdisjoint(saved.names())}


SAVE_ALL = SaveOptions()
