"""transformers' Trainer with our callback: a resumed run has the bits of one that was never interrupted."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ckpt import CheckpointNotFoundError, CheckpointStore
from tests.conftest import REPOSITORY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # transformers' and accelerate's own
]


def trainer(directory: Path, max_steps: int, seed: int, *, save_steps: int = 3) -> Any:
    """Dropout and shuffled data, both of which take random numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from ray_ckpt.integrations.trainer import CheckpointCallback

    arguments = TrainingArguments(
        output_dir=str(directory / "output"),
        max_steps=max_steps,
        save_steps=save_steps,
        save_only_model=True,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=seed,
        data_seed=0,
    )
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    config.attention_dropout = 0.3
    torch.manual_seed(seed)
    data = [{"input_ids": torch.arange(8) + n, "labels": torch.arange(8) + n} for n in range(8)]
    callback = CheckpointCallback(directory / "store")
    return Trainer(LlamaForCausalLM(config), arguments, train_dataset=data, callbacks=[callback])


def held(done: Any) -> dict[str, torch.Tensor]:
    state = done.optimizer.state
    moments = {
        f"{name} {key}": value for name, each in done.model.named_parameters() for key, value in state[each].items()
    }
    return {**done.model.state_dict(), **moments}


@pytest.mark.parametrize("at", [3, 4], ids=["amid an epoch", "at its end"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path: Path, at: int) -> None:
    """There are four batches in an epoch."""
    whole = trainer(tmp_path / "whole", 7, seed=0, save_steps=at)
    whole.train()
    expected = held(whole)
    assert CheckpointStore(tmp_path / "whole" / "store").steps() == ((3, 6, 7) if at == 3 else (4, 7))
    # Another seed, so that other weights and generators are there before the load.
    resumed = trainer(tmp_path / "whole", 7, seed=1)
    assert not torch.equal(resumed.model.model.norm.weight, expected["model.norm.weight"])
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "output" / f"checkpoint-{at}"))
    found = held(resumed)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert resumed.lr_scheduler.get_last_lr() == whole.lr_scheduler.get_last_lr()


def test_without_our_step_nothing_is_trained(tmp_path: Path) -> None:
    trainer(tmp_path, 3, seed=0).train()
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(CheckpointNotFoundError):
        trainer(tmp_path, 6, seed=0).train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-3"))


def test_two_processes_under_torchrun(tmp_path: Path) -> None:
    """As one does it: DDP, each rank with its own random numbers."""
    for name, seed, resumed_at in (("whole", 0, 0), ("resumed", 1, 3)):
        program = ["-m", "tests.test_trainer", tmp_path, tmp_path / name, seed, resumed_at]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
        done = subprocess.run(
            [*map(str, command)], cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
    for rank in range(2):
        expected, found = (torch.load(tmp_path / f"{name}-{rank}.pt") for name in ("whole", "resumed"))
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
        assert len(expected) == len(found) > 20
    first, other = (torch.load(tmp_path / f"started-{seed}.pt") for seed in (0, 1))
    assert not torch.equal(first, other)  # the control: the resumed run began as another


def main(directory: str, name: str, seed: str, resumed_at: str) -> None:
    """What each process runs: six steps, or those from a checkpoint on; what it holds then goes to a file."""
    run = trainer(Path(directory), 6, int(seed))
    rank = run.args.process_index
    if rank == 0:
        torch.save(next(run.model.parameters()).detach().clone(), Path(directory, f"started-{seed}.pt"))
    output = Path(directory, "output", f"checkpoint-{resumed_at}")
    run.train(resume_from_checkpoint=str(output) if int(resumed_at) else None)
    assert run.args.world_size == 2
    torch.save(held(run), f"{name}-{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
