"""A group publishes its weights as what has changed, driven by the driver alone; and such a chain in two tiers."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ray_ckpt import CheckpointStore, WeightFollower, WeightPublisher, cluster, compare, load, verify
from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.errors import UsageError, WorkerError
from ray_ckpt.format import deltas
from tests.support import rank_states

pytestmark = pytest.mark.usefixtures("local_ray")

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def group(local_ray: None) -> Iterator[WorkerGroup]:
    with WorkerGroup(2, cpus_per_worker=0.5, process_group=False, start_timeout_s=120, call_timeout_s=60) as group:
        yield group


@pytest.fixture
def name() -> Iterator[str]:
    name = f"policy{uuid.uuid4().hex[:8]}"
    yield name
    cluster.drop_memory(name)


def held(group: WorkerGroup) -> Weights:
    """What the group holds now, as one process would."""
    first, second = group.run(rank_states.weights_of)
    return {**first, **second}


def blank(of: Weights) -> Weights:
    return {name: torch.full_like(tensor, -7) for name, tensor in of.items()}


def is_delta(store: CheckpointStore, step: int) -> bool:
    return deltas.LINK in store.manifest(step).objects


def assert_same(found: Weights, wanted: Weights) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_each_version_of_a_group_is_rebuilt_bit_for_bit(group: WorkerGroup, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "policy")
    publisher = cluster.WeightPublisher(group, rank_states.weights_or_failure_of, store, whole_every=3)
    follower, served, versions = WeightFollower(store), blank(held(group)), {}
    for step in range(5):
        group.run(rank_states.learn, step)
        if step == 4:
            group.run(rank_states.set_failing)
            with pytest.raises(WorkerError, match="the model is gone"):
                publisher.save(step)
            assert store.steps() == (0, 1, 2, 3)
        publisher.save(step)
        versions[step] = held(group)
        read = follower.fetch(served).num_bytes
        assert_same(served, versions[step])
        assert (read < 2000) == is_delta(store, step)
        for num_bytes, found in group.run(rank_states.follow, str(tmp_path / "policy"), step):
            assert_same(found, versions[step])
            assert (num_bytes < 2000) == is_delta(store, step)
    assert [is_delta(store, step) for step in range(5)] == [False, True, True, False, True]
    for step, wanted in versions.items():
        found = blank(wanted)
        load(found, store, step)
        assert_same(found, wanted)
        assert compare(found, store, step).equal
        assert not compare(found, store, (step + 1) % 5).equal
        assert verify(store, step=step).verified


def test_optimizers_are_refused_as_under_collectives(group: WorkerGroup, tmp_path: Path) -> None:
    publisher = cluster.WeightPublisher(group, rank_states.optimizer_of, tmp_path)
    with pytest.raises(WorkerError, match="deltas are for weights"):
        publisher.save(0)
    with pytest.raises(UsageError, match="whole_every=0"):
        cluster.WeightPublisher(group, rank_states.optimizer_of, tmp_path, whole_every=0)


@pytest.mark.parametrize("by", [pytest.param("group", marks=pytest.mark.slow), "process"])
def test_what_is_copied_alone_is_whole(group: WorkerGroup, tmp_path: Path, name: str, by: str) -> None:
    """Each third version is copied to the durable tier, and the deltas between stay in memory."""
    store = CheckpointStore(tmp_path / "policy", front=f"ram://{name}?replicas=0", durable_every=3)
    durable, state = CheckpointStore(tmp_path / "policy"), held(group)
    alone, together = WeightPublisher(store), cluster.WeightPublisher(group, rank_states.weights_of, store)
    versions = {}
    for step in range(6):
        if by == "group":
            group.run(rank_states.learn, 10 + step)
            together.save(step)
            versions[step] = held(group)
        else:
            state["common"][step] += 1
            alone.save(state, step)
            versions[step] = {key: tensor.clone() for key, tensor in state.items()}
    assert [is_delta(store, step) for step in range(6)] == [False, True, True, False, True, True]
    store.make_durable(0, timeout_s=60)
    store.make_durable(3, timeout_s=60)
    assert durable.steps() == (0, 3)
    assert store.make_durable(5, timeout_s=60) == 5  # and what it is built on
    assert durable.steps() == (0, 3, 4, 5)
    cluster.drop_memory(name)
    for step in durable.steps():
        found = blank(versions[step])
        load(found, durable, step)
        assert_same(found, versions[step])
