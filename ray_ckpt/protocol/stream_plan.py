"""What a transfer sends: every rank of the source has one stream of bytes, which is cut into windows.

offers of all ranks ── plan_streams ──> who sends what, and the record of a checkpoint whose files are these streams

No file ever holds a stream; the record lets a load plan what it wants of which bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ray_ckpt.errors import CheckpointError, CommitError
from ray_ckpt.format.block_sums import BlockSums, block_size
from ray_ckpt.format.boxes import shared_box
from ray_ckpt.format.fingerprint import digest_of
from ray_ckpt.format.manifest import Chunk, Manifest, ObjectEntry, TensorEntry
from ray_ckpt.protocol.coordinator import PlanCache
from ray_ckpt.protocol.merging import GlobalPlan, Key, key_of
from ray_ckpt.protocol.messages import Assignment, LocalPlan, num_bytes
from ray_ckpt.protocol.share_plan import Wants
from ray_ckpt.rounding import round_up
from ray_ckpt.text import listed

ALIGNMENT = 64
"""Every part of a tensor begins at a multiple of this, as torch wants elements at multiples of their size."""


@dataclass(frozen=True)
class StreamOffer:
    """What a rank of the source has to send."""

    plan: LocalPlan
    objects: Mapping[int, ObjectEntry]
    """Position in the plan -> a value that the record can hold."""
    layout: str | None
    """The layout that its `TrainState` names."""


def stream_name(rank: int) -> str:
    """What the record calls the stream of a rank."""
    return f"__{rank}_0.stream"


@dataclass(frozen=True)
class Proof:
    """What a rank of the source tells of what it holds, by position in its plan."""

    blocks: dict[int, BlockSums] = field(default_factory=dict)
    sums: dict[int, int] = field(default_factory=dict)
    """Position -> fingerprint's sum, where one is needed."""

    def add(self, other: Proof) -> None:
        self.blocks.update(other.blocks)
        self.sums.update(other.sums)


@dataclass(frozen=True)
class StreamPlan:
    """Who sends what."""

    merged: GlobalPlan
    assignments: Sequence[Assignment]
    """What each rank does, by rank."""
    manifest: Manifest
    """The record, without fingerprints."""

    def wanted_by(self, wants: Sequence[Wants], rank: int, start: int, end: int) -> list[int]:
        """The ranks of the target that want any of the bytes `[start, end)` of a source rank's stream."""
        found = []
        for target, of_target in enumerate(wants):
            edges = of_target.of_file(stream_name(rank))
            if ((edges[:, 0] < end) & (edges[:, 1] > start)).any():
                found.append(target)
        return found

    @property
    def planned(self) -> Manifest:
        """The record as it will be when all is sent: with the sizes of checksum blocks, and without their checksums."""
        return self._with_sums(lambda _, chunk: BlockSums(block_size(chunk.length), b""), {})

    def _with_sums(self, sums_of: Callable[[str, Chunk], BlockSums], fingerprints: Mapping[str, str]) -> Manifest:
        tensors = {
            name: entry._replace(chunks=tuple(chunk._replace(checksums=sums_of(name, chunk)) for chunk in entry.chunks))
            for name, entry in self.manifest.tensors.items()
        }
        return Manifest(tensors, {}, self.manifest.files, self.manifest.attempt, fingerprints=fingerprints)

    def proven(self, told: Sequence[Proof]) -> Manifest:
        """The record with the checksums and fingerprints of what was sent.

        Args:
            told: by each rank, of all that it holds.

        Raises:
            CommitError: ranks hold different things under one name.
            CheckpointError: something has not been sent.
        """
        of_part: dict[Key, BlockSums] = {}
        of_tensor: dict[str, list[int]] = {}
        differing = set()
        for rank, items in enumerate(self.merged.items):
            skipped = set(self.merged.skipped[rank])
            for position, item in enumerate(items):
                if item.spec is None:
                    continue
                found = told[rank].blocks.get(position)
                if found is None:
                    raise CheckpointError(f"rank {rank} has not sent {item.name!r}")
                if of_part.setdefault(key_of(item), found) != found and item.name not in self.merged.buffers:
                    differing.add(item.name)
                if position not in skipped and position in told[rank].sums:
                    of_tensor.setdefault(item.name, []).append(told[rank].sums[position])
        if differing:
            raise CommitError(
                f"ranks of the source hold different things under one name: {listed(sorted(differing))}; give them "
                "different names, or leave them out by only="
            )
        tensors = self.manifest.tensors
        digests = {
            name: digest_of(tensors[name].dtype, tensors[name].shape, found) for name, found in of_tensor.items()
        }
        return self._with_sums(lambda name, chunk: of_part[name, chunk.box.offsets], digests)


def plan_streams(offers: Sequence[StreamOffer], attempt: str) -> StreamPlan:
    """Decide who sends what: a part that several ranks hold is sent by the least loaded of them.

    Raises:
        CommitError: the ranks' parts do not cover a tensor exactly once, or contradict each other.
        UsageError: something is asked for by a name that no rank has.
    """
    merged = PlanCache().update([offer.plan for offer in offers])
    chunks: dict[str, list[Chunk]] = {name: [] for name, (_, spec) in merged.names.items() if spec is not None}
    objects: dict[str, ObjectEntry] = {}
    files: dict[str, int] = {}
    for rank, items in enumerate(merged.items):
        file, at = stream_name(rank), 0
        skipped = set(merged.skipped[rank])
        for position, (name, path, spec) in enumerate(items):
            if position in skipped:
                continue
            if spec is None:
                objects[name] = offers[rank].objects[position]._replace(file=file, path=path)
                continue
            length = num_bytes(spec)
            chunks[name].append(Chunk(shared_box(spec.offsets, spec.sizes), file, at, length, at))
            at += round_up(length, ALIGNMENT)
        files[file] = at
    tensors = {
        name: TensorEntry(
            spec.dtype, spec.shape, tuple(sorted(chunks[name], key=lambda chunk: chunk.box.offsets)), path
        )
        for name, (path, spec) in merged.names.items()
        if spec is not None
    }
    assignments = [Assignment(attempt, rank, tuple(skipped)) for rank, skipped in enumerate(merged.skipped)]
    return StreamPlan(merged, assignments, Manifest(tensors, objects, files, attempt, offers[0].layout))
