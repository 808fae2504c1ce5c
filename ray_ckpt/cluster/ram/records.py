"""What the index, the keepers and their clients tell each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ray_ckpt.cluster.ram.keeper import Place


@dataclass(frozen=True)
class Options:
    """What a `ram://` URI says behind its `?`."""

    replicas: int = 1
    """Number of nodes, besides the writer's, that hold a file."""
    capacity_bytes: int | None = None
    """Bytes that the files may take on each node; None takes a quarter of the node's shared memory."""
    lifetime: str = "job"
    """`job`: all of it ends with the job of Ray that began it. `detached`: it stays until it is dropped."""


class Found(NamedTuple):
    """A file with a name, and where it lies."""

    key: str
    num_bytes: int
    modified_s: float
    copies: Mapping[str, Place]
    """Node id -> where processes of that node find it."""


class Begun(NamedTuple):
    """A file that a process of a node may write."""

    key: str
    place: Place


class Refusal(NamedTuple):
    """Why a file cannot be written."""

    code: int
    """As in `errno`."""
    reason: str
    """One line."""
