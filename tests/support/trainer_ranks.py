"""A rank function that writes what transformers' `Trainer` writes of the shared training state."""

from __future__ import annotations

from pathlib import Path

import torch

from ray_ckpt.format.snapshot import Snapshot
from tests.support import foreign_ranks


def write_as_trainer(rank: int, directory: str) -> Snapshot:
    from safetensors.torch import save_file

    state, path = foreign_ranks.trained("single"), Path(directory) / "checkpoint-2"
    path.mkdir()
    save_file({name: value.clone() for name, value in state.model.state_dict().items()}, path / "model.safetensors")
    torch.save(state.optimizer.state_dict(), path / "optimizer.pt")
    (path / "trainer_state.json").write_text('{"global_step": 2, "log_history": [{"loss": 1.0}]}')
    return state.snapshot(rank)
