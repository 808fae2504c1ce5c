"""A random walk over a store, against a model: begin, write, crash, commit, prune, delete, pin and clean in any order.

After every step: the latest committed step loads, and is the one that the model says; whatever is committed is whole;
nothing that is pinned, or that somebody else put there, has gone.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

import ray_ckpt
from ray_ckpt.dcp.reader import ArrowStorageReader
from ray_ckpt.errors import CheckpointError, CheckpointNotFoundError, UsageError
from ray_ckpt.format import dcp_metadata
from ray_ckpt.protocol.coordinator import Coordinator
from ray_ckpt.protocol.rank_save import PlanMemory, RankSave
from ray_ckpt.storage.audit import verify_share
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.retention import keep, keep_every, keep_last
from ray_ckpt.storage.store import CheckpointStore

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

T = TypeVar("T")
STEPS = st.integers(0, 5)
OPERATIONS = st.integers(1, 25)
POLICIES = st.lists(
    st.one_of(
        st.integers(1, 3).map(keep_last), st.integers(1, 3).map(keep_every), st.sets(STEPS, max_size=2).map(keep)
    ),
    min_size=1,
    max_size=2,
)


class Crash(BaseException):
    """The end of a process: nothing tidies up after it."""


class Mortal(Storage):
    """Crashes at its k-th operation, its children's included, before or in place of it."""

    def __init__(self, target: str, die_at: int) -> None:
        super().__init__(target)
        self.left = [die_at]

    def perform(self, operation: str, name: str, action: Callable[[], T]) -> T:
        self.left[0] -= 1
        if self.left[0] == 0:
            raise Crash
        return super().perform(operation, name, action)


class Attempt:
    """A save that is under way: written, and not committed yet."""

    def __init__(self, storage: Storage, step: int, version: int) -> None:
        self.step, self.version = step, version
        self.coordinator = Coordinator(storage, overwrite=True)
        writer = RankSave(storage)
        plan = writer.plan(state(version), PlanMemory(), frozenset())
        [assignment] = self.coordinator.merge([plan])
        self.coordinator.check([writer.write(assignment)])

    def commit(self) -> None:
        self.coordinator.publish(dcp_metadata.dumps(self.coordinator.manifest))


def state(version: int) -> dict[str, Any]:
    return {"weight": torch.arange(50.0) + version, "version": version}


