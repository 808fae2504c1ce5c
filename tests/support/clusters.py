"""Ray as people start it, for tests: heads and nodes by `ray start`, and autoscaled ones, on this machine alone.

    with Sandbox() as sandbox:           a directory of its own: home, temporary files, Ray's sessions
        head = start_head(sandbox)       `ray start --head --block` in a session of its own
        add_node(head, "127.0.0.2")      one more node of that cluster
        sandbox.run_job(...)             the main job as its own process, to its end
        sandbox.start_job(...)           the same, to be watched, interrupted or killed

Nothing is shared with other Rays on the machine: every port is chosen by the system, `~/.ray` and the default session
directory stay untouched, and what the sandbox started is found and ended by process id.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import pytest
import ray
from ray.util import placement_group_table

from tests.conftest import REPOSITORY

BIN = Path(sys.executable).parent
JOB = "jobs/pipeline_to_fsdp.py"
MARKER = "RAY_CKPT_TEST_SANDBOX"
"""Environment variable by which a sandbox knows its processes, also those that changed their session."""

CGROUPS = Path("/sys/fs/cgroup/memory")
needs_cgroups = pytest.mark.skipif(
    not os.access(CGROUPS / "cgroup.procs", os.W_OK), reason="limits memory by a cgroup of version 1"
)

START_TIMEOUT_S = 60.0
"""For one `ray start`. It takes 4 s on an idle machine."""

_PORTS_CHOSEN_BY_THE_SYSTEM = (
    "--dashboard-agent-listen-port=0",
    "--min-worker-port=0",
    "--max-worker-port=0",
    "--object-store-memory=80000000",
    "--disable-usage-stats",
)


def wait_until(condition: Callable[[], bool], timeout_s: float, what: Callable[[], object]) -> float:
    """Poll until the condition holds and return the seconds it took; fail with `what()` at the deadline."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, f"not within {timeout_s:g} s: {what()}"
        time.sleep(0.05)
    return time.monotonic() - start


@dataclass(frozen=True)
class Started:
    """A process in a session of its own; what it prints goes to files."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stdout(self) -> str:
        return self.out.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self.err.read_text(errors="replace")

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait_for(self, text: str, timeout_s: float) -> None:
        """Until it has printed the text; a failure if it ends without."""
        wait_until(lambda: text in self.stdout or self.ended, timeout_s, lambda: (text, self.stdout, self.stderr))
        assert text in self.stdout, f"ended with {self.process.returncode}: {self.stdout}{self.stderr}"

    def wait(self, timeout_s: float) -> int:
        """Its exit code."""
        wait_until(lambda: self.ended, timeout_s, lambda: (self.stdout, self.stderr))
        return self.process.returncode


class Sandbox:
    """A directory of its own for Ray and the jobs, and the processes that were started in it.

    The path is short: Ray puts sockets below it, and those may have 107 bytes at most.
    """

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))
        self.home, self.tmp, self.ray = (self.root / name for name in ("home", "tmp", "ray"))
        self.home.mkdir()
        self.tmp.mkdir()
        self._started: list[Started] = []

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_all()
        shutil.rmtree(self.root, ignore_errors=True)

    def environment(self, **extra: str) -> dict[str, str]:
        """A new user's environment: nothing of the developer's shell, nor of what other tests have set."""
        return {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "TMPDIR": str(self.tmp),
            "RAY_TMPDIR": str(self.root),
            "RAY_USAGE_STATS_ENABLED": "0",
            MARKER: str(self.root),
            **extra,
        }

    def start(self, *command: str, **extra: str) -> Started:
        """Start a command at the root of the repository, in a session of its own."""
        out, err = (self.root / f"{len(self._started)}.{name}" for name in ("out", "err"))
        with out.open("wb") as out_file, err.open("wb") as err_file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
                cwd=REPOSITORY,
                env=self.environment(**extra),
                start_new_session=True,
            )
        started = Started(process, out, err)
        self._started.append(started)
        return started

    def start_job(self, *arguments: str, **extra: str) -> Started:
        """Start the main job."""
        return self.start(sys.executable, JOB, *arguments, **extra)

    def run_job(self, *arguments: str, timeout_s: float = 110, **extra: str) -> Started:
        """Run the main job to its end."""
        started = self.start_job(*arguments, **extra)
        started.wait(timeout_s)
        return started

    def processes(self, of: Started | None = None) -> list[psutil.Process]:
        """What is alive of everything that was started here, or of one of them with its descendants' session."""
        sessions = {of.pid} if of else {started.pid for started in self._started}
        marker = None if of else str(self.root)
        return [process for process in psutil.process_iter() if _belongs(process, sessions, marker)]

    def kill(self, started: Started) -> None:
        """SIGKILL every process of the session at once, as when a machine loses power."""
        for process in self.processes(started):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def end_all(self) -> None:
        """SIGTERM, the youngest first, then SIGKILL what is still there after a while."""
        for started in reversed(self._started):
            if not started.ended:
                started.process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.process.wait(timeout=15)
        deadline = time.monotonic() + 15
        while left := self.processes():
            assert time.monotonic() < deadline, f"cannot end {left}"
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)
        for started in self._started:
            started.process.wait(timeout=15)


