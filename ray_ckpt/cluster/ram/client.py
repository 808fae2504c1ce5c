"""`ram://NAME` as a process of the cluster sees it.

A file of the own node is opened through `/proc` and costs what a local file costs; only where it lies, and that it is
whole, is told by the index.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from ray_ckpt.cluster.connect import join_running
from ray_ckpt.cluster.ram.holds import RENEW_S
from ray_ckpt.cluster.ram.index import find_index, start_index
from ray_ckpt.cluster.ram.keeper import Place, label, read_fully
from ray_ckpt.cluster.ram.records import Begun, Found, Options, Refusal
from ray_ckpt.cluster.ram.sending import receive, receive_cuts
from ray_ckpt.cluster.ray_internals import ask_actor
from ray_ckpt.errors import UsageError
from ray_ckpt.report import CopyReport
from ray_ckpt.storage import registered
from ray_ckpt.storage.address import Address
from ray_ckpt.storage.cuts import Cut
from ray_ckpt.text import first_line

INDEX_ANSWER_S = 900.0
"""How long the index may take: it answers a `put` when all copies are made."""

PIECE_ANSWER_S = 60.0
"""How long another node may take to send a piece, before another copy is tried."""

_logger = logging.getLogger("ray_ckpt")


def open_files(address: Address) -> RamFiles:
    """The files of `ram://NAME?replicas=1&capacity_bytes=...&lifetime=job`.

    Raises:
        UsageError: an option is not known or has a value that it cannot have, or no cluster is running.
    """
    _join(address.display)
    given = dict(urllib.parse.parse_qsl(address.options, keep_blank_values=True))
    hold = given.pop(registered.HOLD, "")
    return RamFiles(address.place, _options(given), is_explicit=bool(given), hold=hold)


def _join(store: str) -> None:
    if not join_running():
        raise UsageError(
            f"{store} is memory of a Ray cluster, and none is running here: set RAY_ADDRESS to one, call ray.init() "
            "first, or run in a task, an actor or a job of Ray"
        )


def _options(given: Mapping[str, str]) -> Options:
    values: dict[str, Any] = {}
    for name, text in given.items():
        if name in ("replicas", "capacity_bytes") and text.isdecimal():
            values[name] = int(text)
        elif name == "lifetime" and text in ("job", "detached"):
            values[name] = text
        else:
            raise UsageError(
                f"ram:// has no option {name}={text}: it takes replicas=1 (number of nodes besides the writer's that "
                "hold a file), capacity_bytes=8589934592 (on each node) and lifetime=job or lifetime=detached"
            )
    return Options(**values)


def drop_memory(name: str) -> bool:
    """Free all that `ram://NAME` holds, on all nodes. Readers that have a file of their own node open keep that one.

    Example:
        >>> import torch
        >>> from ray_ckpt import WorkerGroup, cluster
        >>> def state_of(ctx):
        ...     return ctx.objects.setdefault("stage", {f"stage{ctx.rank}": torch.ones(3)})
        >>> with WorkerGroup(2, process_group=False) as group:
        ...     report = cluster.save(group, state_of, "ram://example")
        ...     cluster.drop_memory("example"), cluster.drop_memory("example")
        (True, False)

    Returns:
        Whether there was such a store.

    Raises:
        UsageError: no cluster is running.
    """
    _join(f"ram://{name}")
    index = find_index(name)
    if index is None:
        return False
    ray.get(index.drop.remote(), timeout=INDEX_ANSWER_S)
    ray.kill(index)
    return True


class RamFiles:
    """Files in the memory of the cluster's nodes.

    Args:
        hold: of which only the files are seen; empty: all that have a name.
    """

    def __init__(self, store: str, options: Options, *, is_explicit: bool, hold: str = "") -> None:
        self._store = store
        self._options = options
        self._is_explicit = is_explicit
        self._index: Any = None
        self._is_told = False
        self._hold = hold
        self._renewals: dict[str, threading.Event] = {}
        """Holds of this process, and what ends their renewal."""
        self._lock = threading.Lock()
        self.node: str = ray.get_runtime_context().get_node_id()

    # ------------------------------------------------------------------------------------------------- reading

    def look(self, paths: Sequence[str]) -> Sequence[registered.Found | None]:
        return [None if f is None else registered.Found(f.num_bytes, f.modified_s) for f in self.find(paths)]

    def find(self, paths: Sequence[str]) -> Sequence[Found | None]:
        """Where files lie. No store is begun by looking for one."""
        found: list[Found | None] = self._ask("find", list(paths), self._hold, default=[None] * len(paths))
        return found

    def list(self, directory: str) -> Iterable[tuple[str, registered.Found]]:
        for path, num_bytes, modified_s in self._ask("below", directory, self._hold, default=[]):
            yield path, registered.Found(num_bytes, modified_s)

    def open(self, path: str) -> RamInput:
        [found] = self.find([path])
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return RamInput(self, path, found)

    def open_copies(self, path: str) -> Iterable[tuple[str, RamInput]]:
        for found in filter(None, self.find([path])):
            for node, place in found.copies.items():
                yield f"node {node}", RamInput(self, path, found._replace(copies={node: place}))

    def hold(self, directory: str) -> str:
        hold: str = self._ask("hold", directory, self._hold, default="")
        if hold:
            self._renewals[hold] = ended = threading.Event()
            name = "ray_ckpt-ram-renew"
            threading.Thread(target=self._renew, args=(hold, ended), name=name, daemon=True).start()
        return hold

    def _renew(self, hold: str, ended: threading.Event) -> None:
        """Show that the reader lives, until it ends, or leaves the cluster."""
        while not ended.wait(RENEW_S) and ray.is_initialized():
            with contextlib.suppress(OSError):  # one answer less; a lost index is noticed by the reader
                self._ask("renew", hold, default=False)

    def release(self, hold: str) -> None:
        if hold:
            self._renewals.pop(hold).set()
            if ray.is_initialized():
                self._ask("release", hold, default=False)

    # ------------------------------------------------------------------------------------------------- writing

    def create(self, path: str, num_bytes: int) -> RamOutput:
        begun = self._ask("begin", path, self.node, os.getpid(), num_bytes)
        if isinstance(begun, Refusal):
            raise OSError(begun.code, begun.reason)
        return RamOutput(self, path, begun)

    def put(self, path: str, key: str) -> None:
        """Give a written file its copies and its name."""
        copies = self._ask("put", key)
        if isinstance(copies, Refusal):
            raise OSError(copies.code, copies.reason)
        if copies <= self._options.replicas and not self._is_told:
            self._is_told = True
            _logger.warning(
                "ram://%s is to have %d copies besides the first and has %d: the cluster has no other node that can "
                "hold one. What is saved there is lost with the nodes that hold it",
                self._store,
                self._options.replicas,
                copies - 1,
            )

    def abandon(self, key: str) -> None:
        """Free a file that gets no name."""
        self._ask("abandon", key)

    def delete(self, path: str) -> None:
        if not self._ask("delete", path, default=False):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    # ------------------------------------------------------------------------------------------------- durable

    def copy_out(self, order: registered.CopyOrder) -> CopyReport:
        report: CopyReport = self._ask("copy_out", order)
        return report

    def copying(self, store: str) -> CopyReport:
        report: CopyReport = self._ask("copying", store, default=CopyReport({}, {}))
        return report

    # --------------------------------------------------------------------------------------------------- index

    def _ask(self, method: str, *args: Any, default: Any = None) -> Any:
        """Call the index.

        Args:
            default: the answer of a store that nobody has begun; None begins it.

        Raises:
            OSError: it does not answer.
        """
        if not ray.is_initialized():  # a call would begin another Ray
            raise OSError(errno.ENOTCONN, f"ram://{self._store} is out of reach: this process has left its Ray cluster")
        index = self._find_index(begin=default is None)
        if index is None:
            return default
        try:
            return ask_actor(getattr(index, method), *args, timeout_s=INDEX_ANSWER_S)
        except GetTimeoutError as error:
            raise TimeoutError(
                f"the index of ram://{self._store} gave no answer within {INDEX_ANSWER_S:g} s"
            ) from error
        except Exception as error:  # besides RayError a bare one, for an actor of a cluster that was left
            with self._lock:
                self._index = None
            if default is not None and ray.is_initialized() and find_index(self._store) is None:
                return default  # it has been dropped, or has ended with its job
            raise OSError(errno.EIO, f"the index of ram://{self._store} is lost: {error}".partition("\n")[0]) from error

    def _find_index(self, *, begin: bool) -> Any:
        with self._lock:
            if self._index is None:
                found = find_index(self._store)
                if found is None and begin:
                    found = start_index(self._store, self._options)
                if found is not None:
                    self._take(found)
            return self._index

    def _take(self, index: Any) -> None:
        options: Options = ray.get(index.options.remote(), timeout=INDEX_ANSWER_S)
        if self._is_explicit and options != self._options:
            raise UsageError(
                f"ram://{self._store} was begun with {options}, not with {self._options}: leave the options out, or "
                "drop it first"
            )
        self._options, self._index = options, index


class RamInput:
    """An open file. It stays readable on its own node when its name goes to another."""

    def __init__(self, files: RamFiles, path: str, found: Found) -> None:
        self._files = files
        self._path = path
        self._found = found
        self.num_bytes = found.num_bytes
        self._position = 0
        self._local = _open_here(found.key, found.copies.get(files.node), os.O_RDONLY)
        self.makes_cuts = self._local is None

    def seek(self, offset: int, /) -> None:
        self._position = offset

    def readinto(self, memory: memoryview, /) -> int:
        length = min(len(memory), self._found.num_bytes - self._position)
        if length <= 0:
            return 0
        memory = memory[:length]
        if self._local is not None:
            return read_fully(self._local, memory, self._position)
        failures = []
        for node, place in self._found.copies.items():
            try:
                return self._read_from(place, memory)
            except (OSError, EOFError) as error:
                failures.append(f"node {node}: {first_line(error)}")
        raise OSError(errno.EIO, f"no copy of {self._path} can be read: {'; '.join(failures)}")

    def read_cuts(self, cuts: Sequence[Cut], memory: memoryview, /) -> bool:
        for place in self._found.copies.values():
            with contextlib.suppress(OSError):
                return receive_cuts(place.door, self._found.key, cuts, memory, timeout_s=PIECE_ANSWER_S)
        return False

    def _read_from(self, place: Place, memory: memoryview) -> int:
        done = 0

        def take(piece: memoryview) -> None:
            nonlocal done
            memory[done : done + len(piece)] = piece
            done += len(piece)

        receive(place.door, self._found.key, self._position, len(memory), take, timeout_s=PIECE_ANSWER_S)
        return done

    def close(self) -> None:
        if self._local is not None:
            os.close(self._local)
            self._local = None


class RamOutput:
    """A file being written, into the memory of the own node. It has its name once it is closed."""

    def __init__(self, files: RamFiles, path: str, begun: Begun) -> None:
        self._files = files
        self._path = path
        self._key = begun.key
        self._descriptor = _open_here(begun.key, begun.place, os.O_WRONLY)
        if self._descriptor is None:
            files.abandon(begun.key)
            raise OSError(errno.EACCES, f"{begun.place.path}, where {path} is to be written, cannot be opened")

    def write(self, data: Any, /) -> int:
        assert self._descriptor is not None
        view, done = memoryview(data).cast("B"), 0
        while done < len(view):
            done += os.write(self._descriptor, view[done:])
        return done

    def close(self) -> None:
        if self._descriptor is None:
            return
        os.close(self._descriptor)
        self._descriptor = None
        self._files.put(self._path, self._key)

    def abandon(self) -> None:
        """Free what was written."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            self._files.abandon(self._key)


def _open_here(key: str, place: Place | None, flags: int) -> int | None:
    """Open a file of the own node's memory; None where that cannot be done, as from another container."""
    if place is None:
        return None
    try:
        descriptor = os.open(place.path, flags | os.O_CLOEXEC)
    except OSError:
        return None
    # Its keeper may have ended, and its number been given to another process.
    if label(key) in os.readlink(f"/proc/self/fd/{descriptor}"):
        return descriptor
    os.close(descriptor)
    return None
