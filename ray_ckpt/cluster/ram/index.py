"""The actor that knows which file is where.

There is one for each `ram://NAME`. When its process or node is lost, Ray starts it anew elsewhere, and it asks the
keepers what they hold. No call of a client is answered before a file has all the copies that it is to have.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_ckpt.cluster.metrics import MemoryFill
from ray_ckpt.cluster.ram.durable_copies import DurableCopies
from ray_ckpt.cluster.ram.eviction import superseded
from ray_ckpt.cluster.ram.holds import File, Holds
from ray_ckpt.cluster.ram.keeper import COPIES, COPY_S, Keeper, Place
from ray_ckpt.cluster.ram.nodes import alive_nodes, head_node
from ray_ckpt.cluster.ram.records import Begun, Found, Options, Refusal
from ray_ckpt.cluster.ray_internals import has_ended
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.report import CopyReport
from ray_ckpt.storage.publish import STOCK_RECORD_NAME
from ray_ckpt.storage.registered import CopyOrder
from ray_ckpt.text import first_line
from ray_ckpt.text_units import format_bytes

NAMESPACE = "ray_ckpt"
"""Ray's namespace of all these actors, whatever namespace a process is in."""

WATCH_S = 1.0
"""Time between two looks at the keepers, the writers and the owner."""

ANSWER_S = 10.0
"""How long a keeper may take for an answer without bytes. One that does not answer is not asked for files."""

CALLS_AT_ONCE = 64
KEEPER_CALLS_AT_ONCE = 8

_logger = logging.getLogger("ray_ckpt")


@dataclass
class _Writing:
    path: str
    node: str
    targets: Sequence[str]
    """The nodes that get copies."""
    writer_pid: int
    num_bytes: int = 0
    """Bytes that are kept free for it on each of these nodes."""
    place: Place | None = None


@dataclass
class _Node:
    keeper: Any
    capacity: int
    answers: bool = True


def index_name(store: str) -> str:
    return f"ray_ckpt ram {store}"


def keeper_name(store: str, node: str) -> str:
    return f"ray_ckpt ram {store} on {node}"


def start_index(store: str, options: Options) -> Any:
    """The index of a store, started if there is none."""
    settings: dict[str, Any] = {
        "name": index_name(store),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": CALLS_AT_ONCE,
        # That node's end is the cluster's; only the loss of its process makes the index start anew.
        "scheduling_strategy": NodeAffinitySchedulingStrategy(head_node(), soft=True),
    }
    return ray.remote(**settings)(Index).remote(store, options, ray.get_runtime_context().get_job_id())


def find_index(store: str) -> Any | None:
    """The index of a store, if there is one."""
    with contextlib.suppress(ValueError):
        return ray.get_actor(index_name(store), namespace=NAMESPACE)
    return None


