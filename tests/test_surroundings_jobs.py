"""The main job as a process in poor surroundings: it is done, or one line says what to do, and nothing is left."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.support.clusters import (
    CGROUPS,
    JOB,
    Head,
    Sandbox,
    Started,
    needs_cgroups,
    wait_until,
    wait_until_free,
    workers,
)
from tests.support.commands import assert_one_line

TINY = ("--from", "single", "--to", "single", "--steps", "1", "--dim", "8", "--layers", "1")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
JOB_ENDS_S = 180
"""It takes 8 s on an idle machine."""
RAY_ENDS_S = 90
"""Ray's own agents end by themselves, seen up to 50 s after their raylet."""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


def run(sandbox: Sandbox, setting: str, options: tuple[str, ...] = TINY, **extra: str) -> Started:
    """Run the job from a shell that has set its surroundings up, with mounts of its own where it may make any."""
    alone = ("unshare", "--mount") if os.geteuid() == 0 else ()
    shell = (*alone, "sh", "-ec", f'{setting}\nexec "$@"', "sh")
    started = sandbox.start(*shell, sys.executable, JOB, *options, PYTHONPATH=str(REPOSITORY), **extra)
    started.wait(JOB_ENDS_S)
    return started


ABSENT_SHM = """
mkdir "$HOME/dev"; mount -t tmpfs x "$HOME/dev"
for name in null zero full random urandom tty; do
    touch "$HOME/dev/$name"; mount --bind "/dev/$name" "$HOME/dev/$name"
done
ln -s /proc/self/fd "$HOME/dev/fd"
mount --rbind "$HOME/dev" /dev
test ! -e /dev/shm
"""


def hidden_homes() -> list[Path]:
    """Directories on the way to this Python that nobody else may enter, such as root's home."""
    return [path for path in Path(sys.executable).resolve().parents if not path.stat().st_mode & stat.S_IXOTH]


def ordinary_user() -> str:
    """Commands of a shell that leave `$@` to be run by nobody, who owns the sandbox's directories and no others."""
    lines = ['chown -R nobody "$RAY_TMPDIR"']
    for home in hidden_homes():
        python = Path(sys.base_prefix).resolve()
        lines += [
            f'mkdir "$HOME/python"; mount --bind {python} "$HOME/python"',
            f"mount -t tmpfs -o mode=755 x {home}; mkdir -p {python}",
            f'mount --bind "$HOME/python" {python}',
        ]
    return "\n".join([*lines, 'set -- setpriv --reuid nobody --regid nogroup --clear-groups "$@"'])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "setting",
    [
        pytest.param("\n".join(f"export {name}=http://127.0.0.1:9" for name in PROXIES), id="proxies-that-are-dead"),
        pytest.param("unset HOME", id="no-home"),
        pytest.param("export HOME=/proc/nothing", id="home-that-cannot-be-written"),
        pytest.param("ulimit -n 256", id="256-file-handles"),
        pytest.param("exec <&-", id="closed-stdin"),
        pytest.param("exec >&-", id="closed-stdout"),
        pytest.param("ulimit -v 6291456", id="6-GiB-of-addresses"),
        pytest.param("umask 077", id="umask-077"),
        pytest.param("export PYTHONSAFEPATH=1", id="safe-path"),
        pytest.param("export PYTHONOPTIMIZE=1", id="optimized"),
        pytest.param(ordinary_user(), id="ordinary-user", marks=needs_root),
        pytest.param(
            'python=$1; shift; set -- uv run --offline --no-project --python "$python" "$@"',
            id="uv-run",
            marks=pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed"),
        ),
        pytest.param(ABSENT_SHM, id="no-shm", marks=needs_root),
        pytest.param("mount -t tmpfs -o size=1m x /dev/shm", id="tiny-shm", marks=needs_root),
        pytest.param("mount -t tmpfs -o ro x /dev/shm", id="read-only-shm", marks=needs_root),
        pytest.param('mount -t tmpfs -o noexec x "$TMPDIR"', id="noexec-tmpdir", marks=needs_root),
    ],
)
def test_the_job_is_done(sandbox: Sandbox, setting: str) -> None:
    report = sandbox.home / "out.json"
    job = run(sandbox, setting, (*TINY, "--json", str(report)))
    assert job.process.returncode == 0, job.stderr
    assert json.loads(report.read_text())["verified"] is True
    assert (report.owner() == "nobody") == ("setpriv" in setting)
    assert ("verified: continuation: " in job.stdout) == (setting != "exec >&-")
    assert job.stderr == ""
    assert list(sandbox.tmp.glob("ray-ckpt-*")) == []
    wait_until(lambda: not sandbox.processes(), RAY_ENDS_S, sandbox.processes)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        pytest.param("", "AF_UNIX path length cannot exceed 107 bytes", id="long"),
        pytest.param('mount -t tmpfs -o ro x "$RAY_TMPDIR"', "Read-only file system", id="read-only", marks=needs_root),
        pytest.param(
            'mount -t tmpfs -o size=64k x "$RAY_TMPDIR"',
            "timed out during startup",
            id="full",
            marks=[needs_root, pytest.mark.slow],
        ),
    ],
)
def test_a_directory_that_ray_cannot_use_is_told_in_one_line(sandbox: Sandbox, setting: str, reason: str) -> None:
    directory = sandbox.root / ("r" if setting else "r" * 100)
    directory.mkdir()
    job = run(sandbox, setting, RAY_TMPDIR=str(directory))
    assert job.process.returncode == 2
    assert_one_line(job.stderr, reason)
    assert "; set RAY_TMPDIR to a short path that has room and can be written" in job.stderr
    assert ("or try again when this machine is less busy" in job.stderr) == ("timed out" in reason)
    wait_until(lambda: not sandbox.processes(), RAY_ENDS_S, sandbox.processes)


