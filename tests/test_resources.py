"""What a worker asks for, and why a group does not fit: tables over node lists."""

from __future__ import annotations

import pytest

from ray_ckpt.cluster.resources import NCCL, WorkerDemand, choose_demand, explain_shortage
from ray_ckpt.errors import UsageError


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [
        ([{"CPU": 8}], 4, (1, 0, "gloo")),
        ([{"CPU": 2}], 4, (0.5, 0, "gloo")),
        ([{"CPU": 2}], 3, (0.5, 0, "gloo")),
        ([{"CPU": 1}], 3, (0.3333, 0, "gloo")),
        # 3 + 1 cores hold 4 whole workers, but not 5: on the second node a half is the most that fits.
        ([{"CPU": 3}, {"CPU": 1}], 4, (1, 0, "gloo")),
        ([{"CPU": 3}, {"CPU": 1}], 5, (0.5, 0, "gloo")),
        # A head without CPUs and nobody else yet: an autoscaler is asked for whole ones.
        ([{"CPU": 0}], 4, (1, 0, "gloo")),
        ([{}], 4, (1, 0, "gloo")),
        ([{"CPU": 8, "GPU": 4}], 4, (1, 1, NCCL)),
        ([{"CPU": 8, "GPU": 8}], 4, (1, 1, NCCL)),
        ([{"CPU": 8, "GPU": 2}], 4, (1, 0.5, "gloo")),
        ([{"CPU": 8, "GPU": 1}], 4, (1, 0.25, "gloo")),
        ([{"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 2}], 4, (1, 0.5, "gloo")),
    ],
)
def test_workers_ask_for_what_the_cluster_has(
    nodes: list[dict[str, float]], workers: int, expected: tuple[float, float, str]
) -> None:
    demand = choose_demand(nodes, workers)
    assert (demand.cpus, demand.gpus, demand.backend) == expected
    assert bool(demand.note) == (0 < demand.gpus < 1)
    for name, amount in demand.bundle.items():
        amounts = [node.get(name, 0) for node in nodes]
        assert not sum(amounts) or sum(int(total / amount) for total in amounts) >= workers


def test_what_the_user_says_overrides() -> None:
    nodes = [{"CPU": 8, "GPU": 4}]
    assert choose_demand(nodes, 4, 2, 0) == WorkerDemand(2, 0, "gloo")
    assert choose_demand(nodes, 4, backend="gloo") == WorkerDemand(1, 1, "gloo")
    # GPU nodes that an autoscaler has still to start.
    assert choose_demand([{"CPU": 0}], 4, gpus_per_worker=1) == WorkerDemand(1, 1, NCCL)
    assert "share GPUs (0.25 each)" in choose_demand(nodes, 4, gpus_per_worker=0.25).note


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "nccl"}, "NCCL refuses two ranks on one GPU"),
        ({"backend": NCCL, "gpus_per_worker": 0}, "the workers get none"),
    ],
)
def test_a_backend_that_cannot_work_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_demand([{"CPU": 8, "GPU": 2}], 4, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nodes", "available", "missing"),
    [
        ([{"CPU": 2}], {"CPU": 2}, "missing CPU: needs 4, has 2, GPU: needs 4, has 0."),
        ([{"CPU": 8, "GPU": 2}], {"CPU": 8, "GPU": 2}, "missing GPU: needs 4, has 2."),
        ([{"CPU": 8, "GPU": 4}], {"CPU": 8, "GPU": 1}, "missing GPU: needs 4, 1 of 4 free."),
        (
            [{"CPU": 8, "GPU": 2}, {"CPU": 0, "GPU": 2}],
            {"CPU": 8, "GPU": 4},
            "missing only 2 workers fit, as no worker can be split over two nodes.",
        ),
    ],
)
def test_a_shortage_names_what_is_missing(
    nodes: list[dict[str, float]], available: dict[str, float], missing: str
) -> None:
    text = explain_shortage({"CPU": 1.0, "GPU": 1.0}, 4, nodes, available)
    assert text.startswith("asked for 4 x {CPU: 1, GPU: 1}; the cluster has ")
    assert missing in text
    assert "What to do: " in text