class Walk(RuleBasedStateMachine):
    attempts = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="ray-ckpt-walk-"))
        self.store = CheckpointStore(self.root)
        self.version = 0
        self.committed: dict[int, int] = {}
        """Step -> version."""
        self.pinned: set[int] = set()
        self.condemned: set[int] = set()
        """Committed steps whose delete was cut off: a clean-up may finish it."""
        self.under_way = 0
        self.foreign: dict[Path, bytes] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    def next_version(self) -> int:
        self.version += 1
        return self.version

    def found(self, step: int) -> int | None:
        """The version that is committed now."""
        try:
            version: int = self.store.manifest(step).values()["version"]
        except CheckpointNotFoundError:
            return None
        return version

    def believe(self, step: int, *allowed: int | None) -> None:
        """After a crash: take what is there for true, if it is one of what may be there."""
        version = self.found(step)
        assert version in allowed
        if version is None:
            self.committed.pop(step, None)
        else:
            self.committed[step] = version

    def some_committed(self, number: int) -> int:
        """One of the committed steps, and 0 when there is none."""
        steps = sorted(self.committed)
        return steps[number % len(steps)] if steps else 0

    # ------------------------------------------------------------------------------------------------- saving

    @initialize()
    def save_some(self) -> None:
        for step in (0, 1, 4):
            self.save(step)

    @rule(step=STEPS)
    def save(self, step: int) -> None:
        if step in self.committed:
            with pytest.raises(UsageError, match="already holds"):
                ray_ckpt.save(state(0), self.store, step=step)
            return
        ray_ckpt.save(state(self.next_version()), self.store, step=step)
        self.committed[step] = self.version

    @rule(target=attempts, step=STEPS)
    def begin_and_write(self, step: int) -> Attempt:
        self.under_way += 1
        return Attempt(self.store.location(step), step, self.next_version())

    @rule(attempt=consumes(attempts))
    def commit(self, attempt: Attempt) -> None:
        attempt.commit()
        self.under_way -= 1
        self.committed[attempt.step] = attempt.version
        self.condemned.discard(attempt.step)

    @rule(attempt=consumes(attempts))
    def give_up(self, attempt: Attempt) -> None:
        self.under_way -= 1

    @rule(step=STEPS, die_at=OPERATIONS)
    def crash_in_a_save(self, step: int, die_at: int) -> None:
        storage = CheckpointStore(Mortal(str(self.root), die_at))
        try:
            ray_ckpt.save(state(self.next_version()), storage, step=step, overwrite=True)
        except Crash:
            self.believe(step, self.version, self.committed.get(step))
        else:
            self.committed[step] = self.version
        if self.committed.get(step) == self.version:
            self.condemned.discard(step)

    # ----------------------------------------------------------------------------------------------- removing

    @rule(step=STEPS)
    def delete(self, step: int) -> None:
        if step not in self.committed:
            with pytest.raises(CheckpointNotFoundError):
                self.store.delete(step)
        elif step in self.pinned:
            with pytest.raises(UsageError, match="is pinned"):
                self.store.delete(step)
        else:
            assert self.store.delete(step).removed == (step,)
            del self.committed[step]
            self.condemned.discard(step)

    @rule(number=STEPS, die_at=st.integers(6, 16))
    def crash_in_a_delete(self, number: int, die_at: int) -> None:
        step = self.some_committed(number)
        before = self.committed.get(step)
        with contextlib.suppress(Crash, CheckpointNotFoundError, UsageError):
            CheckpointStore(Mortal(str(self.root), die_at)).delete(step)
        if step in self.pinned:
            self.believe(step, before)
        else:
            self.believe(step, before, None)
            self.condemned = (self.condemned | {step}) & self.committed.keys()

    @rule(policies=POLICIES)
    def prune(self, policies: list[Any]) -> None:
        rehearsal = self.store.prune(*policies, dry_run=True)
        report = self.store.prune(*policies)
        assert rehearsal.removed == report.removed
        self.after_prune(policies, set(self.committed) - set(report.removed))

    @rule(policies=POLICIES, die_at=OPERATIONS)
    def crash_in_a_prune(self, policies: list[Any], die_at: int) -> None:
        try:
            CheckpointStore(Mortal(str(self.root), die_at)).prune(*policies)
        except Crash:
            self.condemned |= self.committed.keys() - self.pinned - self.must_stay(policies)
        self.after_prune(policies, set(self.store.steps()), whole=False)

    def must_stay(self, policies: list[Any]) -> set[int]:
        steps = sorted(self.committed)
        chosen = {step for policy in policies for step in policy.choose(steps)}
        return chosen | (self.pinned & set(steps)) | set(steps[-1:])

    def after_prune(self, policies: list[Any], left: set[int], *, whole: bool = True) -> None:
        must_stay = self.must_stay(policies)
        assert must_stay <= left <= self.committed.keys()
        assert not whole or left == must_stay
        self.committed = {step: self.committed[step] for step in left}
        self.condemned &= left

    @precondition(lambda self: self.under_way == 0)
    @rule()
    def clean(self) -> None:
        before = dict(self.committed)
        self.store.clean(older_than_s=0)
        for step, version in before.items():
            may_go = step in self.condemned and step not in self.pinned
            self.believe(step, version, *([None] if may_go else []))
        self.condemned.clear()
        self.pinned &= self.committed.keys()
        # Nothing is left but what is committed, and what others put there.
        ours = {file for step in self.committed for file in self.files_of(step)}
        kept = {self.root / ".pins", *self.foreign}
        strangers = {
            path
            for path in self.root.glob("**/*")
            if path.is_file() and path not in ours and path not in kept and self.root / ".pins" not in path.parents
        }
        assert strangers == set()

    def files_of(self, step: int) -> set[Path]:
        directory = self.root / f"step-{step}"
        names = {*self.store.manifest(step).files, "manifest.json", ".metadata"}
        return {directory / name for name in names}

    @rule()
    def clean_what_is_old(self) -> None:
        assert self.store.clean().files == ()

    # --------------------------------------------------------------------------------------- pins and strangers

    @rule(step=STEPS)
    def pin(self, step: int) -> None:
        try:
            self.store.pin(step)
        except CheckpointNotFoundError:
            assert step not in self.committed
        except CheckpointError:
            # A delete that was cut off has begun: the pin is there all the same, and nobody else deletes now.
            assert step in self.committed
            self.pinned.add(step)
        else:
            assert step in self.committed
            self.pinned.add(step)

    @rule(step=STEPS)
    def unpin(self, step: int) -> None:
        self.store.unpin(step)
        self.pinned.discard(step)

    @rule(step=STEPS, name=st.sampled_from(["notes.txt", "__0_0.distcp", "model.safetensors"]))
    def somebody_else_writes(self, step: int, name: str) -> None:
        path = self.root / f"step-{step}" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"theirs")
        self.foreign[path] = b"theirs"

    # ---------------------------------------------------------------------------------------------- always true

    @invariant()
    def the_latest_step_loads(self) -> None:
        assert self.store.steps() == tuple(sorted(self.committed))
        latest = max(self.committed, default=None)
        assert self.store.latest() == latest
        if latest is None:
            return
        found = state(-1)
        dcp.load(found, storage_reader=ArrowStorageReader(self.store.location(latest)), no_dist=True)
        assert found["version"] == self.committed[latest]
        assert torch.equal(found["weight"], state(self.committed[latest])["weight"])

    @invariant()
    def what_is_committed_is_whole(self) -> None:
        for step, version in self.committed.items():
            assert self.found(step) == version
            damages = verify_share(self.store.location(step)).damages
            # Two attempts at one step may leave stock DCP without its record, as the store's docstring says.
            assert [damage for damage in damages if damage.file != ".metadata"] == []

    @invariant()
    def nothing_pinned_or_foreign_has_gone(self) -> None:
        assert self.pinned <= self.committed.keys() | set(self.store.pins())
        assert (self.pinned & set(self.store.pins())) == self.pinned
        for path, data in self.foreign.items():
            assert path.read_bytes() == data


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=10, stateful_step_count=25, deadline=None, database=None)
