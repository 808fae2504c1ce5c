"""Reads checkpoints, each in a process of its own, and tells what came of it, how long it took and what it held.

    with Readers() as readers:
        readers.read(path) -> Outcome

One helper process imports everything once and forks for each checkpoint. It has started no thread before it forks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType


@dataclass(frozen=True)
class Outcome:
    """What a read of a checkpoint ended in."""

    kind: str
    """`loaded`, the class of the exception, `timeout`, or `signal <number>`."""
    is_ours: bool
    """Whether that is a load, or an exception of `ray_ckpt`."""
    message: str
    seconds: float
    held_bytes: int
    """Peak of resident memory, beyond what the process held when it began."""


class Readers:
    """A helper process and its forks.

    Args:
        timeout_s: a read that takes longer is killed.
    """

    def __init__(self, *, timeout_s: float = 20.0) -> None:
        command = [sys.executable, "-m", "tests.support.isolated", str(timeout_s)]
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, "PYTHONPATH": root}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env=environment
        )

    def read(self, path: str | os.PathLike[str], *, verb: str = "load") -> Outcome:
        """Read a checkpoint: its manifest, every tensor and every object.

        Args:
            verb: `load`, or `verify`, `save` (over what is there), `clean` of the store above.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([verb, os.fspath(path)]) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Readers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


# ------------------------------------------------------------------------------------------------- in the helper


def _serve(timeout_s: float) -> None:
    _import_everything()
    for line in sys.stdin:
        verb, path = json.loads(line)
        print(json.dumps(_isolated(verb, path, timeout_s)), flush=True)


def _import_everything() -> None:
    import numpy  # noqa: F401
    import torch  # noqa: F401

    import ray_ckpt.checkpoint.verifying
    import ray_ckpt.dcp.reader
    import ray_ckpt.dcp.writer
    import ray_ckpt.storage.store  # noqa: F401


def _isolated(verb: str, path: str, timeout_s: float) -> dict[str, object]:
    read_end, write_end = os.pipe()
    before = _resident_bytes()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)  # nobody handles it: it kills, whatever the code is doing
        os.write(write_end, json.dumps(_attempt(verb, path)).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as stream:
        answer = stream.read()
    _, status, usage = os.wait4(child, 0)
    seconds = time.monotonic() - started
    held = max(0, usage.ru_maxrss * 1024 - before)
    if answer:
        kind, is_ours, message = json.loads(answer)
    else:
        number = os.waitstatus_to_exitcode(status)
        kind, is_ours, message = ("timeout" if -number == signal.SIGALRM else f"signal {-number}"), False, ""
    return {"kind": kind, "is_ours": is_ours, "message": message, "seconds": seconds, "held_bytes": held}


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _attempt(verb: str, path: str) -> tuple[str, bool, str]:
    from ray_ckpt.errors import RayCkptError

    try:
        _VERBS[verb](path)
    except BaseException as error:
        return type(error).__name__, isinstance(error, RayCkptError), str(error)[:5000]
    return "loaded", True, ""


def _load(path: str) -> None:
    from ray_ckpt.dcp.reader import ArrowStorageReader
    from ray_ckpt.format.boxes import Box
    from ray_ckpt.format.torch_container import parse_dtype
    from ray_ckpt.storage.checkpoint_reader import CheckpointReader, Wanted
    from ray_ckpt.storage.chunk_sources import SavedChunk

    ArrowStorageReader(path).read_metadata()
    reader = CheckpointReader(path, threads=1)
    manifest = reader.read_manifest()
    import torch

    for name, entry in manifest.tensors.items():
        dtype = parse_dtype(entry.dtype)
        # One element of each chunk: what is read is the checkpoint's business, and not the target's size.
        for chunk in entry.chunks:
            if chunk.box.num_elements:
                box = Box((0,) * len(chunk.box.sizes), (1,) * len(chunk.box.sizes))
                target = torch.zeros(box.sizes, dtype=dtype)
                reader.read_tensors([Wanted(SavedChunk(name, dtype, chunk), box, target)])
    reader.read_values(manifest.objects)


def _verify(path: str) -> None:
    import ray_ckpt

    ray_ckpt.verify(path)


def _save(path: str) -> None:
    import ray_ckpt

    ray_ckpt.save({"a": 1}, path, overwrite=True)


def _clean(path: str) -> None:
    from ray_ckpt.storage.store import CheckpointStore

    CheckpointStore(os.path.dirname(path)).clean(older_than_s=0)


_VERBS = {"load": _load, "verify": _verify, "save": _save, "clean": _clean}


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
