"""One rank's side of a save."""

from __future__ import annotations

import contextlib
import functools
import itertools
import uuid
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful

from ray_ckpt.errors import StorageError, UsageError
from ray_ckpt.format.manifest import ObjectEntry
from ray_ckpt.format.memory import fault
from ray_ckpt.format.torch_container import parse_dtype
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.phase_clock import PhaseClock
from ray_ckpt.progress import NOBODY, Meter
from ray_ckpt.protocol.holdings import Holdings, fingerprint_sum, hold
from ray_ckpt.protocol.host_copy import HostCopy
from ray_ckpt.protocol.messages import (
    Assignment,
    FileRecord,
    Item,
    LocalPlan,
    RankRecord,
    TensorSpec,
    digest_object,
    digest_tensor,
    num_bytes,
)
from ray_ckpt.protocol.save_options import SAVE_ALL, SaveOptions
from ray_ckpt.protocol.selecting import Selected, select
from ray_ckpt.state.buffers import buffers_of
from ray_ckpt.state.hidden_tensors import hidden
from ray_ckpt.state.train_state import TrainState
from ray_ckpt.state.wrappers import is_optimizer
from ray_ckpt.storage.data_file import MAX_FILE_BYTES, Packed, hash_tensors, pack_file, share_out, write_in_threads
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.objects import SavedObject, saved_object
from ray_ckpt.storage.staging import Converted


class PlanMemory:
    """Remembers a rank's last plan, so that an unchanged plan is sent as a token.

    An equal plan is recognized by comparing all of it: a state that has changed is never saved under an old plan.
    """

    def __init__(self) -> None:
        self.token = ""
        """Token of the last plan."""
        self.items: tuple[Item, ...] | None = None
        self._absent: frozenset[str] = frozenset()

    def plan(
        self, selected: Selected, known: frozenset[str], buffers: Callable[[], frozenset[str]] = frozenset
    ) -> LocalPlan:
        """The plan of what is to be saved.

        Args:
            known: tokens that the coordinator still has the items of.
            buffers: gives the names in which ranks may differ; asked only where they are sent.
        """
        holdings = selected.holdings
        if (self.items, self._absent) != (holdings.items, selected.absent):
            self.token, self.items, self._absent = uuid.uuid4().hex, holdings.items, selected.absent
        if self.token in known:
            return LocalPlan(self.token, None)
        return LocalPlan(self.token, holdings.items, buffers(), selected.absent)


