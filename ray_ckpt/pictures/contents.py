"""What the page of a checkpoint shows, as data: numbers and names, capped so that a page still opens.

Where something is left out or put together, a text beside it says what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ray_ckpt.inspection.contents import Section
from ray_ckpt.report import Damage

__all__ = [
    "Flow",
    "LossPoint",
    "ModuleMap",
    "ModuleNode",
    "Operation",
    "PageReport",
    "PhaseOfRank",
    "Piece",
    "Reshard",
    "Verification",
    "Writer",
]


@dataclass(frozen=True)
class ModuleNode:
    """A rectangle of the map: a module, or a tensor."""

    id: int
    parent: int | None
    """None for the whole checkpoint."""
    name: str
    """The last part of its name; `[0-31]` for numbered siblings of one structure that are drawn as one."""
    path: str
    """Its whole name."""
    section: str
    """The first part of its name."""
    num_tensors: int
    num_elements: int
    num_bytes: int
    own_bytes: int
    """The part of `num_bytes` that no rectangle inside of it stands for."""
    text: str
    """Dtype, shape and number of chunks of a tensor; empty for a module."""


@dataclass(frozen=True)
class ModuleMap:
    """The tensors of a checkpoint as nested rectangles."""

    nodes: tuple[ModuleNode, ...]
    aggregated: str
    """What was put together or left out; empty when every tensor has a rectangle of its own."""


@dataclass(frozen=True)
class Writer:
    """Who wrote a part of the checkpoint."""

    name: str
    """`rank 3`, or the file's name where that does not say who wrote it; several, such as `ranks 0 to 15`, when there
    are too many."""
    num_files: int
    num_bytes: int
    """Size of the files."""


@dataclass(frozen=True)
class Flow:
    """Bytes of tensors that one has written and another reads."""

    written_by: str
    read_by: str
    num_bytes: int


@dataclass(frozen=True)
class Piece:
    """A part of a tensor that one has written, and that the same ranks read."""

    number: int
    """Number of the tensor: 0 is the largest."""
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    """First element of the part, per dim."""
    sizes: tuple[int, ...]
    num_bytes: int
    written_by: str
    file: str
    read_by: str
    """The ranks that read it; empty when no layout to read it was named."""


@dataclass(frozen=True)
class Reshard:
    """Which rank wrote and which rank reads which bytes of which tensor."""

    target: str
    """The layout that reads; empty when none was named and nothing was loaded."""
    basis: str
    """`planned`: from the record and the layout alone. `measured`: what ranks of a load have read."""
    note: str
    """What the numbers rest on."""
    flows: tuple[Flow, ...]
    pieces: tuple[Piece, ...]
    """Parts of the largest tensors, always planned from the record and the layout."""
    aggregated: str
    """What was put together or left out; empty when nothing was."""


@dataclass(frozen=True)
class PhaseOfRank:
    """What a rank did in a stretch of time."""

    operation: str
    rank: str
    """`rank 3`, or `coordinator`."""
    phase: str
    start_s: float
    """Seconds since the operation began; across nodes as exact as their clocks agree."""
    seconds: float
    num_bytes: int


@dataclass(frozen=True)
class Operation:
    """A save or a load."""

    name: str
    num_bytes: int
    """Bytes written, or read by all ranks together."""
    seconds: float
    """Time of the rank that took longest."""
    bytes_per_s: float | None
    """None when it took no time that could be measured."""
    num_retries: int
    """How often the storage was asked again after an error that may pass."""
    num_ranks: int


@dataclass(frozen=True)
class Verification:
    """What a look at every byte has found."""

    verified: bool
    """Whether everything was compared with a checksum and nothing differs."""
    text: str
    """The same in a sentence."""
    total_bytes: int
    seconds: float
    num_damages: int
    damages: tuple[Damage, ...]
    """The first of them."""
    num_unchecked: int
    """Names without a checksum of ours, as in a checkpoint that another program wrote."""


@dataclass(frozen=True)
class LossPoint:
    """The loss of one training step."""

    run: str
    step: int
    loss: float


@dataclass(frozen=True)
class PageReport:
    """What a page of `write_report` shows; the page holds the same as JSON.

    Example:
        >>> import torch
        >>> from ray_ckpt import PageReport, save, write_report
        >>> saved = save({"model": {"weight": torch.ones(4, 3)}}, "run/step-1")
        >>> page: PageReport = write_report("run/step-1", "report.html", layout="fsdp2x2")
        >>> [(flow.written_by, flow.read_by, flow.num_bytes) for flow in page.reshard.flows]
        [('rank 0', 'rank 0', 24), ('rank 0', 'rank 1', 24)]
    """

    uri: str
    """The checkpoint, without credentials and options."""
    step: int | None
    """Its step in the store; None where the target is no store."""
    kind: str
    """`ray_ckpt`, or what program wrote it."""
    notes: tuple[str, ...]
    """What of it cannot be read, and why."""
    layout: str | None
    """How the model lay across ranks when it was saved."""
    saved_by: Mapping[str, str]
    """Name -> version of the software that wrote it."""
    total_bytes: int
    num_files: int
    num_tensors: int
    num_elements: int
    num_values: int
    """Values that are not tensors."""
    damage: str
    """What the files' sizes show; empty when they are as recorded."""
    sections: tuple[Section, ...]
    writers: tuple[Writer, ...]
    modules: ModuleMap
    reshard: Reshard
    verification: Verification | None
    """None when not asked for."""
    operations: tuple[Operation, ...]
    """Saves and loads of a job, in their order; of many the last 100."""
    phases: tuple[PhaseOfRank, ...]
    """Their times by rank."""
    phases_aggregated: str
    """Which ranks were left out; empty when none was."""
    losses: tuple[LossPoint, ...]
    losses_aggregated: str
    """Which points were left out; empty when none was."""
    events: tuple[str, ...]
    """What else a job has to tell: its verdict, failures and restarts."""

    @property
    def damaged(self) -> str:
        """What is missing or differs from what was saved, in a sentence; empty when nothing does."""
        if self.verification is not None and self.verification.num_damages:
            return self.verification.text
        return self.damage
