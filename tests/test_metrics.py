"""Metrics: what a node's endpoint offers in the middle of a job, and that the dashboard asks for what is there."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from ray_ckpt import cluster, save
from ray_ckpt.errors import StorageError
from tests.conftest import REPOSITORY
from tests.support.clusters import Head, wait_until, workers
from tests.support.faulty import Fault, FaultyStorage
from tests.test_train_elastic import start_job

pytestmark = [pytest.mark.filterwarnings("ignore:torch.distributed is disabled"), pytest.mark.timeout(200)]

DASHBOARD = REPOSITORY / "deploy" / "grafana" / "ray-ckpt.json"


def queries() -> list[str]:
    panels: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def asked_for() -> set[str]:
    return {name for query in queries() for name in re.findall(r"ray_ckpt_\w+", query)}


def scraped() -> dict[str, list[str]]:
    """Metric name -> its lines, of all nodes, as Prometheus would get them."""
    found: dict[str, list[str]] = {}
    for node in ray.nodes():
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
            for line in answer.read().decode().splitlines():
                if match := re.match(r"(ray_ckpt_\w+)[{ ]", line):
                    found.setdefault(match[1], []).append(line)
    return found


def test_the_dashboard_has_a_query_for_all_that_is_counted() -> None:
    source = (REPOSITORY / "ray_ckpt" / "cluster" / "metrics.py").read_text()
    counted = {f"ray_{name}" for name in re.findall(r'"(ckpt_\w+)"', source)}
    told = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in asked_for()}
    assert told == counted
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for query in queries():
        assert query.count("(") == query.count(")"), query


@pytest.fixture
def job(head: Head, tmp_path: Path) -> Iterator[Any]:
    options = ("--steps", "100000", "--save-every", "20", "--front", "ram", "--grace", "20")
    started = start_job(head, "single", tmp_path / "run", *options)
    yield started
    started.process.send_signal(signal.SIGTERM)
    assert started.wait(60) == 128 + signal.SIGTERM, started.stdout + started.stderr


@pytest.mark.cluster
def test_the_endpoint_has_what_the_dashboard_asks_for_in_the_middle_of_a_job(
    head: Head, job: Any, tmp_path: Path
) -> None:
    job.wait_for("saving", 90)
    [worker] = workers(head.sandbox)
    worker.kill()
    job.wait_for("failed at step", 60)
    # What the job does not run into, this process does, on the same cluster.
    metrics = cluster.Metrics()
    throttled = FaultyStorage(str(tmp_path / "slow"), Fault("throttled", ("finish",), name=".distcp"), 0)
    full = FaultyStorage(str(tmp_path / "full"), Fault("no space", ("write",), name=".distcp"), 0)
    save({"weight": torch.ones(10)}, throttled, events=metrics)
    with pytest.raises(StorageError):
        save({"weight": torch.ones(10)}, full, events=metrics)
    wait_until(lambda: asked_for() <= scraped().keys(), 60, lambda: asked_for() - scraped().keys())

    def tiers() -> set[str]:
        return {re.findall(r'tier="(\w+)"', line)[0] for line in scraped()["ray_ckpt_newest_step_timestamp"]}

    wait_until(lambda: tiers() == {"front", "durable"}, 60, tiers)
    lines = scraped()
    assert not job.ended
    [failure] = [line for line in lines["ray_ckpt_failures_total"] if 'kind="StorageError"' in line]
    assert failure.endswith(" 1.0")
    assert any('kind="died"' in line for line in lines["ray_ckpt_failures_total"])
    assert float(lines["ray_ckpt_goodput_steps_per_second"][0].split()[-1]) > 0
    for name, found in lines.items():
        assert "secret" not in "".join(found), name
