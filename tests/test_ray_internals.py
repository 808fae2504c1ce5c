"""What the product relies on of Ray's private names, one test each: an upgrade that changes one fails here, by name."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray._private import ray_constants
from ray._private.ray_logging import stdout_deduplicator

import ray_ckpt
from ray_ckpt.cluster import ray_internals
from tests.support.clusters import free_port

PACKAGE = Path(ray_ckpt.__file__).parent
HOME = "ray_internals.py"


def private_names(path: Path) -> set[str]:
    """Ray's names with a part that begins with `_`, and its generated code, which has no public face."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return {
        name
        for name in found
        if name.startswith("ray.") and ("._" in name or name.startswith("ray.core.")) and "(" not in name
    }


def test_they_are_named_in_their_home_alone() -> None:
    by_file = {path.name: private_names(path) for path in PACKAGE.rglob("*.py")}
    assert {name for name, found in by_file.items() if found} == {HOME}


def test_ray_start_records_its_address_where_we_look(tmp_path: Path) -> None:
    """`ray._private.services.find_bootstrap_address`: below `$RAY_TMPDIR/ray`, None where nothing is recorded."""
    code = "from ray_ckpt.cluster.ray_internals import find_recorded_address; print(find_recorded_address())"

    def found() -> str:
        environment = os.environ | {"RAY_TMPDIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout.strip()

    assert found() == "None"
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379")
    assert found() == "10.0.0.1:6379"


@pytest.mark.usefixtures("local_ray")
def test_a_clusters_control_service_answers_one_call() -> None:
    """`init_grpc_channel` and the stub, message and method of `ray.core.generated`, with this process's token."""
    assert ray_internals.check_alive(ray.get_runtime_context().gcs_address, timeout_s=5)
    assert not ray_internals.check_alive(f"127.0.0.1:{free_port()}", timeout_s=5)


@pytest.mark.usefixtures("local_ray")
def test_authentication_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Config.initialize` reads RAY_AUTH_MODE, `AuthenticationTokenLoader.reset_cache` forgets the token."""
    address = ray.get_runtime_context().gcs_address
    with monkeypatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", "0" * 64)
        ray_internals.reread_authentication()
        with pytest.raises(ray_internals.RefusedError):
            ray_internals.check_alive(address, timeout_s=5)
    ray_internals.reread_authentication()
    assert ray_internals.check_alive(address, timeout_s=5)


def test_the_command_line_that_ray_keeps_has_no_credentials() -> None:
    """`ray.init` asks `ray._private.utils.get_entrypoint_name` for it, and `jobs` tells it to everybody."""
    code = (
        "from ray_ckpt.cluster.connect import connect\n"
        "from ray._private.state import jobs\n"
        "with connect('local'):\n"
        "    print(*[job['Entrypoint'] for job in jobs()])\n"
    )
    command = [sys.executable, "-c", code, "--storage=s3://key:hidden@bucket/run", "s3://b/?sig=hidden", "--plain"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "hidden" not in done.stdout
    assert done.stdout.rstrip().endswith("--storage=s3://... s3://... --plain")


@pytest.mark.usefixtures("local_ray")
def test_free_resources_come_node_by_node() -> None:
    """`available_resources_per_node`: a mapping of node to resources as `ray.nodes()` names them."""
    [(node, free)] = ray_internals.free_resources().items()
    assert node == ray.nodes()[0]["NodeID"]
    assert 0 < free["CPU"] <= ray.cluster_resources()["CPU"]


@pytest.mark.usefixtures("local_ray")
def test_no_node_is_drained_here() -> None:
    """`GlobalState.get_draining_nodes`: a mapping of node to milliseconds; tests/test_drained_nodes.py drains some."""
    assert ray_internals.draining_nodes() == {}


@pytest.mark.usefixtures("local_ray")
def test_a_task_knows_what_it_holds_and_a_driver_holds_nothing() -> None:
    """`worker.global_worker.mode` tells the two apart."""
    assert ray_internals.held_resources() == {}
    held = ray.remote(num_cpus=0.5)(ray_internals.held_resources).remote()
    assert ray.get(held, timeout=60) == {"CPU": 0.5}


def test_what_daemons_say_can_be_kept_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """`stdout_deduplicator.skip_re` decides, line by line, what of the daemons' output reaches the driver's."""
    batch = {"ip": "127.0.0.1", "pid": "raylet", "lines": ["(raylet) A worker died or was killed"]}

    def shown() -> list[str]:
        return [line for part in stdout_deduplicator.deduplicate(dict(batch)) for line in part["lines"]]

    monkeypatch.setattr(stdout_deduplicator, "skip_re", None)
    stdout_deduplicator.flush()
    with ray_internals.without_daemon_messages():
        assert shown() == []
    assert shown() == batch["lines"]
    stdout_deduplicator.flush()


@pytest.mark.usefixtures("local_ray")
def test_a_local_rays_monitor_is_found() -> None:
    """`worker._global_node.all_processes[PROCESS_TYPE_MONITOR]`: what `end_monitor` kills when its Ray ends."""
    node = ray._private.worker._global_node
    [monitor] = node.all_processes[ray_constants.PROCESS_TYPE_MONITOR]
    assert monitor.process.poll() is None


JOIN = """
import contextlib, signal, sys
import ray
from ray_ckpt.cluster.deferral import signals_deferred

handler = lambda number, frame: None
signal.signal(signal.SIGTERM, handler)
with signals_deferred() if sys.argv[2] == "ours" else contextlib.nullcontext():
    ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
caught = int(next(line for line in open("/proc/self/status") if line.startswith("SigCgt")).split()[1], 16)
print(bool(caught >> (signal.SIGTRAP - 1) & 1), signal.getsignal(signal.SIGTERM) is handler)
"""


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("how", "expected"), [("ours", "False True"), ("Ray's", "True False")])
def test_a_driver_keeps_its_signal_handlers_while_it_joins(how: str, expected: str) -> None:
    """`RAY_DISABLE_FAILURE_SIGNAL_HANDLER` and `set_sigterm_handler` are looked up when they are used.

    SIGTRAP tells whether the handler of Ray's core is there, as it takes that signal too.
    """
    command = [sys.executable, "-c", JOIN, ray.get_runtime_context().gcs_address, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == expected


def test_an_object_store_goes_elsewhere_where_shared_memory_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`_plasma_directory` of `ray.init`, which names the arguments that it does not know before it does anything."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert ray_internals.object_store_settings(str(tmp_path)) == {}
    settings = ray_internals.object_store_settings(str(tmp_path / "absent"))
    assert list(settings.values()) == [str(tmp_path)]
    with pytest.raises(RuntimeError, match=r"Unknown keyword argument\(s\): nothing_like_it$"):
        ray.init(**settings, nothing_like_it=1)


LEAVING = """
import ray
from ray_ckpt.cluster.ray_internals import ask_actor
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)

@ray.remote(num_cpus=0)
class Doubling:
    def of(self, number):
        return 2 * number

method = Doubling.remote().of
print(ask_actor(method, 3, timeout_s=60))
ray.shutdown()
try:
    ask_actor(method, 3, timeout_s=60)
except Exception as error:
    print(type(error).__name__, ray.is_initialized())
ray.get(ray.put(1))
print(ray.is_initialized())
"""


def test_a_call_after_a_shutdown_begins_no_ray_as_rays_own_does() -> None:
    command = [sys.executable, "-c", LEAVING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=True)
    answer, refused, began = done.stdout.splitlines()
    assert (answer, began) == ("6", "True")
    assert refused.endswith(" False")
