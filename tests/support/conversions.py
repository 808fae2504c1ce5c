"""Sources of exports, in several layouts, and exports that die."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ray_ckpt import TrainState, convert, export, load, save
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.parallel.parallelize import parallelize
from ray_ckpt.parallel.stages import build_on_meta
from ray_ckpt.recipes.training import parameters_of
from tests.support import states
from tests.support.decoders import MODELS
from tests.support.faulty import CountedStorage


def save_layout(rank: int, path: str, layout: str, optimizer: str = "adamw") -> None:
    """Two steps, then a save."""
    warnings.simplefilter("ignore")
    state, module = states.build(layout, optimizer, seed=3)
    if layout == "pp2":
        for parameter in (p for group in state.optimizer.param_groups for p in group["params"] if p.requires_grad):
            parameter.grad = torch.full_like(parameter, 0.5)
        state.optimizer.step()
    else:
        states.train(state, module, steps=2)
    save(state, path)


def die_at(rank: int, to: str, source: str, target: str, at: int | None) -> int:
    """Number of operations on the target, if it lives so long."""
    storage = CountedStorage(target, at)
    if to == "ours":
        convert(source, storage)
    else:
        export(source, storage, to=to, **({} if to == "torch" else {"max_shard_bytes": 20_000}))
    return storage.num_operations


def small_llama(seed: int = 0, *, tied: bool = True) -> Any:
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12)).logits  # type: ignore[no-any-return]


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def save_trained(rank: int, root: str) -> None:
    """A model and its optimizer after a step: a checkpoint, and the weights as plain torch saves them."""
    state = _state_in("single", seed=0)
    for parameter in (p for group in state.optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.full_like(parameter, 0.5)
    state.optimizer.step()
    save(state, Path(root, "single"))
    torch.save(state.model.state_dict(), Path(root, "weights.pt"))


def save_again(rank: int, root: str, layouts: Sequence[str]) -> None:
    """What `save_trained` saved, loaded and saved in other layouts."""
    for layout in layouts:
        state = _state_in(layout, seed=1)
        load(state, Path(root, "single"))
        save(state, Path(root, layout))


def _state_in(layout: str, seed: int) -> TrainState:
    parallel = parallelize(build_on_meta(MODELS["perceptron"]), Layout.parse(layout), torch.device("cpu"), seed=seed)
    optimizer = torch.optim.AdamW(list(parameters_of(parallel).values()), lr=0.01)
    return TrainState(parallel.chunks, optimizer, step=1, tied=parallel.tied, layout=layout)
