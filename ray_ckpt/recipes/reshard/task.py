"""A task of the reshard job: write the file of one rank."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from ray_ckpt.format.manifest import ObjectEntry, itemsize
from ray_ckpt.phase_clock import PhaseClock
from ray_ckpt.progress import NOBODY, Meter
from ray_ckpt.protocol.messages import FileRecord, RankRecord
from ray_ckpt.protocol.rank_save import file_record
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.rewrite import WantedTensor, rewrite


@dataclass(frozen=True)
class RankFile:
    """The file that a task is to write for one rank. Keys are positions in the rank's plan."""

    rank: int
    attempt: str
    """Id of the attempt, part of every file's name."""
    objects: Mapping[int, tuple[str, ObjectEntry]]
    tensors: Mapping[int, WantedTensor]

    @property
    def num_bytes(self) -> int:
        """Size of the tensors' elements."""
        return sum(tensor.box.num_elements * itemsize(tensor.dtype) for tensor in self.tensors.values())


def write_rank(source: Storage, target: Storage, of_rank: RankFile, meter: Meter = NOBODY) -> RankRecord:
    """Copy what the rank holds, checked on the way, into a file of its own. A second run takes another name.

    Args:
        meter: counts the bytes of tensors.

    Raises:
        IntegrityError: what was read differs from its checksum.
        CheckpointError, StorageError: something cannot be read, or not be written.
    """

    def write() -> FileRecord:
        # A broken upload, or a task that was given up, may still finish in the background.
        name = f"__{of_rank.rank}_{secrets.randbelow(10**9)}-{of_rank.attempt}.distcp"
        with meter.trial() as count:
            return file_record(rewrite(source, target, name, of_rank.objects, of_rank.tensors, count))

    clock, before = PhaseClock(), target.num_retries + source.num_retries
    with clock.phase("write") as phase:
        file = target.retried(write)
        phase.num_bytes, phase.checksum_s = of_rank.num_bytes, file.checksum_s
    return RankRecord((file,), b"", clock.phases, target.num_retries + source.num_retries - before)
