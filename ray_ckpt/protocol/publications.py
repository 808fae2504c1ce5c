"""What a publisher has published last, and whether the next version may be built on it. Needs no torch."""

from __future__ import annotations

from ray_ckpt.errors import UsageError
from ray_ckpt.storage.resolve import Target
from ray_ckpt.storage.store import CheckpointStore

__all__ = ["Publications"]


class Publications:
    """The versions of one publisher.

    Args:
        whole_every: of how many versions one is whole at least.

    Raises:
        UsageError: `whole_every` is below 1.
    """

    def __init__(self, store: Target, whole_every: int) -> None:
        if whole_every < 1:
            raise UsageError(f"whole_every={whole_every}: at least every one has to be counted, so 1 or more")
        self.store = store if isinstance(store, CheckpointStore) else CheckpointStore(store)
        self._whole_every = whole_every
        self._last: int | None = None
        self._num_deltas = 0
        """Since the last one that is whole."""

    def before(self, step: int) -> int | None:
        """The version that this one may be built on; None where it has to be whole."""
        if self._last is None or step <= self._last or self._num_deltas + 1 >= self._whole_every:
            return None
        return None if self.store.is_copied_alone(step) else self._last

    def note(self, step: int, *, is_delta: bool) -> None:
        """A version has been published."""
        self._last, self._num_deltas = step, self._num_deltas + 1 if is_delta else 0
