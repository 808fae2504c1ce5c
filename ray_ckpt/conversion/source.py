"""What is read of a source before the first tensor: its record, and the values that say what an optimizer has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ray_ckpt.conversion.jobs import FileJob, TensorJob, batches
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.foreign_optimizers import group_lists
from ray_ckpt.format.manifest import Manifest, ObjectEntry
from ray_ckpt.format.torch_internals import ExtensionRegistry
from ray_ckpt.inspection.opening import Opened, open_record
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.objects import Decoder, read_values
from ray_ckpt.storage.overwritten import refuse_overwritten
from ray_ckpt.storage.ranged_reads import tuning_for
from ray_ckpt.storage.resolve import Target, committed_at, held
from ray_ckpt.storage.rewrite import WantedTensor

__all__ = ["Source", "open_source", "source_at"]


@dataclass(frozen=True)
class Source:
    opened: Opened
    lists: Mapping[str, Any]
    """Values of `group_lists`."""

    @property
    def manifest(self) -> Manifest:
        return self.opened.manifest

    def values(self, entries: Mapping[str, ObjectEntry]) -> dict[str, Any]:
        """Values that are no tensors, by name.

        Raises:
            UnsafeCheckpointError: one of them cannot be loaded without running code.
        """
        decoder = Decoder(ExtensionRegistry(), trusted=False)
        return read_values(self.opened.files, entries, decoder, tuning_for(self.opened.files), verify=True)

    def tensor_job(self, name: str, wanted: str, dtype: str | None = None) -> TensorJob:
        """
        Args:
            wanted: its name in the target.
            dtype: in the target; None for that of the source.
        """
        entry = self.manifest.tensors[name]
        whole = WantedTensor(name, entry.dtype, Box.whole(entry.shape), entry.chunks)
        return TensorJob(wanted, whole, dtype or entry.dtype, self.manifest.fingerprints.get(name, ""))


@contextmanager
def source_at(source: Target, step: int | None, *, trusted: bool) -> Iterator[Source]:
    """A source that stays whole within the block, also where it is deleted or replaced in memory.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointError, StorageError: its record is damaged, or the storage does not answer.
    """
    with held(lambda: committed_at(source, step)) as found:
        refuse_overwritten(found.storage)
        yield open_source(found.storage, trusted=trusted)


def open_source(storage: Storage, *, trusted: bool) -> Source:
    """
    Args:
        trusted: as for `verify`.

    Raises:
        CheckpointError, StorageError: its record is damaged, or the storage does not answer.
    """
    opened = open_record(storage, trusted=trusted)
    lists = {name: opened.manifest.objects[name] for name in group_lists(opened.manifest)}
    return Source(opened, Source(opened, {}).values(lists))


def container_jobs(
    tensors: Iterable[TensorJob], objects: Mapping[str, tuple[str, ObjectEntry]], max_bytes: int, pattern: str
) -> list[FileJob]:
    """Files of containers, of at most so many bytes unless one tensor is larger. The first has everything else.

    Args:
        objects: name in the target -> name in the source, and entry.
        pattern: of the files' names, with a `{}` for the number.
    """
    jobs = list(tensors)
    numbered = {number: (name, entry) for number, (name, (_, entry)) in enumerate(objects.items())}
    return [
        FileJob(pattern.format(number), "dcp", tuple(jobs[index] for index in batch), numbered if number == 0 else {})
        for number, batch in enumerate(batches([job.num_bytes for job in jobs], max_bytes))
    ]
