"""What lies where no checkpoint was found, and what it may be: for the message. Needs no torch.

in_directory(listing)   "it holds checkpoint-500, checkpoint-1000: transformers' Trainer wrote them; name one"
of_file(name, start)    "it is a GGUF file, ..."
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ray_ckpt.storage.foreign_names import Listing
from ray_ckpt.text import listed

__all__ = ["FILE_START_BYTES", "in_directory", "of_file"]

FILE_START_BYTES = 512
"""As many of the first bytes of a file as `of_file` looks at."""


class _Hint(NamedTuple):
    """What files or directories of some name may be."""

    names: re.Pattern[str]
    """Names of files, or of directories with a slash after them."""
    advice: str


_HINTS = tuple(
    _Hint(re.compile(names), advice)
    for names, advice in (
        (r"checkpoint-\d+/", "a run folder of transformers' Trainer: name one of them"),
        (r"(snapshots|models--.*)/", "Hugging Face's cache: name the folder of one revision, snapshots/<revision>"),
        (r"(zero_to_fp32\.py|global_step\d+/|(bf16_)?zero_pp_rank_.*\.pt|mp_rank_\d+_model_states\.pt)", "DeepSpeed's: "
         "merge it once by its own zero_to_fp32.py (model alone) or ds_to_universal.py, or save by save_16bit_model"),
        (r"(latest_checkpointed_iteration\.txt|iter_\d+/|mp_rank_\d+(_\d+)?/)", "Megatron's: name an iter_<N> of "
         "--ckpt-format torch_dist"),
        (r"step[-_]\d+/", "a run folder; its steps were not finished, or hold what is not read: look into one"),
        (r"(_CHECKPOINT_METADATA|_METADATA|_sharding|manifest\.ocdbt|ocdbt\.process_\d+/|\.zarray|zarr\.json)",
         "Orbax or TensorStore (JAX): export it to safetensors there"),
        (r".*\.(keras|h5|hdf5|weights\.h5)", "Keras: load it there and save the weights as safetensors"),
        (r"(saved_model\.pb|variables/|.*\.ckpt-\d+\.index|.*\.data-\d+-of-\d+)", "TensorFlow: export it there"),
        (r".*\.gguf", "GGUF, quantized for llama.cpp: load what it was made from"),
        (r".*\.nemo", "NeMo's archive: unpack it (tar -xf) and name the .ckpt or the directory in it"),
        (r"model_weights/|model_config\.yaml", "an unpacked .nemo: name its model_weights"),
        (r".*\.(tar|tgz|tar\.gz|zip|zst|7z)", "an archive: unpack it and name what is in it"),
        (r".*\.(onnx|engine|plan|mlmodel|tflite|pte)", "exported for inference: load what it was made from"),
        (r".*\.(msgpack|npz|npy|pdparams)", "of another framework: export it to safetensors there"),
        (r"model_index\.json", "a pipeline of diffusers: name the directory of one of its models"),
        (r"\.snapshot_metadata", "torchsnapshot's: restore it there, and save the state dict by torch.save"),
        (r".*\.distcp", "data files of DCP without their .metadata: the save was interrupted"),
        (r"adapter_config\.json|config\.json|tokenizer.*\.json", "a model's settings without its weights"),
        (r".*\.(pt|pth|bin|ckpt)", "files that torch.save may have written: name the file that is meant"),
    )
)  # fmt: skip

_STARTS = (
    (b"GGUF", "GGUF, quantized for llama.cpp: load what it was made from"),
    (b"\x89HDF\r\n", "HDF5, as Keras writes: load it there and save the weights as safetensors"),
    (b"\x1f\x8b", "compressed by gzip: unpack it and name what is in it"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it and name what is in it"),
    (b"\x93NUMPY", "an array of NumPy"),
    (b"version https://git-lfs", "a pointer of Git LFS: fetch the file itself, by git lfs pull"),
    (b"\x80", "a bare pickle, which runs whatever it names: load it where you trust it, and save it by torch.save"),
    (b"<", "a web page, as a failed download leaves it"),
    (b"{", "JSON"),
)
_TAR_MAGIC, _TAR_AT = b"ustar", 257


def in_directory(listing: Listing) -> str:
    """What lies in a directory, and what it may be."""
    names = sorted((*(f"{name}/" for name in listing.directories), *listing.files))
    if not names:
        return "nothing is there"
    for hint in _HINTS:
        if found := [name for name in names if hint.names.fullmatch(name)]:
            return f"it holds {listed([name.rstrip('/') for name in found], at_most=4)}: {hint.advice}"
    return f"it holds {listed(names, at_most=4)}, which no reader here knows"


def of_file(name: str, start: bytes) -> str:
    """What a file may be.

    Args:
        start: its first bytes, `FILE_START_BYTES` of them or all that there are.
    """
    if not start:
        return "it is empty"
    if start[_TAR_AT:].startswith(_TAR_MAGIC):
        return "it is an archive by tar (a .nemo is one, too): unpack it and name what is in it"
    for magic, what in _STARTS:
        if start.startswith(magic):
            return f"it is {what}"
    for hint in _HINTS:
        if hint.names.fullmatch(name) and hint is not _HINTS[-1]:
            return f"by its name it is {hint.advice}"
    return f"it begins with {start[:8]!r}"
