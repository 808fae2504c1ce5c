"""CheckpointStore: the checkpoints of one training run, by step.

    <store>/step-<N>/   one checkpoint, as `Coordinator` or `ArrowStorageWriter` saves it into `store.location(N)`
    <store>/.pins/      who wants a step kept, and who is about to delete one (`pins.py`)

delete, prune ──> claim the step ──> manifest.json, durably ──> .metadata ──> data files ──> give the claim back
clean         ──> deletes that were cut off, then files that no manifest names

Anything else in the store's directory, or in a step's, is somebody else's: it is neither counted nor touched.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from ray_ckpt.errors import CheckpointError, CheckpointNotFoundError, StorageError, UsageError
from ray_ckpt.format.manifest import MANIFEST_NAME, Manifest
from ray_ckpt.report import CopyReport, RemovalReport
from ray_ckpt.storage.cleaning import Cleaning
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.pins import Pins
from ray_ckpt.storage.record_files import read_if_there
from ray_ckpt.storage.removal import REQUESTS_IN_FLIGHT, Removal
from ray_ckpt.storage.retention import Policy, retained
from ray_ckpt.storage.step_names import directory_of
from ray_ckpt.storage.steps import Look, Steps
from ray_ckpt.storage.waiting import Wait

__all__ = ["CheckpointStore"]

_logger = logging.getLogger("ray_ckpt")

DAY_S = 86400.0
"""No save takes this long."""


class CheckpointStore:
    """The checkpoints of one training run: directories `step-<N>` (no leading zeros) below one directory or prefix.

    A step is committed when its `manifest.json` exists. Steps are ordered by number, whenever they were written.

    Example:
        >>> import torch
        >>> from ray_ckpt import CheckpointStore, keep_last, save
        >>> store = CheckpointStore("checkpoints")  # or s3://bucket/run
        >>> reports = [save({"weight": torch.ones(3)}, store, step=step) for step in (10, 20, 30)]
        >>> store.steps(), store.latest()
        ((10, 20, 30), 30)
        >>> store.pin(10)
        >>> store.prune(keep_last(1)).removed
        (20,)

    Any number of processes may use one store at once, on local files and on object stores. They can rely on this:

    - A step appears atomically. While it is being saved, nothing but `clean` removes any of its files, and
      `clean` only those of an attempt that has written nothing for `older_than_s`: let that be longer than a save.
    - A delete takes the commit record first. From then on the step does not exist; a delete that is cut off leaves
      files that `clean` removes.
    - Once `pin` has returned, no `prune` and no `delete` of any process removes the step. A `pin` that meets a delete
      which has already begun raises.
    - `prune` never removes the highest good step that its listing shows. `delete` does what it is told, to that one
      too.
    - A delete and an overwriting save of one step at a time leave either none, or the new one with all its data. In the
      latter case the `.metadata` for stock DCP may be missing if the two write it within the same moment.
    - A reader whose step is deleted meanwhile fails. Within `reading`, the error says that this is why. In memory
      (`ram://`) it does not: what `load`, `compare`, `verify` and `reading` have begun to read stays until they end.

    With a `front`, which is memory of a Ray cluster, the store has two tiers. A save is committed in the front, and
    training goes on; a process of the cluster, not the one that trains, copies the step to `target` and commits it
    there. `latest`, `load` and all else read the newest good step of either, and of a step that both have the front's;
    `LoadReport.tier` says which it was. A copy that fails never stops training: it is told (`SaveReport.not_durable`,
    `copying`), and tried again. Before a job ends, `make_durable` waits for the last one.

    - `prune` applies to each tier by itself, so that the highest good step of either stays. A step that is still to be
      copied stays in the front, unless its memory is needed for a new one: then this is told.
    - A step of `target` that another attempt has saved is replaced only by a save with `overwrite`.

    Args:
        target: a local path, a URI as `Storage` takes it, or a `Storage`.
        front: a store in front of it, such as `ram://run?replicas=1`.
        durable_every: with a front, which steps are copied: the multiples of this.

    Raises:
        UsageError: nobody could copy from the front in the background, or `durable_every` is below 1.
    """

    def __new__(
        cls,
        target: str | os.PathLike[str] | Storage,
        front: str | os.PathLike[str] | Storage | None = None,
        durable_every: int = 1,
    ) -> CheckpointStore:
        if front is None:
            return super().__new__(cls)
        from ray_ckpt.storage.two_tiers import TwoTierStore  # which is one of these

        return super().__new__(TwoTierStore)

    def __init__(
        self,
        target: str | os.PathLike[str] | Storage,
        front: str | os.PathLike[str] | Storage | None = None,
        durable_every: int = 1,
    ) -> None:
        if front is None and durable_every != 1:
            raise UsageError(f"durable_every={durable_every} says what of a front becomes durable, and there is none")
        self._storage = Storage.of(target)
        self._steps = Steps(self._storage)
        self._pins = Pins(self._storage)
        self._removal = Removal(self._storage, self._pins)

    def __reduce__(self) -> tuple[Any, ...]:
        return CheckpointStore, (self._storage,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address!r})"

    @property
    def address(self) -> str:
        """Where it is, without credentials and options."""
        return self._storage.address

    # ------------------------------------------------------------------------------------------------- reading

    def steps(self) -> tuple[int, ...]:
        """The committed steps, ascending.

        One listing: of the directory and a look into each step on local files; on an object store of all names in the
        store, a thousand to a request.
        """
        return self._steps.committed()

    def latest(self, *, fallback: bool = False) -> int | None:
        """The highest committed step; None when there is none.

        It is looked at: its record is read, and its files have the recorded sizes. One listing of the steps, then about
        three requests, and as many more for every damaged step on the way down.

        Args:
            fallback: take the highest step that is good, and log a WARNING for each damaged one above it.

        Raises:
            FormatError: the step is damaged, or with `fallback` all are. The message names path, reason and the highest
                good step.
        """
        return self._steps.latest(fallback=fallback)

    def wait_for(self, step: int, *, timeout_s: float, fallback: bool = False) -> int:
        """Wait until this step or a higher one is committed, ten looks a second, one on an object store.

        Example:
            >>> import torch
            >>> from ray_ckpt import CheckpointStore, save
            >>> store = CheckpointStore("published")
            >>> report = save({"weight": torch.ones(3)}, store, step=7)
            >>> store.wait_for(5, timeout_s=60)
            7

        Args:
            timeout_s: how long to wait; 0 looks once.
            fallback: pass a damaged step over, and wait on where no good one is left from `step` on.

        Returns:
            The highest good step.

        Raises:
            CheckpointNotFoundError: it has not come in time; names the newest that is there.
            FormatError: the highest step is damaged.
        """
        found = Wait(self, step, timeout_s, fallback=fallback).look()
        assert found is not None, "without a limit of its own a look waits to the end"
        return found

    def has_from(self, step: int) -> bool:
        """Whether this step or a higher one is committed, damaged or not."""
        return self._steps.has_from(step)

    @property
    def looks_cost_requests(self) -> bool:
        """Whether a look is a request to an object store."""
        return self._storage.opening_costs_a_request

    def damage(self, step: int) -> str:
        """Path and reason, when a committed step cannot be loaded as far as its record and its files' sizes tell; empty
        when it is good. `verify` reads its bytes.

        Raises:
            CheckpointNotFoundError: the step is not committed.
        """
        damage = self._steps.damage(step)
        if damage is None:
            raise self._steps.not_found(step)
        return damage

    def manifest(self, step: int) -> Manifest:
        """What a committed step holds, at the cost of one read. Of a delta it is what that consists of.

        Raises:
            CheckpointNotFoundError: the step is not committed.
            FormatError, UnsafeCheckpointError: its manifest is damaged.
        """
        data = read_if_there(self.holding(step), MANIFEST_NAME)
        if data is None:
            raise self._steps.not_found(step)
        return Manifest.from_json(data, f"{self.location(step).address}/{MANIFEST_NAME}")

    @contextmanager
    def reading(self, step: int | None = None) -> Iterator[Storage]:
        """The storage of a committed step, by default the latest, while it is read.

        Raises:
            CheckpointNotFoundError: the step is not committed, or was deleted while it was read; what has been read by
                then is incomplete.
            FormatError: no step was named, and the latest is damaged.
        """
        chosen = self.latest() if step is None else step
        if chosen is None or not self.is_committed(chosen):
            raise self._steps.not_found(chosen)
        try:
            with self.holding(chosen).held() as storage:
                yield storage
        except (StorageError, CheckpointError) as error:
            if self.is_committed(chosen):
                raise
            raise CheckpointNotFoundError(
                f"step {chosen} of {self.address} was deleted while it was read; read a step that is left, "
                "or pin it before you read it"
            ) from error

    def is_committed(self, step: int) -> bool:
        """Whether the step is committed, at the cost of one look."""
        return self._steps.is_committed(step)

    def holding(self, step: int) -> Storage:
        """The storage that a committed step is read from: of two tiers the one that has it whole, the front first."""
        return self._steps.holding(step)

    def not_found(self, step: int | None) -> CheckpointNotFoundError:
        """The error for a step that is not committed. It names the latest one."""
        return self._steps.not_found(step)

    # ------------------------------------------------------------------------------------------------- writing

    def location(self, step: int) -> Storage:
        """The storage that a step is saved to, whether a checkpoint is there or not. Nothing is read or written.

        Raises:
            UsageError: `step` is not a number from 0.
        """
        return self._steps.location(step)

    def copying(self) -> CopyReport:
        """What has not been copied from the front to the durable tier; of a store without a front, nothing.

        Raises:
            StorageError: the front does not answer.
        """
        return CopyReport({}, {})

    def make_durable(self, step: int | None = None, *, timeout_s: float) -> int | None:
        """Wait until a step, by default the latest good one, is in the durable tier; have it copied if it is not to be.

        What is in memory alone ends with its cluster, or its job: call this before.

        Returns:
            The step; None where there is none.

        Raises:
            CheckpointNotFoundError: the step is not committed.
            CheckpointError: it is not durable after `timeout_s`, or is not going to be. The message says why.
        """
        chosen = self.latest(fallback=True) if step is None else step
        if chosen is not None and not self.is_committed(chosen):
            raise self.not_found(chosen)
        return chosen

    def delete(self, *steps: int, dry_run: bool = False) -> RemovalReport:
        """Remove committed steps, the lowest first: the commit record, durably, then the files that it names.

        All are looked at before the first is removed. Other files stay.

        Args:
            dry_run: only say what would go.

        Raises:
            CheckpointNotFoundError: one of the steps is not committed; nothing was removed.
            UsageError: one is pinned, or lies behind a link; nothing was removed, except before a step that was pinned
                at the same time.
        """
        pins, looks = self._pins.list().pins, dict[int, Look]()
        for step in sorted(set(steps)):
            found = self._steps.look(step)
            if found is None:
                raise self._steps.not_found(step)
            if not self._removal.is_possible(step):
                raise UsageError(f"step {step} of {self.address} lies behind a link, through which nothing is removed")
            if step in pins:
                raise self._pinned(step)
            looks[step] = found
        kept, files = [step for step in self.steps() if step not in looks], dict[str, int]()
        for step, found in looks.items():
            gone = self._removal.files(step, found) if dry_run else self._removal.remove(step, found)
            if gone is None:
                raise self._pinned(step)
            files |= gone
        return self._report(list(looks), kept, files, dry_run=dry_run)

    def _pinned(self, step: int) -> UsageError:
        return UsageError(f"step {step} of {self.address} is pinned and stays; unpin({step}) first")

    def prune(self, *policies: Policy, dry_run: bool = False) -> RemovalReport:
        """Remove the committed steps that no policy keeps, the lowest first.

        Pinned steps and the highest good one always stay. Damaged steps are neither counted nor removed: the report
        names them, and `delete` removes one. Steps behind a link are not counted either and stay, as do those of this
        store that they lead to.

        Raises:
            UsageError: there is no policy.
        """
        wishes, looks = self._pins.list(), dict[int, Look]()
        kept = self._retained(policies, wishes.pins, looks)
        removed, files = [], dict[str, int]()
        for step in sorted(looks.keys() - set(kept)):
            if looks[step].damage or not self._removal.is_possible(step):
                continue
            found = self._removal.files(step, looks[step]) if dry_run else self._removal.remove(step, looks[step])
            if found is not None:
                removed.append(step)
                files.update(found)
        damages = {step: looks[step].damage for step in sorted(looks) if looks[step].damage}
        return self._report(removed, kept, files, dry_run=dry_run, damages=damages)

    def _retained(self, policies: Sequence[Policy], pins: Collection[int], looks: dict[int, Look]) -> tuple[int, ...]:
        """What policies keep of the good steps. Fills in what every committed step looks like."""
        steps = self.steps()
        with ThreadPoolExecutor(1 if self._storage.is_local else REQUESTS_IN_FLIGHT) as pool:
            for step, found in zip(steps, pool.map(self._steps.look, steps), strict=True):
                if found is not None:
                    looks[step] = found
        linked = {step for step in looks if not self._removal.is_possible(step)}
        good = [step for step, found in looks.items() if not found.damage]
        own = [step for step in good if step not in linked]
        kept = set(retained(own, policies, {*pins, *self._removal.led_to(own, linked)}))
        kept.update(*(looks[step].built_on for step in kept))
        return tuple(step for step in good if step in linked or step in kept)

    def is_copied_alone(self, step: int) -> bool:
        """Whether a step is copied to a durable tier without the one before it, and had better not be built on that."""
        return False

    # ---------------------------------------------------------------------------------------------------- pins

    def pin(self, step: int) -> None:
        """Keep a committed step, whatever policies say, until it is unpinned. All processes see it.

        Raises:
            CheckpointNotFoundError: the step is not committed.
            CheckpointError: a delete of the step has begun. The pin is there, but may have come too late.
        """
        if not self.is_committed(step):
            raise self._steps.not_found(step)
        is_safe = self._pins.pin(step)
        if not self.is_committed(step):
            raise self._steps.not_found(step)
        if not is_safe:
            raise CheckpointError(
                f"a delete of step {step} of {self.address} has begun, and may not have seen the pin; pin it again, "
                "after clean() if that delete was cut off"
            )

    def unpin(self, step: int) -> None:
        """Let policies decide again. A step that is not pinned is left as it is."""
        directory_of(step)
        self._pins.unpin(step)

    def pins(self) -> tuple[int, ...]:
        """The pinned steps, ascending."""
        return tuple(sorted(self._pins.list().pins))

    # --------------------------------------------------------------------------------------------------- clean

    def clean(self, *, older_than_s: float = DAY_S, dry_run: bool = False) -> RemovalReport:
        """Finish deletes that were cut off, and remove what failed saves left: files of our names that no manifest
        names, in the directories of steps and in the store's own, where a checkpoint without a step lies. Files next
        to a damaged manifest stay, for nobody knows whose they are. On S3 also uploads that were cut off are aborted,
        where boto3 is installed (`pip install ray-ckpt[s3]`).

        Costs one listing of everything and a read of every manifest.

        Args:
            older_than_s: leave attempts alone that have written anything within this time. 0 takes everything: only
                when nobody is saving.

        Raises:
            UsageError: `older_than_s` is negative.
        """
        if not older_than_s >= 0:
            raise UsageError(f"clean(older_than_s={older_than_s}) would remove files before they are written")
        cleaning = Cleaning(self._storage, self._steps, self._pins, self._removal, dry_run=dry_run)
        cleaning.run(older_than_s)
        report = self._report(cleaning.removed, cleaning.kept, cleaning.files, dry_run=dry_run)
        return dataclasses.replace(report, uploads=cleaning.uploads)

    def _report(
        self,
        removed: Sequence[int],
        kept: Iterable[int],
        files: Mapping[str, int],
        *,
        dry_run: bool,
        damages: Mapping[int, str] | None = None,
    ) -> RemovalReport:
        size = sum(files.values())
        report = RemovalReport(
            self.address, tuple(removed), tuple(kept), tuple(files), size, dry_run=dry_run, damages=damages or {}
        )
        if files and not dry_run:
            _logger.info("removed %d files with %d bytes of %s; steps %s", len(files), size, self.address, removed)
        for step, damage in report.damages.items():
            _logger.warning(
                "step %d of %s is damaged and was neither counted nor removed: %s", step, self.address, damage
            )
        return report
