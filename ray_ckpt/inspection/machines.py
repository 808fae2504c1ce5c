"""What a machine is like, for whoever wants to train on it, and what its storage does. No Ray in here.

look_at_machine    versions are asked for apart; here: GPUs, limits, room
write_trial        a file of random bytes, written as a rank writes
read_trial         such a file of another machine, read back past the page cache
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import xxhash

from ray_ckpt.errors import CheckpointError, StorageError
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.room import free_bytes

__all__ = ["Machine", "Read", "Written", "clock_ahead", "look_at_machine", "read_trial", "write_trial"]

TRIAL_BYTES = 64 << 20
"""Size of the file that each machine writes."""

_PIECE_BYTES = 4 << 20
_GPU_TIMEOUT_S = 60.0
_SHARED_MEMORY = "/dev/shm"

_ASK_TORCH = """
import json, torch
found = torch.cuda.is_available()
print(json.dumps([torch.cuda.device_count(), torch.distributed.is_available() and torch.distributed.is_nccl_available(),
                  ".".join(map(str, torch.cuda.nccl.version())) if found else ""]))
"""


@dataclass(frozen=True)
class Machine:
    """What one machine has."""

    hostname: str
    clock_s: float
    """Its time, in seconds since the epoch."""
    num_gpus: int | None
    """GPUs that torch sees; None where nothing hints at one, and torch was not asked."""
    nccl: str
    """Version of NCCL that torch uses; empty where it has none."""
    shared_memory_bytes: int | None
    """Size of /dev/shm; None where there is none."""
    open_files: int
    """How many files a process may have open."""
    temporary_free_bytes: int
    """What is free where temporary files, and Ray's, lie."""
    temporary_total_bytes: int


@dataclass(frozen=True)
class Written:
    """What came of writing a file."""

    problem: str = ""
    """Why it could not be written."""
    digest: str = ""
    bytes_per_s: float = 0.0
    """Until it was durable."""
    clock_ahead_s: float | None = None
    """How far the storage's clock is ahead of the machine's, if it is; None where the storage keeps no times."""
    free_bytes: int | None = None
    """What is free there; None where that cannot be asked."""


@dataclass(frozen=True)
class Read:
    """What came of reading a file that another machine has written."""

    problem: str = ""
    is_there: bool = True
    bytes_per_s: float = 0.0


def look_at_machine(ask_for_gpus: bool) -> Machine:
    """This machine.

    Args:
        ask_for_gpus: ask torch, in a process of its own. Otherwise only where the system shows that there are some.
    """
    gpus, nccl = None, ""
    if ask_for_gpus or os.path.exists("/dev/nvidiactl"):
        gpus, nccl = _gpus()
    shared = None
    with contextlib.suppress(OSError):
        shared = shutil.disk_usage(_SHARED_MEMORY).total
    disk = shutil.disk_usage(tempfile.gettempdir())
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return Machine(
        hostname=socket.gethostname(),
        clock_s=time.time(),
        num_gpus=gpus,
        nccl=nccl,
        shared_memory_bytes=shared,
        open_files=sys.maxsize if open_files == resource.RLIM_INFINITY else open_files,
        temporary_free_bytes=disk.free,
        temporary_total_bytes=disk.total,
    )


def _gpus() -> tuple[int, str]:
    """GPUs that torch sees, and NCCL's version, as a process sees them that Ray gives none."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", _ASK_TORCH]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_GPU_TIMEOUT_S)
        gpus, has_nccl, version = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return 0, ""
    return gpus, (version or "unknown version") if has_nccl else ""


def write_trial(storage: Storage, name: str) -> Written:
    """Write a file of random bytes into a directory for trials."""
    data = memoryview(os.urandom(TRIAL_BYTES))
    try:
        before, began = time.time(), time.monotonic()
        with storage.create(name) as file:
            for start in range(0, len(data), _PIECE_BYTES):
                file.write(data[start : start + _PIECE_BYTES])
        seconds, after = time.monotonic() - began, time.time()
        seen = storage.scan().get(name)
        # Times of storages are cut to whole seconds.
        ahead = None if seen is None or seen.modified_s is None else clock_ahead(seen.modified_s, before - 1, after)
        return Written("", xxhash.xxh3_64_hexdigest(data), len(data) / seconds, ahead, free_bytes(storage))
    except (StorageError, CheckpointError) as error:
        return Written(problem=str(error))


def read_trial(storage: Storage, name: str, digest: str) -> Read:
    """Read a file that another machine wrote, and compare it with what was written."""
    try:
        size = storage.size(name)
        if size is None:
            return Read(is_there=False)
        if storage.has_local_files:
            _drop_from_cache(storage.path(name))
        hasher, began = xxhash.xxh3_64(), time.monotonic()
        with storage.open_input(name) as file:
            for piece in file.pieces(size):
                hasher.update(piece)
        seconds = time.monotonic() - began
        problem = "" if hasher.hexdigest() == digest else "reads back other bytes than were written"
        return Read(problem, bytes_per_s=size / seconds)
    except (StorageError, CheckpointError) as error:
        return Read(problem=str(error))


def clock_ahead(read_s: float, began: float, ended: float) -> float:
    """How far a clock is outside of the time in which it was read, by another one."""
    return min(0.0, read_s - began) or max(0.0, read_s - ended)


def _drop_from_cache(path: str) -> None:
    """So that a read is one of the storage, where the system can be asked for that."""
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