PAIR = ("--from", "pp2", "--to", "fsdp2x2", "--steps", "1", "--dim", "64", "--layers", "2", "--cpus-per-worker", "0.5")


@needs_root
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_temporary_directory_that_fills_up_is_told_in_one_line(sandbox: Sandbox) -> None:
    """It holds the checkpoint, when no storage is given: there is room to begin, and none to end."""
    job = run(sandbox, 'mount -t tmpfs -o size=512k x "$TMPDIR"', options=(*TINY, "--dim", "300"))
    assert job.process.returncode == 1, job.stdout + job.stderr
    assert_one_line(job.stderr, "No space left on device")
    assert "error: rank 0 on " in job.stderr
    wait_until(lambda: not sandbox.processes(), RAY_ENDS_S, sandbox.processes)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_jobs_at_once_on_one_cluster_are_done(head: Head, tmp_path: Path) -> None:
    for job in two_jobs(head, [tmp_path / "a", tmp_path / "b"]):
        assert job.wait(110) == 0, job.stdout + job.stderr
        assert "verified: continuation: " in job.stdout
        assert job.stderr == ""
    wait_until_free(60)


def two_jobs(head: Head, storages: list[Path]) -> list[Started]:
    flags = (*PAIR, "--address", head.address, "--storage")
    return [head.sandbox.start_job(*flags, str(storage), PYTHONPATH=str(REPOSITORY)) for storage in storages]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_of_two_jobs_at_one_storage_one_is_done_and_one_is_refused(head: Head, tmp_path: Path) -> None:
    done, refused = sorted(two_jobs(head, [tmp_path / "same"] * 2), key=lambda job: job.wait(110))
    assert (done.process.returncode, refused.process.returncode) == (0, 2), (done.stderr, refused.stderr)
    assert "verified: continuation: " in done.stdout
    assert_one_line(refused.stderr, "already holds a committed checkpoint")
    wait_until_free(60)


@needs_cgroups
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_memory_limit_that_kills_a_worker_is_told_in_one_line(head: Head, tmp_path: Path) -> None:
    """The kernel's way: SIGKILL of the process that asks for more than its container has."""
    storage = tmp_path / "run"
    where = ("--address", head.address, "--storage", str(storage))
    job = head.sandbox.start_job(*PAIR, "--dim", "3000", "--steps", "1000000", *where, PYTHONPATH=str(REPOSITORY))
    job.wait_for("train: ", 110)
    limited = CGROUPS / head.sandbox.root.name
    limited.mkdir()
    try:
        (limited / "cgroup.procs").write_text(str(max(worker.pid for worker in workers(head.sandbox))))
        (limited / "memory.limit_in_bytes").write_text(str(1 << 20))
        assert job.wait(60) == 1, job.stdout + job.stderr
        assert_one_line(job.stderr, "is gone without a word: killed by a signal, as by the kernel when memory runs out")
        assert "error: rank 1 on " in job.stderr
        wait_until_free(60)
    finally:
        wait_until(lambda: not (limited / "cgroup.procs").read_text(), 30, (limited / "cgroup.procs").read_text)
        limited.rmdir()
    assert list(storage.iterdir()) == []