def _belongs(process: psutil.Process, sessions: set[int], marker: str | None) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if os.getsid(process.pid) in sessions:
            return True
        return marker is not None and process.environ().get(MARKER) == marker
    except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
        return False


def workers(sandbox: Sandbox) -> list[psutil.Process]:
    """The processes of worker groups that were started in the sandbox, stopped ones too."""
    found = []
    for process in sandbox.processes():
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Worker"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@dataclass(frozen=True)
class Head:
    """A running `ray start --head`."""

    sandbox: Sandbox
    started: Started
    address: str
    """Where drivers and nodes join it, as `host:port`."""
    dashboard: str
    """Where `ray job` reaches it, as a URL."""

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0]


def start_head(sandbox: Sandbox, *, num_cpus: int = 2, **extra: str) -> Head:
    """Start a head and wait until it takes drivers and jobs."""
    return _first_that_starts(lambda: _try_head(sandbox, num_cpus, "--port=0", **extra))


def _first_that_starts(start: Callable[[], Head | None]) -> Head:
    """Some of Ray's servers take no port 0. Another process may grab the port chosen for one: try again then."""
    for _ in range(3):
        if head := start():
            return head
    raise AssertionError("`ray start --head` ended at once, three times")


def _try_head(sandbox: Sandbox, num_cpus: int, *flags: str, **extra: str) -> Head | None:
    command = (
        *(str(BIN / "ray"), "start", "--head", "--block", f"--num-cpus={num_cpus}", *flags),
        *(*_PORTS_CHOSEN_BY_THE_SYSTEM, f"--ray-client-server-port={free_port()}"),
        *("--dashboard-host=127.0.0.1", "--dashboard-port=0"),
    )
    started = sandbox.start(*command, **extra)

    def printed() -> str:
        return started.stdout + started.stderr

    wait_until(lambda: "runtime started" in printed() or started.ended, START_TIMEOUT_S, printed)
    if started.ended:
        print(printed())
        return None
    [address] = set(re.findall(r"ray start --address='([^']+)'", printed()))
    [dashboard] = set(re.findall(r"http://127\.0\.0\.1:\d+", printed()))
    wait_until(lambda: _takes_requests(dashboard), START_TIMEOUT_S, lambda: f"{dashboard} does not answer")
    return Head(sandbox, started, address, dashboard)


def add_node(head: Head, ip: str, *, num_cpus: int = 1, **extra: str) -> Started:
    """Add a node to the head's cluster, under an address of its own (127.0.0.2, ...), and wait until it has joined.

    Args:
        extra: its environment.
    """
    command = ["start", f"--address={head.address}", "--block", f"--node-ip-address={ip}", f"--num-cpus={num_cpus}"]
    started = head.sandbox.start(str(BIN / "ray"), *command, *_PORTS_CHOSEN_BY_THE_SYSTEM, **extra)
    wait_until(
        lambda: any(node["Alive"] and node["NodeManagerAddress"] == ip for node in ray.nodes()),
        START_TIMEOUT_S,
        lambda: started.stdout + started.stderr,
    )
    return started


