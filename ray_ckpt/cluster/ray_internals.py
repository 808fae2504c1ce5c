"""The only home of Ray's private names; `tests/test_ray_internals.py` says what of each is relied on.

find_recorded_address    `ray start` notes where its cluster is; `ray.init()` looks there in the same way
check_alive              one call that a cluster's control service answers at once
has_ended                whether a driver is gone, also one that was killed
draining_nodes           nodes that are to go, of which Ray's public interface tells nothing outside of Ray Train
free_resources           per node, where Ray's public interface has only the sum
held_resources           Ray's public interface refuses to answer a driver
without_daemon_messages  Ray's daemons write paragraphs to the driver's standard output
end_monitor              a local Ray's shutdown waits a second for a process that does nothing
reread_authentication    Ray reads mode and token once per process
command_line_redacted    Ray keeps a driver's command line, for whoever lists the jobs
object_store_settings    a local Ray's object store aborts where /dev/shm cannot be written
ask_actor                Ray begins a local cluster for a call that comes after a shutdown
without_signal_handlers  Ray's core takes SIGTERM for a crash while it starts, and may abort
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from subprocess import list2cmdline
from typing import Any

import grpc
import ray
from ray._private import ray_constants, services, utils
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_logging import stdout_deduplicator
from ray._private.state import available_resources_per_node, jobs, state
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import AuthenticationError

from ray_ckpt.text import without_credentials


class RefusedError(Exception):
    """A cluster is there, but not for this process's authentication mode or token."""


def find_recorded_address() -> str | None:
    """The address that the last `ray start` on this machine recorded; its cluster may be gone."""
    address: str | None = services.find_bootstrap_address(None)
    return address


def ask_actor(method: Any, *args: Any, timeout_s: float) -> Any:
    """`ray.get(method.remote(*args))`, for threads that may outlive this process's Ray: none is begun.

    Raises:
        RayError: the actor is lost, or gave no answer in time.
        Exception: of any class, as this process has left its cluster.
    """
    submit, get = type(method)._remote.__wrapped__, ray.get.__wrapped__  # type: ignore[attr-defined]
    return get(submit(method, args, {}), timeout=timeout_s)


def check_alive(address: str, timeout_s: float) -> bool:
    """Whether a cluster's control service answers at `HOST:PORT`.

    Ray's own client would retry for minutes, and print every attempt.

    Raises:
        RefusedError: one is there, but it refuses our authentication mode or token.
    """
    try:
        # A proxy that the environment names would be asked even for an address of this machine.
        with init_grpc_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            service = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            request = gcs_service_pb2.CheckAliveRequest()  # type: ignore[attr-defined]
            service.CheckAlive(request, timeout=timeout_s)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise RefusedError("it asks for a token that we did not give") from error
        return False
    except AuthenticationError as error:
        raise RefusedError(str(error)) from error
    return True


def has_ended(job_id: str) -> bool:
    """Whether a job of Ray, which is one driver and all that it started, has ended in whatever way."""
    return any(job["JobID"] == job_id and job["IsDead"] for job in jobs())


def free_resources() -> Mapping[str, Mapping[str, float]]:
    """Node id -> what is free there, of those that are up. Ray learns of changes with a delay of about a second."""
    free: Mapping[str, Mapping[str, float]] = available_resources_per_node()
    return free


def draining_nodes() -> Mapping[str, float]:
    """Node id -> when it goes, in seconds since the epoch, or 0 where that is not said, of the nodes that are drained:
    as by `ray drain-node`, an autoscaler, or a notice of preemption. Nothing new is placed there."""
    return {node: deadline_ms / 1000 for node, deadline_ms in state.get_draining_nodes().items()}


def held_resources() -> Mapping[str, float]:
    """What this very process holds of its node, as a task or an actor of Ray. Nothing, if it is a driver."""
    if ray._private.worker.global_worker.mode != ray.WORKER_MODE:
        return {}
    held: Mapping[str, float] = ray.get_runtime_context().get_assigned_resources()
    return held


@contextmanager
def without_daemon_messages() -> Iterator[None]:
    """Suppress the paragraphs that Ray's daemons print about a dead worker, whatever `log_to_driver` is.

    RAY_DEDUP_LOGS_SKIP_REGEX does this too, but Ray reads it when it is imported.
    """
    before = stdout_deduplicator.skip_re
    stdout_deduplicator.skip_re = re.compile("")
    try:
        yield
    finally:
        stdout_deduplicator.skip_re = before


@contextmanager
def without_signal_handlers() -> Iterator[list[Any]]:
    """Within the block, neither Ray's Python nor its C++ core takes SIGTERM for itself.

    The core's handler, which prints the stack of a crash, takes SIGTERM until Python puts its own back: what comes in
    between is printed as a crash, or aborts the process. The environment variable that leaves it out is read when Ray
    is imported, and would reach Ray's daemons and workers as well.

    Yields:
        The handlers that Ray's Python would have set, in order.
    """
    wished: list[Any] = []
    installed, set_handler = ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER, utils.set_sigterm_handler
    ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER, utils.set_sigterm_handler = True, wished.append
    try:
        yield wished
    finally:
        ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER, utils.set_sigterm_handler = installed, set_handler


def end_monitor() -> None:
    """Kill the autoscaler's monitor of a local Ray: idle there, it ignores SIGTERM, and Ray's shutdown waits for it."""
    node = ray._private.worker._global_node
    monitors: list[Any] = node.all_processes.get(ray_constants.PROCESS_TYPE_MONITOR, []) if node else []
    for monitor in monitors:
        monitor.process.kill()


def object_store_settings(shared_memory: str = "/dev/shm") -> dict[str, str]:
    """What `ray.init` is to be told of a local Ray's object store: a file in Ray's directory, where shared memory is
    absent or cannot be written. Ray itself looks only at its size, and its raylet then aborts."""
    if os.access(shared_memory, os.W_OK) or not sys.platform.startswith("linux"):
        return {}
    return {"_plasma_directory": os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()}


@contextmanager
def command_line_redacted() -> Iterator[None]:
    """What connects within the block tells the cluster its command line without the credentials in it."""
    found = utils.get_entrypoint_name
    utils.get_entrypoint_name = lambda: list2cmdline(map(without_credentials, sys.orig_argv))
    try:
        yield
    finally:
        utils.get_entrypoint_name = found


def reread_authentication() -> None:
    """Make Ray read RAY_AUTH_MODE and RAY_AUTH_TOKEN again, as its own `ray.init()` does."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