class Index:
    """Which file is where.

    Args:
        store: name of the store.
        job_id: the job of Ray that began it.
    """

    def __init__(self, store: str, options: Options, job_id: str) -> None:
        self._store = store
        self._options = options
        self._job_id = job_id
        self._lock = threading.RLock()
        self._starting = threading.Lock()
        self._files: dict[str, File] = {}
        self._writing: dict[str, _Writing] = {}
        self._nodes: dict[str, _Node] = {}
        self._version = 0
        self._holds = Holds()
        self._fill = MemoryFill(store)
        self._durable = DurableCopies(store, self._lock, self._found_below, self._keeper_of)
        self._find_keepers()
        threading.Thread(target=self._watch, name="ray_ckpt-ram-watch", daemon=True).start()

    def options(self) -> Options:
        return self._options

    # ------------------------------------------------------------------------------------------------- reading

    def find(self, paths: Sequence[str], hold: str = "") -> list[Found | None]:
        """These files, of those that a hold sees if there is one; None for one that is not there."""
        with self._lock:
            files = self._seen_by(hold)
            return [None if (file := files.get(path)) is None else file.found for path in paths]

    def below(self, directory: str, hold: str = "") -> list[tuple[str, int, float]]:
        """Path, bytes and time of every file below a directory."""
        with self._lock:
            return [(p, f.num_bytes, f.modified_s) for p, f in _below(self._seen_by(hold), directory).items()]

    def hold(self, directory: str, within: str = "") -> str:
        """Keep the files below a directory as they are now, or as another hold sees them, for a reader, until it
        releases or no longer renews it."""
        with self._lock:
            return self._holds.begin(_below(self._seen_by(within), directory))

    def renew(self, hold: str) -> None:
        """Let a hold last."""
        with self._lock:
            self._holds.renew(hold)

    def release(self, hold: str) -> None:
        """End a hold."""
        with self._lock:
            freed = self._holds.end(hold)
        for file in freed:
            self._free(file)

    def _seen_by(self, hold: str) -> Mapping[str, File]:
        held = self._holds.files(hold)
        return self._files if held is None else held

    def nodes(self) -> dict[str, tuple[int, int]]:
        """Node id -> bytes that files take there, and that they may take."""
        with self._lock:
            return {node: (self._used(node), there.capacity) for node, there in self._nodes.items()}

    # ------------------------------------------------------------------------------------------------- writing

    def begin(self, path: str, node: str, writer_pid: int, num_bytes: int) -> Begun | Refusal:
        """An empty file in a node's memory, and room for it and its copies.

        Args:
            num_bytes: how long it will be, as far as that is known.
        """
        key = uuid.uuid4().hex
        writing = _Writing(path, node, self._targets(node, alive_nodes()), writer_pid)
        try:
            keeper = self._keeper_on(node).keeper
            if no_room := self._reserve(key, writing, num_bytes):
                return no_room
            writing.place = ray.get(keeper.create.remote(key), timeout=ANSWER_S)
        except RayError as error:
            self.abandon(key)
            return Refusal(errno.EIO, f"node {node} cannot hold a file: {first_line(error)}")
        return Begun(key, writing.place)

    def put(self, key: str) -> int | Refusal:
        """Give a file that is written its copies, then its name. Returns the number of copies."""
        with self._lock:
            writing = self._writing.get(key)
        if writing is None:
            return self._put_before(key)
        try:
            source = self._keeper_on(writing.node).keeper
            num_bytes: int = ray.get(source.size.remote(key), timeout=ANSWER_S)
        except RayError as error:
            reason = f"node {writing.node}, which it was written on, does not hold it: {first_line(error)}"
            return Refusal(errno.EIO, reason)
        if no_room := self._reserve(key, writing, num_bytes):
            return no_room
        assert writing.place is not None
        copies = {writing.node: writing.place, **self._copy(key, num_bytes, writing.place, writing.targets)}
        with self._lock:
            self._version += 1
            file = File(writing.path, key, self._version, num_bytes, time.time(), copies)
        self._name(file)
        with self._lock:
            replaced = self._files.get(file.path)
            self._files[file.path] = file
            del self._writing[key]
        if replaced is not None:
            self._free(replaced)
        return len(copies)

    def _put_before(self, key: str) -> int | Refusal:
        """A put that was carried out, and whose answer was lost."""
        with self._lock:
            done = [file for file in self._files.values() if file.key == key]
        return len(done[0].copies) if done else Refusal(errno.EIO, "the index was lost while it was written")

    def abandon(self, key: str) -> None:
        """Free a file that gets no name."""
        with self._lock:
            writing = self._writing.pop(key, None)
        if writing is not None:
            self._tell([writing.node], key)

    def delete(self, path: str) -> bool:
        """Remove a file. Returns whether it was there."""
        with self._lock:
            file = self._files.pop(path, None)
        if file is not None:
            self._free(file)
        return file is not None

    def drop(self) -> None:
        """End the keepers, and what they hold. Whoever asks ends this actor."""
        with self._lock:
            keepers = [there.keeper for there in self._nodes.values()]
            self._files.clear()
        for keeper in keepers:
            ray.kill(keeper)

    # ------------------------------------------------------------------------------------------------ durable

    def copy_out(self, order: CopyOrder) -> CopyReport:
        """Have steps copied to a durable store."""
        return self._durable.order(order)

    def copying(self, store: str) -> CopyReport:
        """What of a store has not been copied yet."""
        return self._durable.report(store)

    def _found_below(self, directory: str) -> dict[str, Found]:
        start = len(directory) + 1 if directory else 0
        return {path[start:]: file.found for path, file in _below(self._files, directory).items()}

    def _keeper_of(self, node: str) -> Any | None:
        there = self._nodes.get(node)
        return None if there is None or not there.answers else there.keeper

    # ------------------------------------------------------------------------------------------------- copies

    def _targets(self, node: str, alive: set[str]) -> list[str]:
        """The nodes that get copies of what is written on this one: the next ones in a ring.

        Nodes that hold files already come first, so that a ring of the workers' nodes does not lead over others.
        """
        with self._lock:
            held = {name for name, there in self._nodes.items() if there.answers}
        ring = sorted(alive, key=lambda name: (name <= node, name))
        others = [name for name in ring if name != node and name in held]
        others += [name for name in ring if name != node and name not in held]
        return others[: self._options.replicas]

    def _copy(self, key: str, num_bytes: int, source: Place, targets: Iterable[str]) -> dict[str, Place]:
        """Copy a file from where it lies to other nodes. Those that fail are left out."""
        refs = {}
        for target in targets:
            with contextlib.suppress(RayError):
                refs[target] = self._keeper_on(target).keeper.copy.remote(key, source.door, num_bytes)
        made = {}
        for target, ref in refs.items():
            try:
                made[target] = ray.get(ref, timeout=COPY_S)
            except RayError as error:
                _logger.warning("no copy of a file of ram://%s on node %s: %s", self._store, target, first_line(error))
        return made

    def _name(self, file: File) -> None:
        asked = [
            self._nodes[node].keeper.name.remote(file.key, file.path, file.version, file.modified_s)
            for node in file.copies
            if node in self._nodes
        ]
        _wait(asked)

    def _free(self, file: File) -> None:
        with self._lock:
            is_held = self._holds.keep(file)
            keepers = [self._nodes[node].keeper for node in file.copies if node in self._nodes]
        _wait([(keeper.unname if is_held else keeper.drop).remote(file.key) for keeper in keepers])

    def _tell(self, nodes: Iterable[str], key: str) -> None:
        with self._lock:
            keepers = [self._nodes[node].keeper for node in nodes if node in self._nodes]
        _wait([keeper.drop.remote(key) for keeper in keepers])

    # --------------------------------------------------------------------------------------------------- room

    def _used(self, node: str) -> int:
        used = sum(file.num_bytes for file in self._files.values() if node in file.copies)
        used += self._holds.kept_bytes(node)
        return used + sum(w.num_bytes for w in self._writing.values() if node in (w.node, *w.targets))

    def _reserve(self, key: str, writing: _Writing, num_bytes: int) -> Refusal | None:
        """Keep room free for a file on each of its nodes. Superseded steps make it, the oldest first."""
        path = writing.path
        while True:
            with self._lock:
                self._writing[key] = writing
                writing.num_bytes = 0
                short = self._short((writing.node, *writing.targets), num_bytes)
                if short is None:
                    writing.num_bytes = num_bytes
                    return None
                waiting, held = self._durable.waiting, self._holds.directories
                directory = superseded(self._files, path, {*waiting, *held}) or superseded(self._files, path, held)
                gone = [] if directory is None else [p for p in self._files if p.startswith(f"{directory}/")]
            if not gone:
                self.abandon(key)
                return short
            text = "ram://%s/%s is removed to make room for %s" + ", before it was durable" * (directory in waiting)
            _logger.warning(text, self._store, directory, path)
            # The record goes first: from then on the step does not exist.
            for name in sorted(gone, key=lambda p: p != f"{directory}/{MANIFEST_NAME}"):
                self.delete(name)

    def _short(self, nodes: Sequence[str], num_bytes: int) -> Refusal | None:
        for node in nodes:
            if node in self._nodes and self._used(node) + num_bytes > self._nodes[node].capacity:
                return Refusal(
                    errno.ENOSPC,
                    f"no room for {format_bytes(num_bytes)} on node {node}: ram://{self._store} takes "
                    f"{format_bytes(self._used(node))} of {format_bytes(self._nodes[node].capacity)} there"
                    f"{self._holds.told(node)}, and no older step is left that could go; keep fewer steps, or give it "
                    "more with ?capacity_bytes=",
                )
        return None

    # ------------------------------------------------------------------------------------------------- keepers

    def _keeper_on(self, node: str) -> _Node:
        with self._lock:
            if node in self._nodes:
                return self._nodes[node]
        with self._starting:
            with self._lock:
                if node in self._nodes:
                    return self._nodes[node]
            settings: dict[str, Any] = {
                "name": keeper_name(self._store, node),
                "namespace": NAMESPACE,
                "lifetime": "detached",
                "get_if_exists": True,
                "num_cpus": 0,
                "max_restarts": 0,
                "max_concurrency": KEEPER_CALLS_AT_ONCE,
                "concurrency_groups": {COPIES: 1},  # a durable store that hangs leaves the keeper's other calls alone
                "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
            }
            there = self._node(ray.remote(**settings)(Keeper).remote())
            with self._lock:
                self._nodes[node] = there
            return there

    def _node(self, keeper: Any) -> _Node:
        capacity = self._options.capacity_bytes
        return _Node(keeper, ray.get(keeper.capacity.remote(), timeout=COPY_S) if capacity is None else capacity)

    def _find_keepers(self) -> None:
        """What there is already, when this index takes the place of one that was lost."""
        prefix = keeper_name(self._store, "")
        for actor in ray.util.list_named_actors(all_namespaces=True):
            node = str(actor["name"]).removeprefix(prefix)
            if actor["namespace"] != NAMESPACE or not str(actor["name"]).startswith(prefix):
                continue
            try:
                keeper = ray.get_actor(actor["name"], namespace=NAMESPACE)
                named = ray.get(keeper.named.remote(), timeout=ANSWER_S)
                self._nodes[node] = self._node(keeper)
            except (RayError, ValueError):
                continue
            for key, path, version, modified_s, num_bytes, place in named:
                self._version = max(self._version, version)
                known = self._files.get(path)
                if known is None or known.version < version:
                    self._files[path] = File(path, key, version, num_bytes, modified_s, {node: place})
                elif known.key == key:
                    known.copies[node] = place

    # ------------------------------------------------------------------------------------------------ watching

    def _watch(self) -> None:
        while ray.is_initialized():  # where it no longer is, this process ends, and a call would begin another Ray
            time.sleep(WATCH_S)
            try:
                if self._options.lifetime == "job" and has_ended(self._job_id):
                    self.drop()
                    ray.kill(ray.get_actor(index_name(self._store), namespace=NAMESPACE))
                    return
                self._look_at_keepers()
                self._restore_copies()
                with self._lock:
                    overdue = self._holds.overdue()
                for hold in overdue:
                    self.release(hold)
                self._fill.tell(self.nodes())
            except Exception:
                _logger.exception("ram://%s: the look at its keepers failed", self._store)

    def _look_at_keepers(self) -> None:
        with self._lock:
            asked = {
                node: there.keeper.ended.remote([w.writer_pid for w in self._writing.values() if w.node == node])
                for node, there in self._nodes.items()
            }
        for node, ref in asked.items():
            try:
                ended = ray.get(ref, timeout=ANSWER_S)
            except ray.exceptions.GetTimeoutError:
                self._nodes[node].answers = False
            except RayError:
                self.lost(node)
            else:
                self._nodes[node].answers = True
                with self._lock:
                    left = [k for k, w in self._writing.items() if w.node == node and w.writer_pid in ended]
                for key in left:
                    self.abandon(key)

    def lost(self, node: str) -> None:
        """Forget what a node held. A step of which a file is lost everywhere is no longer whole: its record goes."""
        with self._lock:
            if self._nodes.pop(node, None) is None:
                return
            for file in self._files.values():
                file.copies.pop(node, None)
            self._holds.lost(node)
            gone = [path for path, file in self._files.items() if not file.copies]
            for path in gone:
                del self._files[path]
            directories = {path.rpartition("/")[0] for path in gone}
        _logger.warning("ram://%s lost node %s; %d files with it", self._store, node, len(gone))
        for directory in directories:
            for record in (MANIFEST_NAME, STOCK_RECORD_NAME):
                self.delete(f"{directory}/{record}".lstrip("/"))

    def _restore_copies(self) -> None:
        with self._lock:
            short = [file for file in self._files.values() if 0 < len(file.copies) <= self._options.replicas]
        alive = alive_nodes() if short else set()
        for file in short:
            source = next(iter(file.copies))
            wanted = [node for node in self._targets(source, alive) if node not in file.copies]
            wanted = wanted[: self._options.replicas + 1 - len(file.copies)]
            if not wanted or self._short(wanted, file.num_bytes):
                continue
            made = self._copy(file.key, file.num_bytes, file.copies[source], wanted)
            with self._lock:
                is_current = self._files.get(file.path) is file
                if is_current:
                    file.copies.update(made)
            if is_current:
                self._name(file)
            else:
                self._tell(made, file.key)


def _below(files: Mapping[str, File], directory: str) -> dict[str, File]:
    prefix = f"{directory}/" if directory else ""
    return {path: file for path, file in files.items() if path.startswith(prefix)}


def _wait(asked: Iterable[Any]) -> None:
    """Until keepers have answered; one that is lost is noticed by the watch."""
    for ref in asked:
        with contextlib.suppress(RayError):
            ray.get(ref, timeout=ANSWER_S)