def start_autoscaled_head(sandbox: Sandbox, *, max_workers: int) -> Head:
    """A head without CPUs whose autoscaler (v2) starts one-CPU nodes on demand, as processes of this machine."""
    return _first_that_starts(lambda: _try_autoscaled_head(sandbox, max_workers))


def _try_autoscaled_head(sandbox: Sandbox, max_workers: int) -> Head | None:
    """Ray's fake node provider stands in for the cloud. It has to know the head's port before the head is started."""
    port = free_port()
    node_id = "f" * 51 + "0" * 5
    config = sandbox.root / "autoscaling.json"
    gcs_address = f"{ray.util.get_node_ip_address()}:{port}"
    config.write_text(json.dumps(_autoscaling_config(gcs_address, node_id, max_workers)))
    return _try_head(
        sandbox,
        0,
        *(f"--port={port}", f"--autoscaling-config={config}"),
        RAY_FAKE_CLUSTER="1",
        RAY_enable_autoscaler_v2="1",
        RAY_CLOUD_INSTANCE_ID=node_id,
        RAY_OVERRIDE_NODE_ID_FOR_TESTING=node_id,
        AUTOSCALER_UPDATE_INTERVAL_S="1",
    )


def _autoscaling_config(gcs_address: str, head_node_id: str, max_workers: int) -> dict[str, Any]:
    return {
        "cluster_name": "autoscaled",
        "max_workers": max_workers,
        "idle_timeout_minutes": 0.1,
        "provider": {
            # Declared as external, because Ray's wheel lacks the defaults file of its own name for this provider.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "gcs_address": gcs_address,
            "head_node_id": head_node_id,
        },
        "head_node_type": "ray.head.default",  # the one name that the provider knows
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 1, "object_store_memory": 80_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": max_workers,
            },
        },
        "auth": {},
        "head_node": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


@contextlib.contextmanager
def joined(head: Head) -> Iterator[None]:
    """Be a driver of the cluster within the block, to look at what is in it."""
    ray.init(address=head.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def joined_head() -> Iterator[Head]:
    """A cluster whose head has no CPU, so that no worker runs there, and which we have joined."""
    with Sandbox() as sandbox:
        head = start_head(sandbox, num_cpus=0)
        with joined(head):
            yield head


@contextlib.contextmanager
def nodes_added(head: Head, ips: Iterable[str]) -> Iterator[dict[str, Started]]:
    """Nodes of one CPU each, by address; killed in the end, until the head, which we have joined, is alone again."""
    started = {ip: add_node(head, ip) for ip in ips}
    yield started
    for node in started.values():
        head.sandbox.kill(node)
    wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 1, 60, ray.nodes)


def drivers() -> set[int]:
    """Process ids of all drivers, running or done, that the cluster we have joined has seen."""
    return {job["DriverPid"] for job in ray._private.state.jobs()}


def wait_until_free(timeout_s: float) -> float:
    """Until the cluster we have joined holds no actor, no placement group and nothing occupies a CPU."""

    def occupied() -> tuple[list[str], list[str], float]:
        actors = [actor for actor in ray._private.state.actors().values() if actor["State"] != "DEAD"]
        placed = [
            entry["placement_group_id"] for entry in placement_group_table().values() if entry["state"] != "REMOVED"
        ]
        cpus = ray.cluster_resources().get("CPU", 0) - ray.available_resources().get("CPU", 0)
        return [actor["ActorClassName"] for actor in actors], placed, cpus

    return wait_until(lambda: occupied() == ([], [], 0), timeout_s, occupied)


def end_named_actors() -> None:
    """Those of `ram://` stores, which last as long as the driver, and the tests are one driver."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        with contextlib.suppress(ValueError):  # it has ended meanwhile
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))


def free_port() -> int:
    """A port that was free a moment ago, for servers that do not take port 0."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def _takes_requests(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=5):
            return True
    except urllib.error.HTTPError:
        # It answers, and asks for a token.
        return True
    except OSError:
        return False
