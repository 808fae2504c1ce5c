"""Fingerprints of tensors that hardly ever change, such as the base of adapters: computed again only if they have.

Whether one has changed, its bytes tell, by a hash that reads them as fast as memory gives them; a fingerprint takes
several times as long. Nothing cheaper is sure: torch's version counter does not see writes through `.data` (by which
peft merges adapters into their base), NumPy or a flattened view.
"""

from __future__ import annotations

from typing import Any

import torch
import xxhash
from torch.distributed.tensor import DTensor

from ray_ckpt.format.fingerprint import CURRENT, Fingerprint
from ray_ckpt.format.fingerprinting import fingerprint_by
from ray_ckpt.format.memory import fault
from ray_ckpt.format.shards import local_boxes
from ray_ckpt.format.torch_internals import local_tensor


class KnownFingerprints:
    """What was computed last for each name and formula."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[Any, Fingerprint]] = {}

    def of(self, name: str, tensor: torch.Tensor, formula: int = CURRENT) -> Fingerprint:
        """The fingerprint of what this process holds of a tensor.

        Raises:
            ValueError: as `fingerprint`.
        """
        content = _content(tensor)
        if content is None:
            return fingerprint_by(formula, tensor)
        before, known = self._known.get((name, formula), (None, None))
        if known is None or before != content:
            known = fingerprint_by(formula, tensor)
            self._known[name, formula] = content, known
        return known


def _content(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """All that the fingerprint depends on; None where hashing it would be no faster."""
    local = local_tensor(tensor).detach()
    if local.device.type != "cpu" or fault(local) or not local.is_contiguous() or not local.numel():
        return None
    if local.is_conj() or local.is_neg():
        return None
    boxes = tuple(part.box for part in local_boxes(tensor)) if isinstance(tensor, DTensor) else ()
    data = local.reshape(-1).view(torch.uint8).numpy().data
    return tensor.dtype, tuple(tensor.shape), boxes, xxhash.xxh3_128_digest(data)
