"""DeepSpeed's directories: the module of ZeRO-1 and 2 is read, of what is not the way out is named.

    latest                                             names the directory of the newest step
    global_step10/mp_rank_00_model_states.pt           the whole module in its training dtype (no ZeRO, ZeRO-1 and 2)
    global_step10/zero_pp_rank_0_mp_rank_00_model_states.pt    of ZeRO-3: places without values
    global_step10/*_optim_states.pt                    each rank's slice of flat buffers: fp32 weights and moments

Source of the names: DeepSpeed's `runtime/engine.py` (`_get_ckpt_name`, `_get_zero_ckpt_name`).
"""

from __future__ import annotations

import re

from ray_ckpt.errors import FormatError
from ray_ckpt.format.manifest import Manifest
from ray_ckpt.storage import torch_files
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.foreign_names import Listing, list_target
from ray_ckpt.storage.foreign_parts import Found, below
from ray_ckpt.text import listed, quoted

__all__ = ["open_directory"]

_MODULE = "module."

_WAY_OUT = (
    "in the directory above, `python zero_to_fp32.py . OUTPUT --safe_serialization` (DeepSpeed puts the script there) "
    "writes the model as safetensors, and `python -m deepspeed.checkpoint.ds_to_universal` makes a checkpoint whose "
    "optimizer DeepSpeed loads in another layout"
)


def open_directory(storage: Storage, listing: Listing, *, trusted: bool) -> Found:
    """
    Raises:
        FormatError: the model is sharded in a way that its files alone do not tell, or they are damaged.
        UnsafeCheckpointError: a file is not safe to read.
    """
    if "latest" in listing.files:
        tag = storage.read_bytes("latest")[:1000].decode("utf-8", "replace").strip()
        if tag not in listing.directories:
            raise FormatError(f"{storage.address}/latest names {quoted(tag)}, which is no directory there")
        inside = storage.child(tag)
        found = _open_step(inside, list_target(inside))
        return Found(found.kind, storage, below(tag, found.manifest), found.notes)
    return _open_step(storage, listing)


def _open_step(storage: Storage, listing: Listing) -> Found:
    models = listing.matching(re.compile(r".*model_states\.pt"))
    if any(name.startswith("zero_pp_rank_") for name in models):
        raise FormatError(
            f"{storage.address} is DeepSpeed's checkpoint of ZeRO-3, whose parameters lie in slices of flat buffers: "
            f"{_WAY_OUT}"
        )
    if len(models) != 1:
        raise FormatError(
            f"{storage.address} is DeepSpeed's checkpoint with the models of {len(models)} ranks "
            f"({listed(models)}), which do not say how they fit together: {_WAY_OUT}"
        )
    whole = torch_files.open_file(storage, models[0], listing.files[models[0]])
    tensors = {
        f"model.{name.removeprefix(_MODULE)}": entry._replace(path=("model", name.removeprefix(_MODULE)))
        for name, entry in whole.tensors.items()
        if name.startswith(_MODULE)
    }
    if not tensors:
        raise FormatError(f"{storage.address}/{models[0]} has no module in it: {_WAY_OUT}")
    left_out = [f"all of {models[0]} but its module"]
    if optimizers := listing.ending("optim_states.pt"):
        left_out.append(f"{listed(optimizers)} (the optimizer, and the fp32 weights that bf16 ones are rounded from)")
    note = f"{' and '.join(left_out)} cannot be read: {_WAY_OUT}"
    return Found("DeepSpeed's checkpoint", storage, Manifest(tensors, {}, whole.files), (note,))
