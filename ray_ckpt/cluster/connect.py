"""Reach a Ray cluster: the one that is running, or one of our own for this process.

    connect(address) -> joins `address`, else RAY_ADDRESS, else the cluster that `ray start` left on this machine,
                        else starts a local Ray with as many logical CPUs as asked for

Ray 2.59 introduced token authentication, with one trap: a local `ray.init()` writes `~/.ray/auth_token`, and from then
on `ray start` turns authentication on for the server while clients keep it off unless RAY_AUTH_MODE says otherwise.
Our local Ray therefore uses a token of its own that lives in this process's environment only.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import services
from ray._raylet import Config  # type: ignore[attr-defined]
from ray.exceptions import RayError

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
                f"no Ray cluster answers at {asked}: give the address that `ray start --head` printed, "
                "or leave out --address and RAY_ADDRESS to run on a local Ray"
            )
        found = None
    is_local = found in (None, "local")
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    if is_local:
        _use_private_token()
        options |= {
            "num_cpus": max(num_cpus, os.cpu_count() or 1),
            "include_dashboard": False,
            "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
        }
    _init("local" if is_local else str(found), options)
    try:
        yield is_local
    finally:
        ray.shutdown()


def _init(address: str, options: dict[str, Any]) -> None:
    try:
        ray.init(address=address, **options)
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        mode = os.environ.get("RAY_AUTH_MODE", "unset")
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"cannot join the Ray cluster at {address}: {reason}. RAY_AUTH_MODE is {mode} here; server and clients "
            "must use the same: export RAY_AUTH_MODE=token on both (a cluster started where ~/.ray/auth_token "
            "exists asks for that token), or RAY_AUTH_MODE=disabled on both"
        ) from error


def _left_by_ray_start() -> str | None:
    """The address that the last `ray start` on this machine recorded. `ray.init()` finds it in the same way."""
    address: str | None = services.find_bootstrap_address(None)
    return address


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return False
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_TIMEOUT_S):
            return True
    except OSError:
        return False


def _use_private_token() -> None:
    """Authenticate our local Ray by a token that nobody else has, unless the user chose a mode."""
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Ray read the mode when it was imported. This is how its own `ray.init()` makes it look again.
        Config.initialize("")
