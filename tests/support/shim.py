"""What a store does while system calls fail, lie or kill: `shim.c` is preloaded into one process that forks for each.

with running_shim(tmp_path) as shim:
    shim.run("save", directory, "killed", at=7)  ->  Outcome("killed", ...)
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

SOURCE = Path(__file__).with_name("shim.c")
ACTIONS = {
    "": 0,
    "killed": 1,
    "EIO": 2,
    "ENOSPC": 3,
    "short": 4,
    "lies": 5,
    "full": 6,
    "full of names": 7,
    "no directory sync": 8,
    "no renameat2": 9,
    "neither renameat2 nor link": 10,
}
"""Those up to `lies` happen at one call; the others at each that they are about."""


@dataclass(frozen=True)
class Outcome:
    """How a fork ended."""

    end: str
    """`done`, `killed`, or the name of an error's class."""
    value: Any = None
    """What the scenario returned, or the error's text."""
    calls: int = 0
    """Calls that were counted."""


class Shim:
    """The process that forks."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, scenario: str, directory: Path, action: str = "", at: int = 0) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([scenario, str(directory), ACTIONS[action], at]), file=self._process.stdin, flush=True)
        return Outcome(**json.loads(self._process.stdout.readline()))


@contextlib.contextmanager
def running_shim(directory: Path) -> Iterator[Shim]:
    library = directory / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True, timeout=60)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.support.shim", library],
        env={**os.environ, "LD_PRELOAD": str(library)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Shim(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)
        assert process.stdout is not None
        process.stdout.close()


def has_compiler() -> bool:
    return sys.platform == "linux" and shutil.which("gcc") is not None


# ----------------------------------------------------------------------------------------------- in the process itself


def state(version: int) -> dict[str, Any]:
    import torch

    return {"weight": torch.arange(3000.0) * version, "other": torch.ones(3) * version, "step": version}


def save(directory: str, version: int = 2) -> None:
    import ray_ckpt

    ray_ckpt.save(state(version), directory, overwrite=version > 1)


def saves_first(directory: str) -> None:
    save(directory, 1)


def loses_a_race(directory: str) -> None:
    """Commit when somebody else has committed since this save has looked for it."""
    import ray_ckpt
    from ray_ckpt.format.manifest import MANIFEST_NAME

    class Raced(ray_ckpt.Storage):
        def perform(self, operation: str, name: str, action: Callable[[], Any]) -> Any:
            if (operation, name) == ("rename", MANIFEST_NAME):
                saves_first(directory)
            return super().perform(operation, name, action)

    ray_ckpt.save(state(2), Raced(directory))


def saves_stock(directory: str) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(state(1), checkpoint_id=directory, no_dist=True)


def saves_steps(directory: str) -> None:
    for step in (1, 2, 3):
        save(f"{directory}/step-{step}", step)


def prunes(directory: str) -> list[int]:
    import ray_ckpt

    return list(ray_ckpt.CheckpointStore(directory).prune(ray_ckpt.keep_last(1)).removed)


def deletes(directory: str) -> None:
    import ray_ckpt

    ray_ckpt.CheckpointStore(directory).delete(3)


def pins(directory: str) -> list[int]:
    import ray_ckpt

    store = ray_ckpt.CheckpointStore(directory)
    store.pin(2)
    return list(store.pins())


def cleans(directory: str) -> None:
    import ray_ckpt

    ray_ckpt.CheckpointStore(directory).clean(older_than_s=0)


def reads(directory: str) -> list[int | None]:
    """The version that ours reads there, and the one that stock DCP does; None where there is none."""
    import torch
    import torch.distributed.checkpoint as dcp

    import ray_ckpt

    found: list[int | None] = []
    for load in (
        lambda target: ray_ckpt.load(target, directory),
        lambda target: dcp.load(target, checkpoint_id=directory, no_dist=True),
    ):
        target: dict[str, Any] = state(0)
        try:
            load(target)
        except (ray_ckpt.CheckpointNotFoundError, dcp.CheckpointException) as error:
            is_absent = isinstance(error, ray_ckpt.CheckpointNotFoundError) or ".metadata" in str(error)
            found.append(None if is_absent else -1)
            continue
        expected = state(target["step"])
        whole = all(torch.equal(target[name], expected[name]) for name in ("weight", "other"))
        found.append(target["step"] if whole else -1)
    return found


def examines(directory: str) -> dict[str, list[int | None]]:
    """What is read of a step of a store before and after a clean-up."""
    before = reads(directory)
    cleans(os.path.dirname(directory))
    return {"before": before, "after": reads(directory)}


def reads_steps(directory: str) -> dict[str, list[int | None]]:
    import ray_ckpt

    return {str(step): reads(f"{directory}/step-{step}") for step in ray_ckpt.CheckpointStore(directory).steps()}


SCENARIOS: dict[str, Callable[[str], Any]] = {
    function.__name__: function
    for function in (
        save,
        saves_first,
        loses_a_race,
        saves_stock,
        saves_steps,
        prunes,
        deletes,
        pins,
        cleans,
        reads,
        examines,
        reads_steps,
    )
}


def _outcome(library: ctypes.CDLL, scenario: str, directory: str, action: int, at: int) -> Outcome:
    library.shim_arm(os.fsencode(directory), action, at)
    try:
        value = SCENARIOS[scenario](directory)
    except Exception as error:
        if not type(error).__module__.startswith("ray_ckpt"):
            traceback.print_exc()
        return Outcome(type(error).__name__, str(error), library.shim_calls())
    return Outcome("done", value, library.shim_calls())


def _fork(library: ctypes.CDLL, *case: Any) -> Outcome:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(writing, "w") as answer:
            json.dump(dataclasses.asdict(_outcome(library, *case)), answer)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return Outcome("killed" if os.WTERMSIG(status) == signal.SIGKILL else f"signal {os.WTERMSIG(status)}")
    return Outcome(**json.loads(text))


def main(library_path: str, requests: IO[str]) -> None:
    import pyarrow.fs  # noqa: F401
    import torch.distributed.checkpoint  # noqa: F401

    import ray_ckpt.checkpoint.loading
    import ray_ckpt.checkpoint.saving
    import ray_ckpt.format.dcp_metadata
    import ray_ckpt.storage.store  # noqa: F401

    library = ctypes.CDLL(library_path)
    library.shim_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int]
    for line in requests:
        print(json.dumps(dataclasses.asdict(_fork(library, *json.loads(line)))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.stdin)
