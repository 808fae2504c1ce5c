"""open_weights(target): the model of a checkpoint as whole tensors, one after the other, for whoever takes them so.

An inference engine's `load_weights` takes such an iterable. What is held at any time are the tensors of one batch.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ray_ckpt.conversion.jobs import batches
from ray_ckpt.conversion.selection import model_of
from ray_ckpt.conversion.source import Source, open_source
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.torch_container import parse_dtype
from ray_ckpt.format.torch_internals import narrow
from ray_ckpt.storage.checkpoint_reader import CheckpointReader, Wanted
from ray_ckpt.storage.chunk_sources import SavedChunk
from ray_ckpt.storage.resolve import Target, checkpoint_at, held, wait_before

__all__ = ["Weight", "Weights", "open_weights"]

BATCH_BYTES = 128 << 20
"""Bytes of tensors that are read together; a larger tensor is alone."""


class Weight(NamedTuple):
    """One tensor of a model.

    Example:
        >>> import torch
        >>> from ray_ckpt import open_weights, save
        >>> report = save({"model": {"scale": torch.ones(2, dtype=torch.bfloat16)}}, "policy/step-0")
        >>> open_weights("policy").metadata[0]
        Weight(name='scale', dtype=torch.bfloat16, shape=(2,))
    """

    name: str
    """As the model calls it."""
    dtype: torch.dtype
    shape: tuple[int, ...]


class Weights:
    """The model in a checkpoint: every pass over it reads it anew, and compares every byte with its checksum.

    Example:
        >>> import torch
        >>> from ray_ckpt import open_weights, save
        >>> report = save({"model": {"scale": torch.ones(2)}}, "policy/step-0")
        >>> dict(open_weights("policy"))
        {'scale': tensor([1., 1.])}
    """

    def __init__(self, source: Source, step: int | None) -> None:
        self._source = source
        self.step = step
        """Number of the step in the store; None where the target is no store."""
        names = model_of(source.manifest, source.lists).names
        self._plain = names
        entries = source.manifest.tensors
        self.metadata = tuple(
            Weight(plain, parse_dtype(entries[name].dtype), entries[name].shape) for name, plain in names.items()
        )
        """Names, dtypes and global shapes. Of tied weights the first name alone."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and whole tensor, on the CPU. The tensors are the caller's.

        Raises:
            IntegrityError: what was read differs from its checksum.
            CheckpointError, StorageError: something cannot be read.
        """
        reader = CheckpointReader(self._source.opened.files)
        names = list(self._plain)
        entries = self._source.manifest.tensors
        for batch in batches([entries[name].num_bytes for name in names], BATCH_BYTES):
            yield from self._read(reader, names[batch.start : batch.stop])

    def _read(self, reader: CheckpointReader, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        tensors: dict[str, torch.Tensor] = {}
        wanted = []
        for name in names:
            entry = self._source.manifest.tensors[name]
            tensor = torch.empty(entry.shape, dtype=parse_dtype(entry.dtype))
            for chunk in entry.chunks:
                saved = SavedChunk(name, tensor.dtype, chunk)
                place = narrow(tensor, chunk.box.offsets, chunk.box.sizes)
                wanted.append(Wanted(saved, Box.whole(chunk.box.sizes), place))
            tensors[self._plain[name]] = tensor
        reader.read_tensors(wanted)
        while tensors:  # so that a tensor is freed when its taker has done with it
            name = next(iter(tensors))
            yield name, tensors.pop(name)


def open_weights(
    target: Target,
    step: int | None = None,
    *,
    wait_for: int | None = None,
    wait_s: float = 600.0,
    trusted: bool = False,
) -> Weights:
    """The model in a checkpoint, as an inference engine takes it: `engine.load_weights(open_weights("ram://policy"))`.

    No process group is used: any process may call it, at any time, whatever layout saved. A step in memory (`ram://`)
    stays whole as long as what this returns exists, also when it is deleted or replaced.

    Example:
        >>> import torch
        >>> from ray_ckpt import TrainState, open_weights, save
        >>> report = save(TrainState(torch.nn.Linear(2, 3)), "policy", step=7)
        >>> weights = open_weights("policy")
        >>> weights.step, [(weight.name, weight.shape) for weight in weights.metadata]
        (7, [('weight', (3, 2)), ('bias', (3,))])
        >>> [name for name, tensor in weights]
        ['weight', 'bias']

    Args:
        target: a checkpoint, whoever wrote it, or a store.
        step: number of the step in the store; by default the latest good one.
        wait_for: as for `load`.
        wait_s: as for `load`.
        trusted: as for `verify`.

    Raises:
        CheckpointNotFoundError: there is none, or not in time.
        CheckpointError, StorageError: the latest step or the record is damaged, or the storage does not answer.
    """
    target, wait = wait_before(target, step, wait_for, wait_s, fallback=False)
    if wait is not None:
        step = wait.look()
    with contextlib.ExitStack() as holds:
        found = holds.enter_context(held(lambda: checkpoint_at(target, step)))
        weights = Weights(open_source(found.storage, trusted=trusted), found.step)
        # At the end of the process there may be no cluster any more, and the hold ends by itself.
        weakref.finalize(weights, _release, holds.pop_all()).atexit = False
    return weights


def _release(holds: contextlib.ExitStack) -> None:
    """On a thread: the garbage collector may call this in the midst of anything, and it asks other processes."""
    threading.Thread(target=holds.close, name="ray_ckpt-release", daemon=True).start()
