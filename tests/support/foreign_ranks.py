"""Rank functions that write training states as others do, and load them. Imports little, as every rank imports it."""

from __future__ import annotations

import shutil
import types
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, ShardedOptimStateDictConfig, ShardedStateDictConfig
from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType

from ray_ckpt.checkpoint.loading import load
from ray_ckpt.format.snapshot import Snapshot
from ray_ckpt.state.train_state import TrainState
from tests.support import states

SEED = 1


def trained(layout: str) -> TrainState:
    state, module = states.build(layout, "adam", SEED)
    states.train(state, module, 2)
    return state


def write_by_one(rank: int, directory: str) -> Snapshot:
    """What a process without any parallelism saves."""
    from safetensors.torch import save_file

    state, at = trained("single"), Path(directory)
    model, optimizer = state.model, state.optimizer
    dcp.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, checkpoint_id=at / "by index")
    torch.save({"model_state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, at / "plain.pt")
    # Lightning's checkpoint without sharding: `dump_checkpoint` of its checkpoint connector.
    lightning = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    torch.save(lightning, at / "lightning.ckpt")
    torch.save(model.state_dict(), at / "weights.pt")
    save_file(model.state_dict(), at / "weights.safetensors")
    save_file({f"model.{name}": value for name, value in model.state_dict().items()}, at / "prefixed.safetensors")
    return state.snapshot(rank)


def write_by_two(rank: int, directory: str) -> dict[str, Snapshot]:
    """What two processes save, by name of what they write."""
    at = Path(directory)
    warnings.simplefilter("ignore")
    return {
        "by name": _write_by_name(rank, at / "by name"),
        "by index, sharded": _write_by_index(rank, at / "by index, sharded"),
        "accelerate": _write_as_accelerate(rank, at / "accelerate"),
        "accelerate, file per rank": _write_as_accelerate(rank, at / "accelerate, file per rank", use_dcp=False),
        "lightning": _write_as_lightning(rank, at / "lightning"),
        "collided": _write_collided(rank, at / "collided"),
    }


def _write_by_name(rank: int, path: Path) -> Snapshot:
    """`get_state_dict` without flattening, as in PyTorch's tutorials."""
    state = trained("fsdp2x2")
    model, optim = get_state_dict(state.model, state.optimizer)
    dcp.save({"model": model, "optim": optim}, checkpoint_id=path)
    return state.snapshot(rank)


def _write_by_index(rank: int, path: Path) -> Snapshot:
    state = trained("fsdp2x2")
    dcp.save({"model": state.model.state_dict(), "optim": state.optimizer.state_dict()}, checkpoint_id=path)
    return state.snapshot(rank)


def _write_as_accelerate(rank: int, path: Path, use_dcp: bool = True) -> Snapshot:
    """By accelerate's own functions. Its Accelerator takes no CPU for FSDP, and is asked for little here."""
    from accelerate import PartialState
    from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer

    PartialState(cpu=True)  # its logging wants one
    state = trained("fsdp2x2")
    plugin = types.SimpleNamespace(
        fsdp_version=2,
        state_dict_type=StateDictType.SHARDED_STATE_DICT,
        state_dict_config=ShardedStateDictConfig(),
        optim_state_dict_config=ShardedOptimStateDictConfig(),
    )
    accelerator = types.SimpleNamespace(process_index=rank, num_processes=2, is_main_process=rank == 0)
    save_fsdp_model(plugin, accelerator, state.model, str(path), use_dcp=use_dcp)
    save_fsdp_optimizer(plugin, accelerator, state.optimizer, state.model, str(path), use_dcp=use_dcp)
    return state.snapshot(rank)


def _write_as_lightning(rank: int, path: Path) -> Snapshot:
    """The calls of `FSDPStrategy.save_checkpoint` and `optimizer_state`, `lightning/pytorch/strategies/fsdp.py`."""
    state = trained("fsdp1x2")
    context = FullyShardedDataParallel.state_dict_type(
        state.model,
        StateDictType.SHARDED_STATE_DICT,
        ShardedStateDictConfig(offload_to_cpu=True),
        ShardedOptimStateDictConfig(offload_to_cpu=True),
    )
    with context:
        converted = {
            "model": state.model.state_dict(),
            "optimizer_0": FullyShardedDataParallel.optim_state_dict(state.model, state.optimizer),
        }
    dcp.save(converted, checkpoint_id=path)
    if rank == 0:
        torch.save({"epoch": 3, "global_step": 7, "lr_schedulers": []}, path / "meta.pt")
    return state.snapshot(rank)


def _write_collided(rank: int, path: Path) -> Snapshot:
    """Two pipeline stages whose groups have one name, and learning rates of their own."""
    state = trained("pp2")
    for group in state.optimizer.param_groups:
        group["lr"] *= rank + 1
    model, optim = get_state_dict(state.model, state.optimizer)
    held = {name: value for name, value in model.items() if not value.is_meta}
    dcp.save({"model": held, "optim": optim}, checkpoint_id=path)
    return state.snapshot(rank)


def load_all(rank: int, layout: str, loads: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Load each path into a fresh state of this layout: what it held before, and what after.

    Args:
        loads: path -> options of `load`.
    """
    warnings.simplefilter("ignore")
    outcomes: dict[str, Any] = {}
    for path, options in loads.items():
        state, _ = states.build(layout, "adam", SEED + 1)
        before = state.snapshot(rank)
        try:
            report = load(state, path, **options)
        except Exception as error:
            outcomes[path] = before, f"{type(error).__name__}: {error}", None
            continue
        outcomes[path] = before, state.snapshot(rank), report
    dist.barrier()
    return outcomes


def load_what_does_not_fit(rank: int, directory: str) -> dict[str, str]:
    """What `load` says of it, or `loaded`."""
    at = Path(directory)

    def outcome(path: str, parameter_groups: Any = None, **options: Any) -> str:
        state, _ = states.build("single", "adam", SEED + 1)
        if parameter_groups is not None:
            state = TrainState(state.model, torch.optim.Adam(parameter_groups(state.model), lr=0.5))
        try:
            load(state, at / path, **options)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "loaded"

    def swapped(model: torch.nn.Module) -> list[dict[str, Any]]:
        groups = states.groups_of(model)
        return [{"params": group["params"][::-1]} for group in groups]

    warnings.simplefilter("ignore")
    shutil.copytree(at / "lightning", at / "lightning with more")
    torch.save({"more": 3}, at / "lightning with more" / "meta.pt")
    return {
        "more in lightning": outcome("lightning with more"),
        "weights into an optimizer": outcome("weights.pt"),
        "other groups": outcome("by index", lambda model: model.parameters()),
        "another order": outcome("by index", swapped),
        "model alone": outcome("by index", lambda model: model.parameters(), only=("model",)),
        "unknown option": outcome("by index", hyperparameters="from-memory"),
    }
