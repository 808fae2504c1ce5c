"""Reads checkpoints in forks, and tells what came of each, how long it took and what it held.

    with Readers() as readers:
        readers.read([(verb, path), ...]) -> [Outcome, ...]

One helper process imports everything once and forks. It has started no thread before it forks.
"""

from __future__ import annotations

import collections
import copyreg
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a read of a checkpoint ended in."""

    kind: str
    """`loaded`, the class of the exception, `timeout`, `signal <number>`, or `changed <name>`."""
    is_ours: bool
    """Whether that is a load, or an exception of `ray_ckpt`."""
    message: str
    seconds: float
    """Of processor time: what else the machine does counts for little. Of one that was killed, by the clock."""
    held_bytes: int = 0
    """Peak of resident memory of the fork that read it, beyond what it began with."""


class Readers:
    """A helper process and its forks.

    Args:
        timeout_s: a read that takes longer is killed.
    """

    def __init__(self, *, timeout_s: float = 60.0) -> None:
        command = [sys.executable, "-m", "tests.support.isolated", str(timeout_s)]
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, "PYTHONPATH": root}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env=environment
        )

    def read(self, tasks: Sequence[tuple[str, str | os.PathLike[str]]]) -> list[Outcome]:
        """Read checkpoints, in one fork as long as it lives.

        Args:
            tasks: verb and path. `load` reads the manifest, an element of every chunk and every object; `fill` loads a
                state dict; the others are `verify`, `save` over what is there, and `clean` of the store above.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([(verb, os.fspath(path)) for verb, path in tasks]) + "\n")
        self._process.stdin.flush()
        return [Outcome(**outcome) for outcome in json.loads(self._process.stdout.readline())]

    def __enter__(self) -> Readers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


# ------------------------------------------------------------------------------------------------- in the helper


def _serve(timeout_s: float) -> None:
    _import_everything()
    for line in sys.stdin:
        waiting = json.loads(line)
        outcomes: list[Outcome] = []
        while waiting:
            found = _read_in_fork(waiting, timeout_s)
            outcomes += found
            waiting = waiting[len(found) :]
        print(json.dumps([asdict(outcome) for outcome in outcomes]), flush=True)


def _import_everything() -> None:
    import numpy  # noqa: F401
    import torch  # noqa: F401

    import ray_ckpt.checkpoint.verifying
    import ray_ckpt.dcp.reader
    import ray_ckpt.dcp.writer
    import ray_ckpt.storage.store  # noqa: F401


def _read_in_fork(tasks: Sequence[tuple[str, str]], timeout_s: float) -> list[Outcome]:
    """The outcomes up to the first that ends the fork, and that one."""
    read_end, write_end = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.write(write_end, f"{_resident_bytes()}\n".encode())
        for verb, path in tasks:
            signal.setitimer(signal.ITIMER_REAL, timeout_s)  # nobody handles it: it kills, whatever the code is doing
            os.write(write_end, (json.dumps(asdict(_attempt(verb, path))) + "\n").encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as stream:
        before, *found = [json.loads(line) for line in stream]
    _, status, usage = os.wait4(child, 0)
    held = max(0, usage.ru_maxrss * 1024 - before)
    if len(found) < len(tasks):
        number = -os.waitstatus_to_exitcode(status)
        kind = "timeout" if number == signal.SIGALRM else f"signal {number}"
        found.append(asdict(Outcome(kind, False, "", time.monotonic() - started)))
    return [Outcome(**{**outcome, "held_bytes": held}) for outcome in found]


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _attempt(verb: str, path: str) -> Outcome:
    from ray_ckpt.errors import RayCkptError

    shared = _shared_objects()
    started = time.process_time()
    kind, is_ours, message = "loaded", True, ""
    try:
        _VERBS[verb](path)
    except BaseException as error:
        kind, is_ours, message = type(error).__name__, isinstance(error, RayCkptError), str(error)[:5000]
    seconds = time.process_time() - started
    for name, attributes in _shared_objects().items():
        if attributes != shared[name]:
            return Outcome(f"changed {name}", False, message, seconds)
    return Outcome(kind, is_ours, message, seconds)


def _shared_objects() -> dict[str, dict[str, int]]:
    """Attributes of what a hostile pickle would like to change, by identity."""
    import torch

    objects: dict[str, Any] = {
        "pathlib.PurePosixPath": pathlib.PurePosixPath,
        "pathlib.PurePath": pathlib.PurePath,
        "collections.OrderedDict": collections.OrderedDict,
        "collections.Counter": collections.Counter,
        "torch.Tensor": torch.Tensor,
        "torch.device": torch.device,
        "io.BytesIO": io.BytesIO,
        "torch.distributed.checkpoint.metadata.Metadata": torch.distributed.checkpoint.metadata.Metadata,
        "torch.distributed.checkpoint.metadata.StorageMeta": torch.distributed.checkpoint.metadata.StorageMeta,
    }
    found = {
        name: {key: id(value) for key, value in vars(item).items() if not key.startswith("__")}
        for name, item in objects.items()
    }
    found["copyreg.dispatch_table"] = {str(key): id(value) for key, value in copyreg.dispatch_table.items()}
    found["os.environ"] = {key: hash(value) for key, value in os.environ.items()}
    found["sys.path"] = {path: number for number, path in enumerate(sys.path)}
    return found


def _load(path: str) -> None:
    import torch

    from ray_ckpt.dcp.reader import ArrowStorageReader
    from ray_ckpt.format.boxes import Box
    from ray_ckpt.format.torch_container import parse_dtype
    from ray_ckpt.storage.checkpoint_reader import CheckpointReader, Wanted
    from ray_ckpt.storage.chunk_sources import SavedChunk

    ArrowStorageReader(path).read_metadata()
    reader = CheckpointReader(path, threads=1)
    manifest = reader.read_manifest()
    for name, entry in manifest.tensors.items():
        dtype = parse_dtype(entry.dtype)
        for chunk in entry.chunks:
            if chunk.box.num_elements:
                box = Box((0,) * len(chunk.box.sizes), (1,) * len(chunk.box.sizes))
                reader.read_tensors([Wanted(SavedChunk(name, dtype, chunk), box, torch.zeros(box.sizes, dtype=dtype))])
    reader.read_values(manifest.objects)


def _fill(path: str) -> None:
    import torch

    import ray_ckpt

    state = {
        "w": torch.zeros(3, 4),
        "n": {"b": torch.zeros(5)},
        "o": None,
        "model": {"w": torch.zeros(2, 3)},
        "lr": 0.0,
    }
    ray_ckpt.load(state, path, strict=False)


def _verify(path: str) -> None:
    import ray_ckpt

    ray_ckpt.verify(path)


def _save(path: str) -> None:
    import ray_ckpt

    ray_ckpt.save({"a": 1}, path, overwrite=True)


def _clean(path: str) -> None:
    from ray_ckpt.storage.store import CheckpointStore

    CheckpointStore(os.path.dirname(path)).clean(older_than_s=0)


_VERBS: dict[str, Callable[[str], None]] = {
    "load": _load,
    "fill": _fill,
    "verify": _verify,
    "save": _save,
    "clean": _clean,
}


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