class RankSave:
    """Writes what a rank holds, as the coordinator assigns it.

    Args:
        storage: the checkpoint's directory.
        threads: number of files written at the same time.
        max_file_bytes: another file is started before one grows past this; a single tensor may be larger.
        options: what of the state is saved, and how.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        threads: int = 1,
        max_file_bytes: int = MAX_FILE_BYTES,
        options: SaveOptions = SAVE_ALL,
    ) -> None:
        self._storage = storage
        self._threads = threads
        self._max_file_bytes = max_file_bytes
        self._options = options
        self._holdings = Holdings((), ())
        self._staged: Holdings | None = None
        self._host_copy: HostCopy | None = None
        self._digests: bytes | None = None
        self._numbers = itertools.count()
        self._begun: list[str] = []
        self._clock = PhaseClock()
        self._unsaved: tuple[str, ...] = ()

    def plan(self, state: Stateful | Mapping[str, Any], memory: PlanMemory, known: frozenset[str]) -> LocalPlan:
        """Look through the state. It may not change before `stage` has returned, or `write` where nothing is staged.

        Args:
            memory: this rank's memory of its last plan.
            known: tokens of plans that the coordinator still has.

        Raises:
            UsageError: as `hold` and `select`.
        """
        with collector_paused(), self._clock.phase("plan"):
            everything = hold(state.state_dict() if isinstance(state, Stateful) else state)
            selected = select(everything, self._options)
            holdings = selected.holdings
            if self._options.only is None:
                self._unsaved = hidden(_optimizers_in(state), everything.values)
            plan = memory.plan(selected, known, lambda: self._options.saved_names(buffers_of(state)))
            if isinstance(state, TrainState) and state.trainable_only:
                frozen = {name: tensor for name, tensor in state.frozen().items() if self._options.takes(name)}
                plan = replace(plan, frozen=state.frozen_fingerprints(frozen))
            # If the plan is equal, the same items as before, so that comparing them next time costs nothing.
            self._holdings = Holdings(memory.items or (), holdings.values)
            return plan

    def stage(self, assignment: Assignment, host_copy: HostCopy) -> None:
        """Copy what is to be written, and digest what is not, so that the state may change before `write`.

        Before `write` it may be called again, for another assignment.

        Args:
            host_copy: its memory may not be used for another copy before the last `write` has returned.

        Raises:
            UsageError: a tensor has no plain elements, or is no longer what was planned.
        """
        with collector_paused(), self._clock.phase("copy"):
            self._digests = self._digest_replicas(assignment.skipped)
            self._staged = host_copy.take(self._holdings, assignment.skipped)
            self._host_copy = host_copy

    def write(self, assignment: Assignment, meter: Meter = NOBODY) -> RankRecord:
        """Write everything but what is skipped; durable on return. May be called again after a failure.

        Args:
            meter: counts the bytes of tensors.

        Raises:
            StorageError: a file could not be written.
            UsageError: a tensor has no plain elements, or is no longer what was planned.
        """
        if self._staged is not None:
            self._holdings = self._staged  # lets go of the originals: training may be done with them
        retries_before = self._storage.num_retries
        # A staged save runs beside training, which needs the collector meanwhile.
        with (
            contextlib.nullcontext() if self._staged is not None else collector_paused(),
            self._clock.phase("write") as phase,
        ):
            items = self._holdings.items
            skipped = set(assignment.skipped)
            positions = [position for position in range(len(items)) if position not in skipped]
            phase.num_bytes = sum(num_bytes(spec) for p in positions if (spec := items[p].spec) is not None)
            meter.expect(phase.num_bytes)
            shares = share_out([_size(items[p].spec) for p in positions], self._threads, self._max_file_bytes)
            writes: list[Callable[[], FileRecord]] = [
                functools.partial(self._write_file, assignment, [positions[index] for index in share], meter)
                for share in shares
            ]
            files = write_in_threads(self._storage, writes, self._threads)
            if self._host_copy is not None:
                self._host_copy.check()
            digests = self._digests if self._digests is not None else self._digest_replicas(assignment.skipped)
            phase.checksum_s = sum(file.checksum_s for file in files)
        num_retries = self._storage.num_retries - retries_before
        return RankRecord(tuple(files), digests, self._clock.phases, num_retries, self._unsaved)

    def discard(self) -> None:
        """Remove the files of this attempt, which no manifest will name. Files that cannot be removed stay."""
        for name in self._begun:
            with contextlib.suppress(StorageError):
                self._storage.delete(name)

    def _write_file(self, assignment: Assignment, positions: Sequence[int], meter: Meter) -> FileRecord:
        # A retry takes another name: a broken upload may still finish in the background, over the new file.
        name = f"__{assignment.rank}_{next(self._numbers)}-{assignment.attempt}.distcp"
        self._begun.append(name)
        items, values = self._holdings.items, self._holdings.values
        saved = _Saving()
        objects = ((p, saved(values[p])) for p in positions if items[p].spec is None)
        size = sum(_size(items[p].spec) for p in positions)
        with meter.trial() as count:
            packed = pack_file(self._storage, name, objects, self._tensors(positions), count, num_bytes=size)
            record = file_record(packed)
        if not self._options.fingerprints:
            return record
        return replace(record, sums=[self._sum(position) for position in record.positions])

    def _sum(self, position: int) -> int:
        spec = self._holdings.items[position].spec
        assert spec is not None, "only tensors have rows"
        return fingerprint_sum(spec, self._holdings.values[position])

    def _tensors(self, positions: Sequence[int]) -> Iterator[tuple[int, torch.Tensor | Converted]]:
        items, values = self._holdings.items, self._holdings.values
        for position in positions:
            name, _, spec = items[position]
            if spec is None:
                continue
            value = values[position]
            if value.dtype != parse_dtype(spec.dtype) or value.shape != spec.sizes:
                raise UsageError(
                    f"{name!r} was planned as {spec.dtype}{list(spec.sizes)} but is now {value.dtype}"
                    f"{list(value.shape)}; do not change the state dict during a save"
                )
            if self._staged is None and (wrong := fault(value.tensor if isinstance(value, Converted) else value)):
                raise UsageError(f"{name!r} {wrong}")
            yield position, value

    def _digest_replicas(self, positions: Sequence[int]) -> bytes:
        values = self._holdings.values
        hashed = hash_tensors(self._tensors(positions))
        digests = {position: digest_tensor(sums) for position, _, sums in hashed}
        saved = _Saving()
        return b"".join(digests[p] if p in digests else digest_object(saved(values[p]).checksum) for p in positions)


def _optimizers_in(state: Stateful | Mapping[str, Any]) -> list[Any]:
    if isinstance(state, TrainState):
        return state.given_optimizers
    values = state.values() if isinstance(state, Mapping) else ()
    return [value for value in values if not isinstance(value, torch.Tensor) and is_optimizer(value)]


class _Saving:
    """Objects as they are saved. Parameters of one group share each hyper-parameter, so each object is encoded once.

    Goes by identity, which holds as long as the objects are held elsewhere.
    """

    def __init__(self) -> None:
        self._known: dict[int, SavedObject] = {}

    def __call__(self, value: object) -> SavedObject:
        saved = self._known.get(id(value))
        if saved is None:
            saved = value if isinstance(value, SavedObject) else saved_object(value)
            self._known[id(value)] = saved
        return saved


def file_record(packed: Packed[int]) -> FileRecord:
    """A rank's record of a file that it has written. Keys are positions in its plan."""
    first_at: dict[int, ObjectEntry] = {}
    return FileRecord(
        packed.tensors,
        positions=array("q", packed.keys),
        # Objects that share a container are one entry, which pickle then sends once.
        objects={position: first_at.setdefault(entry.start, entry) for position, entry in packed.objects},
        checksum_s=packed.checksum_s,
    )


def _size(spec: TensorSpec | None) -> int:
    """Cost of an item when items are distributed over files: its bytes, but at least 1."""
    return 1 if spec is None else max(1, num_bytes(spec))
