"""Round trips with what the frameworks write themselves; `make test-frameworks` installs them."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ray_ckpt import CheckpointStore, Saved, TrainState, load, save
from ray_ckpt.errors import StateMismatchError
from tests.conftest import REPOSITORY
from tests.support.programs import blocks, run
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, times: int = 2) -> None:
    for _ in range(times):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 16).reshape(2, 8)).square().sum().backward()
        optimizer.step()


def same_model(found: nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


# ------------------------------------------------------------------------------------------- by two ranks, into one


def write_torch_checkpointing(rank: int, directory: str) -> dict[str, torch.Tensor]:
    """Without its metadata manager, whose collectives want CUDA: it declares the save not reshardable."""
    import torch_checkpointing
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    warnings.simplefilter("ignore")
    model = fully_shard(net(0), mesh=init_device_mesh("cpu", (2,)))

    class Checkpoint(torch_checkpointing.CheckpointBase):
        def get_items(self) -> dict[str, Any]:
            return {
                "model": torch_checkpointing.CheckpointItem(model.state_dict()),
                "step": torch_checkpointing.CheckpointItem(7),
            }

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            raise NotImplementedError

    saver = torch_checkpointing.make_sync_checkpoint_saver(
        storage_config=LocalFileSystemStorageConfig(use_direct_io=False)
    )
    saver.save(directory, Checkpoint())
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


def test_torch_checkpointing(tmp_path: Path) -> None:
    pytest.importorskip("torch_checkpointing")
    expected = run_ranks(write_torch_checkpointing, 2, tmp_path, str(tmp_path / "at"))[0]
    model = net(1)
    load(TrainState(model), tmp_path / "at", only=("model",))
    assert same_model(model, expected)


def write_megatron(rank: int, directory: str) -> None:
    """Two layers per rank, stacked along a first dim."""
    from megatron.core import dist_checkpointing, parallel_state

    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]  # it copies from a GPU that is not there
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    parallel_state.initialize_model_parallel()
    sharded = dist_checkpointing.ShardedTensor.from_rank_offsets
    layers = {
        f"layers.{layer}": sharded(
            "decoder.layers.mlp.weight",
            torch.full((4, 3), 2.0 * rank + layer),
            (0, 2 * rank + layer, 4),
            prepend_axis_num=1,
        )
        for layer in range(2)
    }
    embedding = sharded("embedding.weight", torch.full((3, 2), 1.0 * rank), (0, rank, 2))
    dist_checkpointing.save({**layers, "embedding": embedding, "iteration": 7}, directory)


def test_megatron_core(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    (tmp_path / "at").mkdir()
    run_ranks(write_megatron, 2, tmp_path, str(tmp_path / "at"))
    state = {"embedding.weight": torch.zeros(6, 2)} | {f"layers.{layer}": torch.zeros(4, 3) for layer in range(4)}
    key_map = {f"layers.{layer}": Saved("decoder.layers.mlp.weight").select(0, layer) for layer in range(4)}
    load(state, tmp_path / "at", key_map=key_map, only=("embedding.weight", *key_map))
    assert [int(state[f"layers.{layer}"][0, 0]) for layer in range(4)] == [0, 1, 2, 3]
    assert state["embedding.weight"][:, 0].tolist() == [0, 0, 0, 1, 1, 1]


# ------------------------------------------------------------------------------------------------------- alone


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(0)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.net(batch).square().sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.125)

    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(4, 8), batch_size=2))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    model = net(1)
    optimizer = torch.optim.AdamW(model.parameters())
    load(TrainState(model, optimizer), tmp_path / "run.ckpt", only=("model", "optim"))
    assert same_model(model, module.net.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.125


def fit_lightning(
    directory: Path, max_epochs: int, seed: int, interval: str, num_ranks: int = 1
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """With dropout, and data that are shuffled; three batches in an epoch. Returns weights and moments.

    Args:
        num_ranks: 1, or as many as this is called on under torchrun.
    """
    lightning = pytest.importorskip("lightning")
    from ray_ckpt.integrations.lightning import CheckpointCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(net(seed), nn.Dropout(0.3))

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.net(batch).square().sum()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.125)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": interval}]

    trainer = lightning.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        devices=num_ranks,
        strategy="ddp" if num_ranks > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[CheckpointCallback(directory, every=2)],
    )
    torch.manual_seed(seed)
    data = torch.utils.data.DataLoader(
        torch.arange(48.0 * num_ranks).reshape(6 * num_ranks, 8), batch_size=2, shuffle=True
    )
    trainer.fit(module := Module(), data)
    assert trainer.global_step == 3 * max_epochs
    moments = [each[key] for each in trainer.optimizers[0].state.values() for key in sorted(each)]
    return module.state_dict(), moments


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_lightning_goes_on_bit_for_bit(tmp_path: Path, interval: str) -> None:
    """The second run has another seed, so that all that matters must come from the checkpoint."""
    expected, moments = fit_lightning(tmp_path / "whole", 4, 0, interval)
    fit_lightning(tmp_path / "cut", 3, 0, interval)
    assert CheckpointStore(tmp_path / "cut").steps() == (6,)
    found, found_moments = fit_lightning(tmp_path / "cut", 4, 1, interval)
    assert not [name for name, value in expected.items() if not torch.equal(value, found[name])]
    assert len(moments) == len(found_moments) == 12
    assert all(map(torch.equal, moments, found_moments))


@pytest.mark.timeout(600)
def test_lightning_goes_on_in_two_processes(tmp_path: Path) -> None:
    """Under torchrun, with DDP; each rank has random numbers of its own."""
    for run_of, max_epochs, seed in (("whole", 4, 0), ("cut", 3, 0), ("cut", 4, 1)):
        program = ["-m", "tests.test_frameworks", tmp_path / run_of, max_epochs, seed]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
        done = subprocess.run(
            [*map(str, command)], cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
    assert CheckpointStore(tmp_path / "cut").steps() == (6, 12)
    for rank in range(2):
        expected, found = (torch.load(tmp_path / f"{run_of}-4-{rank}.pt") for run_of in ("whole", "cut"))
        before = torch.load(tmp_path / f"cut-3-{rank}.pt")
        assert len(expected) == len(found) == 16
        assert all(map(torch.equal, expected, found))
        assert not all(map(torch.equal, before, found))


def main(directory: str, max_epochs: str, seed: str) -> None:
    """What each of two processes runs; what it holds then goes to a file."""
    rank = int(os.environ["RANK"])
    weights, moments = fit_lightning(Path(directory), int(max_epochs), int(seed), "step", num_ranks=2)
    assert dist.get_world_size() == 2
    torch.save([*weights.values(), *moments], f"{directory}-{max_epochs}-{rank}.pt")


def test_the_lightning_page_runs(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    [(_, program)] = blocks("tutorials/lightning.md")
    printed = run([sys.executable, "-W", "ignore", "-c", program], tmp_path)
    assert [line for line in printed.splitlines() if line.isdigit()] == ["16", "24"]


def test_transformers_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=2, use_cpu=True, report_to=[], per_device_train_batch_size=2
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    target = transformers.LlamaForCausalLM(config)
    load(TrainState(target), tmp_path / "checkpoint-2", only=("model",))
    assert same_model(target, model.state_dict())


def test_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted(seed: int) -> Any:
        return peft.get_peft_model(net(seed), peft.LoraConfig(target_modules=["0", "1"], r=2))

    model = adapted(0)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.125)
    step(model, optimizer)
    save(TrainState(model, optimizer), tmp_path / "at")
    target = adapted(1)
    others = torch.optim.AdamW([each for each in target.parameters() if each.requires_grad])
    load(TrainState(target, others), tmp_path / "at")
    assert same_model(target, model.state_dict())


def lora(seed: int, **options: Any) -> Any:
    """Adapters of a seed, on one base."""
    import peft

    model = net(0)
    torch.manual_seed(seed + 7)
    return peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": ["0", "1"], "r": 2, **options}))


ADAPTERS: list[dict[str, Any]] = [{}, {"use_dora": True}, {"modules_to_save": ["1"], "target_modules": ["0"]}]


def lora_in_shards(rank: int, directory: Path) -> list[dict[str, torch.Tensor]]:
    expected = []
    for number, options in enumerate(ADAPTERS):
        model = fully_shard(lora(0, **options), mesh=init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.125)
        step(model, optimizer)
        save(TrainState(model, optimizer, trainable_only=True), directory / str(number))
        expected.append({name: value.full_tensor() for name, value in model.state_dict().items()})
    return expected


def test_peft_adapters_alone_in_another_layout(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    all_expected = run_ranks(lora_in_shards, 2, tmp_path, tmp_path)[0]
    for number, (options, expected) in enumerate(zip(ADAPTERS, all_expected, strict=True)):
        target = lora(1, **options)
        optimizer = torch.optim.AdamW([each for each in target.parameters() if each.requires_grad])
        report = load(TrainState(target, optimizer, trainable_only=True), tmp_path / str(number))
        assert report.base is not None
        assert report.base.endswith("frozen tensors are those of the save")
        assert same_model(target, expected)
        target.base_model.model[0].base_layer.bias.data += 1
        with pytest.raises(StateMismatchError, match="another base"):
            load(TrainState(target, trainable_only=True), tmp_path / str(number), only=("model",))


@pytest.mark.parametrize("options", ADAPTERS)
def test_a_trainer_of_peft_adapters(tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

    def llama(seed: int) -> Any:
        import peft

        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **sizes))
        torch.manual_seed(seed + 7)
        of_layers = {"target_modules": ["q_proj", "v_proj"]} | {k: v for k, v in options.items() if k == "use_dora"}
        return peft.get_peft_model(
            base,
            peft.LoraConfig(r=2, **of_layers, modules_to_save=["lm_head"] if "modules_to_save" in options else None),
        )

    model = llama(1)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=2, save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    rows = [{"input_ids": torch.arange(n, n + 6), "labels": torch.arange(n, n + 6)} for n in range(8)]
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    target = llama(2)
    others = transformers.Trainer(target, arguments, train_dataset=rows).create_optimizer()
    schedule = transformers.get_linear_schedule_with_warmup(others, 0, 2)
    state = TrainState(target, others, schedulers=schedule, step=0, rng=True, trainable_only=True)
    assert not same_model(target, model.state_dict())
    report = load(state, tmp_path / "out" / "checkpoint-2")
    assert (state.step, report.rng, report.missing) == (2, "restored", ())
    assert same_model(target, model.state_dict())
    expected = trainer.optimizer.optimizer.state_dict()
    found = others.state_dict()
    assert found["param_groups"][0] == expected["param_groups"][0]  # the other one, of biases, is empty
    assert found["state"].keys() == expected["state"].keys()
    assert all(torch.equal(found["state"][n]["exp_avg"], of["exp_avg"]) for n, of in expected["state"].items())


OPTIMIZERS = [
    "schedulefree.AdamWScheduleFree",
    "pytorch_optimizer.Lion",
    "pytorch_optimizer.SOAP",
    "pytorch_optimizer.Adan",
    "pytorch_optimizer.TRAC",
    "pytorch_optimizer.Lookahead",
]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_others(tmp_path: Path, name: str) -> None:
    module, _, kind = name.partition(".")
    make = getattr(pytest.importorskip(module), kind)

    def built(seed: int) -> tuple[nn.Module, Any]:
        model = net(seed)
        if kind in ("TRAC", "Lookahead"):
            return model, make(torch.optim.AdamW(model.parameters(), lr=0.01))
        optimizer = make(model.parameters(), lr=0.01)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return model, optimizer

    model, optimizer = built(0)
    step(model, optimizer)
    save(TrainState(model, optimizer), tmp_path / "at")
    target, others = built(1)
    load(TrainState(target, others), tmp_path / "at")
    assert same_model(target, model.state_dict())
    step(model, optimizer)
    step(target, others)
    assert same_model(target, model.state_dict())


def test_torchao(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.optim import AdamW8bit

    def built(seed: int) -> tuple[nn.Module, Any]:
        torch.manual_seed(seed)
        model = nn.Linear(64, 128, bias=False)  # smaller tensors it does not quantize
        return model, AdamW8bit(model.parameters(), lr=0.125)

    def stepped(model: nn.Module, optimizer: Any) -> None:
        model.weight.grad = torch.linspace(-1, 1, 64 * 128).reshape(128, 64)
        optimizer.step()

    model, optimizer = built(0)
    stepped(model, optimizer)
    save(TrainState(model, optimizer), tmp_path / "at")
    target, others = built(1)
    load(TrainState(target, others), tmp_path / "at")
    stepped(model, optimizer)
    stepped(target, others)
    assert same_model(target, model.state_dict())


def quantized(seed: int) -> nn.Module:
    """With a weight of NF4, as under QLoRA."""
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(256, 128, bias=False))
    model[0].weight = nn.Parameter(to_nf4(model[0].weight.detach(), 64, 64), requires_grad=False)
    return model


def nf4_rows(rank: int, directory: str, seed: int) -> torch.Tensor:
    """Saves with the first seed, and loads with another."""
    model = fully_shard(quantized(seed), mesh=init_device_mesh("cpu", (2,)))
    if seed:
        load(TrainState(model), directory)
    else:
        save(TrainState(model), directory)
    return model[0].weight.to_local().get_original_weight()


def test_nf4_in_shards(tmp_path: Path) -> None:
    pytest.importorskip("torchao.quantization.quantize_.workflows.nf4")
    rows = torch.cat(run_ranks(nf4_rows, 2, tmp_path, str(tmp_path / "two"), 0))
    alone = quantized(1)
    load(TrainState(alone), tmp_path / "two")
    assert torch.equal(alone[0].weight.data.get_original_weight(), rows)
    save(TrainState(alone), tmp_path / "one")
    assert torch.equal(torch.cat(run_ranks(nf4_rows, 2, tmp_path, str(tmp_path / "one"), 1)), rows)


def test_torchdata(tmp_path: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        return stateful.StatefulDataLoader(list(range(8)), batch_size=2)

    model, running = net(0), loader()
    batches = iter(running)
    next(batches)
    save(TrainState(model, dataloader=running), tmp_path / "at")
    target, others = net(1), loader()
    load(TrainState(target, dataloader=others), tmp_path / "at")
    assert [batch.tolist() for batch in others] == [batch.tolist() for batch in batches]


def dealt(rank: int, directory: str, workers: int, layout: str, verb: str) -> tuple[list[int], str | None]:
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

    data = list(range(48))
    sampler = StatefulDistributedSampler(data)
    loader = StatefulDataLoader(data, batch_size=3, sampler=sampler, num_workers=workers)
    state = TrainState(nn.Flatten(), step=1, dataloader=loader, layout=layout)
    if verb == "save":
        taken = [sample for _, batch in zip(range(2), loader, strict=False) for sample in batch.tolist()]
        save(state, directory)
        return taken, None
    report = load(state, directory)
    return [sample for batch in loader for sample in batch.tolist()], report.dataloader


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdata_goes_on_over_fewer_ranks(tmp_path: Path, workers: int) -> None:
    pytest.importorskip("torchdata.stateful_dataloader")
    saved = run_ranks(dealt, 4, tmp_path, str(tmp_path / "at"), workers, "dp4", "save", timeout_s=240)
    loaded = run_ranks(dealt, 2, tmp_path, str(tmp_path / "at"), workers, "dp2", "load", timeout_s=240)
    assert [note for _, note in loaded] == ["restored"] * 2
    samples = [sample for taken, _ in (*saved, *loaded) for sample in taken]
    assert len(samples) == len(set(samples)) == 48


if __name__ == "__main__":
    main(*sys.argv[1:])
