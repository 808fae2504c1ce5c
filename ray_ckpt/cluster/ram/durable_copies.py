"""Steps on their way from memory to a durable store, in the background.

order ──> waiting ── a thread of the index, the newest first ──> keepers: each copies files that it holds
                                                                 one of them commits
a failure ──> told by `report`, and tried again: after a growing while, or when the next order comes
what cannot become durable any more ──> given up, and told until a later step is durable
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import ray
import tenacity
from ray.exceptions import GetTimeoutError, RayTaskError

from ray_ckpt.cluster.ram.eviction import in_store
from ray_ckpt.cluster.ram.keeper import COPIES
from ray_ckpt.cluster.ram.records import Found
from ray_ckpt.errors import CheckpointExistsError, RayCkptError, StorageError
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.report import CopyReport
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.registered import CopyOrder
from ray_ckpt.storage.step_names import directory_of, parse_steps
from ray_ckpt.text import first_line

COPY_OUT_S = 3600.0
"""How long a keeper may take to copy its files of a step."""

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
"""Time from a failure to the next try, which doubles up to the longest."""

_logger = logging.getLogger("ray_ckpt")


@dataclass
class _Waiting:
    """A step that is to be copied."""

    target: Storage
    """Its directory in the durable store."""
    key: str
    """Key of its record in memory, which tells one attempt from another."""
    overwrite: bool
    problem: str = ""


class DurableCopies:
    """What is to be copied, and the thread that has it done.

    Args:
        store: name of the store in memory.
        lock: the index's own, which is held while its files are looked at.
        files_below: a directory's files: path in it -> where they are.
        keeper_of: the keeper of a node; None for one that does not answer.
    """

    def __init__(
        self,
        store: str,
        lock: AbstractContextManager[Any],
        files_below: Callable[[str], Mapping[str, Found]],
        keeper_of: Callable[[str], Any | None],
    ) -> None:
        self._store = store
        self._lock = lock
        self._files_below = files_below
        self._keeper_of = keeper_of
        self._waiting: dict[str, _Waiting] = {}
        self._given_up: dict[str, str] = {}
        self._done: dict[str, str] = {}
        """Directory -> key of the record that has been copied."""
        self._ordered = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> frozenset[str]:
        """Directories of steps that are to be copied."""
        with self._lock:
            return frozenset(self._waiting)

    def order(self, order: CopyOrder) -> CopyReport:
        """Take an order. Also what an index that was lost had been ordered, and has not been copied, is copied now."""
        with self._lock:
            files = self._files_below(order.source)
            for step in parse_steps(path.removesuffix(f"/{MANIFEST_NAME}") for path in files):
                record = files.get(f"{directory_of(step)}/{MANIFEST_NAME}")
                if record is not None and (step == order.step or step % order.every == 0):
                    self._take(order, step, record.key)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="ray_ckpt-ram-copies", daemon=True)
                self._thread.start()
        self._ordered.set()
        return self.report(order.source)

    def _take(self, order: CopyOrder, step: int, key: str) -> None:
        directory = in_store(order.source, directory_of(step))
        before = self._waiting.get(directory)
        if self._done.get(directory) == key or (before is not None and before.key == key):
            return
        if directory in self._given_up and step != order.step:
            return
        self._given_up.pop(directory, None)
        overwrite = order.overwrite and step == order.step
        self._waiting[directory] = _Waiting(order.target.child(directory_of(step)), key, overwrite)

    def report(self, store: str) -> CopyReport:
        """What has not been copied of a store in this memory."""
        with self._lock:
            self._forget_gone()
            waiting = {directory: item.problem for directory, item in self._waiting.items()}
            return CopyReport(_by_step(store, waiting), _by_step(store, self._given_up))

    # ------------------------------------------------------------------------------------------------ copying

    def _work(self) -> None:
        while True:
            self._ordered.wait()
            tenacity.Retrying(
                wait=tenacity.wait_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
                retry=tenacity.retry_if_result(lambda some_are_left: some_are_left),
                sleep=tenacity.sleep_using_event(self._ordered),
            )(self._try_all)

    def _try_all(self) -> bool:
        """Try what waits, the newest first. Returns whether some are left."""
        self._ordered.clear()
        with self._lock:
            self._forget_gone()
            todo = sorted(self._waiting.items(), key=lambda entry: _step_of(entry[0]), reverse=True)
        for directory, item in todo:
            try:
                self._copy(directory, item)
            except CheckpointExistsError as error:
                self._give_up(directory, item, first_line(error))
            except Exception as error:
                item.problem = first_line(error)
                _logger.warning("ram://%s/%s is not durable: %s", self._store, directory, item.problem)
                if isinstance(error, StorageError) and error.path.startswith(item.target.address):
                    break  # the others would wait for the same storage
            else:
                self._is_durable(directory, item)
        with self._lock:
            return bool(self._waiting)

    def _copy(self, directory: str, item: _Waiting) -> None:
        """Let the keepers copy a step, and one of them commit it."""
        source = Storage(f"ram://{self._store}/{directory}")
        with self._lock:
            shares, committer = self._shares(directory)
        _all_of(
            [keeper.copy_out.options(concurrency_group=COPIES).remote(source, item.target, files)
             for keeper, files in shares]
        )  # fmt: skip
        _all_of([committer.commit_out.options(concurrency_group=COPIES).remote(source, item.target, item.overwrite)])

    def _shares(self, directory: str) -> tuple[list[tuple[Any, list[str]]], Any]:
        """Keepers and the files that each is to look after, of those that it holds; and the keeper that commits."""
        shares: dict[str, list[str]] = defaultdict(list)
        num_bytes: dict[str, int] = defaultdict(int)
        for name, file in self._files_below(directory).items():
            holders = [node for node in file.copies if self._keeper_of(node) is not None]
            if not holders:
                raise OSError(f"no node that answers holds {directory}/{name}")
            node = min(holders, key=lambda holder: num_bytes[holder])
            num_bytes[node] += file.num_bytes
            shares[node].append(name)
        [committer] = [node for node, files in shares.items() if MANIFEST_NAME in files]
        return [(self._keeper_of(node), files) for node, files in shares.items()], self._keeper_of(committer)

    # ------------------------------------------------------------------------------------------------- endings

    def _is_durable(self, directory: str, item: _Waiting) -> None:
        """Note that a step has been copied. Nobody misses any more what was given up before it."""
        with self._lock:
            self._done[directory] = item.key
            if self._waiting.get(directory) is item:
                del self._waiting[directory]
            store, step = directory.rpartition("/")[0], _step_of(directory)
            for other in list(self._given_up):
                if other.rpartition("/")[0] == store and _step_of(other) < step:
                    del self._given_up[other]

    def _give_up(self, directory: str, item: _Waiting, why: str) -> None:
        _logger.warning("ram://%s/%s does not become durable: %s", self._store, directory, why)
        with self._lock:
            if self._waiting.get(directory) is item:
                del self._waiting[directory]
                self._given_up[directory] = why

    def _forget_gone(self) -> None:
        """Give up what is no longer in memory."""
        for directory, item in list(self._waiting.items()):
            if MANIFEST_NAME not in self._files_below(directory):
                self._give_up(directory, item, f"it is no longer in memory{item.problem and f'; {item.problem}'}")


def _all_of(refs: list[Any]) -> None:
    """Wait for all of these calls. The first failure is raised as the callee raised it."""
    try:
        ray.get(refs, timeout=COPY_OUT_S)
    except GetTimeoutError as error:
        raise TimeoutError(f"a keeper has not copied its part within {COPY_OUT_S:g} s") from error
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, (RayCkptError, OSError)) else error) from None


def _by_step(store: str, directories: Mapping[str, str]) -> dict[int, str]:
    return {_step_of(path): text for path, text in directories.items() if path.rpartition("/")[0] == store}


def _step_of(directory: str) -> int:
    [step] = parse_steps([directory.rpartition("/")[2]])
    return step
