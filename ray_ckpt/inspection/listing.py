"""list_steps(target): the checkpoints of a store, and what lies beside them.

One listing tells when files were written and which no manifest names; every record is read for the rest. A step that
another program wrote has a `.metadata` instead, which needs torch to be read.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ray_ckpt.errors import CheckpointError, CheckpointNotFoundError
from ray_ckpt.format.manifest import MANIFEST_NAME, Manifest
from ray_ckpt.inspection.opening import open_record, size_problem
from ray_ckpt.storage.files import Scanned, Storage
from ray_ckpt.storage.foreign_names import is_file
from ray_ckpt.storage.publish import STOCK_RECORD_NAME
from ray_ckpt.storage.record_files import parse_or_take, read_if_there
from ray_ckpt.storage.resolve import Target, committed_at
from ray_ckpt.storage.step_names import directory_of, parse_steps
from ray_ckpt.storage.store import CheckpointStore
from ray_ckpt.storage.two_tiers import TwoTierStore

__all__ = ["StepListing", "StoreListing", "list_steps"]

_STOCK_FILE = re.compile(r"__\d+_\d+\.distcp")


@dataclass(frozen=True)
class StepListing:
    """One step of a store, as a listing and its record show it."""

    step: int | None
    """Its number; None for a checkpoint that is no step of a store."""
    kind: str
    """`ray_ckpt`, or what program wrote it."""
    damage: str
    """Path and reason, as far as its record and its files' sizes tell; empty when it is good."""
    saved_s: float | None
    """When it was committed, in seconds since the epoch by the storage's clock; None where that is not kept."""
    total_bytes: int
    """Size of its data files."""
    num_tensors: int
    layout: str | None
    """The layout that saved it; None when it does not say."""
    saved_by: Mapping[str, str]
    """Software -> version that wrote it."""
    pinned: bool
    tiers: tuple[str, ...] = ()
    """Where the store has two: those of `front` and `durable` in which the step is."""


@dataclass(frozen=True)
class StoreListing:
    """What a store holds.

    Example:
        >>> import torch
        >>> from ray_ckpt import list_steps, save
        >>> reports = [save({"weight": torch.ones(3)}, "run", step=step, layout="single") for step in (1, 2)]
        >>> listing = list_steps("run")
        >>> listing.latest, [(found.step, found.layout) for found in listing.steps], listing.orphan_bytes
        (2, [(1, 'single'), (2, 'single')], 0)
    """

    uri: str
    """The store or checkpoint, without credentials and options."""
    steps: tuple[StepListing, ...]
    """Committed steps by number, damaged ones among them."""
    latest: int | None
    """The highest committed step that is good."""
    orphans: Mapping[str, int] = field(default_factory=dict)
    """Files of ours that no manifest names -> bytes: of a save that failed, or of one that is under way."""

    @property
    def orphan_bytes(self) -> int:
        """Size of the orphans together."""
        return sum(self.orphans.values())


def list_steps(target: Target) -> StoreListing:
    """What a store holds: its steps, which one is the latest, and files that belong to none. No data file is read.

    Example:
        >>> import torch
        >>> from ray_ckpt import list_steps, save
        >>> report = save({"weight": torch.ones(3)}, "run", step=7)
        >>> [(found.step, found.damage, found.pinned) for found in list_steps("run").steps]
        [(7, '', False)]

    Args:
        target: a store; or one checkpoint, which is then listed alone.

    Raises:
        CheckpointNotFoundError: neither a checkpoint nor a step is there.
        CheckpointError, StorageError: the one checkpoint that is there is damaged, or the storage does not answer.
    """
    if isinstance(target, TwoTierStore):
        return _list_two_tiers(target)
    store = target if isinstance(target, CheckpointStore) else CheckpointStore(target)
    directory = store.location(0).parent()
    assert directory is not None, "the step's directory lies in the store's"
    if is_file(directory[0]):
        return _alone(target, store)
    by_step = _by_step(directory[0])
    listed = [found for step in sorted(by_step) if (found := _list_step(store, step, by_step[step])) is not None]
    if not listed and not any(by_step.values()):
        return _alone(target, store)
    orphans = store.clean(older_than_s=0, dry_run=True)
    pins = set(store.pins())
    steps = tuple(StepListing(**{**vars(found), "pinned": found.step in pins}) for found in listed)
    good = [found.step for found in steps if not found.damage and found.step is not None]
    sizes = {f"{directory_of(step)}/{name}": file.num_bytes for step in by_step for name, file in by_step[step].items()}
    return StoreListing(
        store.address, steps, max(good, default=None), {name: sizes.get(name, 0) for name in orphans.files}
    )


