"""The covering part of the suite under other versions of Python, torch and Ray, and their checkpoints under each other.

    python tests/versions.py                        all of them, one after the other
    python tests/versions.py ray2.54 torch2.11      some of them

Each has a virtual environment of its own, in `.venv-versions/`. Prints a table as docs/versions.md has it. Under each a
checkpoint is written from two ranks of a pipeline and from two of FSDP, and read back whole under every other.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
HOME = REPOSITORY / ".venv-versions"


class Versions(NamedTuple):
    python: str
    torch: str
    ray: str


COMBINATIONS = {
    "pinned": Versions("3.11", "2.13.0", "2.60.0"),
    "ray2.54": Versions("3.11", "2.13.0", "2.54.1"),
    "ray2.57": Versions("3.11", "2.13.0", "2.57.1"),
    "torch2.11": Versions("3.11", "2.11.0", "2.60.0"),
    "torch2.12": Versions("3.11", "2.12.1", "2.60.0"),
    "torch2.14": Versions("3.11", "2.14.1", "2.60.0"),
    "torch2.15": Versions("3.11", "2.15.0", "2.60.0"),
    "python3.10": Versions("3.10", "2.13.0", "2.60.0"),
    "python3.12": Versions("3.12", "2.13.0", "2.60.0"),
    "python3.13": Versions("3.13", "2.13.0", "2.60.0"),
}

COVERING = [
    "tests/test_torch_internals.py",
    "tests/test_ray_internals.py",
    "tests/test_checkpoint.py",
    "tests/test_interop.py",
    "tests/test_async_ranks.py",
    "tests/test_state_layouts.py",
    "tests/test_state_torch_table.py",
    "tests/test_cluster_saving.py",
    "tests/test_worker_group.py",
]
"""What touches most of what torch and Ray have of their own: internals, the verbs, DCP both ways, states, groups."""


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in COMBINATIONS]
    if unknown:
        print(f"there is no {', '.join(unknown)}: take some of {', '.join(COMBINATIONS)}", file=sys.stderr)
        return 2
    chosen = names or list(COMBINATIONS)
    told = {name: install(name, COMBINATIONS[name]) for name in chosen}
    ready = [name for name in chosen if not told[name]]
    results = {name: run_suite(name) for name in ready}
    passed = {name: code == 0 for name, (code, _) in results.items()}
    written = {name: run(name, "write", str(HOME / f"written-{name}")) for name in ready}
    read = {
        reader: [writer for writer in ready if run(reader, "read", str(HOME / f"written-{writer}"))] for reader in ready
    }
    print("\n| | Python | torch | Ray | suite | reads what was written under |\n| --- | --- | --- | --- | --- | --- |")
    for name in chosen:
        versions = COMBINATIONS[name]
        suite, by = results[name][1] if name in results else told[name], ", ".join(read.get(name, ()))
        print(f"| {name} | {versions.python} | {versions.torch} | {versions.ray} | {suite} | {by} |")
    return int(not ready or not all(passed[name] and written[name] and read[name] == ready for name in ready))


def install(name: str, versions: Versions) -> str:
    """Make the environment, unless it is there. Returns why that could not be done; empty when it could."""
    place = HOME / name
    if (place / ".installed").exists():
        return ""
    interpreter = f"python{versions.python}"
    if shutil.which(interpreter) is None or subprocess.run([interpreter, "--version"], capture_output=True).returncode:
        return "not run: no such Python here"
    print(f"installing {name} ...", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([interpreter, "-m", "venv", str(place)], check=True)
    # Without what only torch wants, in a version that goes with its own.
    pins = re.sub(
        r"(?m)^(?:torch|ray|setuptools|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==.*\n",
        "",
        (REPOSITORY / "constraints.txt").read_text(),
    )
    constraints = place / "constraints.txt"
    constraints.write_text(f"{pins}\ntorch=={versions.torch}\nray=={versions.ray}\n")
    command = [
        str(place / "bin/pip"),
        "install",
        "-q",
        "--no-compile",
        "-c",
        str(constraints),
        "-e",
        f"{REPOSITORY}[dev]",
    ]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [""]
        print(done.stderr, file=sys.stderr)
        return f"not run: cannot be installed here ({reasons[0].removeprefix('ERROR: ')[:80]})"
    (place / ".installed").touch()
    return ""


def run_suite(name: str) -> tuple[int, str]:
    """pytest's exit code; passed, failed and seconds, in words."""
    started = time.monotonic()
    command = [*python(name), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    left_out = ("jobs", "slow", "matrix", "faults", "frameworks", "soak", "oldest")
    command += ["-m", " and ".join(f"not {mark}" for mark in left_out), *COVERING]
    print(f"{name}: {' '.join(command[1:4])} ...", flush=True)
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    print("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR"))), flush=True)
    counts = re.sub(r" in [0-9.]+s.*", "", lines[-1]) if lines else "it printed nothing"
    return done.returncode, f"{counts}, {time.monotonic() - started:.0f} s"


def run(name: str, verb: str, directory: str) -> bool:
    """Write a checkpoint under these versions, or read one."""
    done = subprocess.run([*python(name), "-m", "tests.support.exchanged", verb, directory], cwd=REPOSITORY)
    print(f"{name}: {verb} {Path(directory).name}: {'done' if done.returncode == 0 else 'FAILED'}", flush=True)
    return done.returncode == 0


def python(name: str) -> list[str]:
    return [str(HOME / name / "bin/python")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
