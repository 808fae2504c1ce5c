"""How much of a checkpoint is loaded, and how exactly it has to fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ray_ckpt.errors import UsageError
from ray_ckpt.format.saved import Saved
from ray_ckpt.state.load_plan import KeyMap


@dataclass(frozen=True)
class LoadOptions:
    """How much of a checkpoint is loaded, and how exactly it has to fit. See `load`."""

    strict: bool = True
    cast: bool = False
    only: tuple[str, ...] | None = None
    key_map: Mapping[str, str | Saved] | Callable[[str], str] | None = None
    hyperparameters: str = "from-checkpoint"
    """`from-checkpoint`, or `from-optimizer`: the optimizers keep their own."""
    trusted: bool = False

    def __post_init__(self) -> None:
        if self.hyperparameters not in ("from-checkpoint", "from-optimizer"):
            raise UsageError(
                f"hyperparameters={self.hyperparameters!r} is neither 'from-checkpoint' nor 'from-optimizer'"
            )

    @property
    def names(self) -> KeyMap | None:
        """The part of the key map that renames."""
        if not isinstance(self.key_map, Mapping):
            return self.key_map
        return {wanted: saved for wanted, saved in self.key_map.items() if isinstance(saved, str)}

    @property
    def made(self) -> dict[str, Saved]:
        """The part of the key map that joins and splits."""
        if not isinstance(self.key_map, Mapping):
            return {}
        return {wanted: saved for wanted, saved in self.key_map.items() if isinstance(saved, Saved)}

    @property
    def keep_hyperparameters(self) -> bool:
        return self.hyperparameters == "from-optimizer"
