"""Published weights as an iterable of whole tensors, and as vLLM and verl want to be given them."""

from __future__ import annotations

import asyncio
import inspect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ray_ckpt import CheckpointNotFoundError, CheckpointStore, IntegrityError, TrainState, open_weights, save
from ray_ckpt.conversion import weights as weights_module
from ray_ckpt.integrations.verl import StoreCheckpointEngine
from ray_ckpt.integrations.vllm import PublishedWeights
from tests.support.ranks import run_ranks


def model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = torch.nn.Sequential(torch.nn.Embedding(11, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 11, bias=False))
    layers[2].weight = layers[0].weight  # tied
    layers.register_buffer("scale", torch.tensor(2.5, dtype=torch.bfloat16))
    layers.register_buffer("empty", torch.zeros(0, 3))
    return layers


def expected(trained: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in trained.state_dict().items() if name != "2.weight"}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "policy")
    for step in (0, 1):
        trained = model(step)
        save(TrainState(trained, torch.optim.Adam(trained.parameters())), store, step=step)
    return store


class TestWeights:
    @pytest.mark.parametrize("batch_bytes", [1, 200, 1 << 20])
    def test_they_are_whole_in_batches_of_any_size(
        self, store: CheckpointStore, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(weights_module, "BATCH_BYTES", batch_bytes)
        weights = open_weights(store)
        assert weights.step == 1
        assert_same(dict(weights), expected(model(1)))
        assert {w.name: (w.dtype, w.shape) for w in weights.metadata} == {
            name: (tensor.dtype, tensor.shape) for name, tensor in expected(model(1)).items()
        }
        assert not torch.equal(dict(open_weights(store, 0))["1.weight"], expected(model(1))["1.weight"])

    def test_a_pass_is_a_fresh_one(self, store: CheckpointStore) -> None:
        weights = open_weights(store)
        for _, tensor in weights:
            tensor.zero_()
        assert_same(dict(weights), expected(model(1)))

    def test_what_was_sharded_is_whole(self, tmp_path: Path) -> None:
        run_ranks(save_sharded, 2, tmp_path, str(tmp_path / "sharded"))
        assert_same(
            {name: tensor for name, tensor in open_weights(tmp_path / "sharded") if name != "step"},
            {"a": torch.arange(35.0).view(7, 5), "b": torch.arange(6.0)},
        )

    def test_a_flipped_bit_is_an_error(self, store: CheckpointStore) -> None:
        [chunk] = store.manifest(1).tensors["model.1.weight"].chunks
        file = Path(store.address, "step-1", chunk.file)
        data = bytearray(file.read_bytes())
        data[chunk.data_start] ^= 1
        file.write_bytes(data)
        with pytest.raises(IntegrityError):
            dict(open_weights(store))

    def test_what_is_not_there_is_said(self, store: CheckpointStore, tmp_path: Path) -> None:
        with pytest.raises(CheckpointNotFoundError):
            open_weights(tmp_path / "nothing")
        with pytest.raises(CheckpointNotFoundError, match=r"the newest that is there is 1"):
            open_weights(store, wait_for=2, wait_s=0)


def save_sharded(rank: int, target: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    save(
        {
            "a": distribute_tensor(torch.arange(35.0).view(7, 5), mesh, [Shard(1)]),
            "b": distribute_tensor(torch.arange(6.0), mesh, [Replicate()]),
        },
        target,
    )


def signature(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


class TestVllm:
    def test_it_has_the_interface(self, store: CheckpointStore) -> None:
        """`WeightSource` and `ParamMeta` of vllm/distributed/weight_transfer/base.py at 02f250b."""
        source = PublishedWeights(store)
        assert signature(source.metadata) == []
        [embedding] = [found for found in source.metadata() if found.name == "0.weight"]
        assert (embedding.dtype, embedding.shape) == (torch.float32, (11, 6))

    def test_every_pass_takes_the_latest(self, store: CheckpointStore) -> None:
        source = PublishedWeights(store)
        assert_same(dict(source), expected(model(1)))
        save(TrainState(model(2)), store, step=2)
        assert_same(dict(source), expected(model(2)))
        assert source.version == 2


class TestVerl:
    def test_it_has_the_interface(self) -> None:
        """`CheckpointEngine` of verl/checkpoint_engine/base.py, with the `global_steps` that later versions pass."""
        engine = StoreCheckpointEngine
        assert signature(engine) == ["bucket_size", "store", "keep", "wait_s", "is_master"]
        assert signature(engine.prepare) == ["self"]
        assert signature(engine.build_topology) == ["trainer_world_size", "rollout_world_size", "metadata"]
        assert signature(engine.finalize) == ["self"]
        assert signature(engine.send_weights) == ["self", "weights", "global_steps"]
        assert signature(engine.receive_weights) == ["self", "global_steps"]
        assert inspect.iscoroutinefunction(engine.send_weights)
        assert inspect.isasyncgenfunction(engine.receive_weights)

    def test_updates_arrive_while_a_worker_waits_for_them(self, tmp_path: Path) -> None:
        """As its manager has it: trainers have a group of their own, the rollout worker has none."""
        store = str(tmp_path / "policy")
        worker = StoreCheckpointEngine(store=store, wait_s=60)
        for update, (step, number) in enumerate([(None, 0), (7, 7), (None, 8)]):
            of_trainers, of_workers = StoreCheckpointEngine.build_topology(2, 1, [worker.prepare()] * 3)
            worker.init_process_group(**{key: values[0] for key, values in of_workers.items()})
            with ThreadPoolExecutor(1) as thread:
                fetched = thread.submit(lambda: asyncio.run(received(worker)))
                run_ranks(send, 2, tmp_path, store, of_trainers, update, step)
                assert_same(fetched.result(60), expected(model(update)))
            worker.finalize()
            assert CheckpointStore(store).latest() == number
        assert CheckpointStore(store).steps() == (7, 8)


async def received(engine: StoreCheckpointEngine) -> dict[str, torch.Tensor]:
    return {name: tensor async for name, tensor in engine.receive_weights()}


def send(rank: int, store: str, topology: dict[str, list[Any]], update: int, step: int | None) -> None:
    engine = StoreCheckpointEngine(bucket_size=1 << 20, store=store, is_master=rank == 0)
    engine.init_process_group(**{key: values[rank] for key, values in topology.items()})
    asyncio.run(engine.send_weights(iter(expected(model(update)).items()), global_steps=step))
    engine.finalize()
