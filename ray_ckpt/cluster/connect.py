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

import ray

from ray_ckpt.cluster.deferral import signals_deferred
from ray_ckpt.cluster.ray_internals import (
    RefusedError,
    check_alive,
    command_line_redacted,
    end_monitor,
    find_recorded_address,
    object_store_settings,
    reread_authentication,
    without_daemon_messages,
)
from ray_ckpt.errors import UsageError
from ray_ckpt.text import first_line, without_credentials

PROBE_TIMEOUT_S = 5.0
"""How long a cluster's address may take to accept a connection. Ray's own client would wait for most of a minute."""

LOCAL_OBJECT_STORE_BYTES = 256 << 20
"""Size of a local Ray's object store: results of calls are small, tensors never pass through it."""


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
    found = find_cluster(address)
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    with nullcontext() if verbose else without_daemon_messages():
        if found in (None, "local"):
            with _private_token(), _local_ray(num_cpus, options):
                yield True
            return
        _init(str(found), options)
        try:
            yield False
        finally:
            with signals_deferred():
                ray.shutdown()


def find_cluster(address: str | None = None) -> str | None:
    """Where a cluster is: at the address, else at RAY_ADDRESS, else where `ray start` left one; None where none is.

    Raises:
        UsageError: none answers at the address or RAY_ADDRESS, or it refuses our authentication mode.
    """
    asked = address or os.environ.get("RAY_ADDRESS")
    found = asked or find_recorded_address()
    if found and found not in ("auto", "local") and not _answers(found):
        if asked:
            raise UsageError(
                f"no Ray cluster answers at {without_credentials(asked)}: give the address that `ray start --head` "
                "printed (HOST:6379, not the dashboard's nor ray://), or leave out --address and RAY_ADDRESS to run on "
                "a local Ray"
            )
        return None
    return found


def join_running() -> bool:
    """Join the cluster that `connect` would join, for as long as this process runs, unless it is in one already.

    Returns:
        Whether it is in one: False when there is none to join.

    Raises:
        UsageError: none answers at RAY_ADDRESS, or it refuses our authentication mode.
    """
    if ray.is_initialized():
        return True
    found = find_cluster()
    if found in (None, "local"):
        return False
    with without_daemon_messages():
        _init(str(found), {"log_to_driver": False, "logging_level": logging.ERROR})
    return True


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """As `connect`, for whoever may be connected already: then nothing is done.

    Raises:
        UsageError: as `connect`.
    """
    if ray.is_initialized():
        yield
        return
    with connect(address):
        yield


@contextmanager
def _local_ray(num_cpus: int, options: dict[str, Any]) -> Iterator[None]:
    options |= {
        "num_cpus": max(num_cpus, os.cpu_count() or 1),
        "include_dashboard": False,
        "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
        **object_store_settings(),
    }
    _init("local", options)
    try:
        yield
    finally:
        with signals_deferred():
            end_monitor()
            ray.shutdown()


def _init(address: str, options: dict[str, Any]) -> None:
    try:
        with signals_deferred(), command_line_redacted():
            ray.init(address=address, **options)
    except Exception as error:  # Ray raises that very class when its processes do not come up
        doing = "start a local Ray" if address == "local" else f"join the Ray cluster at {address}"
        reason = first_line(error)
        advice = "; set RAY_TMPDIR to a short path that has room and can be written" if address == "local" else ""
        if re.search("timed out|GCS", reason, re.IGNORECASE):  # its control service has not come up
            advice += ", or try again when this machine is less busy" if advice else "; try again when it is less busy"
        raise UsageError(f"cannot {doing}: {reason}{advice}") from error
    except BaseException:  # a signal that came meanwhile
        ray.shutdown()
        raise


def _answers(address: str) -> bool:
    """Whether a Ray cluster is there.

    Raises:
        UsageError: one is there, but it refuses our authentication mode or token.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return False
    try:
        return check_alive(address, PROBE_TIMEOUT_S)
    except RefusedError as error:
        raise _refused(address, first_line(error)) from error


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
    reread_authentication()
    try:
        yield
    finally:
        del os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]
        if token_before is not None:
            os.environ["RAY_AUTH_TOKEN"] = token_before
        reread_authentication()
