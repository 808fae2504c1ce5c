"""The actor that holds files in one node's memory."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import ray

from ray_ckpt.cluster.ram.sending import Door, Sender, receive
from ray_ckpt.storage.copying import commit_copy, copy_files
from ray_ckpt.storage.files import Storage

SHARE_OF_SHARED_MEMORY = 4
"""Without a `capacity_bytes`, files take one of so many parts of the node's shared memory."""

COPY_S = 600.0
"""How long a copy of one file to another node may take."""

COPIES = "copies"
"""The concurrency group of calls that may take as long as a durable store does."""

_SHARED_MEMORY = "/dev/shm"


class Place(NamedTuple):
    """Where processes find a file: those of the node at `/proc/<pid>/fd/<descriptor>`, those of others at the door."""

    pid: int
    descriptor: int
    door: Door

    @property
    def path(self) -> str:
        return f"/proc/{self.pid}/fd/{self.descriptor}"


def label(key: str) -> str:
    """What the kernel calls the memory of a file: by this a process knows that it has opened the right one."""
    return f"ray_ckpt {key}"


def read_fully(descriptor: int, memory: memoryview, offset: int) -> int:
    """Fill memory from a file. Returns the number of bytes: fewer where the file ends before."""
    done = 0
    while done < len(memory) and (num_read := os.preadv(descriptor, [memory[done:]], offset + done)):
        done += num_read
    return done


@dataclass
class Held:
    """A file in memory."""

    descriptor: int
    path: str = ""
    """Its name in the store; empty until it has one."""
    version: int = 0
    modified_s: float = 0.0


class Keeper:
    """Holds files by key. A key stands for one content for ever; which name leads to it is for the index."""

    def __init__(self) -> None:
        self._files: dict[str, Held] = {}
        self._lock = threading.Lock()
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one for each file
        self._sender = Sender(ray.util.get_node_ip_address(), self._opened)

    def capacity(self) -> int:
        """Bytes that files may take by default."""
        with contextlib.suppress(OSError):
            found = os.statvfs(_SHARED_MEMORY)
            return found.f_blocks * found.f_frsize // SHARE_OF_SHARED_MEMORY
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (2 * SHARE_OF_SHARED_MEMORY)

    def create(self, key: str) -> Place:
        """Start an empty file."""
        held = Held(os.memfd_create(label(key), os.MFD_CLOEXEC))
        with self._lock:
            self._files[key] = held
        return self._place(held)

    def copy(self, key: str, source: Door, num_bytes: int) -> Place:
        """Hold a copy of what another keeper holds."""
        place = self.create(key)
        done = 0

        def take(piece: memoryview) -> None:
            nonlocal done
            end = done + len(piece)
            while done < end:  # what is written at once may be less
                done += os.pwrite(place.descriptor, piece[len(piece) - (end - done) :], done)

        try:
            receive(source, key, 0, num_bytes, take, timeout_s=COPY_S)
        except BaseException:
            self.drop(key)
            raise
        return place

    def copy_out(self, source: Storage, target: Storage, files: Sequence[str]) -> None:
        """Copy files of a checkpoint in this memory to a durable store."""
        copy_files(source, target, files)

    def commit_out(self, source: Storage, target: Storage, overwrite: bool) -> None:
        """Commit what has been copied."""
        commit_copy(source, target, overwrite=overwrite)

    def size(self, key: str) -> int:
        """Bytes in a file."""
        with self._opened(key) as descriptor:
            return os.fstat(descriptor).st_size

    @contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        """A descriptor of its own, so that no other thread's `drop` gives its number to another file meanwhile."""
        with self._lock:
            if key not in self._files:
                raise FileNotFoundError(f"{key} is not held here")
            descriptor = os.dup(self._files[key].descriptor)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def name(self, key: str, path: str, version: int, modified_s: float) -> None:
        """Note which name leads to a file, for an index that starts anew."""
        held = self._files[key]
        held.path, held.version, held.modified_s = path, version, modified_s

    def unname(self, key: str) -> None:
        """Note that no name leads to a file any more, while it is still read."""
        with self._lock:
            if key in self._files:
                self._files[key].path = ""

    def named(self) -> list[tuple[str, str, int, float, int, Place]]:
        """Key, path, version, time and bytes of every file that has a name, and where it is.

        The others are freed: it is an index that starts anew which asks, and only the lost one knew of them.
        """
        with self._lock:
            unnamed = [key for key, held in self._files.items() if not held.path]
        for key in unnamed:
            self.drop(key)
        return [
            (key, held.path, held.version, held.modified_s, self.size(key), self._place(held))
            for key, held in list(self._files.items())
            if held.path
        ]

    def _place(self, held: Held) -> Place:
        return Place(os.getpid(), held.descriptor, self._sender.door)

    def drop(self, key: str) -> None:
        """Free a file. Who has it open keeps it until it is closed."""
        with self._lock:
            held = self._files.pop(key, None)
            if held is not None:
                os.close(held.descriptor)

    def ended(self, pids: Sequence[int]) -> list[int]:
        """Those of these processes of the node that have ended. An answer also says that this one has not."""
        return [pid for pid in pids if not os.path.exists(f"/proc/{pid}")]
