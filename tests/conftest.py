"""Settings that every test shares, and the one local Ray of all tests that ask for no more than some Ray."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tenacity

if TYPE_CHECKING:
    from tests.support.clusters import Head

REPOSITORY = Path(__file__).parent.parent

# Before anything imports Ray: what a developer's shell has set must not leak into the tests, nor the tests' phone home.
for _name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
    os.environ.pop(_name, None)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
# Tests send Ctrl-C, which a shell lets its background jobs ignore.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Workers import the functions that the tests send them.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))

# Where models that die on purpose leave a mark (tests/support/models.py). The environment of the workers is that of
# their Ray, so it has to be set before one is started.
MARKERS = Path(tempfile.mkdtemp(prefix="ray-ckpt-markers-"))
os.environ["RAY_CKPT_TEST_MARKERS"] = str(MARKERS)
atexit.register(shutil.rmtree, MARKERS, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a Ray follow one another, as two at once are too much for a small machine; those that share one come
    last, so that none runs beside it that does not ask for it. Jobs wait more than they work: two files at once."""
    for item in items:
        if item.get_closest_marker("jobs") and "local_ray" not in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group(item.path.name))
        elif _has_ray(item):
            item.add_marker(pytest.mark.xdist_group("ray"))
    items.sort(key=lambda item: "local_ray" in getattr(item, "fixturenames", ()))


def _has_ray(item: pytest.Item) -> bool:
    names = vars(item.module) if isinstance(item, pytest.Function) else {}
    origins = {getattr(value, "__module__", None) for value in names.values()}
    return (
        "ray" in names
        or not {"local_ray", "head"}.isdisjoint(getattr(item, "fixturenames", ()))
        or not {"tests.support.clusters", "ray_ckpt.cluster.group"}.isdisjoint(origins)
    )


@pytest.fixture(scope="session")
def _shared_ray() -> Iterator[None]:
    from ray_ckpt.cluster.connect import connect

    with contextlib.ExitStack() as stack:
        # Ray gives its processes 30 s, which a busy machine may need more than once; the tests of it all would fail.
        for attempt in tenacity.Retrying(stop=tenacity.stop_after_attempt(3), reraise=True):
            with attempt:
                stack.enter_context(connect("local", num_cpus=4))
        yield


@pytest.fixture(scope="module")
def local_ray(_shared_ray: None) -> Iterator[None]:
    """A local Ray with four logical CPUs, in which nothing runs when a module's tests begin."""
    from tests.support.clusters import end_named_actors, wait_until_free

    yield
    end_named_actors()
    wait_until_free(60)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A running cluster of one node with two CPUs, which this process has joined to look at it."""
    from tests.support.clusters import Sandbox, joined, start_head

    with Sandbox() as sandbox:
        head = start_head(sandbox, num_cpus=2)
        with joined(head):
            yield head
