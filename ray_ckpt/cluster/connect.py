"""Reach a Ray cluster: the one that is running, or one of our own for this process.

    connect(address) -> joins `address`, else RAY_ADDRESS, else the cluster that `ray start` left on this machine,
                        else starts a local Ray with as many logical CPUs as asked for

Ray's token authentication has a trap since 2.59: a local `ray.init()` writes `~/.ray/auth_token`, and from then on
`ray start` turns authentication on for the server while clients keep it off unless RAY_AUTH_MODE says otherwise. Our
local Ray therefore uses a token of its own that lives in this process's environment, and only as long as that Ray does.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import grpc
import ray
from ray._private import ray_constants, services
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_logging import stdout_deduplicator
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import AuthenticationError, RayError

from ray_ckpt.errors import UsageError

PROBE_TIMEOUT_S = 5.0
"""How long a cluster's address may take to accept a connection. Ray's own client would wait for most of a minute."""

LOCAL_OBJECT_STORE_BYTES = 256 << 20
"""For a local Ray of our own: results of calls are small, tensors never pass through the object store."""


@contextmanager
def connect(address: str | None = None, *, num_cpus: int = 1, verbose: bool = False) -> Iterator[bool]:
    """Be connected to a Ray cluster within the block; leave it, or stop it if it is ours, at the end.

    Args:
        address: of the cluster to join, as for `ray.init`; `"local"` always starts one of our own.
        num_cpus: the least number of logical CPUs that a local Ray of our own offers.
        verbose: let Ray's own log lines, and what the workers print, through.

    Yields:
        Whether the cluster is a local Ray of our own.

    Raises:
        UsageError: no cluster answers at the address, or it refuses our authentication mode.
    """
    asked = address or os.environ.get("RAY_ADDRESS")
    found = asked or _left_by_ray_start()
    if found and found not in ("auto", "local") and not _answers(found):
        if asked:
            raise UsageError(
                f"no Ray cluster answers at {asked}: give the address that `ray start --head` printed (HOST:6379, not "
                "the dashboard's nor ray://), or leave out --address and RAY_ADDRESS to run on a local Ray"
            )
        found = None
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    with nullcontext() if verbose else _without_daemon_messages():
        if found in (None, "local"):
            with _private_token(), _local_ray(num_cpus, options):
                yield True
            return
        _init(str(found), options)
        try:
            yield False
        finally:
            ray.shutdown()


@contextmanager
def _without_daemon_messages() -> Iterator[None]:
    """Keep what Ray's daemons say of a dead worker, a paragraph on standard output whatever `log_to_driver` is, away.

    RAY_DEDUP_LOGS_SKIP_REGEX does this too, but Ray reads it when it is imported.
    """
    before = stdout_deduplicator.skip_re
    stdout_deduplicator.skip_re = re.compile("")
    try:
        yield
    finally:
        stdout_deduplicator.skip_re = before


@contextmanager
def _local_ray(num_cpus: int, options: dict[str, Any]) -> Iterator[None]:
    _init(
        "local",
        options
        | {
            "num_cpus": max(num_cpus, os.cpu_count() or 1),
            "include_dashboard": False,
            "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
        },
    )
    try:
        yield
    finally:
        _end_monitor()
        ray.shutdown()


def _init(address: str, options: dict[str, Any]) -> None:
    try:
        ray.init(address=address, **options)
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(f"cannot join the Ray cluster at {address}: {_first_line(error)}") from error


def _end_monitor() -> None:
    """Ray's shutdown waits a second for the autoscaler's monitor, idle in a local Ray, as it does not mind SIGTERM."""
    node = ray._private.worker._global_node
    monitors: list[Any] = node.all_processes.get(ray_constants.PROCESS_TYPE_MONITOR, []) if node else []
    for monitor in monitors:
        monitor.process.kill()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _left_by_ray_start() -> str | None:
    """The address that the last `ray start` on this machine recorded. `ray.init()` finds it in the same way."""
    address: str | None = services.find_bootstrap_address(None)
    return address


def _answers(address: str) -> bool:
    """Whether a Ray cluster is there: one call that every cluster's control service answers at once.

    Ray's own client would retry for minutes, and print every attempt.

    Raises:
        UsageError: one is there, but it refuses our authentication mode or token.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return False
    try:
        with init_grpc_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            service = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            request = gcs_service_pb2.CheckAliveRequest()  # type: ignore[attr-defined]
            service.CheckAlive(request, timeout=PROBE_TIMEOUT_S)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise _refused(address, "it asks for a token that we did not give") from error
        return False
    except AuthenticationError as error:
        raise _refused(address, _first_line(error)) from error
    return True


def _refused(address: str, reason: str) -> UsageError:
    mode = os.environ.get("RAY_AUTH_MODE", "unset")
    return UsageError(
        f"the Ray cluster at {address} refuses us: {reason}. RAY_AUTH_MODE is {mode} here; server and clients must use "
        "the same: export RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN or ~/.ray/auth_token on both (a cluster "
        "started where ~/.ray/auth_token exists asks for that token), or RAY_AUTH_MODE=disabled on both"
    )


@contextmanager
def _private_token() -> Iterator[None]:
    """Authenticate a local Ray of our own by a token that nobody else has, unless the user chose a mode."""
    if "RAY_AUTH_MODE" in os.environ:
        yield
        return
    token_before = os.environ.get("RAY_AUTH_TOKEN")
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    _reread_authentication()
    try:
        yield
    finally:
        del os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]
        if token_before is not None:
            os.environ["RAY_AUTH_TOKEN"] = token_before
        _reread_authentication()


def _reread_authentication() -> None:
    """Ray reads mode and token once. This is how its own `ray.init()` makes it look again."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