def _list_two_tiers(store: TwoTierStore) -> StoreListing:
    """The steps of both tiers, each as it would be read."""
    listings: dict[str, StoreListing] = {}
    for name, tier in (("front", store.front), ("durable", store.durable)):
        with contextlib.suppress(CheckpointNotFoundError):
            listings[name] = list_steps(tier)
    if not listings:
        raise store.not_found(None)
    places: dict[int, dict[str, StepListing]] = {}
    for name, listing in listings.items():
        for found in listing.steps:
            if found.step is not None:
                places.setdefault(found.step, {})[name] = found
    steps = []
    for step in sorted(places):
        of_step = list(places[step].values())
        shown = next((found for found in of_step if not found.damage), of_step[0])
        pinned = any(found.pinned for found in of_step)
        steps.append(replace(shown, pinned=pinned, tiers=tuple(places[step])))
    good = [found.step for found in steps if not found.damage and found.step is not None]
    orphans = {name: size for listing in listings.values() for name, size in listing.orphans.items()}
    return StoreListing(store.address, tuple(steps), max(good, default=None), orphans)


def _by_step(directory: Storage) -> dict[int, dict[str, Scanned]]:
    """The files in every directory that is named like a step."""
    found: dict[int, dict[str, Scanned]] = {}
    for name, scanned in directory.scan().items():
        below, _, file = name.partition("/")
        for step in parse_steps([below]):
            found.setdefault(step, {})[file] = scanned
    return found


def _list_step(store: CheckpointStore, step: int, files: Mapping[str, Scanned]) -> StepListing | None:
    """None when nothing is committed there."""
    record = files.get(MANIFEST_NAME)
    if record is None:
        is_stock = STOCK_RECORD_NAME in files and any(_STOCK_FILE.search(name) for name in files)
        return _list_foreign(store.location(step), step, files[STOCK_RECORD_NAME].modified_s) if is_stock else None
    try:
        damage = store.damage(step)
        data = read_if_there(store.location(step), MANIFEST_NAME)
    except CheckpointNotFoundError:
        return None  # it was deleted meanwhile
    try:
        manifest = parse_or_take(data or b"", MANIFEST_NAME)
    except CheckpointError:
        manifest = Manifest({}, {}, {})
    return _listing(step, "ray_ckpt", manifest, damage, record.modified_s)


def _list_foreign(directory: Storage, step: int | None, saved_s: float | None) -> StepListing:
    try:
        opened = open_record(directory)
    except CheckpointError as error:
        return _listing(step, "another program's", Manifest({}, {}, {}), str(error), saved_s)
    return _listing(step, opened.kind, opened.manifest, "", saved_s)


def _alone(target: Target, store: CheckpointStore) -> StoreListing:
    """A checkpoint that is no step of a store."""
    found = committed_at(target, None).storage
    opened = open_record(found)
    problem = size_problem(opened)
    # Whose directory holds other things too is not listed for the sake of a time.
    scanned = {} if is_file(found) else opened.files.scan()
    times = [file.modified_s for name, file in scanned.items() if name in opened.manifest.files]
    saved_s = max((time for time in times if time is not None), default=None)
    return StoreListing(store.address, (_listing(None, opened.kind, opened.manifest, problem, saved_s),), None)


def _listing(step: int | None, kind: str, manifest: Manifest, damage: str, saved_s: float | None) -> StepListing:
    return StepListing(
        step=step,
        kind=kind,
        damage=damage,
        saved_s=saved_s,
        total_bytes=manifest.total_bytes,
        num_tensors=len(manifest.tensors),
        layout=manifest.layout,
        saved_by=manifest.saved_by,
        pinned=False,
    )
